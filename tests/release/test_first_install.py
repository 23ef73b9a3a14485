"""The program that a box without the appliance begins with: it trusts one key, and takes nothing that was not signed with it."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.release import first_install, parts
from appliance.release.box import this_box
from appliance.release.first_install import RefusedError
from appliance.release.signing import TrustedKeys
from tests.release.making import KEY, OTHER, bytes_of, write_keys

RAW = KEY.public_key().public_bytes_raw()
FILES = {"release/a.whl": b"code" * 1000, "models/m/1/model.onnx": b"weights", "release/pip-1.whl": b""}


def unpacked(data: bytes, folder: Path) -> dict[str, bytes]:
    source = io.BytesIO(data)
    manifest = first_install.read_manifest(source, RAW)
    folder.mkdir(exist_ok=True)
    first_install.unpack(source, manifest, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_stands_alone() -> None:
    tree = ast.parse(Path(first_install.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_it_unpacks_the_release_and_nothing_else(tmp_path: Path) -> None:
    assert unpacked(bytes_of(FILES), tmp_path / "a") == {"a.whl": FILES["release/a.whl"], "pip-1.whl": b""}


@given(st.data())
def test_every_altered_byte_of_the_manifest_or_the_release_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = bytes_of(FILES)
    place = data.draw(st.integers(0, len(good) - 1))
    altered = bytearray(good)
    altered[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpacked(bytes(altered), tmp_path_factory.mktemp("altered"))
    except (RefusedError, ValueError):
        return
    # bytes of headers and fillings that nobody uses may differ; what comes out may not
    assert found == {"a.whl": FILES["release/a.whl"], "pip-1.whl": b""}


def test_another_key_and_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="not signed with this key"):
        unpacked(bytes_of(FILES, key=OTHER), tmp_path)
    with pytest.raises(RefusedError, match="no release to begin with"):
        unpacked(bytes_of({"models/m/1/model.onnx": b"weights"}), tmp_path)
    with pytest.raises(RefusedError, match="ends early"):
        unpacked(bytes_of(FILES)[:3000], tmp_path)


def test_a_box_of_another_kind_is_refused() -> None:
    here = this_box()
    first_install.check_box({"system": here.system, "machine": "any", "python": here.python})
    with pytest.raises(RefusedError, match=f"for system debian-99, this box has {here.system}"):
        first_install.check_box({"system": "debian-99", "machine": "any", "python": "any"})


def test_keys_are_read_from_pem_and_nothing_else_is_a_key(tmp_path: Path) -> None:
    private = write_keys(tmp_path)
    assert len(first_install.public_key((tmp_path / "keys/maker.pub").read_text())) == 32
    for text in (private.read_text(), "", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(RefusedError, match="Ed25519 public key"):
            first_install.public_key(text)


def test_parts_are_read_as_one_and_a_missing_one_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "r.bundle"
    whole.write_bytes(bytes_of({**FILES, "release/b.whl": bytes(200_000)}))
    index = parts.split(whole, 64 << 10, KEY.sign)
    with first_install.open_bundle(index, RAW) as opened:
        assert opened.read() == whole.read_bytes()
    with pytest.raises(RefusedError, match="not signed"):
        first_install.open_bundle(index, OTHER.public_key().public_bytes_raw())
    (tmp_path / "r.bundle.002").unlink()
    with pytest.raises(RefusedError, match=r"r\.bundle\.002 is missing"):
        first_install.open_bundle(index, RAW)


def test_a_manifest_of_no_or_of_negative_size_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for size in (b"-0000000001", b"00000000000"):
        data = bytearray(bytes_of(FILES))
        data[124:135] = size
        source = io.BytesIO(bytes(data))
        with pytest.raises(RefusedError, match="no bundle of the appliance"):
            first_install.read_manifest(source, RAW)
        assert source.tell() == 512


def test_the_key_is_laid_where_it_is_trusted_whatever_its_name_was_and_replaces_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(tmp_path)
    folder = tmp_path / "keys"
    monkeypatch.setattr(first_install, "KEYS", folder)
    raw = first_install.public_key((folder / "maker.pub").read_text())
    place = first_install.trusted_place("maker.pem", raw)
    place.write_text((folder / "maker.pub").read_text())
    assert len(TrustedKeys(folder).keys) == 1
    assert place in folder.glob("*.pub")
    assert first_install.trusted_place("maker.pub", raw) == folder / "maker.pub"
    with pytest.raises(RefusedError, match=r"maker\.pub is another key"):
        first_install.trusted_place("maker.pub", RAW)


def test_a_box_without_a_running_systemd_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "appliance.deb").touch()

    def run(line: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(line, 0 if line[0] == "dpkg" else 1)

    monkeypatch.setattr(first_install.subprocess, "run", run)
    with pytest.raises(RefusedError, match="systemctl enable"):
        first_install.by_dpkg(tmp_path)


def test_what_it_verifies_is_what_the_library_signs() -> None:
    assert first_install.signed(RAW, b"message", KEY.sign(b"message"))
    assert not first_install.signed(RAW, b"massage", KEY.sign(b"message"))
    assert not first_install.signed(RAW, b"message", b"short")
