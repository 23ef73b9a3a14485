"""The recorder: what is recorded is read back, whatever happens to the process, the file, the clock or the disk."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.core.audit import BEGUN_ANEW
from appliance.core.energy import EnergyWindow, ModelShare
from appliance.core.errors import ApplianceError
from appliance.core.history import TIERS
from appliance.recording import bridge
from appliance.recording.file import is_damage, is_full
from appliance.recording.reader import RecordReader
from appliance.recording.recorder import Recorder
from appliance.recording.writer import Action, Item, RecordedEvent, Sample, Writer

MB = 1 << 20
WALL = 1_800_000_000.0


def writer(path: Path, max_bytes: int = 64 * MB, run_id: str = "run") -> Writer:
    return Writer(path, max_bytes, run_id=run_id, boot_id="boot")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recorder.sqlite3"


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    found = Recorder(path, max_bytes=64 * MB)
    found.start()
    yield found
    found.close()


def samples(count: int, names: int = 3, wall: float = WALL, begin: float = 1000.0) -> Iterator[Sample]:
    for second in range(count):
        values = {f"s{number}": float((second * 7 + number) % 100) for number in range(names)}
        yield Sample(wall + second, begin + second, values)


def test_what_is_recorded_is_read_back(recorder: Recorder, path: Path) -> None:
    recorder.record_event("model.state", "info", {"model": "m"})
    recorder.record_sample(WALL, 10.0, {"gpu.temperature": 61.0, "broken": float("nan")})
    assert recorder.flush()
    reader = RecordReader(path, wall=lambda: WALL)
    [event] = reader.events(kind="model")
    assert (event["kind"], event["severity"], event["fields"]) == ("model.state", "info", {"model": "m"})
    found = reader.history(["gpu.temperature", "broken"], since=WALL - 10)
    assert found["series"]["gpu.temperature"] == {"min": [61.0], "mean": [61.0], "max": [61.0]}
    assert found["series"]["broken"]["mean"] == [None]
    assert recorder.state.problem == ""


def test_actions_form_a_chain_and_a_change_in_the_file_shows(recorder: Recorder, path: Path) -> None:
    for number in range(5):
        recorder.record_action("anna", "load", {"model": f"m{number}"})
    assert recorder.flush()
    reader = RecordReader(path)
    assert reader.audit()["verdict"]["ok"]
    assert len(reader.events(kind="operator")) == 5
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE audit SET actor = 'otto' WHERE seq = 3")
    verdict = reader.audit()["verdict"]
    assert not verdict["ok"]
    assert verdict["broken_seq"] == 3
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM audit WHERE seq = 3")
    assert RecordReader(path).audit()["verdict"]["reason"].startswith("entry 3 is missing")
    connection.close()


def test_energy_is_summed_and_its_parts_make_the_total(recorder: Recorder, path: Path) -> None:
    window = EnergyWindow("gpu0", "nvml", False, 10.0, 1000, 300, 100, (ModelShare("m", 600, 4.0, 50),))
    for _ in range(3):
        recorder.record_energy(window)
    assert recorder.flush()
    sums = {one.kind: one for one in RecordReader(path).energy()}
    assert sums["total"].uj == 3000 == sums["idle"].uj + sums["unattributed"].uj + sums["model"].uj
    assert (sums["model"].model, sums["model"].items) == ("m", 150)


def test_a_run_that_did_not_say_goodbye_is_told_by_the_next(path: Path) -> None:
    first = writer(path)
    assert first.begin(WALL, 1.0) is None
    first.apply(list(samples(150)))
    first.close()
    second = writer(path, run_id="next")
    crashed = second.begin(WALL + 500, 501.0)
    assert crashed is not None
    assert (crashed["run_id"], crashed["same_boot"], crashed["last_heard"]) == ("run", True, WALL + 149)
    second.end()
    second.close()
    third = writer(path)
    assert third.begin(WALL + 600, 601.0) is None
    rows = third._connection.execute("SELECT count(*) FROM samples_60").fetchone()[0]
    assert rows == 4, (
        "1000..1149 touches the minutes from 960, 1020, 1080 and 1140, the last one made by the second run"
    )
    third.close()


def test_a_stepped_clock_is_an_event_and_no_reading_is_lost(path: Path) -> None:
    found = writer(path)
    found.begin(WALL, 1000.0)
    steady = list(samples(10))
    ahead = list(samples(10, wall=WALL + 86_400, begin=1010.0))
    back = list(samples(10, wall=WALL - 3_600, begin=1020.0))
    found.apply([*steady, *ahead, *back])
    found.close()
    reader = RecordReader(path)
    steps = [event["fields"]["seconds"] for event in reader.events(kind="clock.step")]
    assert steps == [86_390.0, -90_010.0]
    history = reader.history(["s0"], since=WALL - 7200, until=WALL + 100_000, step_s=1.0, points=2000)
    assert sum(value is not None for value in history["series"]["s0"]["mean"]) >= 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM samples_1").fetchone()[0] == 30
    connection.close()


def recorded(path: Path, *runs: tuple[float, float, int, int]) -> None:
    """Runs of samples: wall time and monotonic time of the first, how many, and how many seconds apart."""
    found = writer(path)
    found.begin(runs[0][0], runs[0][1])
    for wall, monotonic, count, apart in runs:
        all_ = [
            Sample(wall + apart * number, monotonic + apart * number, {"s": float(number)}) for number in range(count)
        ]
        for begin in range(0, count, 900):
            found.apply(all_[begin : begin + 900])
    found.close()


YEARS = 4 * 365 * 86_400.0


def test_a_clock_that_was_ahead_and_was_set_back_leaves_no_point_in_the_future(path: Path) -> None:
    recorded(path, (WALL + YEARS, 1_000.0, 1_800, 1), (WALL, 2_800.0, 1_200, 1))
    now = WALL + 1_200
    reader = RecordReader(path, wall=lambda: now)
    found = reader.history(["s"], since=now - 600)
    assert (found["step_s"], found["tier_s"], len(found["times"])) == (2, 1, 300)
    assert min(found["times"]) >= now - 600
    assert max(found["times"]) < now
    whole = reader.history(["s"], since=0.0)
    assert max(whole["times"]) < now
    asked = reader.history(["s"], since=0.0, until=WALL + 2 * YEARS)
    assert asked["times"] == sorted(asked["times"])
    assert max(asked["times"]) > WALL + YEARS, "who asks for that time is told"
    assert [one.uj for one in reader.energy()] == []


def test_a_boot_without_a_clock_does_not_make_the_finest_tier_look_old(path: Path) -> None:
    begin = WALL - 6 * 3_600 - 3_700
    recorded(path, (begin, 1_000.0, 6 * 60 + 1, 60), (30.0, 30_000.0, 30, 1), (WALL - 3_600, 30_030.0, 3_600, 1))
    reader = RecordReader(path, wall=lambda: WALL)
    for since, tier in ((WALL - 7_200, 60), (WALL - 3_500, 1)):
        found = reader.history(["s"], since=since, points=2_000)
        assert found["tier_s"] == tier
        assert found["times"][0] - since < 120
        assert found["times"] == sorted(found["times"])


def test_a_clock_that_was_set_back_leaves_the_times_in_order(path: Path) -> None:
    recorded(path, (WALL, 1_000.0, 100, 1), (WALL - 50, 1_100.0, 100, 1))
    times = RecordReader(path, wall=lambda: WALL + 100).history(["s"], since=WALL - 100, points=2_000)["times"]
    assert times == sorted(times)
    assert len(times) == 200


def test_a_day_of_samples_stays_within_the_budget_and_is_answered_from_the_right_tier(path: Path) -> None:
    found = writer(path)
    found.begin(WALL, 1000.0)
    day = list(samples(86_400, names=10))
    for begin in range(0, len(day), 1800):
        found.apply(day[begin : begin + 1800])
    found.keep_within_budget()
    found.close()
    assert path.stat().st_size < 8 * MB
    reader = RecordReader(path)
    end = WALL + 86_400
    assert reader.history(["s0"], since=end - 600, until=end, points=2000)["tier_s"] == 1
    day_answer = reader.history(["s0"], since=WALL, until=end, points=2000)
    assert day_answer["tier_s"] == 60
    column = day_answer["series"]["s0"]
    assert len(column["mean"]) >= 1_430
    assert min(column["min"]) == 0.0
    assert max(column["max"]) == 99.0
    assert sum(column["mean"]) / len(column["mean"]) == pytest.approx(49.5, abs=0.5)


def test_beyond_the_budget_the_oldest_goes_and_the_newest_stays(path: Path) -> None:
    found = writer(path, max_bytes=8 * MB)
    found.begin(WALL, 1000.0)
    dropped = 0
    for number in range(60):
        batch: list[Item] = [
            RecordedEvent(WALL + number, 1000.0 + number, "x", "info", {"n": number, "pad": "y" * 2000})
            for _ in range(100)
        ]
        found.apply(batch)
        dropped += found.keep_within_budget()
        assert path.stat().st_size <= 8 * MB
    found.close()
    assert dropped > 0
    assert RecordReader(path).events(limit=1)[0]["fields"]["n"] == 59


def of_a_generation(number: int, at: int) -> Sample:
    """Readings as they are while a version is served: the house's own, and those of its workers."""
    workers = {f"process.worker{number}.{name}": float(number) for name in ("rss", "cpu", "fds", "threads")}
    return Sample(WALL + at, 1000.0 + at, {"gpu.0.temperature": 61.0, **workers})


def test_names_of_versions_that_are_gone_make_room_for_those_of_new_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.recording.writer.MAX_SERIES", 16)
    written = writer(path)
    written.begin(WALL, 1000.0)
    for number in range(40):
        written.apply([of_a_generation(number, number)])
    assert written.series_refused == 0
    reader = RecordReader(path, wall=lambda: WALL)
    found = reader.history(["process.worker39.rss", "gpu.0.temperature"], since=WALL - 1)["series"]
    assert found["process.worker39.rss"]["mean"][-1] == 39.0
    assert found["gpu.0.temperature"]["mean"] == [61.0] * 40
    written.close()


def test_more_names_at_once_than_there_is_room_for_are_refused_and_the_layout_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.recording.writer.MAX_SERIES", 4)
    written = writer(path)
    written.begin(WALL, 1000.0)
    written.apply(list(samples(10, names=6)))
    assert written.series_refused == 2 * 10
    assert RecordReader(path).series() == ["s0", "s1", "s2", "s3"]
    assert written._connection.execute("SELECT count(*) FROM layouts").fetchone() == (1,)
    written.close()


def test_layouts_go_with_the_last_row_that_has_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = writer(path)
    written.begin(WALL, 1000.0)
    for number in range(30):
        written.apply([of_a_generation(number, number)])
    layouts = "SELECT count(*) FROM layouts"
    assert written._connection.execute(layouts).fetchone() == (30,)
    monkeypatch.setattr("appliance.recording.writer.rows_to_drop", lambda count, floor: count)
    assert written.drop_oldest() == 30
    assert written._connection.execute("SELECT count(*) FROM samples_60").fetchone() == (1,)
    assert written._connection.execute(layouts).fetchone() == (2,), "of the minute, and of the row to come"
    written.apply([of_a_generation(29, 31)])
    assert "process.worker29.rss" in RecordReader(path).series()
    written.close()


@pytest.mark.parametrize("part", ["", "-wal"])
def test_a_damaged_file_is_read_or_set_aside_and_never_the_end(path: Path, tmp_path: Path, part: str) -> None:
    made = writer(path)
    made.begin(WALL, 1000.0)
    if not part:
        made.apply([*samples(300), *(RecordedEvent(WALL, 1.0, "e", "info", {"n": n}) for n in range(200))])
        made._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    else:
        made._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        made.apply([*samples(300), *(RecordedEvent(WALL, 1.0, "e", "info", {"n": n}) for n in range(200))])
    files = {
        suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal") if Path(f"{path}{suffix}").exists()
    }
    made.close()
    chance = random.Random(7)
    places = [*range(0, 100, 7), *(chance.randrange(len(files[part])) for _ in range(40))]
    aside = 0
    for number, place in enumerate(places):
        target = tmp_path / f"case{number}" / "recorder.sqlite3"
        target.parent.mkdir()
        for suffix, data in files.items():
            changed = bytearray(data)
            if suffix == part:
                changed[place : place + 16] = bytes(byte ^ 0xFF for byte in changed[place : place + 16])
            Path(f"{target}{suffix}").write_bytes(changed)
        again = Recorder(target, max_bytes=64 * MB)
        again.start()
        again.record_event("after")
        assert again.flush(), again.state
        again.close()
        reader = RecordReader(target)
        assert reader.events(kind="after"), place
        reader.history(["s0"], since=0.0)
        reader.audit()
        if any(file.name.startswith("recorder.sqlite3.damaged") for file in target.parent.iterdir()):
            aside += 1
            assert reader.events(kind="recorder.damaged")
    assert aside > 0 or part, "headers were among what was damaged"


def test_a_second_appliance_on_the_same_file_records_nothing_and_says_so(recorder: Recorder, path: Path) -> None:
    assert recorder.flush()
    recorder.record_event("mine")
    assert recorder.flush()
    second = Recorder(path, max_bytes=64 * MB)
    second.start()
    second.record_event("theirs")
    second.close()
    assert "another appliance" in second.state.problem
    assert [event["kind"] for event in RecordReader(path).events()] == ["mine"]
    asked = RecordReader(path, is_anothers=lambda: second.is_anothers)
    for question in (asked.events, asked.series, asked.energy, asked.audit):
        with pytest.raises(ApplianceError, match="another appliance records into this file"):
            question()
    assert not recorder.is_anothers


def test_a_queue_that_is_full_drops_the_oldest_and_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.recording.recorder.QUEUE_ITEMS", 10)
    found = Recorder(path, max_bytes=64 * MB)
    for number in range(25):
        found.record_event("e", "info", {"n": number})
    assert found.state.dropped == 15
    found.start()
    assert found.flush()
    found.close()
    assert [event["fields"]["n"] for event in RecordReader(path).events()] == list(range(15, 25))


def test_the_bridge_keeps_events_grades_them_and_chains_operators() -> None:
    class Heard:
        def __init__(self) -> None:
            self.events: list[tuple[str, str]] = []
            self.actions: list[tuple[str, str, dict[str, object] | None]] = []

        def record_event(self, kind: str, severity: str = "info", fields: dict[str, object] | None = None) -> None:
            self.events.append((kind, severity))

        def record_action(self, actor: str, action: str, fields: dict[str, object] | None = None) -> None:
            self.actions.append((actor, action, fields))

    from appliance.observability.events import EventBus

    heard = Heard()
    bus = EventBus()
    bus.subscribe(bridge.listener(heard))
    bus.publish("model.progress", percent=1)
    bus.publish("model.state", state="FAILED")
    bus.publish("worker.lost", pid=1)
    bus.publish("operator.load", model="m", actor="anna")
    assert heard.events == [("model.state", "error"), ("worker.lost", "error")]
    assert heard.actions == [("anna", "load", {"model": "m"})]


def test_a_year_of_sixty_readings_fits_the_default_budget() -> None:
    from appliance.config import RecorderConfig
    from appliance.core.history import full_bytes

    assert full_bytes(60) < 0.5 * RecorderConfig().max_size_mb * MB
    assert [tier.span_s for tier in TIERS] == [3_600, 7 * 86_400, 365 * 86_400]


def spoil(path: Path, table: str, *, whole: bool = False) -> None:
    """Overwrite the first page of a table, or every page but the first, under whoever has the file open; and let them notice."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    [page] = other.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    count = other.execute("PRAGMA page_count").fetchone()[0]
    # another writer's commit makes everybody read anew what they have in memory
    other.execute("INSERT OR REPLACE INTO meta VALUES ('probe', 'x')")
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    with path.open("r+b") as file:
        for number in range(2, count + 1) if whole else [page]:
            file.seek((number - 1) * 4096)
            file.write(b"\xa5" * 4096)


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_is_damaged_under_a_running_recorder_is_set_aside_and_nothing_after_it_is_lost(
    recorder: Recorder, path: Path, caplog: pytest.LogCaptureFixture, *, whole: bool
) -> None:
    recorder.record_action("kim", "unload", {"model": "m"})
    recorder.record_event("before")
    assert recorder.flush()
    ended_with = recorder.state.last_hash
    spoil(path, "events", whole=whole)
    for number in range(20):
        recorder.record_event("after", "info", {"n": number})
    recorder.record_action("kim", "load", {"model": "m"})
    assert recorder.flush()
    reader = RecordReader(path)
    assert [event["fields"]["n"] for event in reader.events(kind="after")] == list(range(20))
    [told] = reader.events(kind="recorder.damaged")
    [aside] = [file.name for file in path.parent.glob("*.damaged-*") if not file.name.endswith("-wal")]
    assert (told["severity"], aside in told["fields"]["reason"]) == ("error", True)
    assert told["fields"]["last_hash"] == ended_with
    found = reader.audit()
    assert (found["verdict"]["ok"], found["damaged_files"]) == (True, [aside])
    [anew] = found["begun_anew"]
    assert [entry["action"] for entry in found["entries"]] == [BEGUN_ANEW, "load"]
    assert (anew["fields"]["file"], anew["fields"]["last_hash"]) == (aside, ended_with)
    state = recorder.state
    assert (state.problem, state.dropped, state.set_aside) == ("", 0, 1)
    assert "recorder.damaged" in caplog.text


@pytest.mark.parametrize(("whole", "readable"), [(False, True), (True, False)])
def test_a_record_that_is_destroyed_while_nobody_records_is_the_first_entry_of_the_new_chain(
    path: Path, *, whole: bool, readable: bool
) -> None:
    first = Recorder(path, max_bytes=64 * MB)
    first.start()
    for number in range(3):
        first.record_action("kim", "hold", {"n": number})
    assert first.flush()
    first.close()
    spoil(path, "samples_1", whole=whole)
    # one that is killed right after it opened a new file has not said so yet
    Writer(path, 64 * MB, run_id="killed", boot_id="boot").close()
    for _ in range(2):
        second = Recorder(path, max_bytes=64 * MB)
        second.start()
        second.record_event("after")
        assert second.flush(), second.state
        second.close()
    found = RecordReader(path).audit()
    assert (found["verdict"]["ok"], found["verdict"]["entries"], len(found["begun_anew"])) == (True, 1, 1)
    fields = found["begun_anew"][0]["fields"]
    assert [fields["file"]] == found["damaged_files"]
    if readable:
        assert (fields["last_seq"], fields["last_hash"]) == (3, first.state.last_hash)
    else:
        assert (fields["last_seq"], fields["last_hash"]) == (0, "none of it can be read")


def test_the_floors_give_way_where_the_budget_is_smaller_than_they_are(path: Path) -> None:
    """Two weeks of 100 readings, one in five minutes, with the least budget: the newest always goes in."""
    found = writer(path, max_bytes=8 * MB - MB // 2)
    found.begin(WALL, 1000.0)
    values = {f"s{number}": float(number) for number in range(100)}
    minutes = 14 * 1440
    for begin in range(0, minutes, 120):
        batch: list[Item] = [
            Sample(WALL + 60 * minute, 1000.0 + 60 * minute, values) for minute in range(begin, begin + 120, 5)
        ]
        batch.append(RecordedEvent(WALL + 60 * begin, 1000.0 + 60 * begin, "e", "info", {"pad": "x" * 4_000}))
        batch.append(Action(WALL + 60 * begin, 1000.0 + 60 * begin, "kim", "hold", {"pad": "x" * 4_000}))
        found.apply(batch)
        found.keep_within_budget()
    assert path.stat().st_size <= 8 * MB
    rows = {table: found._count(table) for table in ("samples_1", "samples_60", "samples_900", "events", "audit")}
    assert min(rows.values()) > 20, "none pays for all"
    assert rows["samples_900"] > 96, "of the coarsest there is more than a day"
    found.close()
    reader = RecordReader(path)
    end = WALL + 60 * (minutes - 5)
    assert reader.history(["s7"], since=end - 600, until=end)["times"][-1] == end
    assert reader.audit()["verdict"]["ok"], "what is left of the chain is one"


def test_a_disk_that_others_fill_does_not_take_more_than_the_floors(path: Path) -> None:
    found = writer(path)
    found.begin(WALL, 1000.0)
    found.apply(list(samples(700)))
    while found.drop_oldest():
        pass
    assert found._count("samples_1") == TIERS[0].floor_rows
    found.close()


def test_segments_go_with_the_last_row_that_has_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = writer(path)
    found.begin(WALL, 1000.0)
    found.apply([Sample(WALL + 100.0 * number, 1000.0 + number, {"a": 1.0}) for number in range(50)])
    assert found._count("segments") == 50
    monkeypatch.setattr("appliance.recording.writer.rows_to_drop", lambda count, floor: count if count > 2 else 0)
    while found.drop_oldest():
        pass
    assert found._count("segments") <= 3
    found.apply([Sample(WALL + 9_000.0, 1051.0, {"a": 1.0})])
    found.close()


def test_damage_that_the_check_does_not_see_is_set_aside_at_the_second_time_and_does_not_spin(
    recorder: Recorder, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that somebody dropped: the file is sound, and nothing can be put into it."""
    recorder.record_event("before")
    assert recorder.flush()
    opened = []
    real = Writer.__init__

    def counting(self: Writer, *arguments: object, **more: object) -> None:
        opened.append(more["distrust"])
        real(self, *arguments, **more)  # type: ignore[arg-type]  handed on as it came

    monkeypatch.setattr(Writer, "__init__", counting)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DROP TABLE events")
    other.close()
    recorder.record_event("after")
    assert recorder.flush()
    assert [bool(distrust) for distrust in opened] == [False, True]
    assert recorder.state.set_aside == 1
    assert [event["kind"] for event in RecordReader(path).events(kind="after")] == ["after"]


@pytest.mark.parametrize(
    ("code", "full", "damage"),
    [
        (sqlite3.SQLITE_FULL, True, False),
        (sqlite3.SQLITE_IOERR_WRITE, True, False),
        (sqlite3.SQLITE_IOERR_FSYNC, True, False),
        (sqlite3.SQLITE_IOERR_READ, False, True),
        (sqlite3.SQLITE_IOERR_SHORT_READ, False, True),
        (sqlite3.SQLITE_CORRUPT, False, True),
        (sqlite3.SQLITE_CORRUPT_INDEX, False, True),
        (sqlite3.SQLITE_BUSY, False, False),
        (sqlite3.SQLITE_READONLY_DBMOVED, False, False),
    ],
)
def test_a_disk_that_does_not_give_back_is_damage_and_one_that_does_not_take_is_full(
    code: int, *, full: bool, damage: bool
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    assert (is_full(error), is_damage(error)) == (full, damage)
