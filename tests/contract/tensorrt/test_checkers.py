"""The checkers themselves, on samples that must pass and samples that must not; and signatures taken apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.contract.tensorrt import fakes, typing_check
from tests.contract.tensorrt.api import Api, Parameter, signature
from tests.contract.tensorrt.bindings import RELEASES, UnavailableError, read
from tests.contract.tensorrt.uses import Checker, users
from tests.contract.tensorrt.uses import overrides as overridden
from tests.contract.tensorrt.uses import read as read_uses

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="module")
def apis() -> list[Api]:
    try:
        return [read(release) for release in RELEASES]
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("line", "parameters", "returns"),
    [
        ("f(self: a.tensorrt.B, x: int, y: list[tuple[int, str]] = [(1, 'a')]) -> None", ["x", "y"], "None"),
        ("2. g(arg0: B, kind: K = <K.STATIC: 0>) -> a.tensorrt_rtx.C", ["kind"], "C"),
        ("(self: B) -> int", [], "int"),
        ("h(self: B, *args, **kwargs) -> Callable[[int], str]", ["*args", "**kwargs"], "Callable[[int], str]"),
    ],
)
def test_a_signature_in_a_docstring_is_taken_apart(line: str, parameters: list[str], returns: str) -> None:
    found = signature(line)
    assert ([parameter.name for parameter in found.parameters], found.returns) == (parameters, returns)


def test_a_call_is_held_against_a_signature() -> None:
    found = signature("f(self: B, x: int, y: int, z: int = 0) -> None")
    assert found.parameters[0] == Parameter("x", "int", False)
    assert found.refuses(2, ()) == found.refuses(1, ("y", "z")) == ""
    assert found.refuses(1, ()) == "is not given 'y'"
    assert found.refuses(4, ()) == "takes 3 arguments, not 4"
    assert found.refuses(2, ("w",)) == "has no parameter 'w'"
    with pytest.raises(ValueError, match="no signature"):
        signature("Overloaded function.")


def test_files_that_use_the_library_are_found() -> None:
    assert [file.name for file in users(SAMPLES)] == ["bad.py", "good.py"]
    assert "tensorrt_library.py" in [file.name for file in users(Path(__file__).parents[3] / "appliance")]


def where(problems: list[str]) -> list[tuple[int, str]]:
    """Line, and the word in quotes that it is about."""
    return [(int(one.split(":")[1]), (re.findall(r"['\"](\w+)['\"]", one) or ["?"])[0]) for one in problems]


@pytest.mark.slow
def test_uses_without_types(apis: list[Api]) -> None:
    checker = Checker(apis)
    for api in apis:
        assert checker.problems(read_uses(SAMPLES / "good.py"), api) == []
        assert overridden(SAMPLES / "good.py", api) == []
    newest = apis[-2]
    assert where(checker.problems(read_uses(SAMPLES / "bad.py"), newest)) == [
        (11, "create_execution_context_without_device_memory"),
        (13, "execute_async_v2"),
        (14, "stream"),
        (18, "FP16"),
        (19, "max_num_tacticss"),
        (20, "max_num_tacticss"),
        (21, "MemoryPool"),
        (25, "execute_async_v4"),
        (26, "profile_index"),
        (27, "device_memory_size"),
    ]
    assert where(overridden(SAMPLES / "bad.py", newest)) == [(31, "notify_shapes")]
    oldest = [line for line, _ in where(checker.problems(read_uses(SAMPLES / "bad.py"), apis[0]))]
    assert oldest == [13, 14, 19, 20, 21, 25, 26]


@pytest.mark.slow
def test_uses_with_types(apis: list[Api], tmp_path: Path) -> None:
    errors = typing_check.check([SAMPLES / "good.py", SAMPLES / "bad.py"], apis[-2], tmp_path)
    assert where(errors) == [
        (11, "ICudaEngine"),
        (13, "IExecutionContext"),
        (14, "stream"),
        (18, "FP16"),
        (21, "MemoryPool"),
    ]
    assert all(one.startswith("bad.py") for one in errors)


@pytest.mark.slow
def test_a_stand_in_is_held_against_the_real_one(apis: list[Api]) -> None:
    for api in apis:
        assert fakes.problems(SAMPLES / "fake_good.py", api) == []
        assert [int(one.split(":")[1]) for one in fakes.problems(SAMPLES / "fake_bad.py", api)] == [
            9, 10, 14, 20, 22, 25, 29, 33,
        ]  # fmt: skip
