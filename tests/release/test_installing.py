"""Installing and going back, with a release and a service that are played: what is on the box is real files below a root."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest

from appliance.release import archive, debian, slots, system
from appliance.release.box import Box, Installed, State, hold_releases, read_state, this_box, write_state
from appliance.release.errors import BundleError
from appliance.release.installing import Installer, RolledBackError
from appliance.release.manifest import Target
from appliance.release.slots import Slots
from tests.release.making import bytes_of, verify


class PlayedRelease:
    """Releases that are names in a list."""

    def __init__(self, running: str = "") -> None:
        self.running = running
        self.held = {running} if running else set()
        self.refuses = ""

    def current(self) -> str:
        return self.running

    def holds(self, version: str) -> bool:
        return version in self.held

    def prepare(self, version: str, unpacked: Path) -> str:
        assert list((unpacked / "release").iterdir())
        self.held.add(version)
        return ""

    def switch(self, version: str, sha256: str = "") -> None:
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

    def enable(self) -> None:
        self.enabled = True
        self.restart()

    def ready(self, version: str) -> bool:
        self.asked += 1
        return self.runs == version and version not in self._breaks

    def trouble(self) -> str:
        return " (m: no such operator)" if self.runs in self._breaks else ""


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


def test_a_start_that_hangs_counts_as_time_that_the_release_had(tmp_path: Path) -> None:
    house = House(tmp_path)

    class Hangs(PlayedService):
        def restart(self) -> None:
            super().restart()
            if self.runs == "1.1.0":
                house.now += 10

    house.service = Hangs(house.release, breaks={"1.1.0"})
    with pytest.raises(RolledBackError, match=r"not ready within 10 s .m: no such operator.; release 1\.0\.0 answers"):
        house.install("1.1.0")
    assert house.now == 10


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
    assert read_state(house.box).failed == "1.0.0"
    house.install("0.9.9", MODEL)
    assert (house.service.runs, house.service.enabled) == ("0.9.9", True)
    # the one that never came up is no way back
    assert house.release.held == {"0.9.9"}
    assert (read_state(house.box).failed, read_state(house.box).floor) == ("", "0.9.9")
    with pytest.raises(BundleError, match="no release to go back to"):
        house.installer().roll_back()

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
    with pytest.raises(RolledBackError, match=r"not ready within 10 s .m: no such operator.; release 1\.0\.0 answers"):
        house.install("1.1.0", MODEL)
    assert house.service.runs == "1.0.0"
    assert (house.files(), house.release.held) == ({}, {"1.0.0"})
    assert read_state(house.box) == State()
    assert house.now == 10


def test_models_that_do_not_become_ready_are_taken_away_and_the_release_is_not_blamed(tmp_path: Path) -> None:
    house = House(tmp_path, breaks={"1.0.0"})
    with pytest.raises(
        RolledBackError, match=r"the models of bundle 7 were not ready within 10 s .m: no such operator"
    ):
        house.install("7", MODEL, kind="models")
    assert house.notes[-1].endswith("taking them away again")
    assert (house.files(), house.release.running) == ({}, "1.0.0")


def test_a_bundle_s_models_are_refused_where_the_box_keeps_its_models_elsewhere(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.box.config.parent.mkdir(parents=True)
    house.box.config.write_text('[repository]\npath = "/data/models"\n')
    with pytest.raises(
        BundleError, match=r"the models of this box are in /data/models .*a bundle puts its models into"
    ):
        house.install("1.1.0", MODEL)
    assert house.service.runs == "1.0.0"
    (tmp_path / "data").mkdir()
    house.box.models.rmdir()
    (tmp_path / "data/models").mkdir()
    house.box.models.symlink_to(tmp_path / "data/models")
    house.install("1.1.0", MODEL)
    assert (tmp_path / "data/models/m/2/model.onnx").read_bytes() == b"two"


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

    def cut(version: str, sha256: str = "") -> None:
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


def test_a_power_cut_while_a_release_is_taken_back_is_ended_by_rollback_too(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0", MODEL)

    class PowerCut(BaseException):
        pass

    def cut(version: str, sha256: str = "") -> None:
        raise PowerCut

    switch, house.release.switch = house.release.switch, cut  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        house.installer().roll_back()
    house.release.switch = switch  # type: ignore[method-assign]
    state = read_state(house.box)
    assert state.pending == state.current
    assert house.installer().roll_back() == "1.0.0"
    state = read_state(house.box)
    assert (house.release.running, house.files()) == ("1.0.0", {})
    assert (state.pending, state.current) == (None, Installed("1.0.0"))


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


def models(house: House, version: str, files: dict[str, bytes]) -> None:
    house.installer().install(archive.Reader(io.BytesIO(bytes_of(files, version=version)), verify))


def test_going_back_undoes_bundles_of_models_one_by_one_and_then_the_release(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("2.0.0")
    models(house, "0.0.7", MODEL)
    models(house, "0.0.8", {"models/n/1/model.onnx": b"one"})
    assert house.installer().roll_back() == "2.0.0"
    assert set(house.files()) == {"m/2/model.onnx", "m/model.toml"}
    assert house.installer().roll_back() == "2.0.0"
    assert house.files() == {}
    assert house.installer().roll_back() == "1.0.0"
    assert house.service.runs == "1.0.0"


def test_a_release_on_top_of_models_leads_back_to_them_and_the_same_release_again_to_the_one_before(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.install("2.0.0")
    models(house, "0.0.7", MODEL)
    house.install("3.0.0")
    assert house.installer().roll_back() == "2.0.0"
    assert house.files() != {}
    house.release.held.add("1.0.0")
    house.install("2.0.0", allow_older=True)
    assert house.installer().roll_back() == "1.0.0"


def test_models_are_taken_away_on_a_box_whose_release_nobody_kept(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.release.held.clear()
    models(house, "0.0.7", MODEL)
    house.release.running = house.service.runs = "1.5.0"
    assert house.installer().roll_back() == "1.5.0"
    assert house.files() == {}


def test_many_bundles_of_models_do_not_fill_the_state_and_the_release_below_them_is_not_forgotten(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.install("2.0.0")
    for number in range(20):
        models(house, f"0.0.{number}", {f"models/m/{number + 1}/model.onnx": b"x"})
    state = read_state(house.box)
    assert len(state.before) == 16
    assert state.before[0].version == "2.0.0"


def test_what_is_older_than_what_dpkg_put_here_is_refused_too(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0")
    house.release.running = "2.0.0"
    with pytest.raises(BundleError, match=r"2\.0\.0 was on this box"):
        house.install("1.5.0")
    house.release.running = "one of somebody else's"
    house.install("1.5.0")


def test_only_one_installation_goes_on_at_a_time(tmp_path: Path) -> None:
    house = House(tmp_path)
    with hold_releases(house.box):
        with pytest.raises(BundleError, match="another installation is going on"):
            house.install("1.1.0")
        with pytest.raises(BundleError, match="another installation is going on"):
            house.installer().roll_back()
    house.install("1.1.0")


def test_a_folder_of_releases_that_is_not_roots_alone_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0")
    house.box.releases.chmod(0o770)
    with pytest.raises(BundleError, match="not root's alone"):
        house.installer().roll_back()
    own = house.box.releases.rename(tmp_path / "elsewhere")
    own.chmod(0o700)
    house.box.releases.symlink_to(own)
    with pytest.raises(BundleError, match="is no folder"):
        house.installer().roll_back()
    assert house.service.runs == "1.1.0"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another")
def test_a_folder_of_releases_of_the_services_user_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.install("1.1.0")
    house.box.releases.rename(tmp_path / "away")
    house.box.releases.mkdir(0o700)
    (house.box.releases / "state.json").write_bytes((tmp_path / "away/state.json").read_bytes())
    os.chown(house.box.releases, 65534, 65534)
    for change in (house.installer().roll_back, lambda: house.install("1.2.0")):
        with pytest.raises(BundleError, match="not root's alone"):
            change()
    assert house.service.runs == "1.1.0"


def test_nothing_of_releases_lies_below_a_folder_of_the_services_user() -> None:
    box = Box()
    assert box.state not in box.releases.parents
    assert box.state not in box.incoming.parents


class PlayedDpkg:
    """dpkg and its tools, as far as `Packages` asks them: a package's text is what it says of itself."""

    def __init__(self) -> None:
        self.installed = "appliance 1.0.0"

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        said = ""
        if command[0] == "dpkg-query":
            said = f"installed {self.installed.split()[1]}"
        elif command[0] == "dpkg-deb":
            said = Path(command[-1]).read_text()
        else:
            self.installed = Path(command[-1]).read_text()
        return subprocess.CompletedProcess(command, 0, said, "")


def test_a_kept_package_is_installed_only_as_it_was_kept_and_one_that_root_put_there_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpkg = PlayedDpkg()
    monkeypatch.setattr(debian, "_run", dpkg)
    house = House(tmp_path)
    packages = debian.Packages(house.box)

    class Ready(PlayedService):
        def ready(self, version: str) -> bool:
            return dpkg.installed == f"appliance {version}"

    def installer() -> Installer:
        return Installer(house.box, packages, Ready(house.release), ready_timeout_s=0)

    def install(version: str) -> None:
        files = {"release/a.deb": f"appliance {version}".encode()}
        data = bytes_of(files, version=version, kind="deb")
        installer().install(archive.Reader(io.BytesIO(data), verify))

    with pytest.raises(BundleError, match="is not kept here"):
        install("2.0.0")
    (house.box.releases / "1.0.0.deb").write_text("appliance 1.0.0")
    install("2.0.0")
    assert installer().roll_back() == "1.0.0"
    install("2.0.0")
    install("3.0.0")
    assert set(read_state(house.box).kept) == {"2.0.0", "3.0.0"}
    (house.box.releases / "2.0.0.deb").write_text("appliance 2.0.0 ")
    with pytest.raises(BundleError, match="not the package that was kept"):
        installer().roll_back()
    assert dpkg.installed == "appliance 3.0.0"


def test_a_program_that_hangs_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: object, **_: object) -> None:
        raise subprocess.TimeoutExpired(str(command), 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(BundleError, match="dpkg-query did not end within"):
        debian.Packages(Box(tmp_path)).current()
    with pytest.raises(BundleError, match="not put together within"):
        slots._run(["pip"])
    with pytest.raises(BundleError, match=r"systemd-sysusers appliance\.conf did not end within"):
        system.settle()


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
    folders = Slots(Box(tmp_path))
    (tmp_path / "usr/lib/appliance/releases/1.0.0").mkdir(parents=True)
    with pytest.raises(BundleError, match="not on this box"):
        folders.switch("1.0.0")
    (tmp_path / "usr/lib/appliance/releases/1.0.0/.complete").touch()
    folders.switch("1.0.0")
    assert folders.current() == "1.0.0"
