"""An administrator's first year by the book: every command of it, in order, on a booted machine with the installed package.

The chapters on trouble are read on a machine that has it: before the first command of such a section the machine is made ill in
that way, and the section's own commands have to show it, and mend it where the book says that they do.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from appliance import __version__
from tests.docs.book import BOOKS, Command, matches, read
from tests.packaging.conftest import changed_deb, project_wheel, target
from tests.packaging.installed import InstalledBox
from tests.systemd.box import why_not
from tools.distribution.build_wheel import ROOT

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)

COMMAND_LIMIT_S = 300.0
"""More than a release has to become ready (120 s), and to be taken back: what happened is for the command to say, not for us."""
NEXT, NEWEST = "98.0.0", "99.0.0"
MODELS = "/var/lib/appliance/models"
TOML = "/etc/appliance/appliance.toml"


class Desk(InstalledBox):
    """The machine with a stick in it."""

    def __init__(self, stick: Path, state: Path) -> None:
        super().__init__(state=state)
        self._stick = stick

    def _binds(self) -> list[tuple[str, str, bool]]:
        return [*super()._binds(), (str(self._stick), "/media/stick", False)]

    def shell(self, text: str, *, check: bool = True) -> str:
        """What a few lines of shell print, as on a terminal."""
        done = self.run("bash", "-c", f"exec 2>&1\ncd /root\n{text}", check=check, timeout=COMMAND_LIMIT_S)
        return done.stdout

    def until(self, text: str) -> None:
        """Until those lines succeed."""
        self.shell(f"for _ in $(seq 100); do if {text}; then exit 0; fi; sleep 0.2; done; exit 1")


@pytest.fixture(scope="module")
def desk(deb: Path, wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A fresh machine, and a stick with two packages, wheels and a model."""
    if reason := why_not():
        pytest.skip(reason)
    if target().debian != "12":
        pytest.skip("the book's bundle is for Debian 12")
    stick = tmp_path_factory.mktemp("stick")
    shutil.copy2(deb, stick)
    for folder, version in (("next", NEXT), ("newest", NEWEST)):
        (stick / folder).mkdir()
        changed_deb(deb, stick / folder, version)
    shutil.copytree(wheelhouse, stick / "wheels", ignore=shutil.ignore_patterns("pip-*", "appliance-*"))
    shutil.copy2(project_wheel(tmp_path_factory.mktemp("wheel"), NEXT), stick / "wheels")
    shutil.copytree(ROOT / "models" / "digits", stick / "parts")
    box = Desk(stick, tmp_path_factory.mktemp("disk"))
    try:
        box.start()
        # what dpkg syncs would have to survive nothing here
        box.shell("useradd --create-home alice; echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/unsafe-io")
        yield box
    finally:
        box.remove()


# --- what the machine has when a section is opened, and what is taken from it afterwards -----------------------------------


def no_appliance(desk: Desk) -> None:
    desk.shell("dpkg --purge appliance && rm -rf /var/lib/appliance && test ! -e /usr/bin/appliance")


def answers(desk: Desk, version: str) -> None:
    assert desk.version() == version, f"{desk.version()} answers, not {version}"


def newer_bundle(desk: Desk) -> None:
    desk.shell(
        f"appliance bundle create /media/stick/newer.bundle --key /root/maker.key --version {NEWEST}"
        " --system debian-12 --release /media/stick/newest/*.deb"
    )


def misspelt_key(desk: Desk) -> None:
    desk.shell(f"sed --in-place 's/^port = /prot = /' {TOML}; systemctl restart appliance; test $? -ne 0")


def taken_port(desk: Desk) -> None:
    desk.shell(
        "systemctl stop appliance\n"
        "systemd-run --quiet --unit squatter python3 -m http.server --bind 127.0.0.1 8000\n"
        "for _ in $(seq 50); do curl -so /dev/null http://127.0.0.1:8000/ && break; sleep 0.1; done\n"
        "systemctl start appliance; test $? -ne 0"
    )


def free_port(desk: Desk) -> None:
    """The book: it comes up by itself once the port is free."""
    desk.shell("systemctl stop squatter")
    desk.until("appliance status")


def damaged_file(desk: Desk) -> None:
    desk.shell(
        f"cp {MODELS}/digits/1/model.onnx /root/whole.onnx\n"
        f"echo rubbish > {MODELS}/digits/1/model.onnx\nsystemctl restart appliance"
    )


def whole_file(desk: Desk) -> None:
    desk.shell(f"cp /root/whole.onnx {MODELS}/digits/1/model.onnx\nappliance models load digits")


def damaged_parts(desk: Desk) -> None:
    desk.shell(
        f"cp -r /media/stick/parts {MODELS}/\nrm -f {MODELS}/parts/model.toml\necho rubbish > {MODELS}/parts/1/model.onnx\n"
        f"chown -R appliance:appliance {MODELS}/parts\nappliance models load parts; test $? -eq 1"
    )


def locked_folder(desk: Desk) -> None:
    desk.shell(f"chown -R root:root {MODELS}/parts && chmod 000 {MODELS}/parts/1")


def no_parts(desk: Desk) -> None:
    desk.shell(f"rm -r {MODELS}/parts && systemctl reload appliance")


def own_place(desk: Desk) -> None:
    """The other sections have the models where the package puts them."""
    desk.shell(
        f'sed --in-place \'s|^path = "/srv/disk/models"|path = "{MODELS}"|\' {TOML}\n'
        "rm -r /srv/disk /etc/systemd/system/appliance.service.d/models-disk.conf\n"
        "systemctl daemon-reload && systemctl restart appliance && appliance status"
    )


def stopped(desk: Desk) -> None:
    desk.shell("systemctl stop appliance")


def no_memory(desk: Desk) -> None:
    desk.shell(f"cp {TOML} /root/good.toml\nprintf '\\n[memory]\\nhost_reserve_mb = 1000000\\n' >> {TOML}")
    desk.shell("systemctl restart appliance")


def memory(desk: Desk) -> None:
    desk.shell(f"cat /root/good.toml > {TOML} && systemctl restart appliance")


def killed_worker(desk: Desk) -> None:
    desk.shell(
        """kill -9 $(appliance ps --json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["pid"])')"""
    )
    desk.until(
        "test $(appliance ps --json | grep -c '\"pid\"') = 1 && appliance events --kind worker.replaced | grep -q ."
    )


def power_cut(desk: Desk) -> None:
    desk.stop()
    desk.start()
    desk.until("appliance status")


def altered_engine(desk: Desk) -> None:
    desk.shell(
        "appliance compile digits --precision int8 --no-load\n"
        "file=$(find /var/lib/appliance/engines/digits -name model.onnx)\n"
        "printf x | dd of=$file bs=1 seek=1000 conv=notrunc status=none"
    )


def cut_bundle(desk: Desk) -> None:
    desk.shell("head --bytes 1000000 /media/stick/newer.bundle > /media/stick/cut.bundle")


BEFORE: dict[str, Callable[[Desk], None]] = {
    "first-release-by-bundle": no_appliance,
    "upgrade-by-bundle": newer_bundle,
    "configuration-refused": misspelt_key,
    "port-in-use": taken_port,
    "not-ready": damaged_file,
    "model-failed": damaged_parts,
    "models-folder": locked_folder,
    "no-answer": stopped,
    "memory-refused": no_memory,
    "out-of-memory": killed_worker,
    "power-cut": power_cut,
    "stale-engine": altered_engine,
    "bundle-refused": cut_bundle,
}
AFTER: dict[str, Callable[[Desk], None]] = {
    "upgrade": partial(answers, version=NEXT),
    "upgrade-by-bundle": partial(answers, version=NEWEST),
    "roll-back-a-bundle": partial(answers, version=NEXT),
    "roll-back-a-package": partial(answers, version=__version__),
    "models-on-a-disk-of-their-own": own_place,
    "port-in-use": free_port,
    "not-ready": whole_file,
    "models-folder": no_parts,
    "memory-refused": memory,
}


def test_every_command_of_the_book_does_what_it_says(desk: Desk) -> None:
    commands = [command for path in BOOKS for command in read(path).commands]
    sections = {command.section for command in commands}
    assert not (BEFORE.keys() | AFTER.keys()) - sections, "a section that the book has no more"
    begun = time.monotonic()
    wrong: list[str] = []
    for section, part in groupby(commands, key=lambda command: command.section):
        wrong += made(desk, BEFORE.get(section))
        wrong += [complaint for command in part if (complaint := tried(desk, command))]
        wrong += made(desk, AFTER.get(section))
    log.info("%d commands in %.0f s", len(commands), time.monotonic() - begun)
    assert not wrong, "\n\n".join(wrong)


def made(desk: Desk, change: Callable[[Desk], None] | None) -> list[str]:
    """Why the machine could not be brought into that state: most often a command before did not do what the book says."""
    try:
        if change is not None:
            change(desk)
    except AssertionError as error:
        return [f"{change}: {error}"]
    return []


def tried(desk: Desk, command: Command) -> str:
    """What was otherwise than the book says; empty if nothing was."""
    begun = time.monotonic()
    done = desk.run("bash", "-c", f"exec 2>&1\ncd /root\n{command.text}", check=False, timeout=COMMAND_LIMIT_S)
    log.info("%.1f s: %s", time.monotonic() - begun, command)
    if done.returncode != command.status:
        return f"{command}\nended with {done.returncode}, the book says {command.status}:\n{done.stdout}\n{desk.log()}"
    if command.output and not matches(command.output, done.stdout):
        quoted = "\n".join(command.output)
        return f"{command}\nthe book quotes:\n{quoted}\nit printed:\n{done.stdout}"
    return ""
