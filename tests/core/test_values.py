"""States, tensors, retries, version policy, classification: small pure rules, each with its table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.classification import classify
from appliance.core.errors import ApplianceError
from appliance.core.manifest import VersionPolicyManifest
from appliance.core.retry import RestartBudget, backoff
from appliance.core.states import (
    MODEL_TRANSITIONS,
    REQUEST_TRANSITIONS,
    ModelState,
    RequestState,
    model_transition,
    public_state,
    request_transition,
)
from appliance.core.tensor import DataType, Tensor, check_shape, check_size, datatype_of, element_count
from appliance.core.version_policy import GenerationSnapshot, Load, Unload, aspired_versions, next_action


def test_only_the_steps_of_the_table_exist() -> None:
    for current, target in itertools.product(ModelState, ModelState):
        if target in MODEL_TRANSITIONS[current]:
            assert model_transition(current, target) is target
        else:
            with pytest.raises(ValueError, match="no step"):
                model_transition(current, target)
    for before, after in itertools.product(RequestState, RequestState):
        if after in REQUEST_TRANSITIONS[before]:
            assert request_transition(before, after) is after
        else:
            with pytest.raises(ValueError, match="no step"):
                request_transition(before, after)


def test_every_state_has_a_public_name_and_every_failed_load_can_be_tried_again() -> None:
    assert {public_state(state) for state in ModelState} == {"LOADING", "READY", "UNLOADING", "UNAVAILABLE"}
    reachable = {ModelState.NEW}
    while more := {target for state in reachable for target in MODEL_TRANSITIONS[state]} - reachable:
        reachable |= more
    assert reachable == set(ModelState)
    assert ModelState.NEW in MODEL_TRANSITIONS[ModelState.FAILED]


def test_element_counts_do_not_wrap() -> None:
    assert element_count((2**4, 2**60 + 2)) == 2**64 + 32
    with pytest.raises(ApplianceError, match="needs"):
        check_size("x", DataType.INT8, (2**4, 2**60 + 2), 32)


@pytest.mark.parametrize(("shape", "words"), [((-1,), "0 or more"), ((1,) * 17, "at most 16")])
def test_impossible_shapes_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ApplianceError, match=words):
        check_shape("x", shape)


def test_datatypes_have_the_protocol_s_names() -> None:
    assert datatype_of("FP32") is DataType.FP32
    with pytest.raises(ApplianceError, match="unknown datatype 'FLOAT'"):
        datatype_of("FLOAT")


@given(st.integers(0, 2000), st.floats(0.001, 1), st.floats(1, 60))
def test_pauses_grow_and_stay_below_their_limit(attempt: int, initial: float, maximum: float) -> None:
    assert backoff(attempt, initial, maximum) <= maximum
    assert backoff(attempt, initial, maximum) <= backoff(attempt + 1, initial, maximum)


def test_a_restart_budget_is_spent_and_comes_back_with_time() -> None:
    budget = RestartBudget(limit=3, window_s=60, backoff_initial_s=0.1, backoff_max_s=10)
    assert [budget.next_delay(now) for now in (0, 1, 2, 3)] == [0.1, 0.2, 0.4, None]
    assert budget.next_delay(200) == 0.1


S = ModelState


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [
        ([], None),
        ([("2", S.NEW, True)], Load("2")),
        ([("1", S.READY, False), ("2", S.NEW, True)], Load("2")),
        ([("1", S.READY, False), ("2", S.LOADING, True)], None),
        ([("1", S.READY, False), ("2", S.READY, True)], Unload("1")),
        ([("1", S.READY, False), ("2", S.FAILED, True)], None),
        ([("1", S.FAILED, False), ("2", S.FAILED, True)], Unload("1")),
        ([("1", S.READY, False)], Unload("1")),
        ([("1", S.DRAINING, False)], None),
        ([("1", S.READY, True), ("2", S.FAILED, True)], None),
    ],
)
def test_the_policy_keeps_something_serving(snapshots: list[tuple[str, ModelState, bool]], expected: object) -> None:
    assert next_action([GenerationSnapshot(*snapshot) for snapshot in snapshots]) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (VersionPolicyManifest(), (7,)),
        (VersionPolicyManifest(latest=2), (3, 7)),
        (VersionPolicyManifest(all=True), (1, 3, 7)),
        (VersionPolicyManifest(specific=(1, 9)), (1,)),
    ],
)
def test_which_versions_are_aspired_to(policy: VersionPolicyManifest, expected: tuple[int, ...]) -> None:
    assert aspired_versions({7, 1, 3}, policy) == expected


def test_the_best_classes_come_first_with_their_labels() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]], np.float32)
    found = classify(Tensor("s", DataType.FP32, (2, 3), scores.tobytes()), 2, ["a", "b"], batched=True)
    assert (found.datatype, found.shape) == (DataType.BYTES, (2, 2))
    texts = [b"0.700000:1:b", b"0.200000:2", b"0.500000:0:a", b"0.500000:1:b"]
    assert found.data == b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def test_strings_cannot_be_classified() -> None:
    with pytest.raises(ApplianceError, match="needs numbers"):
        classify(Tensor("s", DataType.BYTES, (1,), bytes(4)), 1, [], batched=False)
