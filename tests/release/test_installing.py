"""Installing and going back, with a release and a service that are played: what is on the box is real files below a root."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import pytest

from appliance.release import archive
from appliance.release.box import Box, Installed, State, read_state, this_box, write_state
from appliance.release.errors import BundleError
from appliance.release.installing import Installer, RolledBackError
from appliance.release.manifest import Target
from appliance.release.slots import Slots
from tests.release.making import bytes_of, verify


class PlayedRelease:
    """Releases that are names in a list."""

    restarts_by_itself = False

    def __init__(self, running: str = "") -> None:
        self.running = running
        self.held = {running} if running else set()
        self.refuses = ""

    def current(self) -> str:
        return self.running

    def holds(self, version: str) -> bool:
        return version in self.held

    def prepare(self, version: str, unpacked: Path) -> None:
        assert list((unpacked / "release").iterdir())
        self.held.add(version)

    def switch(self, version: str) -> None:
        assert version in self.held
        if version == self.refuses:
            raise BundleError("the disk is full")
        self.running = version

    def forget(self, keep: Collection[str]) -> None:
        self.held &= set(keep)


class PlayedService:
    """A service that runs what is in place, unless that release is one that breaks."""

    def __init__(self, release: PlayedRelease, breaks: Collection[str] = ()) -> None:
        self._release = release
        self._breaks = breaks
        self.runs = release.running
        self.asked = 0
        self.enabled = False

    def restart(self) -> None:
        self.runs = self._release.running

    def start(self) -> None:
        self.restart()

    def enable(self) -> None:
        self.enabled = True
        self.restart()

    def ready(self, version: str) -> bool:
        self.asked += 1
        return self.runs == version and version not in self._breaks


class House:
    def __init__(self, root: Path, running: str = "1.0.0", breaks: Collection[str] = ()) -> None:
        self.box = Box(root)
        self.box.models.mkdir(parents=True)
        self.release = PlayedRelease(running)
        self.service = PlayedService(self.release, breaks)
        self.notes: list[str] = []
        self.now = 0.0

    def installer(self) -> Installer:
        return Installer(
            self.box,
            self.release,
            self.service,
            ready_timeout_s=10,
            note=self.notes.append,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def install(
        self, version: str, files: dict[str, bytes] | None = None, *, allow_older: bool = False, **changes: object
    ) -> None:
        data = bytes_of({"release/a.whl": b"code", **(files or {})}, version=version, **changes)
        self.installer().install(archive.Reader(io.BytesIO(data), verify), allow_older=allow_older)

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.box.models).as_posix(): path.read_bytes()
            for path in self.box.models.rglob("*")
            if path.is_file()
        }


MODEL = {"models/m/2/model.onnx": b"two", "models/m/model.toml": b"new"}


def test_a_release_that_becomes_ready_stays_and_the_one_before_is_kept(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0", MODEL)
    assert house.service.runs == "1.1.0"
    assert house.release.held == {"1.0.0", "1.1.0"}
    assert house.files() == {"m/2/model.onnx": b"two", "m/model.toml": b"new"}
    assert read_state(house.box).floor == "1.1.0"
    assert not house.box.incoming.exists()


def test_the_first_release_of_a_box_is_started_with_every_boot_and_a_later_one_leaves_that_to_the_site(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, running="")
    house.install("1.0.0")
    assert house.service.enabled
    house.service.enabled = False
    house.install("1.1.0")
    assert not house.service.enabled


def test_a_first_release_that_breaks_or_is_cut_off_does_not_stand_in_the_way_of_the_next(tmp_path: Path) -> None:
    house = House(tmp_path, running="", breaks={"1.0.0"})
    with pytest.raises(BundleError, match="none to go back to"):
        house.install("1.0.0", MODEL)
    assert house.files() == {}
    house.install("1.0.1", MODEL)
    assert house.service.runs == "1.0.1"

    cut = House(tmp_path / "cut", running="")
    write_state(cut.box, State("", None, Installed("1.0.0")))
    cut.install("1.0.0", MODEL)
    assert (cut.service.runs, cut.service.enabled) == ("1.0.0", True)
    assert read_state(cut.box).pending is None


def test_the_same_release_again_leaves_the_way_back_where_it_led(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0")
    house.install("1.1.0", MODEL)
    assert house.release.held == {"1.0.0", "1.1.0"}
    assert house.installer().roll_back() == "1.0.0"

    first = House(tmp_path / "first", running="1.0.0")
    first.install("1.0.0", MODEL)
    with pytest.raises(BundleError, match="no release to go back to"):
        first.installer().roll_back()
    assert first.files() != {}


def test_one_command_goes_back_and_takes_away_what_the_release_added(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0", MODEL)
    assert house.installer().roll_back() == "1.0.0"
    assert house.service.runs == "1.0.0"
    assert house.files() == {}
    with pytest.raises(BundleError, match="no release to go back to"):
        house.installer().roll_back()


def test_a_release_that_does_not_become_ready_is_taken_back_by_itself(tmp_path: Path) -> None:
    house = House(tmp_path, breaks={"1.1.0"})
    with pytest.raises(RolledBackError, match=r"not ready within 10 s; release 1\.0\.0 answers again"):
        house.install("1.1.0", MODEL)
    assert house.service.runs == "1.0.0"
    assert house.files() == {}
    assert read_state(house.box) == State()
    assert house.now == 10


def test_a_switch_that_fails_is_taken_back(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.release.refuses = "1.1.0"
    with pytest.raises(RolledBackError, match=r"the disk is full; release 1\.0\.0 answers again"):
        house.install("1.1.0", MODEL)
    assert house.files() == {}


def test_a_power_cut_while_a_release_is_tried_is_ended_by_rollback(tmp_path: Path) -> None:
    house = House(tmp_path)

    class PowerCut(BaseException):
        pass

    def cut(version: str) -> None:
        house.release.running = version
        raise PowerCut

    switch, house.release.switch = house.release.switch, cut  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        house.install("1.1.0", MODEL)
    house.release.switch = switch  # type: ignore[method-assign]
    with pytest.raises(BundleError, match="cut off"):
        house.install("1.2.0")
    assert house.installer().roll_back() == "1.0.0"
    assert (house.release.running, house.files()) == ("1.0.0", {})
    house.install("1.2.0")


def test_what_is_older_than_what_ran_here_is_refused_unless_told(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.2.0")
    for older in ("1.1.9", "1.2.0rc1", "1.2.0.dev3"):
        with pytest.raises(BundleError, match=r"1\.2\.0 was on this box"):
            house.install(older)
    house.install("1.1.9", allow_older=True)
    assert house.service.runs == "1.1.9"
    assert read_state(house.box).floor == "1.2.0"


@pytest.mark.parametrize(
    "change",
    [{"system": "debian-99"}, {"machine": "riscv64"}, {"python": "3.9"}],
    ids=lambda change: next(iter(change)),
)
def test_a_bundle_for_another_box_is_refused_and_nothing_changes(tmp_path: Path, change: dict[str, str]) -> None:
    house = House(tmp_path)
    values = {"system": this_box(tmp_path).system, "machine": this_box().machine, "python": this_box().python}
    with pytest.raises(BundleError, match="the bundle is for"):
        house.install("1.1.0", MODEL, target=Target(**{**values, **change}))
    assert (house.files(), house.service.asked) == ({}, 0)
    house.install("1.1.0", MODEL, target=Target(**values))


def test_what_is_on_the_box_wins(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.box.models / "m").mkdir()
    (house.box.models / "m" / "model.toml").write_bytes(b"mine")
    house.box.config.parent.mkdir(parents=True)
    house.box.config.write_bytes(b"# mine")
    house.install("1.1.0", {**MODEL, "configuration/appliance.toml": b"# theirs"})
    assert house.files()["m/model.toml"] == b"mine"
    assert house.box.config.read_bytes() == b"# mine"
    assert house.box.config.with_name("appliance.toml.bundle").read_bytes() == b"# theirs"
    assert len(house.notes) == 2
    house.installer().roll_back()
    assert house.files() == {"m/model.toml": b"mine"}


def test_a_version_of_a_model_never_changes(tmp_path: Path) -> None:
    house = House(tmp_path)
    (house.box.models / "m" / "2").mkdir(parents=True)
    (house.box.models / "m" / "2" / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match="m/2 is on this box"):
        house.install("1.1.0", MODEL)
    assert house.release.held == {"1.0.0"}


def test_nothing_is_installed_through_a_link(tmp_path: Path) -> None:
    house = House(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (house.box.models / "m").symlink_to(outside)
    with pytest.raises(RolledBackError, match="is a link"):
        house.install("1.1.0", MODEL)
    assert not list(outside.iterdir())


def test_models_alone_need_no_release(tmp_path: Path) -> None:
    house = House(tmp_path)
    data = bytes_of(MODEL, version="0.0.7")
    house.installer().install(archive.Reader(io.BytesIO(data), verify))
    assert house.service.runs == "1.0.0"
    assert set(house.files()) == {"m/2/model.onnx", "m/model.toml"}


def test_an_altered_bundle_changes_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    data = bytearray(bytes_of({"release/a.whl": b"code", **MODEL}, version="1.1.0"))
    data[-1500] ^= 1
    with pytest.raises(BundleError):
        house.installer().install(archive.Reader(io.BytesIO(bytes(data)), verify))
    assert (house.files(), house.release.held, house.service.asked) == ({}, {"1.0.0"}, 0)
    assert not house.box.incoming.exists()


def test_a_first_release_that_does_not_start_says_that_there_is_no_way_back(tmp_path: Path) -> None:
    house = House(tmp_path, running="", breaks={"1.0.0"})
    with pytest.raises(BundleError, match="none to go back to"):
        house.install("1.0.0")


def test_the_state_survives_as_it_was_written(tmp_path: Path) -> None:
    box = Box(tmp_path)
    write_state(box, State("1.0.0"))
    assert read_state(box) == State("1.0.0")
    (box.releases / "state.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        read_state(box)


def test_an_unfinished_slot_is_never_switched_to(tmp_path: Path) -> None:
    slots = Slots(Box(tmp_path))
    (tmp_path / "usr/lib/appliance/releases/1.0.0").mkdir(parents=True)
    with pytest.raises(BundleError, match="not on this box"):
        slots.switch("1.0.0")
    (tmp_path / "usr/lib/appliance/releases/1.0.0/.complete").touch()
    slots.switch("1.0.0")
    assert slots.current() == "1.0.0"
