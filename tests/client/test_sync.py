"""The blocking client against real transports; its calls run on another thread, the transports on the test's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from appliance.client import ApplianceError, Client, ErrorCode
from tests.transports.zmq.conftest import House, until

T = TypeVar("T")
X = np.arange(8, dtype=np.float32).reshape(2, 4)
NOWHERE = "tcp://127.0.0.1:1"


async def use(endpoints: str | list[str], call: Callable[[Client], T], timeout_s: float = 5.0) -> T:
    def run() -> T:
        with Client(endpoints, timeout_s=timeout_s) as client:
            return call(client)

    return await asyncio.to_thread(run)


def failing(call: Callable[[], Any]) -> tuple[ApplianceError, float]:
    """The error of a call, and how long it took."""
    started = time.monotonic()
    with pytest.raises(ApplianceError) as caught:
        call()
    return caught.value, time.monotonic() - started


@pytest.mark.parametrize("face", ["ipc", "tcp"])
async def test_arrays_in_arrays_out(house: House, face: str) -> None:
    result = await use(getattr(house, face), lambda client: client.infer("echo", {"x": X}))
    np.testing.assert_array_equal(result.outputs["x"], X)
    assert (result.model, result.version, result.timing.queue_us) == ("echo", "1", 12)
    result.outputs["x"] += 1  # the caller's own memory, aligned
    assert result.outputs["x"].flags.aligned


async def test_every_option_arrives(house: House) -> None:
    def call(client: Client) -> None:
        client.infer(
            "echo",
            {"x": X},
            version="1",
            outputs=["x"],
            ttl_ms=2000,
            priority=2,
            stream="cam1",
            classification=3,
            idempotent=False,
            parameters={"lot": "A7"},
        )

    await use(house.ipc, call)
    (request,) = house.service.requests
    assert request.timeout_s is not None
    assert 1.0 < request.timeout_s <= 2.0
    assert (request.version, request.priority, request.stream, request.idempotent) == ("1", 2, "cam1", False)
    assert [(output.name, output.classification) for output in request.outputs] == [("x", 3)]
    assert request.parameters == {"lot": "A7"}


async def test_without_a_ttl_the_appliance_gives_up_when_we_do(house: House) -> None:
    await use(house.ipc, lambda client: client.infer("echo", {"x": X}, timeout_s=3.0))
    timeout_s = house.service.requests[0].timeout_s
    assert timeout_s is not None
    assert 2.0 < timeout_s <= 3.0


async def test_a_wrong_dtype_is_refused_before_it_is_sent(house: House) -> None:
    error, _ = await use(house.ipc, lambda client: failing(lambda: client.infer("echo", {"x": X.astype(np.float64)})))
    assert (error.code, "astype" in error.message) == (ErrorCode.INVALID_ARGUMENT, True)
    assert house.service.requests == []


async def test_the_model_is_described_once(house: House) -> None:
    await use(house.ipc, lambda client: [client.infer("echo", {"x": X}) for _ in range(5)])
    assert house.transport.counters.messages_received == 6


async def test_the_other_calls_answer(house: House) -> None:
    def call(client: Client) -> None:
        assert client.ping() is True
        assert client.hello()["server"]["name"] == "appliance"
        assert client.models()[0]["name"] == "echo"
        assert client.stats("echo")[0]["inference_count"] == 0
        assert client.snapshot()["seq"] == 0
        assert client.describe("echo").labels == ("a", "b", "c", "d")

    await use(house.ipc, call)


async def test_the_appliances_refusal_is_raised_with_its_code_and_its_advice(house: House) -> None:
    house.service.refusal = ApplianceError(ErrorCode.RESOURCE_EXHAUSTED, "full", retry_after_s=0.25)
    error, _ = await use(house.ipc, lambda client: failing(lambda: client.infer("echo", {"x": X})))
    assert (error.code, error.message, error.retry_after_s) == (ErrorCode.RESOURCE_EXHAUSTED, "full", 0.25)


async def test_no_answer_in_time_is_a_deadline_error_and_a_late_answer_disturbs_nothing(house: House) -> None:
    def call(client: Client) -> tuple[ApplianceError, float]:
        client.describe("echo")
        failed = failing(lambda: client.infer("echo", {"x": X}, timeout_s=0.2))
        loop.call_soon_threadsafe(house.service.release)
        np.testing.assert_array_equal(client.infer("echo", {"x": X + 1}).outputs["x"], X + 1)
        return failed

    loop = asyncio.get_running_loop()
    house.service.hold()
    error, took = await use(house.ipc, call)
    assert error.code is ErrorCode.DEADLINE_EXCEEDED
    assert 0.2 <= took < 2


async def test_nobody_there_is_unavailable_within_the_timeout() -> None:
    error, took = await use(NOWHERE, lambda client: failing(client.ping), timeout_s=0.2)
    assert (error.code, "is it running" in error.message) == (ErrorCode.UNAVAILABLE, True)
    assert took < 2


async def test_an_endpoint_where_nobody_is_is_passed_over(house: House) -> None:
    assert await use([NOWHERE, house.ipc], lambda client: client.ping()) is True


async def test_a_draining_appliance_sends_us_to_the_next(house: House, second: House) -> None:
    house.service.draining = True
    result = await use([house.ipc, second.ipc], lambda client: client.infer("echo", {"x": X}))
    np.testing.assert_array_equal(result.outputs["x"], X)
    assert len(second.service.requests) == 1


async def test_what_is_not_idempotent_is_not_sent_again(house: House, second: House) -> None:
    house.service.draining = True
    error, _ = await use(
        [house.ipc, second.ipc],
        lambda client: failing(lambda: client.infer("echo", {"x": X}, idempotent=False)),
    )
    assert error.code is ErrorCode.UNAVAILABLE
    assert second.service.requests == []


async def test_an_appliance_that_hangs_is_left_for_the_next_in_time(house: House, second: House) -> None:
    house.service.hold()
    await use([house.ipc, second.ipc], lambda client: client.infer("echo", {"x": X}, timeout_s=1.0))
    assert (len(house.service.requests), len(second.service.requests)) == (1, 1)


async def test_an_appliance_that_dies_with_our_request_is_left_at_once(house: House, second: House) -> None:
    house.service.hold()
    call = asyncio.create_task(
        use([house.ipc, second.ipc], lambda client: client.infer("echo", {"x": X}), timeout_s=60.0)
    )
    await until(lambda: house.service.requests)
    await house.transport.close()
    result = await asyncio.wait_for(call, 5)
    np.testing.assert_array_equal(result.outputs["x"], X)
    assert len(second.service.requests) == 1


async def test_a_request_lost_in_a_restart_is_sent_again(house: House) -> None:
    house.service.hold()
    call = asyncio.create_task(use(house.ipc, lambda client: client.infer("echo", {"x": X}), timeout_s=10.0))
    await until(lambda: house.service.requests)
    await house.transport.close()
    house.service.holding = False
    await house.make().start()
    np.testing.assert_array_equal((await call).outputs["x"], X)


async def test_a_request_that_must_not_run_twice_fails_when_its_connection_is_lost(house: House) -> None:
    house.service.hold()
    call = asyncio.create_task(
        use(
            house.ipc,
            lambda client: failing(lambda: client.infer("echo", {"x": X}, idempotent=False)),
            timeout_s=60.0,
        )
    )
    await until(lambda: house.service.requests)
    await house.transport.close()
    error, _ = await asyncio.wait_for(call, 5)
    assert (error.code, "may have run" in error.message) == (ErrorCode.UNAVAILABLE, True)


async def test_events_start_with_a_snapshot_and_go_on_from_it(house: House) -> None:
    def call(client: Client) -> list[Any]:
        events = client.events(timeout_s=5)
        seen = [next(events)]
        loop.call_soon_threadsafe(house.service.publish, "model.state", {"n": 1})
        while seen[-1].seq < 1:
            seen.append(next(events))
        loop.call_soon_threadsafe(house.service.publish, "model.state", {"n": 2})
        seen.append(next(events))
        events.close()
        return seen

    loop = asyncio.get_running_loop()
    first, *_, last = await use(house.tcp, call)
    assert (first.topic, first.seq) == ("snapshot", 0)
    assert (last.topic, last.seq, last.data) == ("model.state", 2, {"n": 2})


async def test_events_may_be_waited_for_with_a_timeout(house: House) -> None:
    def call(client: Client) -> ApplianceError:
        events = client.events(timeout_s=0.1)
        next(events)
        return failing(lambda: next(events))[0]

    assert (await use(house.ipc, call)).code is ErrorCode.DEADLINE_EXCEEDED


async def test_a_closed_client_says_so(house: House) -> None:
    client = Client(house.ipc)
    client.close()
    client.close()
    with pytest.raises(ApplianceError, match="closed"):
        client.ping()


async def test_closing_a_client_whose_events_are_still_followed_does_not_hang(house: House) -> None:
    def call(client: Client) -> None:
        events = client.events()
        next(events)
        client.close()
        with pytest.raises(ApplianceError, match="closed"):
            next(events)

    await asyncio.wait_for(use(house.ipc, call), 5)


def test_a_client_needs_an_endpoint() -> None:
    with pytest.raises(ApplianceError, match="at least one endpoint"):
        Client([])
