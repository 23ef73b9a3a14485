"""The bundle's bytes: what comes out is what went in, tar can read it, and nothing else is accepted."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.release import archive, bundle, manifest
from appliance.release.errors import BundleError
from tests.release.making import KEY, OTHER, bytes_of, manifest_of, read, verify

FILES = {"models/digits/1/model.onnx": b"weights" * 200, "models/digits/labels.txt": b"", "release/a.whl": b"x" * 512}

parts = st.builds(lambda first, rest: first + rest, st.sampled_from("aZ9_"), st.text("aZ9._+~-", max_size=8))
names = st.builds(
    lambda room, rest: "/".join([room, *rest]), st.sampled_from(manifest.ROOMS), st.lists(parts, min_size=1, max_size=5)
)
contents = st.dictionaries(names, st.binary(max_size=1200), max_size=6).filter(
    lambda files: not any(other.startswith(f"{name}/") for name in files for other in files)
)


@given(contents)
def test_what_went_in_comes_out(files: dict[str, bytes]) -> None:
    assert read(bytes_of(files)) == files


@given(contents)
def test_any_tar_reads_it(files: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(bytes_of(files))) as opened:
        found = {member.name: opened.extractfile(member).read() for member in opened.getmembers()}  # type: ignore[union-attr]
    assert {name: data for name, data in found.items() if not name.startswith("manifest.")} == files


def test_a_long_name_is_split_as_tar_does() -> None:
    name = "release/" + "w" * 96 + ".whl"
    with tarfile.open(fileobj=io.BytesIO(bytes_of({name: b"1"}))) as opened:
        assert name in opened.getnames()


@given(data=st.data())
def test_one_flipped_bit_anywhere_is_noticed(data: st.DataObject) -> None:
    good = bytes_of(FILES)
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BundleError):
        read(bytes(bad))


@given(data=st.data())
def test_a_truncated_bundle_is_noticed(data: st.DataObject) -> None:
    good = bytes_of(FILES)
    with pytest.raises(BundleError):
        read(good[: data.draw(st.integers(0, len(good) - 1))])


@given(st.binary(min_size=1, max_size=2000))
def test_trailing_bytes_are_noticed(more: bytes) -> None:
    with pytest.raises(BundleError, match="behind the end"):
        read(bytes_of(FILES) + more)


@given(st.binary(max_size=3000))
def test_noise_is_no_bundle(noise: bytes) -> None:
    with pytest.raises(BundleError):
        read(noise)


def test_another_makers_bundle_is_refused_before_its_manifest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes_of(FILES, key=OTHER)
    monkeypatch.setattr(archive, "decode", lambda _: pytest.fail("untrusted bytes were decoded"))
    with pytest.raises(BundleError, match="no trusted key"):
        read(data)


def signed(document: bytes, rest: bytes = b"") -> bytes:
    """A bundle whose manifest is any bytes, rightly signed: what a careless maker could hand out."""
    target = io.BytesIO()
    archive._write_member(target, archive.MANIFEST, document)
    archive._write_member(target, archive.SIGNATURE, KEY.sign(document))
    return target.getvalue() + rest


@pytest.mark.parametrize(
    "name",
    [
        "../etc/passwd", "/etc/passwd", "models/../../etc/passwd", "models/./a", "models//a", "models/a/", "models",
        "models/.hidden", "models/a\0b", "models/a b", "models/" + "x" * 101, "models/\u00e4", "models/a\\b", "models/-rf", "",
        "elsewhere/a", "models/" + "/".join("abcdefgh"),
    ],
)  # fmt: skip
def test_a_name_that_could_leave_its_folder_is_refused_even_if_signed(name: str) -> None:
    document = msgspec.json.encode(msgspec.structs.replace(manifest_of({}), files=(manifest.File(name, 0, "0" * 64),)))
    with pytest.raises(BundleError):
        read(signed(document))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([("models/a", 1), ("models/a", 1)], "twice"),
        ([("models/b", 1), ("models/a", 1)], "not in order"),
        ([("models/a", 1), ("models/a+b", 1), ("models/a/1", 1)], "a file and a folder"),
        ([("models/a", manifest.MAX_FILE_BYTES + 1)], "bytes"),
        ([("models/a", -1)], "bytes"),
        ([(f"models/{n:03d}", manifest.MAX_FILE_BYTES) for n in range(40)], "in all"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_even_if_signed(files: list[tuple[str, int]], words: str) -> None:
    listed = tuple(manifest.File(name, size, "0" * 64) for name, size in files)
    document = msgspec.json.encode(msgspec.structs.replace(manifest_of({}), files=listed))
    with pytest.raises(BundleError, match=words):
        read(signed(document))


@pytest.mark.parametrize("document", [b"{}", b"[" * 10_000, b"\xff", b'{"format":"appliance-parts-1"}'])
def test_a_signed_document_of_another_kind_is_no_manifest(document: bytes) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        read(signed(document))


def test_a_manifest_larger_than_allowed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            view = memoryview(buffer)  # type: ignore[arg-type]
            head = archive.header(archive.MANIFEST, manifest.MAX_MANIFEST_BYTES + 1)
            view[: len(head)] = head[: len(view)]
            self.taken += len(view)
            return len(view)

    source = Endless()
    with pytest.raises(BundleError, match="no bundle"):
        archive.Reader(source, verify)  # type: ignore[arg-type]
    assert source.taken <= archive.BLOCK


def test_unpacking_follows_no_link_and_overwrites_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="in the way"):
        bundle.unpack(archive.Reader(io.BytesIO(bytes_of(FILES)), verify), tmp_path)
    fresh = tmp_path / "fresh"
    bundle.unpack(archive.Reader(io.BytesIO(bytes_of(FILES)), verify), fresh)
    assert {
        path.relative_to(fresh).as_posix(): path.read_bytes() for path in fresh.rglob("*") if path.is_file()
    } == FILES


def test_a_link_is_not_taken_into_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "secret").symlink_to("/etc/shadow")
    with pytest.raises(BundleError, match="no plain file"):
        bundle.collect({"models": [tmp_path / "m"]})


def test_tar_and_openssl_alone_can_check_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    (tmp_path / "b.bundle").write_bytes(bytes_of(FILES))
    (tmp_path / "k.pub").write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    subprocess.run(["tar", "-xf", "b.bundle"], cwd=tmp_path, check=True)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "k.pub", "-rawin", "-in", "manifest.json"]
    try:
        subprocess.run([*command, "-sigfile", "manifest.sig"], cwd=tmp_path, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
