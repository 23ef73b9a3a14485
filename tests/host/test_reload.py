"""The way back from a reload, between two processes: who asks gets the answer to its own question, or an honest no."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.host import reload
from appliance.host.reload import NobodyError, Outcome

LONG_S = 20.0

SERVER = """
import os, signal, sys
from pathlib import Path
from appliance.host import reload
folder, behaviour = Path(sys.argv[1]), sys.argv[2]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
number = 0
reload.write(folder, reload.Outcome(os.getpid(), number))
print("up", flush=True)
while True:
    signal.sigwait([signal.SIGHUP])
    if behaviour == "dies":
        os._exit(1)
    if behaviour == "silent":
        continue
    number += 1
    reload.write(folder, reload.Outcome(os.getpid(), number, number % 2 == 1, problems=(f"the {number}th",)))
"""


class Server:
    """A process that answers reloads: every first with yes, every second with no."""

    def __init__(self, folder: Path, behaviour: str = "answers") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), behaviour], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.end()


def test_who_asks_is_answered_with_how_its_own_reload_ended(tmp_path: Path, server: Server) -> None:
    assert reload.ask(tmp_path, None, LONG_S) == Outcome(server.process.pid, 1, True, ("the 1th",))
    assert reload.ask(tmp_path, server.process.pid, LONG_S) == Outcome(server.process.pid, 2, False, ("the 2th",))


def test_many_who_ask_at_once_have_an_answer_each(tmp_path: Path, server: Server) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(reload.ask(tmp_path, None, LONG_S).number)) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [1, 2, 3, 4, 5]


def test_the_outcome_of_a_reload_whose_asker_has_gone_is_not_taken_for_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 4th still runs when somebody asks: it may have read the file before it was changed, and ends well; the 5th does not."""
    reload.write(tmp_path, Outcome(41, 4, running=True))
    answers = iter([Outcome(41, 4), Outcome(41, 5, running=True), Outcome(41, 5, False, ("wrong",))])
    monkeypatch.setattr(os, "kill", lambda pid, number: number or reload.write(tmp_path, next(answers)))
    assert reload.ask(tmp_path, 41, LONG_S) == Outcome(41, 5, False, ("wrong",))


def test_one_that_ends_meanwhile_is_nobody(tmp_path: Path) -> None:
    server = Server(tmp_path, "dies")
    reaper = threading.Thread(target=server.process.wait)
    reaper.start()
    with pytest.raises(NobodyError, match="has ended"):
        reload.ask(tmp_path, None, LONG_S)
    reaper.join()
    server.end()


def test_one_that_is_gone_is_nobody_though_it_left_its_last_word(tmp_path: Path, server: Server) -> None:
    server.end()
    with pytest.raises(NobodyError, match="has ended"):
        reload.ask(tmp_path, None, LONG_S)


def test_one_that_says_nothing_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    server = Server(tmp_path, "silent")
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        reload.ask(tmp_path, None, 0.2)
    assert 0.2 <= time.monotonic() - begun < LONG_S
    server.end()


def test_where_nothing_has_served_there_is_nobody(tmp_path: Path) -> None:
    with pytest.raises(NobodyError, match="no appliance has served"):
        reload.ask(tmp_path, None, LONG_S)
    with pytest.raises(NobodyError, match="there is no"):
        reload.ask(tmp_path / "missing", None, LONG_S)


def test_an_outcome_is_replaced_whole_and_forgotten_at_the_end(tmp_path: Path) -> None:
    assert reload.read(tmp_path) is None
    outcome = Outcome(os.getpid(), 7, False, ("first", "second"), ("http",))
    reload.write(tmp_path, outcome)
    assert reload.read(tmp_path) == outcome
    assert [path.name for path in tmp_path.iterdir()] == ["reload.json"]
    reload.forget(tmp_path)
    assert reload.read(tmp_path) is None
    reload.forget(tmp_path)


def test_a_file_that_is_no_outcome_is_none(tmp_path: Path) -> None:
    for text in ("", "{", '{"pid": "x", "number": 1}'):
        reload.path_in(tmp_path).write_text(text)
        assert reload.read(tmp_path) is None


def test_the_signal_that_asks_is_the_one_that_daemons_reread_their_configuration_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        sent.append((pid, number))
        reload.write(tmp_path, Outcome(pid, 2))

    reload.write(tmp_path, Outcome(41, 1))
    monkeypatch.setattr(os, "kill", kill)
    assert reload.ask(tmp_path, None, LONG_S).number == 2
    assert sent == [(41, signal.SIGHUP)]


def test_another_pid_than_the_last_one_begins_with_whatever_number_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload.write(tmp_path, Outcome(41, 9))
    monkeypatch.setattr(os, "kill", lambda pid, _number: reload.write(tmp_path, Outcome(pid, 1)))
    assert reload.ask(tmp_path, 42, LONG_S) == Outcome(42, 1)
