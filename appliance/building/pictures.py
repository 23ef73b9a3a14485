"""Pictures, arrays and labelled folders as a model's inputs, by the preprocessing that its manifest names.

One place for all who feed a model: `infer`, calibration, verification, evaluation. Knows files and shapes, and no engine. Needs
pillow for pictures only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from appliance.building.arrays import Archive, ArrayError, as_input, read_array
from appliance.core.manifest import PreprocessingManifest
from appliance.core.tensor import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
MAX_PIXELS = 64_000_000
"""A picture may announce any size in a few bytes; beyond this it is refused before it is decoded."""

PADDING = 114
"""Grey of a letterbox's bars, as the YOLO family was trained with."""

LABEL_ARRAYS = ("label", "labels", "y")
"""What the array of labels in an .npz may be called."""

CHANNEL_COUNTS = {"L": 1, "RGB": 3, "BGR": 3}


class SampleError(Exception):
    """A file, or a folder of them, is not what the model needs; the text says which and what was expected."""


class ImageLayout(msgspec.Struct, frozen=True):
    """An image input taken apart: sizes in pixels (-1: any), `first` if the channels come before height and width."""

    height: int
    width: int
    channels: int
    first: bool


def image_layout(spec: TensorSpec, preprocessing: PreprocessingManifest) -> ImageLayout:
    """How a picture lies in that input, by the manifest or else by its shape. SampleError if it looks like no picture."""
    sizes = spec.shape[-3:]
    likely: dict[str, bool] = {
        "NHWC": len(sizes) == 3 and sizes[2] in (1, 3),
        "NCHW": len(sizes) == 3 and sizes[0] in (1, 3),
    }
    layout: str = preprocessing.layout or next((name for name, fits in likely.items() if fits), "")
    if not layout or not likely[layout]:
        raise SampleError(
            f"input {spec.name!r} with shape {list(spec.shape)} does not look like a picture"
            + (f" in {layout}" if layout else "")
            + "; give arrays (.npy, .npz), or name [preprocessing] layout in model.toml"
        )
    if layout == "NHWC":
        found = ImageLayout(sizes[0], sizes[1], sizes[2], False)
    else:
        found = ImageLayout(sizes[1], sizes[2], sizes[0], True)
    wanted = CHANNEL_COUNTS.get(preprocessing.channels, found.channels)
    if wanted != found.channels:
        raise SampleError(
            f"[preprocessing] channels is {preprocessing.channels}, but input {spec.name!r} has {found.channels} channel(s)"
        )
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (0, 1, found.channels):
            raise SampleError(f"[preprocessing] {name} has {len(values)} values for {found.channels} channel(s)")
    return found


def load_picture(file: Path, spec: TensorSpec, preprocessing: PreprocessingManifest) -> NDArray[Any]:
    """A picture as one row of that input, without the batch axis. SampleError if it cannot be read or does not fit."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    layout = image_layout(spec, preprocessing)
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise SampleError(f"{file} has {opened.width}×{opened.height} pixels, {MAX_PIXELS} are allowed")
            upright = ImageOps.exif_transpose(opened)
            picture = upright.convert("L" if layout.channels == 1 else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise SampleError(f"{file} is no picture that can be read") from error
    if layout.width > 0 and layout.height > 0:
        picture = fit(picture, layout.width, layout.height, preprocessing.resize)
    pixels = np.asarray(picture, np.uint8).reshape(picture.height, picture.width, layout.channels)
    if preprocessing.channels == "BGR":
        pixels = pixels[..., ::-1]
    values = scale(pixels, spec, preprocessing)
    return np.ascontiguousarray(values.transpose(2, 0, 1) if layout.first else values)


def fit(picture: Image.Image, width: int, height: int, how: str) -> Image.Image:
    """A picture at that size: stretched, with bars of grey (letterbox), or cut at its longer sides (crop)."""
    from PIL import Image, ImageOps

    if picture.size == (width, height):
        return picture
    if how == "letterbox":
        grey: Any = PADDING if picture.mode == "L" else (PADDING,) * 3
        return ImageOps.pad(picture, (width, height), Image.Resampling.BILINEAR, color=grey)
    if how == "crop":
        return ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def scale(pixels: NDArray[np.uint8], spec: TensorSpec, preprocessing: PreprocessingManifest) -> NDArray[Any]:
    """(pixel * scale - mean) / std in the input's datatype. SampleError for datatypes that hold no pixels."""
    kind = spec.datatype.numpy
    if kind is None or kind == "bool":
        raise SampleError(f"input {spec.name!r} is {spec.datatype.value}, which holds no pixels")
    floats = np.dtype(kind).kind == "f"
    factor = preprocessing.scale or (1 / 255 if floats else 1.0)
    if factor == 1.0 and not preprocessing.mean and not preprocessing.std:
        return pixels.astype(kind)
    values: NDArray[Any] = pixels.astype(np.float32) * np.float32(factor)
    if preprocessing.mean:
        values = values - np.array(preprocessing.mean, np.float32)
    if preprocessing.std:
        values = values / np.array(preprocessing.std, np.float32)
    return (values if floats else np.rint(values)).astype(kind)


class Sample(msgspec.Struct, frozen=True):
    """One row for each input, with its batch axis of 1; its label's index (-1: none), where it came from, a target if any."""

    inputs: dict[str, Any]
    label: int
    source: str
    target: Any = None


class SampleSource:
    """Samples of a folder or an .npz, in a fixed order; read anew each time it is gone through.

    A folder holds pictures and arrays (.npy for the only input, .npz by input name), in subfolders named by label where they have
    one. An .npz holds an array for each input, rows first; `label` (or `labels`, `y`) with one integer a row (-1: none), or
    `target` with the values of a regression; a model with one input also takes `x`.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        preprocessing: PreprocessingManifest,
        labels: Sequence[str] = (),
        *,
        limit: int = 0,
    ) -> None:
        self._path = path
        self._inputs = tuple(inputs)
        self._preprocessing = preprocessing
        self._labels = {label: index for index, label in enumerate(labels)}
        self._limit = limit
        if not path.exists():
            raise SampleError(f"{path.name!r} is not there: expected a folder of pictures or arrays, or an .npz")
        if path.is_dir() and not self._files():
            raise SampleError(f"the folder {path.name!r} holds no .png, .jpg, .bmp, .npy or .npz")

    def _files(self) -> list[Path]:
        kinds = PICTURES | {".npy", ".npz"}
        found = sorted(file for file in self._path.rglob("*") if file.suffix.lower() in kinds and file.is_file())
        return self._spread(found)

    def _spread(self, files: list[Path]) -> list[Path]:
        """At most `limit` of them, evenly from all, so that every label's folder has its part."""
        if not self._limit or len(files) <= self._limit:
            return files
        return [files[index * len(files) // self._limit] for index in range(self._limit)]

    def __len__(self) -> int:
        """How many there are, as far as that is known without reading: an .npz inside a folder counts once."""
        if self._path.is_dir():
            return len(self._files())
        try:
            with Archive(self._path, self._place(self._path)) as archive:
                rows = len(next(iter(self._columns(archive, self._path).values())))
        except ArrayError as error:
            raise SampleError(str(error)) from error
        return min(rows, self._limit) if self._limit else rows

    def __iter__(self) -> Iterator[Sample]:
        """Each sample. SampleError names the file that is wrong."""
        files = self._files() if self._path.is_dir() else [self._path]
        for file in files:
            label = self._label(file) if self._path.is_dir() else -1
            try:
                if file.suffix.lower() in PICTURES | {".npy"}:
                    yield self._single(file, label)
                else:
                    yield from self._rows(file, label)
            except ArrayError as error:
                raise SampleError(str(error)) from error

    def _label(self, file: Path) -> int:
        """By the first folder below the source: a label's name, or a number."""
        parts = file.relative_to(self._path).parts
        if len(parts) < 2:
            return -1
        if parts[0] in self._labels:
            return self._labels[parts[0]]
        if parts[0].isdecimal():
            return int(parts[0])
        raise SampleError(f"{self._place(file)}: the folder {parts[0]!r} is no label of the model and no number")

    def _single(self, file: Path, label: int) -> Sample:
        spec = self._image_input()
        if file.suffix.lower() in PICTURES:
            return Sample({spec.name: load_picture(file, spec, self._preprocessing)[np.newaxis]}, label, file.name)
        return Sample({spec.name: self._row(file, spec, read_array(file, self._place(file)))}, label, file.name)

    def _image_input(self) -> TensorSpec:
        wanted = self._preprocessing.input
        for spec in self._inputs:
            if spec.name == (wanted or self._inputs[0].name):
                if len(self._inputs) > 1 and not wanted:
                    break
                return spec
        names = ", ".join(repr(spec.name) for spec in self._inputs)
        raise SampleError(f"the model takes {names}: give .npz files with an array for each, by name")

    def _place(self, file: Path) -> str:
        """For people: beside the source's own name, not where on this box that lies."""
        return str(file.relative_to(self._path.parent))

    def _columns(self, archive: Archive, file: Path) -> dict[str, Any]:
        columns = {}
        for spec in self._inputs:
            # a lone input may also go by the usual name
            name = "x" if len(self._inputs) == 1 and spec.name not in archive.names else spec.name
            if name not in archive.names:
                raise SampleError(
                    f"{self._place(file)} has no array {spec.name!r}; it holds {', '.join(archive.names)}"
                )
            columns[spec.name] = self._member(archive, name, file)
        return columns

    def _member(self, archive: Archive, name: str, file: Path) -> NDArray[Any]:
        array = archive[name]
        if not array.ndim:
            raise SampleError(f"{self._place(file)}: its array {name!r} is a scalar, rows were expected")
        return array

    def _rows(self, file: Path, label: int) -> Iterator[Sample]:
        with Archive(file, self._place(file)) as archive:
            columns = self._columns(archive, file)
            names = [name for name in LABEL_ARRAYS if name in archive.names and name not in columns]
            given = self._classes(self._member(archive, names[0], file), names[0], file) if names else None
            target = self._targets(self._member(archive, "target", file), file) if "target" in archive.names else None
            count = len(next(iter(columns.values())))
            beside = [column for column in (given, target) if column is not None]
            if any(len(column) != count for column in (*columns.values(), *beside)):
                raise SampleError(f"{self._place(file)}: its arrays have different numbers of rows")
            for row in range(min(count, self._limit) if self._limit else count):
                inputs = {spec.name: self._row(file, spec, columns[spec.name][row : row + 1]) for spec in self._inputs}
                index = int(given[row]) if given is not None else label
                yield Sample(inputs, index, f"{file.name}[{row}]", target[row] if target is not None else None)

    def _classes(self, array: NDArray[Any], name: str, file: Path) -> NDArray[Any]:
        """One class a row; -1 for none."""
        flat = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        wanted = f"{self._place(file)}: its array {name!r} must hold a whole number a row, the class from 0 on, or -1 for none"
        if flat.ndim != 1 or flat.dtype.kind not in "biuf":
            raise SampleError(f"{wanted}; {array.dtype} of shape {list(array.shape)} came")
        wrong = ~(np.isfinite(flat) & (flat == np.floor(flat)) & (flat >= -1) & (flat < 2**31))
        if wrong.any():
            raise SampleError(f"{wanted}; {flat[wrong][0]} came in row {int(np.argmax(wrong))}")
        return flat.astype(np.int64)

    def _targets(self, array: NDArray[Any], file: Path) -> NDArray[Any]:
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise SampleError(f"{self._place(file)}: its array 'target' must hold finite numbers only")
        return array

    def _row(self, file: Path, spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
        if array.ndim == len(spec.shape) - 1:
            array = array[np.newaxis]
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, size) for want, size in zip(spec.shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            raise SampleError(
                f"{self._place(file)}: input {spec.name!r} has shape {list(spec.shape)}, {list(array.shape)} came"
            )
        try:
            return as_input(array, spec)
        except ArrayError as error:
            raise SampleError(f"{self._place(file)}: {error}") from error
