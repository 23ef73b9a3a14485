"""The whole page with everything connected, and with any readings at all: valid, plain, no name twice, nothing made up."""

from __future__ import annotations

import re
import shutil
import subprocess

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from appliance.core import quantities as q
from appliance.core.readings import Finding, Gpu, GpuState, MigInstance, Reading, Severity, Snapshot, missing
from appliance.core.states import ModelState
from appliance.observability.energy_totals import EnergyTotals
from appliance.observability.families import Family, Sheet, plain
from appliance.observability.metrics import FAMILIES, Metrics
from appliance.observability.metrics_house import ZMQ
from appliance.observability.metrics_readings import COLUMNS, THROTTLE_REASONS
from appliance.sensors.nvml_tables import THROTTLE
from appliance.transports.zmq.counters import Counters
from tests.observability import populated

PERF_ANALYZER = re.compile(r'\n(nv_\w+)\{gpu_uuid="([^"]+)"\} (\d+\.?\d*)(?=\n)')
"""perf_analyzer's metrics_manager reads GPU metrics by this expression: this one label, digits and a point."""


def samples(made: Metrics) -> dict[str, float]:
    lines = [line for line in made.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_every_family_that_is_declared_can_be_rendered_and_no_other_is() -> None:
    typed = re.findall(r"^# TYPE (\S+) (\S+)$", populated.metrics().render().decode(), re.MULTILINE)
    assert sorted(typed) == sorted((family.name, family.kind) for family in FAMILIES)


def test_what_is_not_connected_has_no_series() -> None:
    text = Metrics(populated.Source()).render().decode()
    assert not re.search("appliance_(gpu|host|http|zmq|governor|recorder|energy)_", text)
    assert "nv_cpu" not in text


def test_perf_analyzer_reads_all_six_numbers_of_a_gpu() -> None:
    found = {name: (uuid, value) for name, uuid, value in PERF_ANALYZER.findall(populated.metrics().render().decode())}
    assert {name: float(value) for name, (_, value) in found.items()} == {
        "nv_gpu_utilization": 0.5,
        "nv_gpu_memory_total_bytes": 500.5,
        "nv_gpu_memory_used_bytes": 500,
        "nv_gpu_power_usage": 500,
        "nv_gpu_power_limit": 500.5,
        "nv_energy_consumption": 500,
    }
    assert {uuid for uuid, _ in found.values()} == {populated.UUID}


def test_readings_come_in_base_units_with_labels() -> None:
    found = samples(populated.metrics())
    assert found['appliance_gpu_temperature_celsius{gpu="0"}'] == 75
    assert found['appliance_gpu_clock_sm_hertz{gpu="0"}'] == 500e6
    assert found['appliance_gpu_fan_ratio{gpu="0",fan="0"}'] == 0.75
    assert found['appliance_gpu_throttled_hw_thermal_seconds_total{gpu="0"}'] == 500
    assert found["appliance_host_cpu_load_ratio"] == 0.5
    assert found["nv_cpu_utilization"] == 0.5
    assert found['appliance_gpu_throttle{gpu="0",reason="SwPowerCap"}'] == 1
    assert found['appliance_gpu_throttle{gpu="0",reason="HwThermalSlowdown"}'] == 0
    assert found['appliance_finding{code="driver-drift",severity="warning",subject="driver"}'] == 1
    assert found['appliance_findings{severity="critical"}'] == 0
    assert found["appliance_readings_age_seconds"] == 0.5


def test_what_is_missing_is_named_and_is_no_zero() -> None:
    found = samples(populated.metrics())
    assert found['appliance_reading_missing{reading="gpu.0.fan.7"}'] == 1
    assert not [series for series in found if 'fan="7"' in series]


def test_a_lost_gpu_shows_its_state_and_no_numbers() -> None:
    found = samples(populated.metrics(populated.lost_gpu()))
    assert found['appliance_gpu_state{gpu="0",state="LOST"}'] == 1
    assert found['appliance_gpu_state{gpu="0",state="OK"}'] == 0
    assert not [series for series in found if series.startswith(("nv_gpu", "appliance_gpu_power", "appliance_gpu_thr"))]
    assert 'appliance_gpu_processes{gpu="0"}' not in found


def test_the_governor_is_a_number_and_a_state() -> None:
    found = samples(populated.metrics())
    assert found["appliance_governor_level"] == 2
    assert [found[f'appliance_governor_state{{level="{level.name}"}}'] for level in populated.Level] == [0, 0, 1, 0]
    assert found['appliance_governor_headroom_celsius{device="gpu:0"}'] == 5.5
    assert 'appliance_governor_headroom_celsius{device="host"}' not in found


def test_energy_is_split_by_part_and_model_and_nothing_is_lost() -> None:
    totals = EnergyTotals()
    for _ in range(3):
        totals.add(populated.Window())
    made = populated.metrics()
    made.energy = totals
    found = samples(made)
    device = 'device="gpu:0",source="nvml",estimated="false",within=""'
    parts = {
        part: found[f'appliance_energy_joules_total{{{device},part="{part}"}}']
        for part in ("idle", "unattributed", "active")
    }
    assert parts == {"idle": 60, "unattributed": 4.5, "active": 90.75}
    assert found[f'appliance_model_energy_joules_total{{{device},model="digits",version="3"}}'] == 90
    assert found[f'appliance_model_energy_joules_total{{{device},model="defects",version="1"}}'] == 0.75


def test_the_recorder_and_its_last_commit() -> None:
    found = samples(populated.metrics())
    assert (found["appliance_recorder_ok"], found["appliance_recorder_commit_age_seconds"]) == (1, 0.75)
    made = populated.metrics()
    made.recorder = lambda: populated.Recorded(problem="the disk is full", committed_at_s=None)
    found = samples(made)
    assert found["appliance_recorder_ok"] == 0
    assert "appliance_recorder_commit_age_seconds" not in found


@pytest.mark.parametrize(
    ("states", "shown", "ready"),
    [
        ([ModelState.FAILED], "FAILED", 0),
        ([ModelState.READY], "READY", 1),
        ([ModelState.DRAINING, ModelState.READY], "READY", 1),
        ([ModelState.READY, ModelState.BUILDING], "READY", 1),
        ([ModelState.UNLOADED, ModelState.BUILDING], "BUILDING", 0),
    ],
)
def test_of_two_generations_of_a_version_the_one_that_serves_is_shown(
    states: list[ModelState], shown: str, ready: int
) -> None:
    class Reloading(populated.Source):
        def snapshot(self) -> dict[str, object]:
            return {"models": [populated.document(state) for state in states], "status": {}}

    found = samples(Metrics(Reloading()))
    on = [series for series, value in found.items() if series.startswith("appliance_model_state") and value == 1]
    assert on == [f'appliance_model_state{{model="digits",version="3",state="{shown}"}}']
    assert found['appliance_model_ready{model="digits",version="3"}'] == ready


def test_a_ready_version_without_a_worker_is_not_ready() -> None:
    class Dead(populated.Source):
        def snapshot(self) -> dict[str, object]:
            return {"models": [populated.document(ModelState.READY, workers=0)], "status": {}}

    assert samples(Metrics(Dead()))['appliance_model_ready{model="digits",version="3"}'] == 0


def test_every_counter_of_the_zeromq_face_has_a_metric() -> None:
    assert set(ZMQ) == set(msgspec.structs.asdict(Counters()))


def test_the_throttle_reasons_are_those_of_the_sensors() -> None:
    assert set(THROTTLE_REASONS) == {name for _, name in THROTTLE}


TEXT = st.text(max_size=12)
NAMES = st.sampled_from([quantity.name(*populated.labels_of(quantity)) for quantity in q.QUANTITIES.values()])
GPUS = st.builds(
    Gpu,
    st.integers(0, 2),
    TEXT,
    TEXT,
    st.booleans(),
    st.sampled_from(GpuState),
    TEXT,
    TEXT,
    st.lists(TEXT, max_size=3).map(tuple),
    st.just(()),
    st.lists(
        st.builds(MigInstance, st.integers(0, 3), TEXT, st.none() | st.integers(0, 2**50), st.none()), max_size=2
    ).map(tuple),
)
SNAPSHOTS = st.builds(
    Snapshot,
    st.integers(0, 9),
    st.floats(0, 1e9),
    st.floats(0, 2e9),
    st.floats(0, 10),
    st.dictionaries(
        NAMES | TEXT, st.builds(Reading, st.none() | st.floats(), st.just("x"), st.floats(0, 1e9)), max_size=12
    ),
    st.lists(GPUS, max_size=3).map(tuple),
    st.lists(st.builds(Finding, TEXT, st.sampled_from(Severity), TEXT, TEXT, TEXT), max_size=3).map(tuple),
)


@settings(max_examples=40, deadline=None)
@given(SNAPSHOTS)
def test_any_snapshot_is_valid_text_without_a_series_twice(snapshot: Snapshot) -> None:
    text = populated.metrics(snapshot).render().decode()
    families = list(text_string_to_metric_families(text))
    series = [(s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples]
    assert len(series) == len(set(series))
    for line in text.split("\n"):
        if line.startswith("nv_"):
            assert re.fullmatch(r"-?\d+(\.\d+)?", line.rpartition(" ")[2]), line


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
def test_a_plain_number_is_the_same_number_in_digits(value: float) -> None:
    assert re.fullmatch(r"-?\d+(\.\d+)?", plain(value))
    assert float(plain(value)) == float(value)


def test_what_is_no_number_is_no_sample() -> None:
    sheet, family = Sheet(), Family("x", "gauge", "x")
    for value in (None, float("nan"), float("inf")):
        sheet.add(family, value)
    assert sheet.render() == b""


def test_every_unit_of_the_table_has_a_name_and_every_reading_its_family() -> None:
    assert set(COLUMNS) == set(q.QUANTITIES)
    for template, column in COLUMNS.items():
        assert column.family.name.endswith("_total") == (q.QUANTITIES[template].kind == "counter")


def test_a_missing_reading_of_the_table_is_missing_and_of_no_table_is_nothing() -> None:
    gone = missing(q.GPU_POWER, "no", 0.0)
    snapshot = Snapshot(1, 0.0, 0.0, 0.0, {"gpu.0.power": gone, "gpu.0.colour": gone})
    found = [series for series in samples(populated.metrics(snapshot)) if "missing" in series]
    assert found == ['appliance_reading_missing{reading="gpu.0.power"}']


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_finds_nothing_to_complain_of_but_tritons_own_names() -> None:
    """Names that begin with nv_ are Triton's, must stay as its tools know them, and break the rules: they are left out."""
    lines = populated.metrics().render().decode().splitlines(keepends=True)
    own = "".join(line for line in lines if not re.match(r"(# (HELP|TYPE) )?nv_", line))
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=own, capture_output=True, text=True, check=False, timeout=60
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
