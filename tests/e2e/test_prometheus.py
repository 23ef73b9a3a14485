"""A real Prometheus scrapes a real appliance, evaluates the shipped rules, and answers queries about it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cli.connection import Appliance
from tests.e2e.house import LONG_S, ROOT, House

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"),
]


class Prometheus:
    """One server on a loopback port, with its data in that folder, scraping once a second."""

    def __init__(self, folder: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        shutil.copy(ROOT / "docs" / "prometheus" / "appliance.rules.yml", folder)
        example = (ROOT / "docs" / "prometheus" / "prometheus.yml").read_text()
        config = example.replace("127.0.0.1:8000", target).replace("interval: 15s", "interval: 1s")
        (folder / "prometheus.yml").write_text(config)
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
        self.process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={self.address}"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def get(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def value(self, expression: str) -> float:
        """The value of that expression, once there is one: a scrape comes every second, and nothing tells of it."""
        end = time.monotonic() + LONG_S
        while time.monotonic() < end:
            try:
                found = self.get("query", query=expression)["result"]
            except (urllib.error.URLError, ConnectionError):
                found = []  # it does not listen yet
            if found:
                return float(found[0]["value"][1])
            time.sleep(0.2)
        raise AssertionError(f"no value for {expression}; targets: {self.get('targets')['activeTargets']}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(LONG_S)


@pytest.fixture
def prometheus(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    house.loopback("echo", shape="4")
    house.start()
    made = Prometheus(tmp_path_factory.mktemp("prometheus"), house.http.removeprefix("http://"))
    yield made
    made.close()
    house.stop()


def test_prometheus_scrapes_it_and_answers_queries_about_it(house: House, prometheus: Prometheus) -> None:
    appliance = Appliance(house.http)
    document = {"inputs": [{"name": "data", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    for _ in range(3):
        appliance.post("/v2/models/echo/infer", document)
    assert prometheus.value('nv_inference_request_success{model="echo",job="appliance"} > 2') == 3
    assert prometheus.value("appliance_ready") == 1
    assert prometheus.value('up{job="appliance"}') == 1
    assert prometheus.value('appliance_model_state{model="echo",state="READY"}') == 1
    assert prometheus.value('appliance_arena_slots{model="echo"}') == 2
    assert prometheus.value('appliance_request_duration_seconds_count{model="echo"} > 2') == 3
    assert (
        0 < prometheus.value('histogram_quantile(0.99, appliance_request_duration_seconds_bucket{model="echo"})') < 60
    )
    assert prometheus.value("appliance_recorder_ok") == 1
    assert prometheus.value("appliance_governor_level") == 0
    assert prometheus.value("appliance_host_memory_total_bytes") > 1 << 28
    assert prometheus.value("nv_cpu_memory_used_bytes") > 1 << 20
    assert prometheus.value("appliance_readings_age_seconds") < 30
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    assert [rule["name"] for rule in rules if rule.get("lastError")] == []
    assert prometheus.get("metadata", metric="nv_inference_count")["nv_inference_count"][0]["type"] == "counter"


def test_promtool_has_nothing_to_complain_of_but_tritons_names(house: House) -> None:
    """Names that begin with nv_ are Triton's and stay as its tools know them: they are left out of the check."""
    house.loopback("echo", shape="4")
    house.start()
    text = Appliance(house.http).request("GET", "/metrics")[1].decode()
    house.stop()
    own = "".join(line for line in text.splitlines(keepends=True) if not re.match(r"(# (HELP|TYPE) )?nv_", line))
    done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
