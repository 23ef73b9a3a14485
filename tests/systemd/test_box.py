"""Where a box with memory limits goes in the tree of control groups."""

from __future__ import annotations

from pathlib import Path

from tests.systemd.box import memory_parent


def group(path: Path, hands_down: str) -> Path:
    """A folder that looks like a control group."""
    path.mkdir()
    (path / "cgroup.subtree_control").write_text(hands_down)
    return path


def test_the_nearest_group_above_that_hands_memory_down_is_taken_and_left_as_it_is(tmp_path: Path) -> None:
    root = group(tmp_path / "root", "cpu memory")
    user = group(root / "user", "cpu memory pids")
    session = group(user / "session", "")
    with memory_parent(session) as parent:
        assert parent == user
    assert (session / "cgroup.subtree_control").read_text() == ""


def test_where_none_does_our_own_is_made_to_and_no_longer_at_the_end(tmp_path: Path) -> None:
    own = group(tmp_path / "own", "cpuset hugetlb")
    with memory_parent(own) as parent:
        assert parent == own
        assert (own / "cgroup.subtree_control").read_text() == "+memory"
    assert (own / "cgroup.subtree_control").read_text() == "-memory"


def test_where_the_kernel_refuses_that_there_is_none(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    # writing to it fails, as writing to that of a group with processes does
    (own / "cgroup.subtree_control").symlink_to(own / "nowhere/else")
    with memory_parent(own) as parent:
        assert parent is None
