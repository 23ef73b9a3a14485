"""`infer MODEL FILE…`: ask a running appliance about pictures, arrays or ready-made requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.cli.connection import Appliance, model_path
from appliance.cli.options import JSON, URL, command
from appliance.cli.output import CommandError, Exit, note, print_json, print_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PICTURES = {".png", ".jpg", ".jpeg", ".bmp"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("infer")(infer)


@command
def infer(
    model: Annotated[str, typer.Argument(help="The model to ask.")],
    files: Annotated[list[Path], typer.Argument(help="png, jpg, npy, npz or json; one request each.")],
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many classes to show.")] = 3,
    raw: Annotated[bool, typer.Option("--raw", help="Print the output tensors instead of classes.")] = False,
    url: URL = None,
    as_json: JSON = False,
) -> None:
    """Ask a model, and print labels with their probabilities."""
    appliance = Appliance(url)
    metadata = appliance.get(model_path(model))
    answers = []
    for file in files:
        body, headers = _request(file, metadata, 0 if raw else top)
        _, data = appliance.request("POST", model_path(model, "infer"), body, headers)
        answers.append((file, json.loads(data)))
    if as_json:
        print_json([{"file": str(file), **answer} for file, answer in answers])
    elif raw:
        for file, answer in answers:
            for output in answer["outputs"]:
                typer.echo(f"{file}  {output['name']} {output['datatype']} {output['shape']}")
                typer.echo(json.dumps(output["data"]))
    else:
        print_table(("FILE", "OUTPUT", "CLASS", "LABEL", "VALUE"), [row for item in answers for row in _rows(*item)])


def _rows(file: Path, answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for output in answer["outputs"]:
        for text in output["data"]:
            value, index, *label = text.split(":", 2)
            rows.append((file.name, output["name"], index, label[0] if label else "", f"{float(value):.4f}"))
    return rows


def _request(file: Path, metadata: dict[str, Any], classes: int) -> tuple[bytes, dict[str, str]]:
    """The HTTP body and headers for one file."""
    if not file.is_file():
        raise CommandError(Exit.USAGE, "NO_FILE", f"{file} is no file")
    if file.suffix == ".json":
        return file.read_bytes(), {}
    arrays = _arrays(file, metadata)
    inputs, blobs = [], []
    for spec in metadata["inputs"]:
        if spec["name"] not in arrays:
            raise CommandError(
                Exit.USAGE,
                "NO_INPUT",
                f"{file}: the input {spec['name']!r} is missing",
                f"the file holds {', '.join(arrays)}",
            )
        data, shape = _wire(arrays[spec["name"]], spec)
        inputs.append(
            {
                "name": spec["name"],
                "datatype": spec["datatype"],
                "shape": shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )
        blobs.append(data)
    document: dict[str, Any] = {"inputs": inputs}
    if classes:
        document["outputs"] = [
            {"name": output["name"], "parameters": {"classification": classes}} for output in metadata["outputs"]
        ]
    header = json.dumps(document).encode()
    return b"".join((header, *blobs)), {"Inference-Header-Content-Length": str(len(header))}


def _wire(array: NDArray[Any], spec: dict[str, Any]) -> tuple[bytes, list[int]]:
    """An array as the bytes of that input, with the batch axis added if only that is missing."""
    import numpy as np

    from appliance.core.tensor import datatype_of
    from appliance.protocols.tensors import from_numpy

    datatype = datatype_of(spec["datatype"])
    if array.ndim == len(spec["shape"]) - 1:
        array = array[np.newaxis]
    if datatype.numpy is not None and array.dtype != np.dtype(datatype.numpy):
        note(f"{spec['name']}: {array.dtype} converted to {datatype.value}")
        array = array.astype(datatype.numpy)
    tensor = from_numpy(spec["name"], array, datatype if datatype.numpy is None and datatype.itemsize else None)
    return bytes(tensor.data), list(tensor.shape)


def _arrays(file: Path, metadata: dict[str, Any]) -> dict[str, NDArray[Any]]:
    import numpy as np

    first = metadata["inputs"][0]["name"]
    if file.suffix.lower() in PICTURES:
        return {first: _picture(file, metadata["inputs"][0])}
    try:
        if file.suffix == ".npy":
            return {first: np.load(file, allow_pickle=False)}
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except (ValueError, OSError) as error:
        raise CommandError(Exit.USAGE, "BAD_FILE", f"{file} cannot be read: {error}") from error
    raise CommandError(Exit.USAGE, "BAD_FILE", f"{file}: unknown kind of file", "png, jpg, npy, npz or json")


def _picture(file: Path, spec: dict[str, Any]) -> NDArray[Any]:
    """A picture fitted to an image input: size, channels, layout; floats in [0, 1], bytes as they are."""
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CommandError(
            Exit.FAILED,
            "NO_PILLOW",
            "pictures need the package pillow",
            "pip install 'appliance[cpu]', or send an .npy",
        ) from error
    height, width, channels, first = _layout(spec)
    try:
        with Image.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CommandError(Exit.USAGE, "BAD_FILE", f"{file} is no picture that can be read") from error
    done = [f"{channels} channel{'s' if channels > 1 else ''}"]
    if (width, height) != picture.size and width > 0 and height > 0:
        done.append(f"{picture.width}×{picture.height} resized to {width}×{height}")
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    array: NDArray[np.uint8] = np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)
    if first:
        array = array.transpose(2, 0, 1)
    if spec["datatype"].startswith("FP"):
        done.append("scaled to [0, 1]")
        scaled: NDArray[Any] = array.astype(np.float32) / 255
        note(f"{file.name}: {', '.join(done)}")
        return scaled
    note(f"{file.name}: {', '.join(done)}")
    return array


def _layout(spec: dict[str, Any]) -> tuple[int, int, int, bool]:
    """Height, width, channels of an image input, and whether channels come first."""
    shape = spec["shape"][-3:]
    if len(shape) == 3 and shape[2] in (1, 3):
        return shape[0], shape[1], shape[2], False
    if len(shape) == 3 and shape[0] in (1, 3):
        return shape[1], shape[2], shape[0], True
    raise CommandError(
        Exit.USAGE,
        "NO_IMAGE_INPUT",
        f"input {spec['name']!r} with shape {spec['shape']} does not look like a picture",
        "send an .npy, .npz or .json",
    )
