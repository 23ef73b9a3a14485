"""Which release is newer. Pure.

The subset of PEP 440 that this project uses: 1.2.3, with rc1 or .dev4 behind it, both before the release itself.
"""

from __future__ import annotations

import re

from appliance.release.errors import BundleError

_FORM = re.compile(r"(\d{1,6}(?:\.\d{1,6}){0,3})(?:rc(\d{1,6}))?(?:\.dev(\d{1,6}))?")

Key = tuple[tuple[int, ...], int, int]


def key(version: str) -> Key:
    """What to compare by; BundleError for anything that is no version."""
    match = _FORM.fullmatch(version)
    if match is None:
        raise BundleError(f"{version[:60]!r} is no version", "versions are like 1.2.3, 1.2.3rc1, 1.2.3.dev4")
    numbers = tuple(int(part) for part in match[1].split("."))
    last = 1_000_000
    return (
        (*numbers, *(0,) * (4 - len(numbers))),
        int(match[2]) if match[2] else last,
        int(match[3]) if match[3] else last,
    )


def older(one: str, than: str) -> bool:
    """Whether `one` comes before `than`."""
    return key(one) < key(than)
