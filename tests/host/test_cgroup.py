"""The limits of a unit or a container, as the kernel's files say them."""

from __future__ import annotations

from pathlib import Path

from appliance.host.cgroup import MemoryLimits, memory_limits

GIB = 1 << 30


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_the_tightest_of_all_groups_above_counts(tmp_path: Path) -> None:
    unit = "sys/fs/cgroup/system.slice/appliance.service"
    root = tree(
        tmp_path,
        {
            "proc/7/cgroup": "0::/system.slice/appliance.service",
            f"{unit}/memory.max": "max",
            f"{unit}/memory.high": 6 * GIB,
            f"{unit}/memory.current": 2 * GIB,
            f"{unit}/memory.stat": f"anon 1\ninactive_file {GIB}",
            "sys/fs/cgroup/system.slice/memory.max": 4 * GIB,
            "sys/fs/cgroup/system.slice/memory.high": "max",
            "sys/fs/cgroup/system.slice/memory.current": 3 * GIB,
        },
    )
    found = memory_limits(7, root=root)
    assert found == MemoryLimits(max_bytes=4 * GIB, high_bytes=6 * GIB, room_bytes=GIB)
    assert found.tightest_bytes == 4 * GIB


def test_the_older_kind_of_groups_is_understood_and_its_huge_number_is_no_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu:/x\n2:memory:/docker/a",
            "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        },
    )
    assert memory_limits(root=root) == MemoryLimits(max_bytes=2 * GIB, room_bytes=GIB)


def test_a_process_that_is_gone_has_no_limits(tmp_path: Path) -> None:
    assert memory_limits(7, root=tmp_path) == MemoryLimits()
    assert memory_limits(7, root=tmp_path).tightest_bytes is None
