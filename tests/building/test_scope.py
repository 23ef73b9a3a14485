"""A build's control group: asked for once, with its limits, and done without where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.building.scope import Scopes


def _systemd_run(folder: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that notes its calls."""
    calls = folder / "calls"
    program = folder / "systemd-run"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return calls


async def test_where_systemd_allows_it_a_build_runs_in_a_scope_with_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _systemd_run(tmp_path, 0, monkeypatch)
    scopes = Scopes(booted=tmp_path)
    command = await scopes.command(512)
    assert command[:2] == ["systemd-run", "--scope"]
    assert {"--property=MemoryMax=512M", "--property=CPUWeight=20"} <= set(command)
    assert not [word for word in await scopes.command(0) if "Memory" in word]
    assert len(calls.read_text().splitlines()) == 1


async def test_where_systemd_refuses_there_is_no_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _systemd_run(tmp_path, 1, monkeypatch)
    scopes = Scopes(booted=tmp_path)
    assert await scopes.command(512) == []
    assert await scopes.command(512) == []
    assert len(calls.read_text().splitlines()) == 1


async def test_without_systemd_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _systemd_run(tmp_path, 0, monkeypatch)
    assert await Scopes(booted=tmp_path / "absent").command(512) == []
    assert not calls.exists()
