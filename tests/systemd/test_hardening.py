"""Every directive of the sandbox is tried: what it forbids is attempted with it, without it, and inside the whole unit.

A row of TABLE is one line of a unit file. Its probe must end with `with_` in a unit that has that line (and what stands in
`beside`), with `without` in one that has not, so that it is shown to be able to fail, and with `full` inside the unit as shipped.
Outcomes are those of `probes`. A line of a unit that has no row fails a test. The box has no CAP_SYS_TIME, CAP_SYSLOG,
CAP_SYS_MODULE, CAP_SYS_RAWIO and CAP_SYS_RESOURCE, and a read-only /proc/sys: the rows of directives that take these away try
another thing that the same directive forbids.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.systemd import probes
from tests.systemd.box import LONG_S, Box
from tests.systemd.test_life import ask

UNITS = Path(__file__).parents[2] / "systemd"
SERVICE = UNITS / "appliance.service"
GPU_SERVICE = UNITS / "appliance-gpu.service"
STRICT = UNITS / "dropins/strict-cpu-only.conf"
BUILDER = UNITS / "dropins/tensorrt-builder.conf"

LIFE = {
    "Type",
    "NotifyAccess",
    "Environment",
    "WorkingDirectory",
    "ExecStart",
    "ExecReload",
    "Restart",
    "RestartSec",
    "RestartPreventExitStatus",
    "WatchdogSec",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "TimeoutAbortSec",
    "KillMode",
    "OOMPolicy",
    "OOMScoreAdjust",
    "FileDescriptorStoreMax",
    "RemainAfterExit",
}
"""Directives that forbid nothing: how it starts, lives and dies. `test_life` has them."""

ELSEWHERE = {
    "RuntimeDirectoryPreserve": "test_sockets.py::test_ten_restarts_under_load_cost_no_request",
    "SyslogIdentifier": "test_journal.py::test_entries_carry_the_fields_that_they_are_looked_for_by",
    "LogRateLimitIntervalSec": "test_journal.py::test_a_flood_is_cut_by_journald_and_says_so",
    "LogRateLimitBurst": "test_journal.py::test_a_flood_is_cut_by_journald_and_says_so",
}
"""Directives whose effect another test tries."""

UNTRIED = {
    "LimitMEMLOCK": "above the host's own limit needs CAP_SYS_RESOURCE, which the box has not: it is clipped silently"
}

DENIED = "EPERM|EACCES|EROFS"


@dataclass(frozen=True)
class Row:
    """One line of a unit. `instead` stands in its place in the run without; `full` is `with_` if nothing is said.

    "A|B" is either: a denial may come from more than one directive, and not every release of systemd gives the same errno.
    """

    line: str
    probe: str
    with_: str
    without: str
    full: str = ""
    beside: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()


USER = ("User=appliance",)
OWN = ("User=appliance", "Group=appliance")
FILTER = ("SystemCallFilter=@system-service",)
ERRNO = ("SystemCallErrorNumber=EPERM",)
CLOSED = ("DevicePolicy=closed",)
NVIDIA = "DeviceAllow=char-nvidia* rw"
FAMILIES = ("RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",)
LANDLOCK = "SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self"
NO_DRIVER = "ENXIO"
"""What opening the node of a driver that is not there comes to, once it is allowed."""

TABLE = [
    Row("User=appliance", "read what is root's", "EACCES", "ok"),
    Row("User=appliance", "user", "appliance", "root"),
    Row("Group=appliance", "group", "appliance", "root"),
    Row("UMask=0027", "mode of new files", "640", "644"),
    Row("StateDirectory=appliance", "write its state", "ok", "EROFS", beside=(*OWN, "ProtectSystem=strict")),
    Row("StateDirectoryMode=0750", "mode of its state", "750", "755", beside=(*OWN, "StateDirectory=appliance")),
    Row("CacheDirectory=appliance", "write its cache", "ok", "EROFS", beside=(*OWN, "ProtectSystem=strict")),
    Row("CacheDirectoryMode=0750", "mode of its cache", "750", "755", beside=(*OWN, "CacheDirectory=appliance")),
    Row("RuntimeDirectory=appliance", "write its runtime", "ok", "ENOENT", beside=(*OWN, "ProtectSystem=strict")),
    Row("RuntimeDirectoryMode=0750", "mode of its runtime", "750", "755", beside=(*OWN, "RuntimeDirectory=appliance")),
    Row("ConfigurationDirectory=appliance", "its configuration", "/etc/appliance", "none"),
    Row(
        "ConfigurationDirectoryMode=0750",
        "mode of its configuration",
        "750",
        "755",
        beside=("ConfigurationDirectory=appliance",),
    ),
    Row("LimitNOFILE=65536", "2000 descriptors", "ok", "EMFILE"),
    Row("LimitCORE=0", "core files", "EPERM", "ok"),
    # the GPU: stand-ins of its nodes, whose major numbers systemd finds in /proc/devices as it does where a driver is
    Row("DevicePolicy=closed", "unlisted device", "EPERM", NO_DRIVER),
    Row(NVIDIA, "device nvidia", NO_DRIVER, "EPERM", beside=CLOSED),
    Row(NVIDIA, "device nvidia-uvm", NO_DRIVER, "EPERM", beside=CLOSED),
    Row("DeviceAllow=char-drm rw", "device drm", NO_DRIVER, "EPERM", beside=CLOSED),
    Row("DeviceAllow=char-nvhost* rw", "device nvhost", NO_DRIVER, "EPERM", beside=CLOSED),
    Row("DeviceAllow=char-nvmap* rw", "device nvmap", NO_DRIVER, "EPERM", beside=CLOSED),
    # what it cannot do
    Row("NoNewPrivileges=yes", "setuid program", "itself", "root", beside=USER),
    Row("CapabilityBoundingSet=", "give a file away", "EPERM", "ok", full=DENIED),
    Row("CapabilityBoundingSet=", "bounding set", "empty", "", full="empty"),
    Row(
        "AmbientCapabilities=",
        "low port",
        "EACCES",
        "ok",
        beside=USER,
        instead=("AmbientCapabilities=CAP_NET_BIND_SERVICE",),
    ),
    Row("ProtectSystem=strict", "write to /usr", "EROFS", "ok"),
    Row("ProtectSystem=strict", "write to /etc", "EROFS", "ok"),
    Row("ProtectHome=yes", "homes", "hidden", "seen"),
    Row("PrivateTmp=yes", "others' temporary files", "hidden", "seen"),
    Row("PrivateIPC=yes", "others' shared memory", "ENOENT", "ok"),
    Row("RemoveIPC=yes", "leave shared memory", "gone", "left", beside=USER),
    Row("PrivateMounts=yes", "mount", "apart", "seen"),
    Row("PrivateUsers=yes", "give a file away", "EINVAL", "ok", full=f"{DENIED}|EINVAL"),
    Row("ProtectKernelTunables=yes", "kernel tunables", "EROFS", "ok", full=DENIED),
    Row("ProtectKernelModules=yes", "kernel modules", "hidden", "seen"),
    Row("ProtectKernelLogs=yes", "kernel log", "EACCES", "ok", full=DENIED),
    Row("ProtectControlGroups=yes", "control groups", "EROFS", "ok", full=DENIED),
    Row("ProtectClock=yes", "clock", "EPERM", "ok"),
    Row("ProtectHostname=yes", "host name", "EPERM", "ok"),
    Row("ProtectProc=invisible", "other processes", "hidden", "seen", beside=USER),
    Row("ProcSubset=all", "memory of the machine", "seen", "hidden", instead=("ProcSubset=pid",)),
    Row("LockPersonality=yes", "personality", "EPERM", "ok"),
    Row("RestrictRealtime=yes", "realtime", "EPERM", "ok"),
    Row("RestrictNamespaces=yes", "namespaces", "EPERM", "ok"),
    Row("RestrictSUIDSGID=yes", "set a setuid bit", "EPERM", "ok"),
    Row("KeyringMode=private", "keyring", "apart", "linked", instead=("KeyringMode=shared",)),
    Row("SystemCallArchitectures=native", "foreign system calls", "SIGSYS", "ok"),
    Row("SystemCallFilter=@system-service", "trace", "EPERM", "ok", beside=ERRNO),
    Row("SystemCallFilter=~@privileged", "set its own uid", "EPERM", "ok", beside=(*FILTER, *ERRNO)),
    # newer releases have them in @system-service: there the line changes nothing
    Row(LANDLOCK, "give up files", "ok", "EPERM|ok", beside=(*FILTER, *ERRNO)),
    Row("SystemCallErrorNumber=EPERM", "trace", "EPERM", "SIGSYS", beside=FILTER),
    Row(*FAMILIES, "raw packets", "EAFNOSUPPORT", "ok"),
    # what the drop-ins add or take back
    Row("PrivateDevices=yes", "device node", "hidden", "seen"),
    Row("DeviceAllow=", "device nvidia", "EPERM", NO_DRIVER, full=f"{DENIED}|ENOENT", beside=(*CLOSED, NVIDIA)),
    Row("MemoryDenyWriteExecute=yes", "writable code", "EPERM|EACCES", "ok"),
    Row("MemoryDenyWriteExecute=no", "writable code", "ok", "EPERM|EACCES", instead=("MemoryDenyWriteExecute=yes",)),
    Row("IPAddressDeny=any", "send to a site", "EPERM", "ok"),
    Row("IPAddressAllow=localhost", "send to localhost", "ok", "EPERM", beside=("IPAddressDeny=any",)),
    # the unit that waits for the GPU
    Row("PrivateNetwork=yes", "network", "none", probes.OTHER_ADDRESS),
    Row("RestrictAddressFamilies=AF_UNIX", "internet socket", "EAFNOSUPPORT", "ok"),
    Row(
        "CapabilityBoundingSet=CAP_MKNOD CAP_SYS_MODULE CAP_FOWNER CAP_CHOWN",
        "low port",
        "EACCES",
        "ok",
        full=f"{DENIED}|EAFNOSUPPORT",
    ),
]

INSIDE = {"gpu": {"setuid program": "root"}, "strict": {"unlisted device": "ENOENT"}}
"""Outcomes inside a unit, where they are others than the row's: one that is root already, one that has no such node."""

PYTHON = "/usr/lib/appliance/bin/python"
RUN_ALL = """set -e
mkdir -p /var/lib/probes
systemctl daemon-reload
for unit in /run/systemd/system/probe-*.service; do
    name=$(basename "$unit")
    rm -rf /etc/appliance
    systemctl start "$name" || :
    if grep -q OUTSIDE "$unit"; then
        /usr/lib/appliance/bin/python /mnt/tests/probes.py outside > "/var/lib/probes/$name.outside"
    fi
done
cd /var/lib/probes
for file in *; do echo "$file"; cat "$file"; echo; done
"""


def lines_of(path: Path) -> list[str]:
    """What stands in [Service]."""
    section = path.read_text().split("[Service]\n")[1].split("\n[")[0]
    return [line for line in section.splitlines() if re.match(r"[A-Z]\w+=", line)]


def directive(line: str) -> str:
    return line.partition("=")[0]


def sandbox(*paths: Path) -> list[str]:
    return [line for path in paths for line in lines_of(path) if directive(line) not in LIFE]


WHOLE = {
    "service": (sandbox(SERVICE), sandbox(SERVICE)),
    "strict": (sandbox(SERVICE, STRICT), sandbox(STRICT)),
    "builder": (sandbox(SERVICE, STRICT, BUILDER), sandbox(BUILDER)),
    "gpu": (sandbox(GPU_SERVICE), sandbox(GPU_SERVICE)),
}
"""Units as shipped: all of their lines, and those that are tried in them."""


def unit_text(lines: tuple[str, ...], names: list[str]) -> str:
    marker = "# OUTSIDE\n" if set(names) & set(probes.OUTSIDE) else ""
    quoted = " ".join(f'"{name}"' for name in names)
    own = "\n".join(lines)
    return (
        f"{marker}[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=oneshot\nTimeoutStartSec=20\n"
        f"ExecStart={PYTHON} /mnt/tests/probes.py {quoted}\n"
        f"StandardOutput=truncate:/var/lib/probes/%n\n{own}\n"
    )


class Outcomes:
    """What came of every probe in every unit. One start of each unit, with all the probes that are tried in it."""

    def __init__(self, box: Box) -> None:
        wanted: dict[tuple[str, ...], set[str]] = {}
        for row in TABLE:
            wanted.setdefault((*row.beside, row.line), set()).add(row.probe)
            wanted.setdefault((*row.beside, *row.instead), set()).add(row.probe)
        for lines, tried in WHOLE.values():
            wanted.setdefault(tuple(lines), set()).update(row.probe for row in TABLE if row.line in tried)
        self._units = {lines: f"probe-{number:02}.service" for number, lines in enumerate(wanted)}
        texts = {name: unit_text(lines, sorted(wanted[lines])) for lines, name in self._units.items()}
        box.run(PYTHON, "/mnt/tests/probes.py", "prepare")
        box.run(PYTHON, "-c", WRITE_UNITS, stdin=json.dumps(texts))
        output = box.run("sh", "-c", RUN_ALL).stdout.split("\n")
        self._found = dict(zip(output[::2], output[1::2], strict=False))

    def of(self, lines: tuple[str, ...], probe: str) -> str:
        name = self._units[lines]
        file = f"{name}.outside" if probe in probes.OUTSIDE else name
        return str(json.loads(self._found[file])[probe])


WRITE_UNITS = """
import json, pathlib, sys
for name, text in json.load(sys.stdin).items():
    folder = pathlib.Path("/run/systemd/system")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
"""


@pytest.fixture(scope="module")
def outcomes(machine: Box) -> Outcomes:
    """One pass for all tests."""
    return Outcomes(machine)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.line}: {row.probe}")
def test_what_a_directive_forbids_is_refused_with_it_and_possible_without(outcomes: Outcomes, row: Row) -> None:
    assert outcomes.of((*row.beside, row.line), row.probe) in row.with_.split("|")
    found = outcomes.of((*row.beside, *row.instead), row.probe)
    assert found in row.without.split("|") or (not row.without and found != row.with_)


@pytest.mark.slow
@pytest.mark.parametrize("unit", WHOLE)
def test_all_of_it_is_refused_inside_the_unit_as_shipped(outcomes: Outcomes, unit: str) -> None:
    lines, tried = WHOLE[unit]
    wrong = []
    for row in TABLE:
        if row.line in tried:
            found = outcomes.of(tuple(lines), row.probe)
            wanted = INSIDE.get(unit, {}).get(row.probe) or row.full or row.with_
            if found not in wanted.split("|"):
                wrong.append((row.line, row.probe, found, wanted))
    assert not wrong


@pytest.mark.parametrize("path", [SERVICE, STRICT, BUILDER, GPU_SERVICE], ids=lambda path: path.name)
def test_every_line_of_a_sandbox_has_a_probe(path: Path) -> None:
    rows = {row.line for row in TABLE}
    without = {*ELSEWHERE, *UNTRIED}
    untried = [line for line in sandbox(path) if line not in rows and directive(line) not in without]
    assert not untried, "add a row to TABLE"


def test_every_row_is_a_line_that_is_shipped_and_every_other_test_exists() -> None:
    shipped = set(sandbox(SERVICE, STRICT, BUILDER, GPU_SERVICE))
    assert {row.line for row in TABLE} <= shipped
    for place in ELSEWHERE.values():
        name, _, test = place.partition("::")
        assert f"def {test}(" in (Path(__file__).parent / name).read_text()


STATE = """
import json, sys
from pathlib import Path
def of(pid):
    folder = Path("/proc") / pid
    status = dict(line.split(":\\t", 1) for line in (folder / "status").read_text().splitlines() if ":\\t" in line)
    links = {kind: (folder / "ns" / kind).readlink().name for kind in ("mnt", "ipc", "uts", "user", "pid", "net")}
    maps = {line.split()[4]: line.split()[5].split(",") for line in (folder / "mountinfo").read_text().splitlines()}
    return {
        "name": status["Name"],
        "status": {key: status[key].strip() for key in ("NoNewPrivs", "Seccomp", "CapEff", "CapBnd", "CapPrm", "CapAmb", "Uid")},
        "differs": sorted(kind for kind in links if links[kind] != (Path("/proc/1/ns") / kind).readlink().name),
        "readonly": "ro" in maps["/"],
        "core": next(line.split()[4:6] for line in (folder / "limits").read_text().splitlines() if "core file" in line),
    }
print(json.dumps([of(pid) for pid in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_front_template_and_workers_really_run_in_it(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    group = box.show("ControlGroup")
    pids = box.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").stdout.split()
    found = json.loads(box.python(STATE, *pids))
    assert len(found) == 4, "front, template, a worker for each model"
    own = box.run("id", "-u", "appliance").stdout.strip()
    for process in found:
        status = process["status"]
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert {status[name].strip("0") for name in ("CapEff", "CapBnd", "CapPrm", "CapAmb")} == {""}
        assert set(status["Uid"].split()) == {own}
        assert process["differs"] == ["ipc", "mnt", "user", "uts"]
        assert process["readonly"]
        assert process["core"] == ["0", "0"]


@pytest.mark.slow
def test_a_worker_can_do_less_than_its_front(box: Box) -> None:
    """The same attempts with the sandbox of its own, and without: then the unit's alone is left."""
    secret = "/run/credentials/appliance.service/key"
    box.write("/etc/appliance/secrets/key", "secret")
    box.dropin("[Service]\nLoadCredential=key:/etc/appliance/secrets/key\n")
    box.loopback("echo", shape="2", commands="true")
    attempts = {
        "write /var/lib/appliance/new": "EACCES",
        "write /run/appliance/reload.json": "EACCES",
        "write /tmp/new": "EACCES",
        f"read {secret}": "EACCES",
        "read /etc/appliance/appliance.toml": "EACCES",
        # ProtectProc= hides whom it may not trace: for it there is no front
        "read /proc/FRONT/environ": "ENOENT",
        "write /proc/FRONT/oom_score_adj": "ENOENT",
        "connect 8000": "EPERM",
        "run /bin/true": "EPERM",
    }
    for sandbox in (True, False):
        box.configure(f"[workers]\nsandbox = {str(sandbox).lower()}\n")
        box.run("chmod", "0644", "/etc/appliance/appliance.toml")
        box.run("systemctl", "start", "appliance.service")
        front = box.show("MainPID")
        for attempt, denied in attempts.items():
            answer = ask(box, "echo", attempt.replace("FRONT", front))
            if sandbox:
                assert f"ended with {denied}" in answer, (attempt, answer)
            else:
                assert "was possible" in answer, (attempt, answer)
        said = box.journal("EVENT=workers.sandbox", f"_PID={front}")[-1]
        assert said["APPLIANCE_IN_FORCE"] == ("none" if not sandbox else said["APPLIANCE_IN_FORCE"])
        assert ("Landlock" in said["APPLIANCE_IN_FORCE"]) is sandbox
        box.run("systemctl", "stop", "appliance.service")


@pytest.mark.slow
def test_an_engine_is_built_inside_of_it(box: Box) -> None:
    """Int8, by ONNX Runtime: the sandboxes of unit and build leave it all that it needs."""
    box.run("sh", "-c", "cp -r /mnt/models/digits /var/lib/appliance/models/ && chown -R appliance: /var/lib/appliance")
    box.run("sh", "-c", "cd /var/lib/appliance/models/digits && sed -i '1i precision = \"int8\"' model.toml")
    box.run("systemctl", "start", "appliance.service")
    deadline = time.monotonic() + LONG_S
    # the model as it is goes when its engine has been verified and serves
    while not box.journal("MODEL=digits", "STATE=UNLOADED", f"_PID={box.show('MainPID')}"):
        assert time.monotonic() < deadline, box.log()
        time.sleep(0.1)
    assert box.run("sh", "-c", "ls /var/lib/appliance/engines/digits/*/model.onnx").stdout
