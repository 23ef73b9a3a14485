"""A device that is lost: the worker's last words, its exit status, and what the front makes of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from appliance.core.errors import ApplianceError
from appliance.core.manifest import WorkerManifest
from appliance.core.retry import RestartBudget
from appliance.workers.messages import (
    MAX_MESSAGE_BYTES,
    Exited,
    Faulted,
    Fork,
    Load,
    decode_from_template,
    decode_from_worker,
    encode,
)
from appliance.workers.supervisor import Supervisor
from tests.workers.test_supervisor import MANIFEST, Owner, options, run, supervisor

__all__ = ["supervisor"]  # the fixture


def test_a_worker_says_why_and_exits_with_75() -> None:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "appliance.workers.template", str(theirs.fileno()), str(os.getpid())]
    template = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    for end in (control, channel):
        end.settimeout(30)
    try:
        socket.send_fds(control, [encode(Fork(1, "m"))], [worker_end.fileno()])
        worker_end.close()
        _, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        os.close(descriptors[0])
        channel.send(encode(Load(7, options(load="fault"))))
        said = decode_from_worker(channel.recv(MAX_MESSAGE_BYTES))
        assert said == Faulted(7, "loopback was told at load that its device is lost")
        ended = decode_from_template(control.recv(MAX_MESSAGE_BYTES))
        assert isinstance(ended, Exited)
        assert ended.status == 75
    finally:
        for end in (control, channel, theirs):
            end.close()
        template.wait(30)


async def test_the_loss_is_reported_once_in_the_worker_s_words(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4", commands="true"), MANIFEST)
    owner = instance.owner = Owner()
    run(instance, 1, "fault")
    assert await owner.next() == ("lost", "loopback was told that its device is lost")
    assert len(owner.heard) == 1
    assert instance.link.faulted == instance.handle
    assert supervisor.links == []


async def test_an_answer_before_the_fault_still_counts(supervisor: Supervisor) -> None:
    instance = await supervisor.open_instance("m:1", options(shape="4", commands="true"), MANIFEST)
    owner = instance.owner = Owner()
    run(instance, 1, "")
    run(instance, 2, "fault")
    while len(owner.heard) < 2:
        await owner.next()
    assert [word for word, _ in owner.heard] == ["done", "lost"]


async def test_a_fault_at_load_is_the_reason_of_the_load_and_of_every_model_beside_it(supervisor: Supervisor) -> None:
    shared = WorkerManifest(isolation="device", busy_poll_us=0)
    first = await supervisor.open_instance("a:1", options(shape="4"), shared)
    owner = first.owner = Owner()
    with pytest.raises(ApplianceError, match="told at load that its device is lost"):
        await supervisor.open_instance("b:1", options(load="fault"), shared)
    assert owner.heard == [("lost", "loopback was told at load that its device is lost")]
    assert first.link.faulted not in (None, first.handle), "it was not this one's work"
    again = await supervisor.open_instance("a:1", options(shape="4"), shared)
    owner = again.owner = Owner()
    run(again, 1)
    assert (await owner.next())[0] == "done"


def test_who_is_not_to_blame_waits_the_first_pause_and_keeps_the_budget() -> None:
    budget = RestartBudget(limit=1, window_s=10, backoff_initial_s=0.5, backoff_max_s=4)
    assert [budget.pause_s for _ in range(5)] == [0.5] * 5
    assert budget.next_delay(0.0) == 0.5
    assert budget.next_delay(0.0) is None
