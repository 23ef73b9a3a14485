"""A leak is found, and what only looks like one is not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.slope import SlopeAlarm, SlopePolicy

MIB = 2**20
DAY_S = 24 * 3600


def alarms(memory: Callable[[float], float], policy: SlopePolicy | None = None, every_s: int = 30) -> list[int]:
    """The times, in seconds, at which it goes off within a day."""
    watched = SlopeAlarm(policy or SlopePolicy())
    return [now for now in range(0, DAY_S, every_s) if watched.observe(float(now), memory(now))]


def test_a_steady_leak_is_found_once_within_a_window() -> None:
    found = alarms(lambda now: 200 * MIB + 16 * MIB * now / 3600)
    assert len(found) == 1
    assert found[0] <= 1800 + 4 * 3600 + 600


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("constant", lambda now: 200 * MIB),
        ("slower than the limit", lambda now: 200 * MIB + 4 * MIB * now / 3600),
        ("a sawtooth of a collector", lambda now: 200 * MIB + 100 * MIB * (now % 400) / 400),
        ("a sawtooth over an hour", lambda now: 200 * MIB + 100 * MIB * (now % 3600) / 3600),
        ("a step after a load", lambda now: (200 if now < 8 * 3600 else 900) * MIB),
        ("growth while it warms up", lambda now: (200 + min(now, 1700) / 2) * MIB),
        ("growth that levels off", lambda now: 200 * MIB + 300 * MIB * (1 - math.exp(-now / 900))),
        ("falling", lambda now: 900 * MIB - 16 * MIB * now / 3600),
    ],
)
def test_what_only_looks_like_a_leak_is_none(name: str, memory: Callable[[float], float]) -> None:
    assert alarms(memory) == []


def test_a_leak_under_a_sawtooth_is_found() -> None:
    assert len(alarms(lambda now: 200 * MIB + 16 * MIB * now / 3600 + 100 * MIB * (now % 400) / 400)) == 1


@settings(deadline=None, max_examples=15)
@given(st.floats(16, 500), st.integers(0, 1 << 30), st.floats(0, 20))
def test_any_leak_twice_the_limit_is_found_under_noise(per_h: float, seed: int, noise: float) -> None:
    draw = random.Random(seed).uniform
    assert alarms(lambda now: MIB * (200 + per_h * now / 3600 + draw(0, noise)), every_s=60)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1 << 30), st.floats(0, 500))
def test_noise_without_a_slope_never_alarms(seed: int, noise: float) -> None:
    draw = random.Random(seed).uniform
    policy = SlopePolicy(limit_bytes_per_h=max(1.0, noise * MIB))
    assert alarms(lambda now: MIB * (200 + draw(0, noise)), policy, every_s=60) == []
