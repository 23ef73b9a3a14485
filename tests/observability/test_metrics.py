"""What Prometheus and perf_analyzer read: Triton's names exactly, plain numbers, every name once."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from appliance.core.description import ModelStatistics, WorkerDescription
from appliance.core.request import ModelName, Version
from appliance.observability.metrics import FAMILIES, Metrics

LINE = re.compile(r'[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? \d+(\.\d+)?')
"""perf_analyzer's own expression reads digits and a point: an exponent would be cut off."""


class Source:
    def __init__(self) -> None:
        self.model = ModelStatistics(
            ModelName("digits"), Version("3"), inference_count=9_000_000_000, execution_count=3
        )
        self.model.success.add(8_000_000_000_000_000, 7)
        self.model.queue.add(1_999)
        self.model.compute_infer.add(5_000)
        self.model.failures["REJECTED"] = 2
        self.model.pending = 4

    def statistics(self) -> list[ModelStatistics]:
        return [self.model]

    def workers(self) -> list[WorkerDescription]:
        return [
            WorkerDescription("digits", "3", instance, 100 + instance, "READY", "CPU", 1, 123_456_789_012, 50, 8)
            for instance in (0, 1)
        ]

    def refusals(self) -> dict[tuple[str, str], int]:
        return {("digits", "RESOURCE_EXHAUSTED"): 3, ("", "NOT_FOUND"): 1}

    def snapshot(self) -> dict[str, Any]:
        model = {"name": "digits", "version": "3", "detail": "READY", "workers": 2, "instances": 2, "restarts": 1}
        return {"models": [model], "status": {"uptime_s": 12.5, "ready": True, "events": {"model.state": 3}}}


class Http:
    statuses = {200: 10, 413: 1}  # noqa: RUF012 - a stand-in
    refusals = {"body_too_large": 1}  # noqa: RUF012
    bytes_in_flight = 4096
    connections = 2


def render() -> str:
    rendered = Metrics(Source())
    rendered.http = Http()
    return rendered.render().decode()


def samples(text: str) -> dict[str, float]:
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines(text))}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_tritons_counters_have_tritons_names_and_labels() -> None:
    found = samples(render())
    model = '{model="digits",version="3"}'
    assert found[f"nv_inference_request_success{model}"] == 7
    assert found['nv_inference_request_failure{model="digits",version="3",reason="REJECTED"}'] == 2
    assert found[f"nv_inference_count{model}"] == 9_000_000_000
    assert found[f"nv_inference_exec_count{model}"] == 3
    assert found[f"nv_inference_pending_request_count{model}"] == 4
    assert found[f"nv_inference_request_duration_us{model}"] == 8_000_000_000_000
    assert found[f"nv_inference_queue_duration_us{model}"] == 1
    assert found[f"nv_inference_compute_infer_duration_us{model}"] == 5
    assert f"nv_inference_compute_input_duration_us{model}" in found
    assert f"nv_inference_compute_output_duration_us{model}" in found


def test_request_times_are_a_histogram_whose_buckets_add_up() -> None:
    source = Source()
    for us in (50, 900, 900, 20_000):
        source.model.request_times.add(us)
    families = {family.name: family for family in text_string_to_metric_families(Metrics(source).render().decode())}
    family = families["appliance_request_duration_seconds"]
    assert family.type == "histogram"
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert buckets["6.4e-05"] == 1
    assert buckets["0.001024"] == 3
    assert buckets["+Inf"] == 4
    assert [sample.value for sample in family.samples if sample.name.endswith("_count")] == [4]
    assert list(buckets.values()) == sorted(buckets.values())


def test_the_appliances_own_metrics() -> None:
    found = samples(render())
    assert found["appliance_uptime_seconds"] == 12.5
    assert found["appliance_ready"] == 1
    assert found['appliance_events_total{topic="model.state"}'] == 3
    assert found['appliance_worker_resident_memory_bytes{model="digits",version="3",worker="1"}'] == 123_456_789_012
    assert found['appliance_worker_restarts_total{model="digits",version="3"}'] == 1
    assert found['appliance_http_responses_total{code="413"}'] == 1
    assert found['appliance_http_refusals_total{reason="body_too_large"}'] == 1
    assert found["appliance_http_connections"] == 2
    assert found["appliance_http_bytes_in_flight"] == 4096


def test_every_line_is_plain() -> None:
    for line in lines(render()):
        assert LINE.fullmatch(line), line


def test_prometheus_reads_it_and_every_name_stands_once() -> None:
    text = render()
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))
    typed = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len(typed) == len({name for name, _ in typed})
    assert ("nv_inference_count", "counter") in typed
    assert ("appliance_events_total", "counter") in typed
    assert ("nv_inference_pending_request_count", "gauge") in typed


def test_a_label_with_quotes_and_newlines_is_escaped() -> None:
    source = Source()
    source.model.name = ModelName('a"b\nc\\')
    text = Metrics(source).render().decode()
    names = {
        sample.labels["model"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "model" in sample.labels
    }
    assert 'a"b\nc\\' in names


def test_reading_twice_reads_anew() -> None:
    source = Source()
    rendered = Metrics(source)
    before = samples(rendered.render().decode())
    source.model.inference_count += 1
    after = samples(rendered.render().decode())
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {'nv_inference_count{model="digits",version="3"}'}


def test_a_name_is_defined_in_one_place() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
