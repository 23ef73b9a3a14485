"""What the code uses of TensorRT exists in every release that is supported, with those parameters. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.tensorrt import fakes, typing_check
from tests.contract.tensorrt.api import Api
from tests.contract.tensorrt.bindings import RELEASES, Release, UnavailableError, read
from tests.contract.tensorrt.uses import Checker, overrides, users
from tests.contract.tensorrt.uses import read as read_uses

ROOT = Path(__file__).parents[3]
FILES = users(ROOT / "appliance")
FAKES = [ROOT / "tests" / "fakes" / f"tensorrt_{half}.py" for half in ("runtime", "building")]

pytestmark = pytest.mark.slow


def read_or_skip(release: Release) -> Api:
    try:
        return read(release)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=RELEASES, ids=str)
def api(request: pytest.FixtureRequest) -> Api:
    return read_or_skip(request.param)


def test_every_name_and_every_call_is_known_to_this_release(api: Api) -> None:
    # those guarded by hasattr must be known to one of all
    checker = Checker([read_or_skip(release) for release in RELEASES])
    assert [problem for file in FILES for problem in checker.problems(read_uses(file), api)] == []


def test_callbacks_are_those_that_this_release_calls(api: Api) -> None:
    assert [problem for file in FILES for problem in overrides(file, api)] == []


def test_the_type_checker_agrees_with_this_release(api: Api, tmp_path: Path) -> None:
    assert typing_check.check(FILES, api, tmp_path) == []


def test_the_stand_in_has_only_what_this_release_has(api: Api) -> None:
    assert [problem for file in FAKES for problem in fakes.problems(file, api)] == []
