"""What wheels put into the system around them, below a root of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.release import debian, system
from appliance.release.box import Box
from tools.distribution.build_deb import debian_version
from tools.distribution.build_wheel import ROOT
from tools.distribution.environment import TARGETS


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    (folder / "systemd").symlink_to(ROOT / "systemd")
    (folder / "appliance.toml").write_text("# the first\n")
    return folder


def test_every_file_that_systemd_reads_is_in_its_place_and_documents_stay_away(tmp_path: Path, share: Path) -> None:
    box = Box(tmp_path / "root")
    system.install(box, share)
    found = {path.relative_to(box.root).as_posix(): path for path in box.root.rglob("*") if path.is_file()}
    assert set(found) == {
        "usr/lib/systemd/system/appliance.service",
        "usr/lib/systemd/system/appliance.socket",
        "usr/lib/systemd/system/appliance-gpu.service",
        "usr/lib/systemd/system/appliance-recovery.service",
        "usr/lib/appliance/libexec/wait-for-gpu",
        "usr/lib/appliance/libexec/take-back-release",
        "usr/lib/sysusers.d/appliance.conf",
        "usr/lib/tmpfiles.d/appliance.conf",
        "usr/lib/systemd/catalog/appliance.catalog",
        "usr/share/polkit-1/rules.d/50-appliance.rules",
        "etc/appliance/appliance.toml",
    }
    assert found["usr/lib/appliance/libexec/wait-for-gpu"].stat().st_mode & 0o777 == 0o755
    assert found["usr/lib/systemd/system/appliance.service"].stat().st_mode & 0o777 == 0o644


def test_a_configuration_is_never_replaced_and_units_always_are(tmp_path: Path, share: Path) -> None:
    box = Box(tmp_path / "root")
    system.install(box, share, configuration=False)
    assert not box.config.exists()
    system.install(box, share)
    box.config.write_text("# the site's\n")
    unit = box.root / system.UNITS / "appliance.service"
    unit.write_text("[Service]\n")
    system.install(box, share)
    assert box.config.read_text() == "# the site's\n"
    assert unit.read_text() == (ROOT / "systemd/appliance.service").read_text()


@pytest.mark.parametrize("version", ["1.2.3", "1.2.3rc1", "1.2.3.dev4", "1.2.3rc1.dev4"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_packages_version_is_read_back_as_its_release(version: str, name: str) -> None:
    assert debian._release(debian_version(version, TARGETS[name])) == version
