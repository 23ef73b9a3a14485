"""The decisions of the clients: where to try, what to forget, when to take a new snapshot."""

from __future__ import annotations

import pytest

from appliance.client.arrays import Description
from appliance.client.attempts import Attempts
from appliance.client.calls import Descriptions, fields_of, remaining_ttl_ms
from appliance.client.following import Follower, events_endpoint
from appliance.core.errors import ApplianceError, ErrorCode
from appliance.core.request import InferenceResponse, ModelName, RequestId, Version
from appliance.protocols.zmq_wire import Reply, WireEvent

BUSY = ApplianceError(ErrorCode.RESOURCE_EXHAUSTED, "busy")
WRONG = ApplianceError(ErrorCode.INVALID_ARGUMENT, "wrong")


def attempts(links: int, *, idempotent: bool = True, first: int = 0) -> Attempts:
    return Attempts(links, first=first, idempotent=idempotent, now=100.0, timeout_s=3.0)


def test_the_preferred_endpoint_comes_first_and_the_others_in_turn() -> None:
    assert attempts(3, first=1).candidates == [1, 2, 0]


def test_each_endpoint_gets_a_fair_share_of_what_is_left() -> None:
    call = attempts(3)
    assert call.until(100.0) == 101.0
    call.timed_out(0)
    assert call.until(101.0) == 102.0
    call.timed_out(1)
    assert call.until(102.0) == 103.0


def test_the_last_failure_is_raised() -> None:
    call = attempts(2)
    call.refused(0, BUSY)
    assert call.nobody() is BUSY
    with pytest.raises(ApplianceError, match="no answer within 3 s") as caught:
        call.timed_out(1)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED


def test_an_error_that_is_the_requests_own_is_raised_at_once() -> None:
    with pytest.raises(ApplianceError, match="wrong"):
        attempts(2).refused(0, WRONG)


def test_what_is_not_idempotent_is_sent_once_and_may_take_all_the_time() -> None:
    call = attempts(3, idempotent=False)
    assert call.until(100.0) == 103.0
    for fail in (lambda: call.refused(0, BUSY), lambda: call.lost(1), lambda: call.timed_out(2)):
        with pytest.raises(ApplianceError):
            fail()


def test_a_lost_connection_to_the_only_endpoint_is_forgiven_once() -> None:
    call = attempts(1)
    call.lost(0)
    assert call.candidates == [0]
    with pytest.raises(ApplianceError, match="connection was lost"):
        call.lost(0)


def test_without_any_connection_the_error_says_so() -> None:
    assert attempts(1).nobody().code is ErrorCode.UNAVAILABLE
    assert "is it running" in attempts(1).nobody().message


def test_ttl_shrinks_with_the_time_that_passed() -> None:
    assert remaining_ttl_ms(None, 100.0, 102.0, 100.5) == 1500
    assert remaining_ttl_ms(50, 100.0, 102.0, 100.02) == 30
    assert remaining_ttl_ms(50, 100.0, 102.0, 101.0) == 1.0


def reply(boot: str = "b", version: str = "1", error: ApplianceError | None = None) -> Reply:
    response = InferenceResponse(ModelName("m"), Version(version), RequestId("1"), ())
    return Reply("1", boot, error, None if error else response, {})


def known() -> Descriptions:
    descriptions = Descriptions()
    descriptions.put("m", "", Description("m", "1", (), ()), "b")
    return descriptions


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (reply(), True),
        (reply(boot="other"), True),  # it has just answered with the version that we know
        (reply(boot="other", error=BUSY), False),
        (reply(version="2"), False),
        (reply(error=WRONG), False),
        (reply(error=BUSY), True),
    ],
)
def test_a_description_is_kept_as_long_as_it_is_true(answer: Reply, kept: bool) -> None:
    descriptions = known()
    descriptions.learn("m", "", answer)
    assert (descriptions.get("m", "") is not None) is kept


def test_another_boot_makes_all_other_descriptions_doubtful() -> None:
    descriptions = known()
    descriptions.put("n", "", Description("n", "1", (), ()), "b")
    descriptions.learn("m", "", reply(boot="other"))
    assert descriptions.get("n", "") is None


def test_a_description_of_another_boot_replaces_all() -> None:
    descriptions = known()
    descriptions.put("n", "", Description("n", "1", (), ()), "other")
    assert descriptions.get("m", "") is None
    assert descriptions.get("n", "") is not None


def test_a_missing_field_is_the_appliances_fault() -> None:
    with pytest.raises(ApplianceError, match="lacks 'models'") as caught:
        fields_of(Reply("1", "b", None, None, {}), "models")
    assert caught.value.code is ErrorCode.INTERNAL


def event(seq: int, topic: str = "model.state", boot: str = "b") -> WireEvent:
    return WireEvent(topic, seq, "", boot, {})


def follower(*topics: str) -> Follower:
    follower = Follower(topics)
    assert follower.behind
    assert follower.caught_up({"seq": 5, "boot": "b"}).topic == "snapshot"
    return follower


def test_events_that_the_snapshot_includes_are_not_given_again() -> None:
    following = follower()
    assert [following.take(event(seq)) for seq in (4, 5, 6, 6, 7)] == [False, False, True, False, True]
    assert not following.behind


@pytest.mark.parametrize(
    "lost", [event(7), event(6, "heartbeat"), event(6, boot="other"), event(5, "heartbeat", "other")]
)
def test_a_gap_or_another_boot_asks_for_a_snapshot(lost: WireEvent) -> None:
    following = follower()
    assert not following.take(lost)
    assert following.behind
    following.caught_up({"seq": lost.seq, "boot": lost.boot})
    assert following.take(event(lost.seq + 1, boot=lost.boot))


def test_heartbeats_are_not_given() -> None:
    following = follower()
    assert not following.take(event(5, "heartbeat"))
    assert not following.behind


def test_topics_are_prefixes_and_what_they_leave_out_is_no_gap() -> None:
    following = follower("worker.")
    assert [following.take(event(6)), following.take(event(7, "worker.died"))] == [False, True]
    assert not following.behind


@pytest.mark.parametrize(
    ("link", "events"),
    [
        ("tcp://box:5570", "tcp://box:5571"),
        ("tcp://[::1]:5570", "tcp://[::1]:5571"),
        ("ipc:///run/a/infer.ipc", "ipc:///run/a/events.ipc"),
    ],
)
def test_events_are_reached_the_way_the_appliance_was(link: str, events: str) -> None:
    assert events_endpoint(link, ["tcp://0.0.0.0:5571", "ipc:///run/a/events.ipc", 7]) == events


def test_an_appliance_without_events_there_is_a_clear_error() -> None:
    with pytest.raises(ApplianceError, match="no events over ipc"):
        events_endpoint("ipc:///x", ["tcp://0.0.0.0:5571"])
