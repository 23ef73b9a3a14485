"""What sizes an engine is built for: from the batch size, from [build.shapes], or an error that says what to write."""

from __future__ import annotations

import pytest

from appliance.building.orders import BuildError
from appliance.building.profiles import InputRange, profile
from appliance.core.manifest import BatchingManifest, BuildManifest, ModelManifest, ShapeRange


def _manifest(max_batch_size: int = 0, **shapes: ShapeRange) -> ModelManifest:
    batching = BatchingManifest(max_batch_size=max_batch_size)
    return ModelManifest(batching=batching, build=BuildManifest(shapes=shapes))


def test_a_free_batch_axis_goes_from_one_to_the_largest_batch() -> None:
    assert profile([("x", (-1, 3))], _manifest(8)) == (InputRange("x", (1, 3), (8, 3), (8, 3)),)
    assert profile([("x", (-1, 3))], _manifest())[0].max == (32, 3)


def test_a_model_of_fixed_sizes_needs_no_profile() -> None:
    assert profile([("x", (1, 3)), ("y", (2,))], _manifest(8)) == ()


def test_a_range_is_taken_as_it_is_given() -> None:
    given = ShapeRange(min=(1, 64), max=(4, 512))
    assert profile([("x", (-1, -1))], _manifest(x=given)) == (InputRange("x", (1, 64), (4, 512), (4, 512)),)
    tuned = ShapeRange(min=(1, 64), opt=(2, 128), max=(4, 512))
    assert profile([("x", (-1, -1))], _manifest(x=tuned))[0].opt == (2, 128)


def test_a_free_axis_without_a_range_says_what_to_write() -> None:
    with pytest.raises(
        BuildError, match=r"axis 2 free .*\[build\.shapes\.x\] with min = \[1, 3, 1\] and max = \[8, 3,"
    ):
        profile([("x", (-1, 3, -1))], _manifest(8))
    with pytest.raises(BuildError, match=r'\[build\.shapes\."a:0"\]'):
        profile([("a:0", (-1, -1))], _manifest())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ShapeRange(min=(1,), max=(4, 3)), "min has 1 sizes, the input has 2 axes"),
        (ShapeRange(min=(1, 3), max=(4, 5)), "max has 5 on axis 1, where the model has 3"),
        (ShapeRange(min=(5, 3), max=(4, 3)), "min <= opt <= max"),
        (ShapeRange(min=(1, 3), opt=(9, 3), max=(4, 3)), "min <= opt <= max"),
    ],
)
def test_a_range_that_does_not_fit_says_why(given: ShapeRange, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        profile([("x", (-1, 3))], _manifest(x=given))


def test_a_range_for_no_input_is_refused() -> None:
    with pytest.raises(BuildError, match="names no input of the model; it has x"):
        profile([("x", (-1, 3))], _manifest(y=ShapeRange(min=(1, 3), max=(2, 3))))
