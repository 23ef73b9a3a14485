"""The asyncio client against real transports on the same loop."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from appliance.client import ApplianceError, AsyncClient, ErrorCode
from tests.transports.zmq.conftest import House, until

X = np.arange(8, dtype=np.float32).reshape(2, 4)
NOWHERE = "tcp://127.0.0.1:1"


async def test_many_calls_at_once_get_their_own_answers(house: House) -> None:
    async with AsyncClient(house.ipc) as client:
        results = await asyncio.gather(*[client.infer("echo", {"x": X + n}) for n in range(200)])
    for n, result in enumerate(results):
        np.testing.assert_array_equal(result.outputs["x"], X + n)


async def test_calls_one_after_another_never_miss_a_wake_up(house: House) -> None:
    async with AsyncClient(house.tcp) as client:
        for n in range(200):
            assert (await client.infer("echo", {"x": X + n})).outputs["x"][0, 0] == n


async def test_the_other_calls_answer(house: House) -> None:
    async with AsyncClient(house.ipc) as client:
        assert await client.ping() is True
        assert (await client.hello())["server"]["name"] == "appliance"
        assert (await client.models())[0]["name"] == "echo"
        assert (await client.stats("echo"))[0]["inference_count"] == 0
        assert (await client.snapshot())["seq"] == 0
        assert (await client.describe("echo")).version == "1"


async def test_no_answer_in_time_is_a_deadline_error(house: House) -> None:
    async with AsyncClient(house.ipc) as client:
        await client.describe("echo")
        house.service.hold()
        with pytest.raises(ApplianceError, match="no answer within") as caught:
            await client.infer("echo", {"x": X}, timeout_s=0.1)
        assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        house.service.release()
        assert (await client.infer("echo", {"x": X})).outputs["x"][0, 1] == 1


async def test_a_cancelled_call_is_cancelled_at_the_appliance(house: House) -> None:
    async with AsyncClient(house.ipc) as client:
        await client.describe("echo")
        house.service.hold()
        keep = asyncio.create_task(client.infer("echo", {"x": X}))
        drop = asyncio.create_task(client.infer("echo", {"x": X + 1}))
        await until(lambda: len(house.service.waiting) == 2)
        drop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drop
        await until(lambda: house.service.cancelled)
        house.service.release()
        np.testing.assert_array_equal((await keep).outputs["x"], X)
        assert len(house.service.cancelled) == 1


async def test_nobody_there_is_unavailable_within_the_timeout() -> None:
    async with AsyncClient(NOWHERE, timeout_s=0.1) as client:
        with pytest.raises(ApplianceError, match="is it running") as caught:
            await client.ping()
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_an_endpoint_where_nobody_is_is_passed_over(house: House) -> None:
    async with AsyncClient([NOWHERE, house.ipc]) as client:
        assert await client.ping() is True


async def test_a_draining_appliance_sends_us_to_the_next(house: House, second: House) -> None:
    house.service.draining = True
    async with AsyncClient([house.ipc, second.ipc]) as client:
        await client.infer("echo", {"x": X})
        await client.infer("echo", {"x": X})
    assert len(second.service.requests) == 2


async def test_an_appliance_that_dies_with_our_requests_is_left_at_once(house: House, second: House) -> None:
    async with AsyncClient([house.ipc, second.tcp], timeout_s=60.0) as client:
        await client.describe("echo")
        house.service.hold()
        calls = [asyncio.create_task(client.infer("echo", {"x": X + n})) for n in range(10)]
        await until(lambda: len(house.service.requests) == 10)
        await house.transport.close()
        results = await asyncio.wait_for(asyncio.gather(*calls), 5)
    assert [result.outputs["x"][0, 0] for result in results] == list(range(10))


async def test_a_request_lost_in_a_restart_is_sent_again(house: House) -> None:
    async with AsyncClient(house.ipc, timeout_s=10.0) as client:
        await client.describe("echo")
        house.service.hold()
        call = asyncio.create_task(client.infer("echo", {"x": X}))
        await until(lambda: house.service.requests)
        await house.transport.close()
        house.service.holding = False
        await house.make().start()
        np.testing.assert_array_equal((await call).outputs["x"], X)


async def test_closing_ends_the_calls_that_wait(house: House) -> None:
    client = AsyncClient(house.ipc, timeout_s=60.0)
    await client.describe("echo")
    house.service.hold()
    call = asyncio.create_task(client.infer("echo", {"x": X}))
    await until(lambda: house.service.waiting)
    await client.close()
    with pytest.raises(ApplianceError, match="closed"):
        await asyncio.wait_for(call, 5)
    await client.close()


async def test_closing_ends_the_events_that_are_followed(house: House) -> None:
    client = AsyncClient(house.ipc)
    events = client.events()
    await anext(events)
    following = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ApplianceError, match="closed"):
        await asyncio.wait_for(following, 5)


async def test_events_start_with_a_snapshot_and_go_on_from_it(house: House) -> None:
    async with AsyncClient(house.ipc) as client:
        events = client.events()
        assert (await anext(events)).topic == "snapshot"
        house.service.publish("model.state", {"n": 1})
        event = await asyncio.wait_for(anext(events), 5)
        assert (event.seq, event.boot) == (1, "boot-1")
        house.service.publish("model.state", {"n": 2})
        assert (await asyncio.wait_for(anext(events), 5)).data == {"n": 2}
        await events.aclose()
