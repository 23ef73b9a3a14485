"""Bundles in parts: carried one by one, checked one by one, begun again where it broke off."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.release import bundle, parts
from appliance.release.errors import BundleError
from tests.release.making import KEY, OTHER, bytes_of, verify

FILES = {"models/a/1/model.onnx": bytes(range(256)) * 1000, "models/b/1/model.onnx": b"b" * 10}


@pytest.fixture
def index(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    (made / "x.bundle").write_bytes(bytes_of(FILES))
    return parts.split(made / "x.bundle", parts.MIN_PART_BYTES, KEY.sign)


def test_the_parts_together_are_the_bundle(index: Path) -> None:
    index.with_name("x.bundle").unlink()
    manifest, _ = bundle.verify_all(index, verify)
    assert {file.name for file in manifest.files} == set(FILES)
    assert len(parts.read_index(index, verify).parts) == 4


def test_what_is_there_and_right_is_not_copied_again(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "stick"
    target.mkdir()
    (target / "x.bundle.001").write_bytes(index.with_name("x.bundle.001").read_bytes())
    (target / "x.bundle.002").write_bytes(index.with_name("x.bundle.002").read_bytes()[:100])
    index.with_name("x.bundle.001").unlink()
    said: list[str] = []
    copied = parts.copy(index, target, verify, said.append)
    assert said[:2] == ["x.bundle.001: there already", "x.bundle.002: copied"]
    bundle.verify_all(copied, verify)


def test_a_missing_part_leaves_the_others_for_the_next_try(index: Path, tmp_path: Path) -> None:
    index.with_name("x.bundle.003").rename(tmp_path / "kept")
    with pytest.raises(BundleError, match=r"x\.bundle\.003 cannot be copied"):
        parts.copy(index, tmp_path / "stick", verify)
    (tmp_path / "kept").rename(index.with_name("x.bundle.003"))
    said: list[str] = []
    parts.copy(index, tmp_path / "stick", verify, said.append)
    assert [line.split(": ")[1] for line in said] == ["there already", "there already", "copied", "copied"]


def test_the_part_that_is_wrong_is_named(index: Path, tmp_path: Path) -> None:
    wrong = index.with_name("x.bundle.002")
    wrong.write_bytes(b"!" + wrong.read_bytes()[1:])
    with pytest.raises(BundleError, match=r"x\.bundle\.002 was altered"):
        bundle.verify_all(index, verify)
    with pytest.raises(BundleError, match=r"x\.bundle\.002 is not what was signed"):
        parts.copy(index, tmp_path / "stick", verify)
    assert not list((tmp_path / "stick").glob(".*"))


@given(data=st.data())
def test_an_index_with_a_flipped_bit_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "x.bundle").write_bytes(bytes_of({"models/a/1/model.onnx": b"1"}))
    index = parts.split(folder / "x.bundle", parts.MIN_PART_BYTES, KEY.sign)
    bad = bytearray(index.read_bytes())
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    index.write_bytes(bad)
    with pytest.raises(BundleError):
        parts.read_index(index, verify)


def test_another_makers_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bundle").write_bytes(bytes_of(FILES))
    with pytest.raises(BundleError, match="no trusted key"):
        parts.read_index(parts.split(tmp_path / "x.bundle", parts.MIN_PART_BYTES, OTHER.sign), verify)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".x", ""])
def test_a_part_cannot_be_elsewhere_even_if_signed(tmp_path: Path, name: str) -> None:
    import msgspec

    document = msgspec.json.encode(parts.Index("appliance-parts-1", (parts.Part(name, 1, "0" * 64),)))
    (tmp_path / "x.parts").write_bytes(KEY.sign(document) + document)
    with pytest.raises(BundleError, match="no part"):
        parts.read_index(tmp_path / "x.parts", verify)
