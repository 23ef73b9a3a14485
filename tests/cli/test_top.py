"""What `top` draws from status documents, and what it prints where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from appliance.cli.top import GPU_READINGS, Screen, sparkline
from appliance.core import quantities as q


def document(success: int, **more: Any) -> dict[str, Any]:
    model = {
        "name": "digits", "version": "1", "detail": "READY", "reason": "", "engine": "", "provider": "CPUExecutionProvider",
        "success": success, "fail": 2, "pending": 3, "p50_us": 900, "p95_us": 1500, "p99_us": 2250,
    }  # fmt: skip
    return {"status": {"version": "0.1.0", "line": "1 model ready, 50 req/s"}, "models": [model]} | more


def drawn(screen: Screen) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(screen.draw())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_models_rate_is_what_came_between_two_looks() -> None:
    screen = Screen()
    screen.take(document(100), 10.0)
    screen.take(document(150), 12.0)
    text = drawn(screen)
    row = next(line for line in text.splitlines() if line.strip().startswith("digits"))
    assert row.split()[:9] == ["digits", "1", "READY", "CPUExecutionProvider", "25", "0.90", "1.50", "2.25", "3"]


def test_gpus_host_governor_and_findings_are_drawn_where_there_are_any() -> None:
    screen = Screen()
    screen.take(
        document(
            0,
            gpus=[{"index": 0, "name": "Orin", "state": "LOST", "action": "reboot"}],
            readings={"gpu.0.temperature": 91.0, "gpu.0.power": None, "host.cpu.load": 12.0},
            governor={"level": "HOT", "reason": "GPU 0 at 91 °C"},
            findings=[{"severity": "warning", "text": "reboot pending"}],
        ),
        1.0,
    )
    text = drawn(screen)
    for words in ("HOT GPU 0 at 91 °C", "Orin LOST: reboot", "CPU 12 %", "! reboot pending"):
        assert words in text
    assert "–" in text, "a reading that is missing is shown as missing"


def test_every_column_shows_what_the_sensors_give_by_its_name() -> None:
    values = {
        q.GPU_TEMPERATURE.name(0): 61.0,
        q.GPU_POWER.name(0): 71.0,
        q.GPU_CLOCK_GRAPHICS.name(0): 1981.0,
        q.GPU_UTILIZATION.name(0): 81.0,
        q.GPU_MEMORY_USED.name(0): 9.1e9,
        q.GPU_FAN.name(0, 0): 33.0,
        q.GPU_FAN.name(0, 1): 44.0,
        q.GPU_FAN.name(1, 0): 99.0,
        q.CPU_LOAD.name(): 12.0,
        q.MEMORY_AVAILABLE.name(): 3.3e9,
        q.PROCESS_RSS.name("front"): 55e6,
    }
    screen = Screen()
    gpu = {"index": 0, "name": "A2", "state": "OK", "action": ""}
    screen.take(document(0, gpus=[gpu], readings=values, processor_temperature=47.5), 1.0)
    lines = drawn(screen).splitlines()
    row = next(line for line in lines if line.strip().startswith("0 A2"))
    assert row.split()[2:8] == ["61", "71", "1981", "81", "9.1", "44"], "the fastest fan of this GPU"
    assert len(GPU_READINGS) == 6
    assert "CPU 12 %   47.5 °C   memory available 3.3 GB   front 55 MB" in "\n".join(lines)


def test_without_a_gpu_there_is_no_gpu_table() -> None:
    screen = Screen()
    screen.take(document(0), 1.0)
    assert "TEMP" not in drawn(screen)


def test_a_lost_connection_keeps_what_was_seen() -> None:
    screen = Screen()
    screen.lost("no appliance answers")
    assert "no appliance answers" in drawn(screen)
    screen.take(document(0), 1.0)
    screen.lost("no appliance answers")
    assert "digits" in drawn(screen)
    assert "no answer: no appliance answers" in drawn(screen)


def test_sparklines_go_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 7, 14]) == "▁▅█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == ""


def test_gpus_say_what_is_unusual_about_their_memory() -> None:
    screen = Screen()
    gpu = {"index": 0, "name": "A30", "state": "OK", "action": "", "mig_mode": True, "mig": [{}, {}]}
    shared = {"index": 1, "name": "GB10", "state": "OK", "action": "", "integrated": True, "mig_mode": None}
    screen.take(document(0, gpus=[gpu, shared], readings={}), 1.0)
    assert "A30 (MIG: 2 instances)" in drawn(screen)
    assert "GB10 (host's memory)" in drawn(screen)
