"""Freed memory stays for reuse: seen in the page faults of a process that takes and frees a camera frame again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from appliance.host.allocator import keep_freed_memory

FAULTS = """
import resource
{prepare}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(1_228_800)
before = faults()
for _ in range(50):
    bytearray(1_228_800)[-1] = 1
    bytearray(2_400_000)[-1] = 1
print(faults() - before)
"""


def faults(prepare: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS.format(prepare=prepare)], check=True, capture_output=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not sys.maxsize > 2**32, reason="glibc on 64 bits")
def test_blocks_of_a_frame_s_size_are_reused_without_page_faults() -> None:
    prepare = "from appliance.host.allocator import keep_freed_memory\nassert keep_freed_memory()"
    # the first of each size may touch fresh pages: 890 of them; all fifty of each would be 45,000
    assert faults(prepare) < 2_000


def test_a_c_library_without_mallopt_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.host.allocator.ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
