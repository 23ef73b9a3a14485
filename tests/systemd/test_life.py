"""Start, status, reload, watchdog, kill, stop, wrong configuration, power cut: on a real systemd."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.systemd.box import ENVIRONMENT, LONG_S, Box, why_no_memory_limits, why_not

pytestmark = [pytest.mark.slow]

ASK = """
import sys, json, http.client
body = {"inputs": [{"name": "data", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
if sys.argv[2:]:
    body["inputs"].append({"name": "command", "datatype": "BYTES", "shape": [1, 1], "data": [sys.argv[2]]})
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
connection.request("POST", f"/v2/models/{sys.argv[1]}/infer", json.dumps(body))
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


def ask(box: Box, model: str = "plain", command: str | None = None) -> str:
    return box.python(ASK, model, *([] if command is None else [command]))


def worker_pid(box: Box, model: str) -> str:
    workers = json.loads(box.cli("ps", "--json").stdout)
    return str(next(worker["pid"] for worker in workers if worker["model"] == model))


def test_it_starts_and_says_in_one_line_how_it_is(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    assert box.show("ActiveState") == "active"
    assert box.show("StatusText") == "2 models ready, 0 req/s"
    assert ask(box).startswith("200")
    assert box.show("WatchdogUSec") == "30s"


def test_a_start_that_takes_longer_than_the_limit_goes_on_while_models_load(box: Box) -> None:
    box.loopback("slow", "[worker]\nload_budget_ms = 4000\n", load="hang")
    box.dropin("[Service]\nTimeoutStartSec=2s\n")
    box.run("systemctl", "start", "appliance.service")
    assert "1 failed" in box.show("StatusText")


def test_a_reload_loads_what_is_new_and_returns_when_it_serves(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    pid = box.show("MainPID")
    box.loopback("second", shape="2")
    box.run("systemctl", "reload", "appliance.service")
    assert ask(box, "second").startswith("200")
    assert box.show("MainPID") == pid


def test_a_bad_configuration_is_refused_by_reload_with_the_reason_and_the_old_one_serves_on(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    pid = box.show("MainPID")
    box.configure("[http]\nprot = 8000\n")
    done = box.run("systemctl", "reload", "appliance.service", check=False)
    assert done.returncode != 0
    assert box.show("MainPID") == pid
    assert box.show("ActiveState") == "active"
    assert ask(box).startswith("200")
    refused = box.journal("EVENT=config.reload_refused", "MESSAGE_ID=9f1d2c6b4a3e4f0c8a53d8a1b6c7e005")
    assert "unknown key 'http.prot'" in refused[-1]["REASON"]
    assert "did you mean" in "".join(entry["MESSAGE"] for entry in box.journal("-u", "appliance.service", "-n", "20"))
    box.configure("")
    box.run("systemctl", "reload", "appliance.service")


def test_a_model_that_cannot_be_loaded_makes_reload_fail_and_disturbs_nobody(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    box.loopback("broken", load="fail")
    assert box.run("systemctl", "reload", "appliance.service", check=False).returncode != 0
    assert ask(box).startswith("200")
    failed = box.journal("MODEL=broken", "STATE=FAILED", "MESSAGE_ID=9f1d2c6b4a3e4f0c8a53d8a1b6c7e00a")
    assert "told to fail" in failed[-1]["REASON"]


def test_a_stop_while_a_reload_waits_for_a_model_is_a_stop_in_good_order(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    box.loopback("hanging", "[worker]\nload_budget_ms = 60000\n", load="hang")
    box.run("systemctl", "reload", "--no-block", "appliance.service")
    deadline = time.monotonic() + LONG_S
    while not box.journal("MODEL=hanging", "STATE=LOADING"):
        assert time.monotonic() < deadline
    assert box.show("ActiveState") == "reloading"
    box.run("systemctl", "stop", "appliance.service")
    assert (box.show("ActiveState"), box.show("Result")) == ("inactive", "success")


def test_a_models_folder_whose_disk_comes_late_is_waited_for_and_says_so(box: Box) -> None:
    box.run("sh", "-c", "rm -rf /var/lib/appliance/models && ln -s /nodisk/models /var/lib/appliance/models")
    box.run("systemctl", "start", "appliance.service", check=False)
    box.wait_until("SubState", "auto-restart")
    assert (box.show("ExecMainStatus"), box.show("ActiveState")) == ("75", "activating")
    assert box.show("StatusText").endswith("is not there; is its disk mounted, or repository.path wrong?")
    done = box.cli("doctor", "--only", "running", check=False)
    assert (done.returncode, "is its disk mounted" in " ".join(done.stdout.split())) == (1, True), done.stdout
    box.run("sh", "-c", "mkdir -p /nodisk/models && mv /nodisk /disk-that-comes && ln -s /disk-that-comes /nodisk")
    box.wait_until("ActiveState", "active")
    box.run("systemctl", "stop", "appliance.service")
    box.run("sh", "-c", "rm /var/lib/appliance/models; ln -s /home/alice/models /var/lib/appliance/models")
    box.run("systemctl", "start", "appliance.service", check=False)
    box.wait_until("SubState", "auto-restart")
    assert "ProtectHome= hides /home" in box.show("StatusText")
    box.run("systemctl", "stop", "appliance.service")
    box.run("sh", "-c", "rm /var/lib/appliance/models /nodisk && systemd-tmpfiles --create appliance.conf")


def test_a_wrong_configuration_is_not_started_again_and_status_says_why(box: Box) -> None:
    box.configure('[http]\nport = "eighty"\n')
    box.run("systemctl", "start", "appliance.service", check=False)
    assert box.show("ActiveState") == "failed"
    assert box.show("ExecMainStatus") == "78"
    assert box.show("NRestarts") == "0"
    status = box.run("systemctl", "status", "--no-pager", "appliance.service", check=False).stdout
    assert "appliance.toml:2: 'http.port' is 'eighty'" in status.split("Status:")[1]


def test_a_hung_loop_is_ended_by_the_watchdog_and_serves_again(box: Box) -> None:
    box.dropin("[Service]\nWatchdogSec=2s\n")
    box.run("systemctl", "start", "appliance.service")
    pid = box.show("MainPID")
    box.run("sh", "-c", f"kill -STOP {pid}")
    box.wait_until("NRestarts", "1")
    box.wait_until("ActiveState", "active")
    assert box.show("MainPID") != pid
    assert ask(box).startswith("200")


def test_a_hung_worker_is_ended_and_replaced_and_the_others_do_not_notice(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    pid, worker = box.show("MainPID"), worker_pid(box, "echo")
    assert ask(box, "echo", "hang").startswith("500")
    assert ask(box).startswith("200")
    assert ask(box, "echo", "").startswith("200")
    assert worker_pid(box, "echo") != worker
    assert box.show("MainPID") == pid
    lost = box.journal("EVENT=worker.lost", "MODEL=echo", f"WORKER_PID={worker}")
    assert "budget of 0.5 s" in lost[-1]["REASON"]
    explained = box.run("journalctl", "-x", "--no-pager", f"WORKER_PID={worker}").stdout
    assert "A worker of model echo has ended" in explained


def test_a_required_model_that_answers_nobody_for_long_makes_it_begin_anew(box: Box) -> None:
    """The template is stopped and the worker killed: nothing below can mend that."""
    box.configure('[repository]\nrequired = ["echo"]\n[workers]\nstall_limit_s = 2\n')
    box.run("systemctl", "start", "appliance.service")
    pid = box.show("MainPID")
    worker = worker_pid(box, "echo")
    template = Path(f"/proc/{box.pid}/root/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1]
    box.run("sh", "-c", f"kill -STOP {template}; kill -KILL {worker}")
    box.wait_until("NRestarts", "1")
    box.wait_until("ActiveState", "active")
    assert box.show("MainPID") != pid
    stalled = box.journal("EVENT=watchdog.stalled")
    assert "echo:1 is READY and has answered nobody" in stalled[-1]["REASON"]
    assert ask(box, "echo", "").startswith("200")


def test_a_killed_front_is_back_in_seconds_and_clients_wait(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    box.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "appliance.service")
    assert ask(box).startswith("200")
    assert box.show("NRestarts") == "1"


def test_a_killed_worker_costs_no_request(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    load = box.start_load("http", model="plain")
    for _ in range(3):
        box.run("sh", "-c", f"kill -KILL {worker_pid(box, 'plain')}")
        box.wait_until("ActiveState", "active")
    result = box.end_load(load)
    assert result["failed"] == 0, result
    assert box.show("NRestarts") == "0"


def test_a_stop_under_load_answers_what_was_accepted(box: Box) -> None:
    box.loopback("slow", "[worker]\nrun_budget_ms = 30000\n", shape="2", commands="true")
    box.run("systemctl", "start", "appliance.service")
    slow = subprocess.Popen(
        # long enough to be seen at work on a machine that is busy with other things
        box.command("/usr/lib/appliance/bin/python", "-c", ASK, "slow", "delay 4000"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + LONG_S
    while "BUSY" not in box.cli("ps", "--json").stdout:
        assert time.monotonic() < deadline
    box.run("systemctl", "stop", "appliance.service")
    assert slow.communicate(timeout=LONG_S)[0].startswith("200")
    assert box.show("Result") == "success"
    assert box.show("ExecMainStatus") == "0"


def test_credentials_reach_the_configuration_and_nobody_else(box: Box) -> None:
    box.write("/etc/appliance/secrets/host", "127.0.0.1\n")
    box.run("chmod", "0400", "/etc/appliance/secrets/host")
    box.configure('[http]\nhost = "credential:http-host"\n')
    box.run("systemctl", "start", "appliance.service", check=False)
    assert box.show("ExecMainStatus") == "78"
    assert "LoadCredential=http-host" in box.show("StatusText")
    box.dropin("[Service]\nLoadCredential=http-host:/etc/appliance/secrets/host\n")
    box.run("systemctl", "start", "appliance.service")
    assert ask(box).startswith("200")
    assert "credential:http-host" in box.cli("config", "show", "--json").stdout
    box.run("systemctl", "reload", "appliance.service")


def as_user(box: Box, user: str, *command: str) -> int:
    line = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env", *command]
    return box.run(*line, check=False).returncode


@pytest.fixture
def people(box: Box) -> Box:
    """The appliance runs; `operator1` is in its group, `stranger1` is not."""
    box.run("systemctl", "start", "appliance.service")
    box.run("sh", "-c", "id operator1 || useradd -G appliance operator1; id stranger1 || useradd stranger1")
    return box


def test_members_of_the_group_load_models_without_root_and_others_do_not(people: Box) -> None:
    command = "/usr/lib/appliance/bin/appliance"
    for verb in ("unload", "load"):
        line = (command, "models", verb, "plain", "--url", "unix:/run/appliance/http.sock")
        assert as_user(people, "stranger1", *line) != 0
        assert ("plain" in people.cli("ps", "--json").stdout) is (verb == "unload")
        assert as_user(people, "operator1", *line) == 0
        assert ("plain" in people.cli("ps", "--json").stdout) is (verb == "load")
    assert as_user(people, "operator1", "touch", "/var/lib/appliance/models/mine") == 0
    assert as_user(people, "stranger1", "touch", "/var/lib/appliance/models/theirs") != 0
    assert as_user(people, "operator1", "test", "-r", "/var/lib/appliance/recorder.sqlite3") == 0
    assert as_user(people, "stranger1", "ls", "/var/lib/appliance") != 0


def test_members_of_the_group_reload_and_restart_this_service_and_no_other(people: Box) -> None:
    if people.run("sh", "-c", "test -x /usr/lib/polkit-1/polkitd", check=False).returncode:
        pytest.skip("needs polkitd in the tree")
    for verb in ("reload", "restart"):
        line = ("systemctl", "--no-ask-password", verb, "appliance.service")
        assert as_user(people, "stranger1", *line) != 0
        assert as_user(people, "operator1", *line) == 0
    assert as_user(people, "operator1", "systemctl", "--no-ask-password", "restart", "systemd-journald.service") != 0
    assert as_user(people, "operator1", "systemctl", "--no-ask-password", "mask", "appliance.service") != 0


def test_boxes_run_side_by_side_and_know_nothing_of_each_other(box: Box) -> None:
    box.run("systemctl", "start", "appliance.service")
    other = Box()
    try:
        other.start()
        other.loopback("plain", shape="2")
        other.run("systemctl", "start", "appliance.service")
        box.run("systemctl", "stop", "appliance.service")
        assert ask(other).startswith("200")
        assert box.show("ActiveState") == "inactive"
        assert other.run("hostname").stdout == box.run("hostname").stdout
        assert other.run("cat", "/etc/machine-id").stdout != box.run("cat", "/etc/machine-id").stdout
    finally:
        other.remove()


def test_it_comes_up_by_itself_after_a_power_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := why_not():
        pytest.skip(reason)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        box = Box(state=Path(folder))
        try:
            box.start()
            box.loopback("plain", shape="2")
            box.run("systemctl", "enable", "--now", "appliance.service")
            assert ask(box).startswith("200")
            load = box.start_load("http", model="plain")
            box.stop()
            load.kill()
            load.wait()
            assert load.stdin is not None
            assert load.stdout is not None
            load.stdin.close()
            load.stdout.close()
            box.start()
            box.wait_until("ActiveState", "active")
            assert ask(box).startswith("200")
        finally:
            box.remove()


def test_a_worker_that_eats_all_memory_ends_alone(box: Box) -> None:
    if reason := why_no_memory_limits():
        pytest.skip(reason)
    other = Box(memory=True)
    try:
        other.start()
        other.loopback("plain", shape="2")
        other.loopback("hungry", shape="2", commands="true")
        other.dropin("[Service]\nMemoryMax=600M\nMemorySwapMax=0\n")
        other.run("systemctl", "start", "appliance.service")
        pid = other.show("MainPID")
        assert ask(other, "hungry", "allocate 2000000000").startswith("500")
        assert other.show("MainPID") == pid
        assert other.show("NRestarts") == "0"
        assert ask(other).startswith("200")
        lost = other.journal("EVENT=worker.lost", "MODEL=hungry")
        assert "SIGKILL" in lost[-1]["REASON"]
    finally:
        other.remove()
