"""The life of the package on a machine: installed, upgraded under load, downgraded, removed, installed again, purged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance import __version__
from tests.packaging.conftest import breaks_on_start, changed_deb, hangs_on_start, target
from tests.packaging.installed import InstalledBox
from tests.systemd.box import why_not

pytestmark = pytest.mark.slow

CONFIG = "/etc/appliance/appliance.toml"
STATE = "/var/lib/appliance"
SAMPLE = "/usr/share/appliance/models/digits/samples/3.png"
CHANGE = '[http]\nport = 8000\n# by the site\n\n[repository]\npath = "/var/lib/appliance/models"\n'

PLACES = (
    "{units}/appliance.service",
    "{units}/appliance.socket",
    "{units}/appliance-gpu.service",
    "{units}/appliance-recovery.service",
    "/usr/lib/appliance/libexec/wait-for-gpu",
    "/usr/lib/appliance/libexec/take-back-release",
    "/usr/lib/sysusers.d/appliance.conf",
    "/usr/lib/tmpfiles.d/appliance.conf",
    "/usr/lib/systemd/catalog/appliance.catalog",
    "/usr/share/polkit-1/rules.d/50-appliance.rules",
    "/usr/share/doc/appliance/systemd.md",
    "/usr/share/doc/appliance/examples/systemd/dropins/credentials.conf",
    "/usr/bin/appliance",
)
"""The table of systemd/README.md."""

ZMQ = """
import sys
import numpy as np
from appliance.client import Client
print(Client(sys.argv[1]).infer("digits", {"image": np.zeros((1, 28, 28, 1), np.float32)}).outputs["scores"].shape)
"""


@pytest.fixture
def machine(deb: Path, tmp_path: Path) -> Iterator[Callable[..., InstalledBox]]:
    """Makes booted machines with the package and others at hand."""
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:

        def make(*others: Path) -> InstalledBox:
            box = InstalledBox(deb, *others)
            stack.callback(box.remove)
            box.start()
            box.install(deb)
            return box

        yield make


def serve(box: InstalledBox) -> None:
    box.loopback("plain", shape="2")
    box.run("systemctl", "enable", "--now", "appliance")


def test_it_is_installed_and_one_command_starts_it(installed: InstalledBox) -> None:
    assert installed.show("ActiveState") == "inactive"
    for unit in ("appliance.service", "appliance.socket"):
        assert installed.show("UnitFileState", unit) == "disabled"
    installed.run("systemctl", "enable", "--now", "appliance")
    assert installed.show("StatusText").startswith("1 model ready")
    answer = json.loads(installed.run("appliance", "infer", "digits", SAMPLE, "--json").stdout)
    assert answer[0]["outputs"][0]["data"][0].endswith(":3:3")
    for endpoint in ("tcp://127.0.0.1:5570", "ipc:///run/appliance/infer.ipc"):
        assert installed.python(ZMQ, endpoint).strip() == "(1, 10)"


def test_everything_that_the_units_need_is_in_its_place_and_dpkg_knows_it(installed: InstalledBox) -> None:
    places = [place.format(units=f"/{target().units}") for place in PLACES]
    listed = installed.dpkg("--search", *places).stdout.splitlines()
    assert listed == [f"appliance: {place}" for place in places]
    assert installed.dpkg("--verify", "appliance").stdout == ""
    found = installed.run("stat", "--format=%a %U:%G", CONFIG, f"{STATE}/models", f"{STATE}/models/digits/1/model.onnx")
    assert found.stdout.split("\n")[:2] == ["640 root:appliance", "2770 appliance:appliance"]
    assert found.stdout.split("\n")[2].endswith("appliance:appliance")
    kept = installed.run("stat", "--format=%a %U:%G", "/var/lib/appliance-releases").stdout
    assert kept.strip() == "700 root:root"


def test_manual_completions_and_explanations_are_ready_to_use(installed: InstalledBox) -> None:
    installed.run("systemctl", "start", "appliance")
    explained = installed.run("journalctl", "-x", "--no-pager", "-u", "appliance").stdout
    assert "Subject: The appliance serves" in explained
    completions = "/usr/share/bash-completion/completions/appliance"
    ask = "COMP_WORDS=(appliance bun); COMP_CWORD=1; _appliance_completion appliance; echo ${COMPREPLY[@]}"
    words = installed.run("bash", "-c", f". {completions}; {ask}")
    assert words.stdout.split() == ["bundle"]
    if installed.run("sh", "-c", "command -v man", check=False).returncode == 0:
        page = installed.run("man", "--warnings", "-E", "UTF-8", "-l", "/usr/share/man/man1/appliance-bundle.1.gz")
        assert "appliance bundle rollback" in page.stdout
        assert page.stderr == ""


def test_an_upgrade_and_a_downgrade_under_load_cost_no_request_and_no_local_change(
    machine: Callable[..., InstalledBox], deb: Path, tmp_path: Path
) -> None:
    newer = changed_deb(deb, tmp_path, "9.9.9")
    box = machine(newer)
    box.configure(CHANGE)
    serve(box)
    before, pid = box.version(), box.show("MainPID")
    for package, version in ((newer, "9.9.9"), (deb, before)):
        loads = [box.start_load(kind, clients=2, model="plain") for kind in ("http", "keep", "zmq")]
        box.install(package)
        assert box.version() == version
        results = [box.end_load(load) for load in loads]
        assert all(result["failed"] == 0 and result["requests"] > 50 for result in results), results
        assert box.show("MainPID") != pid
        pid = box.show("MainPID")
        assert box.show("UnitFileState") == "enabled"
        assert box.show("UnitFileState", "appliance.socket") == "disabled"
    assert box.text(CONFIG) == CHANGE
    assert box.exists(f"{STATE}/models/plain/model.toml")
    assert box.show("NRestarts") == "0"


def test_a_new_default_configuration_is_put_beside_a_changed_one(
    machine: Callable[..., InstalledBox], deb: Path, tmp_path: Path
) -> None:
    def change(tree: Path) -> None:
        with (tree / "etc/appliance/appliance.toml").open("a") as opened:
            opened.write("# a new default\n")

    newer = changed_deb(deb, tmp_path, "9.9.9", change)
    box = machine(newer)
    box.configure(CHANGE)
    box.install(newer, "--force-confdef", "--force-confold")
    assert box.text(CONFIG) == CHANGE
    assert box.text(f"{CONFIG}.dpkg-dist").endswith("# a new default\n")
    assert box.show("ActiveState") == "inactive", "what was not running is not started by an upgrade"


def test_a_release_that_breaks_on_start_is_installed_and_said_so_and_the_old_package_ends_it_without_a_lost_request(
    machine: Callable[..., InstalledBox], deb: Path, tmp_path: Path
) -> None:
    broken = changed_deb(deb, tmp_path, "9.9.9", breaks_on_start)
    box = machine(broken)
    serve(box)
    load = box.start_load("http", clients=2, model="plain")
    done = box.install(broken)
    assert "appliance.service" in done.stderr, "dpkg's output says which unit did not come up"
    assert "this release breaks on start" in box.log()
    box.install(deb)
    box.wait_until("ActiveState", "active")
    result = box.end_load(load)
    assert result["failed"] == 0, result


def hangs_and_is_waited_for_briefly(tree: Path) -> None:
    """A release whose start hangs, and whose package waits less long for it than a real one."""
    hangs_on_start(tree)
    script = tree / "DEBIAN/postinst"
    text = script.read_text()
    assert text.count("\npatience=300\n") == 1
    script.write_text(text.replace("\npatience=300\n", "\npatience=2\n"))


def test_a_release_whose_start_hangs_does_not_hold_dpkg_and_the_old_package_ends_it(
    machine: Callable[..., InstalledBox], deb: Path, tmp_path: Path
) -> None:
    hung = changed_deb(deb, tmp_path, "9.9.7", hangs_and_is_waited_for_briefly)
    box = machine(hung)
    serve(box)
    done = box.install(hung)
    assert "it was not up after 2 s, and is still being started: systemctl status appliance" in done.stderr
    assert box.show("ActiveState") == "activating"
    box.install(deb)
    assert (box.version(), box.show("ActiveState")) == (__version__, "active")


def test_a_removal_keeps_everything_and_installing_again_finds_it(
    machine: Callable[..., InstalledBox], deb: Path
) -> None:
    box = machine()
    box.configure(CHANGE)
    serve(box)
    # a link to a larger disk is the site's, too
    box.run("sh", "-c", f"mv {STATE}/models /srv/models && ln -s /srv/models {STATE}/models")
    box.run("sh", "-c", "chown root:appliance /srv/models && chmod 2750 /srv/models")
    # and links that the service's user may have put in its folder lead root nowhere
    box.run(
        "sh", "-c", f"echo kept > /srv/kept && ln -s /srv/kept {STATE}/.ran && ln -s /srv/kept {STATE}/.example.sha256"
    )
    box.dpkg("--remove", "appliance")
    assert box.run("pgrep", "-u", "appliance", check=False).stdout == ""
    assert not box.exists("/usr/lib/appliance")
    assert box.text(CONFIG) == CHANGE
    box.install(deb)
    box.wait_until("ActiveState", "active")
    assert box.show("StatusText").startswith("2 models ready")
    assert box.run("stat", "--format=%a %U:%G", "/srv/models").stdout.strip() == "2750 root:appliance"
    assert box.text("/srv/kept") == "kept\n"
    # what somebody removed stays away, also the example
    box.run("systemctl", "disable", "--now", "appliance")
    box.run("rm", "-r", f"{STATE}/models/digits")
    box.dpkg("--remove", "appliance")
    box.install(deb)
    assert box.show("UnitFileState") == "disabled"
    assert box.show("ActiveState") == "inactive"
    assert box.run("ls", f"{STATE}/models").stdout.split() == ["plain"]


def test_a_purge_takes_what_is_the_packages_and_leaves_the_work_of_others(machine: Callable[..., InstalledBox]) -> None:
    box = machine()
    serve(box)
    box.write(f"{STATE}/engines/x.plan", "built here")
    said = box.dpkg("--purge", "appliance").stderr
    assert f"models and records stay in {STATE}" in said
    assert box.run("ls", f"{STATE}/models").stdout.split() == ["plain"]
    for gone in (CONFIG, "/etc/appliance", f"{STATE}/engines", "/var/cache/appliance", "/run/appliance"):
        assert not box.exists(gone), gone
    assert box.dpkg("--status", "appliance", check=False).returncode != 0
    links = box.run("find", "/etc/systemd/system", "/var/lib/systemd", "-name", "appliance*").stdout
    assert links == "", "units, masks and records of deb-systemd-helper"


def test_a_purge_of_what_nobody_used_leaves_nothing_and_wheels_are_not_gone_over(
    machine: Callable[..., InstalledBox], deb: Path
) -> None:
    box = machine()
    said = box.dpkg("--purge", "appliance").stderr
    assert "models and records" not in said
    places = ("/etc", "/usr/lib", "/lib/systemd", "/usr/bin", "/var/lib", "/var/cache", "/run", "/usr/share/appliance")
    left = box.run("find", *places, "-name", "*appliance*", "-not", "-path", "/usr/lib/google*", check=False).stdout
    assert left == ""
    # dpkg would write through the links of releases that came as wheels
    box.run("mkdir", "-p", "/usr/lib/appliance/releases/1.0.0/bin")
    box.run("ln", "-s", "releases/1.0.0/bin", "/usr/lib/appliance/bin")
    refused = box.install(deb, check=False)
    assert refused.returncode != 0
    assert "from bundles of wheels" in refused.stderr
    assert box.run("ls", "/usr/lib/appliance/releases/1.0.0/bin").stdout == ""
