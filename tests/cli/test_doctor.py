"""Each check on a box made ill in that one way, and on a healthy one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from typer.testing import CliRunner

from appliance.cli import doctor
from appliance.cli.doctor import Check, Finding, Patient
from appliance.cli.main import app
from appliance.config import (
    Config,
    EnginesConfig,
    HttpConfig,
    RecorderConfig,
    RepositoryConfig,
    WorkersConfig,
    ZmqConfig,
)
from appliance.host.sandbox import Sandbox
from appliance.recording.file import ANOTHERS
from tests.fakes.nvml import StubNvml

STATUS = {"status": {"ready": True, "line": "1 model ready", "version": "0.1.0"}, "models": []}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    models = tmp_path / "models"
    (models / "m" / "1").mkdir(parents=True)
    (models / "m" / "1" / "model.onnx").write_bytes(b"x")
    return Config(
        repository=RepositoryConfig(path=str(models)),
        engines=EnginesConfig(path=str(tmp_path / "engines")),
        recorder=RecorderConfig(path=str(tmp_path / "recorder" / "r.sqlite3")),
        runtime_dir=str(tmp_path / "run"),
        http=HttpConfig(port=0),
        zmq=ZmqConfig(tcp="tcp://127.0.0.1:0", events_tcp=""),
    )


def patient(config: Config, **more: Any) -> Patient:
    return Patient(config, None, **{"status": None, **more})


def one(check: Check, looked_at: Patient) -> Finding:
    (found,) = check(looked_at)
    return found


def first(check: Check, looked_at: Patient) -> Finding:
    return next(iter(check(looked_at)))


class DiskUsage(NamedTuple):
    """As `shutil.disk_usage` tells it, in bytes."""

    total: int
    used: int
    free: int


def test_a_healthy_folder_is_good_and_one_that_all_may_change_is_not(config: Config) -> None:
    assert first(doctor._permissions, patient(config)).grade == "good"
    file = Path(config.repository.path) / "m" / "1" / "model.onnx"
    file.chmod(0o666)
    found = first(doctor._permissions, patient(config))
    assert (found.grade, "everybody" in found.text) == ("warning", True)
    gone = Config(repository=RepositoryConfig(path="/nowhere"))
    assert first(doctor._permissions, patient(gone)).grade == "error"


class Modes:
    """Folders that refuse, told instead of made: a test may run as root, whom no folder refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.closed: set[Path] = set()
        monkeypatch.setattr("appliance.cli.doctor_places.os.access", self.access)

    def access(self, path: Path, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path) in self.closed)


def test_folders_that_the_appliance_writes_are_looked_at(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = Modes(monkeypatch)
    (tmp_path / "recorder").mkdir()
    _, found = doctor._permissions(patient(config))
    assert (found.grade, found.text) == ("good", "sockets, engines, recorder: can be written")
    modes.closed = {tmp_path / "recorder"}
    _, found, well = doctor._permissions(patient(config))
    assert (found.grade, found.fix) == ("error", f"chmod u+rwx {tmp_path / 'recorder'}")
    assert well.text == "sockets, engines: can be written"
    modes.closed = {tmp_path}
    grades = [(told.grade, told.text.split(" ")[1]) for told in doctor._permissions(patient(config))][1:]
    assert grades == [("error", "(sockets)"), ("error", "(engines)"), ("good", "can")]
    monkeypatch.setattr("appliance.cli.doctor_places.os.geteuid", lambda: os.getuid() + 1)
    assert [told.grade for told in doctor._permissions(patient(config))] == ["good", "note", "note", "good"]


def test_the_disk_of_the_record_is_looked_at_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {"recorder": (100 * 10**9, 0, 10**8)}
    monkeypatch.setattr(
        "appliance.cli.doctor_places.shutil.disk_usage",
        lambda path: DiskUsage(*usage.get(path.name, (100 * 10**9, 0, 50 * 10**9))),
    )
    Path(config.recorder.path).parent.mkdir()
    found = {told.text.partition(":")[0]: told for told in doctor._disk(patient(config))}
    assert {name: told.grade for name, told in found.items()} == {
        "models": "good",
        "engines": "good",
        "recorder": "warning",
    }
    assert "recorder.max_size_mb" in found["recorder"].fix


def test_a_failed_model_and_a_finding_of_the_sensors_are_named(config: Config) -> None:
    status = {
        "status": {"ready": False, "line": "0 models ready", "version": "0.1.0"},
        "models": [{"name": "m", "version": "1", "detail": "FAILED", "reason": "no such operator"}],
        "findings": [{"code": "gpu-lost", "severity": "error", "text": "GPU 0 is lost", "fix": "reboot"}],
    }
    found = list(doctor._running(patient(config, status=status)))
    assert [finding.grade for finding in found] == ["error", "error", "error"]
    assert "no such operator" in found[1].text
    assert (found[2].fix, found[2].see) == ("reboot", "operations.md#gpu-lost")


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


NO_ZMQ = ZmqConfig(enabled=False)


def test_a_port_that_somebody_else_has_is_an_error_and_ours_is_not(config: Config, listener: int) -> None:
    ill = Config(http=HttpConfig(port=listener), zmq=NO_ZMQ)
    assert one(doctor._ports, patient(ill)).grade == "error"
    assert one(doctor._ports, patient(ill, status=STATUS)).grade == "good"
    open_house = Config(http=HttpConfig(host="0.0.0.0", port=listener), zmq=NO_ZMQ)
    assert [finding.grade for finding in doctor._ports(patient(open_house, status=STATUS))] == ["good", "warning"]


@pytest.mark.parametrize("setting", ["tcp", "events_tcp"])
def test_zeromqs_ports_are_looked_at_as_well(listener: int, setting: str) -> None:
    quiet = {"tcp": "", "events_tcp": ""}
    ill = Config(http=HttpConfig(port=0), zmq=ZmqConfig(**{**quiet, setting: f"tcp://127.0.0.1:{listener}"}))
    found = one(doctor._ports, patient(ill))
    assert (found.grade, f"set zmq.{setting}" in found.fix) == ("error", True)
    assert one(doctor._ports, patient(ill, status=STATUS)).text == f"127.0.0.1:{listener} is ours"
    open_house = Config(http=HttpConfig(port=0), zmq=ZmqConfig(**{**quiet, setting: f"tcp://*:{listener}"}))
    ours, warned = doctor._ports(patient(open_house, status=STATUS))
    assert (ours.grade, warned.grade) == ("good", "warning")
    assert "ZeroMQ listens on *" in warned.text


def test_telemetry_records_are_found(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert one(doctor._telemetry, patient(config)).grade == "good"
    (tmp_path / ".cache" / "Microsoft" / "DeveloperTools" / ".onnxruntime").mkdir(parents=True)
    assert one(doctor._telemetry, patient(config)).grade == "warning"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert one(doctor._telemetry, patient(config)).grade == "error"


def test_a_damaged_engine_is_found(config: Config) -> None:
    assert one(doctor._engines, patient(config)).grade == "note"
    (Path(config.engines.path) / "m" / "abc").mkdir(parents=True)
    found = one(doctor._engines, patient(config))
    assert (found.grade, found.text[:1]) == ("warning", "1")


def test_both_packages_at_once_are_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor._packages, patient(config)).grade == "good"
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    assert one(doctor._packages, patient(config)).grade == "error"
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    assert one(doctor._packages, patient(config)).grade == "error"


def test_the_processor_can_be_used_and_the_clock_is_looked_at(config: Config) -> None:
    assert {finding.text: finding.grade for finding in doctor._providers(patient(config))}["cpu loads"] == "good"
    assert one(doctor._clock, patient(config)).check == "clock"


def test_what_workers_give_up_is_looked_at(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    full, poor = Sandbox(7, seccomp=True), Sandbox(0, seccomp=True)
    monkeypatch.setattr(Sandbox, "of_this_kernel", lambda: full)
    assert one(doctor._sandbox, patient(config)).grade == "good"
    monkeypatch.setattr(Sandbox, "of_this_kernel", lambda: poor)
    found = one(doctor._sandbox, patient(config))
    assert (found.grade, "no Landlock" in found.text) == ("note", True)
    off = msgspec.structs.replace(config, workers=WorkersConfig(sandbox=False))
    assert one(doctor._sandbox, patient(off)).grade == "warning"


def test_hardening_is_that_of_the_front_and_not_what_a_worker_has_given_up(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = {"NoNewPrivs": "1", "Seccomp": "2", "Uid": "990"}
    processes = {"30": given_up | {"PPid": "20"}, "20": {"PPid": "10"}, "10": given_up}
    monkeypatch.setattr(doctor, "_process", lambda pid: processes[str(pid)])
    looked_at = patient(config, workers=[{"pid": 30}])
    assert one(doctor._hardening, looked_at).grade == "good"
    processes["10"] = {"NoNewPrivs": "0", "Seccomp": "0", "Uid": "0"}
    found = one(doctor._hardening, looked_at)
    assert (found.grade, found.text.count(";")) == ("warning", 2)


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_patient: Patient) -> Iterator[Finding]:
        raise RuntimeError("no such file")
        yield

    def whole(_patient: Patient) -> Iterator[Finding]:
        yield Finding("whole", "error", "must be mended", "mend it")

    monkeypatch.setattr(doctor, "CHECKS", (broken, whole))
    done = CliRunner().invoke(app, ["doctor", "--url", "http://127.0.0.1:9", "--json"])
    found = {entry["check"]: entry for entry in json.loads(done.stdout)}
    assert "RuntimeError: no such file" in found["broken"]["text"]
    assert found["whole"]["fix"] == "mend it"
    assert done.exit_code == 1


def test_a_bad_configuration_is_the_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[http]\nprot = 1\n")
    monkeypatch.setenv("APPLIANCE_CONFIG", str(file))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    told = " ".join(done.stdout.split())
    assert "did you mean 'port'" in told
    assert "see operations.md#configuration-refused" in told


def test_a_record_that_was_put_away_and_one_that_does_not_record_are_found(config: Config) -> None:
    assert one(doctor._recorder, patient(config)).grade == "good"
    ill = {"recorder": {"problem": "no room: disk is full", "dropped": 7}}
    found = one(doctor._recorder, patient(config, status=ill))
    assert (found.grade, "disk is full" in found.text) == ("error", True)
    lossy = {"recorder": {"problem": "", "dropped": 7}}
    assert "7 records were lost" in one(doctor._recorder, patient(config, status=lossy)).text
    aside = Path(f"{config.recorder.path}.damaged-1-2")
    aside.parent.mkdir()
    aside.touch()
    found = one(doctor._recorder, patient(config, status={"recorder": {"problem": "", "dropped": 0}}))
    assert (found.grade, aside.name in found.text) == ("warning", True)
    off = Config(recorder=RecorderConfig(enabled=False))
    assert one(doctor._recorder, patient(off)).grade == "note"


def test_the_second_appliance_on_one_record_is_told_to_have_its_own(config: Config) -> None:
    found = one(doctor._recorder, patient(config, status={"recorder": {"problem": ANOTHERS}}))
    assert (found.grade, "make room" in found.fix, "stop the other" in found.fix) == ("error", False, True)


def test_a_damaged_record_is_found_before_the_start_that_puts_it_aside(config: Config) -> None:
    file = Path(config.recorder.path)
    file.parent.mkdir()
    file.touch()
    assert one(doctor._recorder, patient(config)).grade == "good"
    file.write_bytes(b"no database" * 1000)
    found = one(doctor._recorder, patient(config))
    assert found.grade == "warning"
    assert "file is not a database" in found.text
    assert "`appliance serve` puts the file aside" in found.fix
    assert file.read_bytes() == b"no database" * 1000


@pytest.mark.parametrize(
    ("free", "total", "words"),
    [
        (12_300_000, 64 << 20, "recorder: 12.3 MB of 67.1 MB free"),
        (0, 10**9, "recorder: 0.0 MB of 1.0 GB free"),
    ],
)
def test_the_room_on_a_small_disk_is_told_in_megabytes(
    config: Config, monkeypatch: pytest.MonkeyPatch, free: int, total: int, words: str
) -> None:
    monkeypatch.setattr("appliance.cli.doctor_places.shutil.disk_usage", lambda _: DiskUsage(total, total - free, free))
    assert words in [told.text for told in doctor._disk(patient(config))]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubNvml]:
    if reason := StubNvml.missing():
        pytest.skip(reason)
    folder = tmp_path / "nvml"
    folder.mkdir()
    stub = StubNvml(folder).start()
    for name, value in stub.environment().items():
        monkeypatch.setenv(name, value)
    yield stub
    stub.close()


def finding(code: str, subject: str) -> dict[str, Any]:
    return STATUS | {"findings": [{"code": code, "subject": subject, "severity": "error", "text": "", "fix": ""}]}


def test_a_driver_that_hangs_costs_doctor_a_moment_and_is_the_finding(
    config: Config, gpu: StubNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DRIVER_PROBE_S", 1.0)
    gpu.set("0.hang", 1)
    found = one(doctor._gpus, patient(config))
    assert (found.grade, "it hangs" in found.text, found.fix) == ("error", True, "reboot the box")
    found = one(doctor._gpus, patient(config, status=finding("sensor-silent", "nvml")))
    assert (found.grade, "not asked" in found.text) == ("note", True)


def test_what_the_running_appliance_has_told_is_not_said_twice_and_a_lost_gpu_is_not_believed(
    config: Config, gpu: StubNvml
) -> None:
    gpu.set("0.rows.failed", 1)
    here = [finding for finding in doctor._gpus(patient(config)) if finding.check == "GPU 0"]
    assert [finding.grade for finding in here] == ["error", "good"]
    told = list(doctor._gpus(patient(config, status=finding("gpu-rows-failed", "gpu.0"))))
    assert [finding.grade for finding in told] == ["good"]
    gpu.unset("0.rows.failed")
    assert list(doctor._gpus(patient(config, status=finding("gpu-lost", "gpu.0")))) == []


def test_one_check_alone_can_be_asked_for_and_a_wrong_name_lists_them() -> None:
    done = CliRunner().invoke(app, ["doctor", "--url", "http://127.0.0.1:9", "--json", "--only", "clock"])
    assert [entry["check"] for entry in json.loads(done.stdout)] == ["configuration", "clock"]
    done = CliRunner().invoke(app, ["doctor", "--only", "clocks"])
    assert done.exit_code == 2
    assert "there are running, packages" in done.stderr


def test_heat_is_named_with_its_level(config: Config) -> None:
    for level, grade in (("WARM", "warning"), ("HOT", "error"), ("CRITICAL", "error")):
        status = STATUS | {"governor": {"level": level, "reason": "GPU 0 is at 90 °C"}}
        (found,) = [one for one in doctor._running(patient(config, status=status)) if one.check == "governor"]
        assert (found.grade, found.text) == (grade, f"{level}: GPU 0 is at 90 °C")


def test_an_address_that_only_the_service_knows_is_not_looked_at_and_one_that_is_none_is_named(config: Config) -> None:
    hidden = msgspec.structs.replace(config, http=HttpConfig(host="credential:http-host", port=9))
    assert (one(doctor._ports, patient(hidden)).grade, one(doctor._ports, patient(hidden)).text.split(" is")[0]) == (
        "note",
        "http.host",
    )
    endpoints = ZmqConfig(tcp="credential:a:5570", events_tcp="credential:b")
    hidden = msgspec.structs.replace(hidden, zmq=endpoints)
    assert [told.text.split(" is")[0] for told in doctor._ports(patient(hidden))] == [
        "http.host",
        "zmq.tcp",
        "zmq.events_tcp",
    ]
    wrong = msgspec.structs.replace(config, http=HttpConfig(host="no.such.host.invalid", port=9))
    found = one(doctor._ports, patient(wrong))
    assert (found.grade, found.fix) == ("error", "mend http.host")


def test_a_models_folder_without_a_model_may_be_a_disk_that_is_not_mounted(config: Config, tmp_path: Path) -> None:
    assert list(doctor._models(patient(config))) == []
    empty = tmp_path / "mnt"
    (empty / "lost+found").mkdir(parents=True)
    (empty / ".recorder").mkdir()
    unmounted = msgspec.structs.replace(config, repository=RepositoryConfig(path=str(empty)))
    found = one(doctor._models, patient(unmounted, status=STATUS))
    assert (found.grade, found.text) == ("warning", f"0 models in {empty}: is its disk mounted?")
    gone = msgspec.structs.replace(config, repository=RepositoryConfig(path=str(tmp_path / "gone")))
    assert list(doctor._models(patient(gone))) == []
