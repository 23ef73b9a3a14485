"""A GPU that is lost under a running appliance, as the loopback engine says it on command: real processes, real sockets."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections import Counter

import pytest

from appliance.cli.connection import Appliance
from appliance.client import Client
from appliance.core.errors import ApplianceError, ErrorCode
from tests.e2e.house import LONG_S, House
from tests.e2e.test_adversity import Load, command

SLOW = {"crash_limit": 3, "backoff_initial_s": 0.3, "backoff_max_s": 0.3}


def ready(house: House, path: str) -> bool:
    """What a load balancer asks: the status alone counts."""
    try:
        with urllib.request.urlopen(f"{house.http}{path}", timeout=LONG_S) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


def all_ready(house: House) -> list[bool]:
    return [ready(house, "/v2/models/whip/ready"), ready(house, "/v2/health/ready")]


def test_requests_in_hand_are_answered_once_and_the_model_is_back_after_its_pause(house: House) -> None:
    house.loopback("whip", shape="1", commands="true")
    house.settings["workers"] = SLOW
    house.start()
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(text: str) -> None:
        with Client(house.ipc, timeout_s=LONG_S) as client:
            try:
                client.infer("whip", command(text))
                found = f"{text}:OK"
            except ApplianceError as error:
                found = f"{text}:{error.code}"
        with lock:
            outcomes[found] += 1

    assert all_ready(house) == [True, True]
    # the first keeps the worker busy, so that the others share a batch with the fault
    texts = ["delay 200", "", "", "fault", "", ""]
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    lost = house.wait_for("worker.lost", model="whip")
    assert lost["reason"] == "loopback was told that its device is lost"
    assert lost["device_fault"] is True
    assert all_ready(house) == [False, False], "nobody answers for it now"
    back = house.wait_for("worker.replaced", model="whip")
    assert back["restarts"] == 1
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive(), "a request was never answered"
    assert outcomes == {"delay 200:OK": 1, ":OK": 4, f"fault:{ErrorCode.ENGINE_FAULT}": 1}
    # run once more and alone, the request met the fault again
    house.wait_for("worker.replaced", model="whip", restarts=2)
    assert all_ready(house) == [True, True]


def test_a_model_that_meets_fault_after_fault_is_quarantined_with_the_device_s_words(house: House) -> None:
    house.loopback("whip", shape="1", commands="true")
    house.settings["workers"] = {"crash_limit": 2, "backoff_initial_s": 0.01}
    house.start()
    with Client(house.ipc, timeout_s=LONG_S) as client:
        for _ in range(2):
            with pytest.raises(ApplianceError):
                client.infer("whip", command("fault"))
    state = house.wait_for("model.state", model="whip", state="FAILED")
    assert "quarantined after 2 deaths" in state["reason"]
    assert "its device is lost" in state["reason"]


def test_a_fault_of_one_model_in_a_shared_worker_is_no_mark_against_the_other(house: House) -> None:
    shared = '[worker]\nisolation = "device"\n'
    house.loopback("whip", shared, shape="1", commands="true")
    house.loopback("echo", shared, shape="4")
    house.settings["workers"] = {"crash_limit": 2, "backoff_initial_s": 0.01}
    house.start()
    with Load(house, "echo", "zmq") as load, Client(house.ipc, timeout_s=LONG_S) as client:
        for _ in range(2):
            with pytest.raises(ApplianceError):
                client.infer("whip", command("fault"))
            load.wait_for_more(5)
        house.wait_for("model.state", model="whip", state="FAILED")
        load.wait_for_more(20)
    assert set(load.answers) <= {"OK", "ENGINE_FAULT"}, load.answers
    assert load.answers["OK"] > 25
    assert load.wrong == 0
    index = {entry["name"]: entry for entry in Appliance(house.http).post("/v2/repository/index")}
    assert index["echo"]["state"] == "READY"
