"""Pictures and arrays as inputs: layout, fit, scaling, labelled folders; and what is wrong with them, in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from appliance.building.pictures import PADDING, SampleError, SampleSource, image_layout, load_picture
from appliance.core.manifest import PreprocessingManifest
from appliance.core.tensor import DataType, TensorSpec

NHWC = TensorSpec("x", DataType.FP32, (-1, 4, 6, 3))
NCHW = TensorSpec("x", DataType.UINT8, (-1, 3, 4, 6))
GREY = TensorSpec("x", DataType.FP32, (-1, 4, 4, 1))
PLAIN = PreprocessingManifest()


def _picture(file: Path, width: int, height: int, colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(file)
    return file


def test_the_layout_is_read_from_the_shape() -> None:
    assert image_layout(NHWC, PLAIN).first is False
    found = image_layout(NCHW, PLAIN)
    assert (found.height, found.width, found.channels, found.first) == (4, 6, 3, True)


@pytest.mark.parametrize("shape", [(-1, 10), (-1, 8, 8, 8), ()])
def test_what_is_no_picture_says_so(shape: tuple[int, ...]) -> None:
    with pytest.raises(SampleError, match="does not look like a picture"):
        image_layout(TensorSpec("x", DataType.FP32, shape), PLAIN)


def test_a_contradiction_with_the_manifest_says_so() -> None:
    with pytest.raises(SampleError, match=r"channels is L, but input 'x' has 3"):
        image_layout(NHWC, PreprocessingManifest(channels="L"))
    with pytest.raises(SampleError, match="mean has 2 values for 3"):
        image_layout(NHWC, PreprocessingManifest(mean=(1, 2)))


def test_floats_are_shares_and_bytes_stay(tmp_path: Path) -> None:
    file = _picture(tmp_path / "p.png", 6, 4)
    array = load_picture(file, NHWC, PLAIN)
    assert array.shape == (4, 6, 3)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array[0, 0], np.array([10, 20, 30]) / 255, rtol=1e-6)
    array = load_picture(file, NCHW, PLAIN)
    assert array.shape == (3, 4, 6)
    assert array[:, 0, 0].tolist() == [10, 20, 30]


def test_mean_std_scale_and_bgr_are_applied_in_that_order(tmp_path: Path) -> None:
    file = _picture(tmp_path / "p.png", 6, 4)
    wanted = PreprocessingManifest(channels="BGR", scale=0.5, mean=(1, 2, 3), std=(2, 2, 2))
    array = load_picture(file, NHWC, wanted)
    np.testing.assert_allclose(array[0, 0], (np.array([30, 20, 10]) * 0.5 - [1, 2, 3]) / 2)


def test_a_letterbox_pads_with_grey_and_a_crop_cuts(tmp_path: Path) -> None:
    file = _picture(tmp_path / "p.png", 60, 10, (255, 255, 255))
    spec = TensorSpec("x", DataType.UINT8, (-1, 8, 8, 3))
    boxed = load_picture(file, spec, PreprocessingManifest(resize="letterbox"))
    assert boxed[0, 0].tolist() == [PADDING] * 3
    assert boxed[4, 4].tolist() == [255] * 3
    assert (load_picture(file, spec, PreprocessingManifest(resize="crop")) == 255).all()


def test_a_picture_turned_by_its_camera_is_put_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 6))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.jpg", exif=exif)
    spec = TensorSpec("x", DataType.UINT8, (-1, -1, -1, 3))
    assert load_picture(tmp_path / "p.jpg", spec, PLAIN).shape == (4, 6, 3)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"no picture")
    with pytest.raises(SampleError, match=r"p\.png is no picture"):
        load_picture(tmp_path / "p.png", NHWC, PLAIN)


def test_a_folder_of_labels_gives_each_sample_its_index(tmp_path: Path) -> None:
    for label in ("bad", "good"):
        for number in range(2):
            _picture(tmp_path / label / f"{number}.png", 4, 4)
    found = list(SampleSource(tmp_path, [GREY], PLAIN, ["good", "bad"]))
    assert [(sample.label, sample.source) for sample in found] == [
        (1, "0.png"), (1, "1.png"), (0, "0.png"), (0, "1.png")
    ]  # fmt: skip
    assert found[0].inputs["x"].shape == (1, 4, 4, 1)


def test_a_limit_takes_evenly_from_all(tmp_path: Path) -> None:
    for label in "012":
        for number in range(4):
            _picture(tmp_path / label / f"{number}.png", 4, 4)
    assert {sample.label for sample in SampleSource(tmp_path, [GREY], PLAIN, limit=3)} == {0, 1, 2}


def test_an_archive_gives_rows_labels_and_targets(tmp_path: Path) -> None:
    rows = np.arange(48, dtype=np.float64).reshape(3, 4, 4, 1)
    np.savez(tmp_path / "a.npz", x=rows, y=np.array([2, 0, 1]), target=np.array([0.5, 1.5, 2.5]))
    source = SampleSource(tmp_path / "a.npz", [GREY], PLAIN)
    found = list(source)
    assert len(source) == 3
    assert [sample.label for sample in found] == [2, 0, 1]
    assert [float(sample.target) for sample in found] == [0.5, 1.5, 2.5]
    assert found[0].inputs["x"].dtype == np.float32
    np.testing.assert_array_equal(found[1].inputs["x"], rows[1:2])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"z": np.zeros((1, 4, 4, 1))}, "has no array 'x'; it holds z"),
        ({"x": np.zeros((2, 4, 4, 1)), "y": np.zeros(3, int)}, "different numbers of rows"),
        ({"x": np.full((2, 4, 4, 1), "a")}, r"a\.npz: input 'x' is FP32, an array of strings"),
        ({"x": np.zeros((2, 4, 4, 1)), "y": np.array([0, 0.5])}, r"whole number a row.*0\.5 came in row 1"),
        ({"x": np.zeros((2, 4, 4, 1)), "y": np.array([0, -2])}, r"whole number a row.*-2 came in row 1"),
        ({"x": np.zeros((2, 4, 4, 1)), "target": np.array([0, np.inf])}, "'target' must hold finite numbers"),
        ({"x": np.zeros((2, 5, 4, 1))}, r"has shape \[-1, 4, 4, 1\], \[1, 5, 4, 1\] came"),
    ],
)
def test_an_archive_that_does_not_fit_says_why(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SampleError, match=said):
        list(SampleSource(tmp_path / "a.npz", [GREY], PLAIN))


def test_an_archive_of_pickles_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SampleError, match="its array 'x' cannot be read"):
        list(SampleSource(tmp_path / "a.npz", [GREY], PLAIN))


def test_an_archive_that_is_cut_short_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4, 1)))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    source = SampleSource(tmp_path / "a.npz", [GREY], PLAIN)
    for use in (len, list):
        with pytest.raises(SampleError, match=r"a\.npz is no \.npz that can be read"):
            use(source)


def test_whole_numbers_are_labels_whatever_their_datatype(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4, 4, 1)), labels=np.array([[2.0], [-1.0], [0.0]]))
    assert [sample.label for sample in SampleSource(tmp_path / "a.npz", [GREY], PLAIN)] == [2, -1, 0]


def test_a_folder_that_is_no_label_and_places_that_hold_nothing_are_named(tmp_path: Path) -> None:
    _picture(tmp_path / "scratched" / "p.png", 4, 4)
    with pytest.raises(SampleError, match="'scratched' is no label"):
        list(SampleSource(tmp_path, [GREY], PLAIN, ["good"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match="holds no"):
        SampleSource(tmp_path / "empty", [GREY], PLAIN)
    with pytest.raises(SampleError, match="is not there"):
        SampleSource(tmp_path / "none", [GREY], PLAIN)


def test_several_inputs_need_archives_by_name(tmp_path: Path) -> None:
    _picture(tmp_path / "p.png", 4, 4)
    with pytest.raises(SampleError, match=r"takes 'x', 'z': give \.npz"):
        list(SampleSource(tmp_path, [GREY, TensorSpec("z", DataType.FP32, (-1, 2))], PLAIN))
