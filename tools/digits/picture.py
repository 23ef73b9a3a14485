"""PNG pictures for the model folder: the confusion matrix and single digits. Arrays in, bytes out."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from . import CLASS_COUNT

CELL = 56
LEFT, TOP, RIGHT, BOTTOM = 84, 60, 24, 72
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 32), (221, 225, 230)
RIGHT_HUE, WRONG_HUE = (29, 99, 161), (190, 60, 30)


def digit_png(image: NDArray[np.float32]) -> bytes:
    """Encode one picture (28, 28, 1) of 0..1 as 8-bit grey."""
    grey = np.rint(np.clip(image[:, :, 0], 0.0, 1.0) * 255.0).astype(np.uint8)
    return _png(Image.fromarray(grey))


def confusion_png(confusion: NDArray[np.int64]) -> bytes:
    """Draw counts (true, predicted): hits blue, mistakes red, both deeper the larger their share of the true class."""
    side = CELL * CLASS_COUNT
    canvas = Image.new("RGB", (LEFT + side + RIGHT, TOP + side + BOTTOM), PAPER)
    draw = ImageDraw.Draw(canvas)
    title, number, axis = (ImageFont.load_default(size) for size in (22, 20, 18))
    hits, total = int(np.trace(confusion)), int(confusion.sum())
    draw.text((LEFT + side / 2, TOP / 2), f"{hits} of {total} test pictures right", INK, title, anchor="mm")
    support = np.maximum(1, confusion.sum(axis=1))
    for true in range(CLASS_COUNT):
        middle = CELL * true + CELL / 2
        draw.text((LEFT - 16, TOP + middle), str(true), INK, number, anchor="mm")
        draw.text((LEFT + middle, TOP + side + 18), str(true), INK, number, anchor="mm")
        for predicted in range(CLASS_COUNT):
            corner = (LEFT + CELL * predicted, TOP + CELL * true)
            count = int(confusion[true, predicted])
            _draw_cell(
                draw, corner, count, count / support[true], RIGHT_HUE if true == predicted else WRONG_HUE, number
            )
    draw.text((LEFT + side / 2, TOP + side + 50), "predicted digit", INK, axis, anchor="mm")
    _draw_upwards(canvas, (28, TOP + side // 2), "true digit", axis)
    return _png(canvas)


def _draw_cell(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    count: int,
    share: float,
    hue: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    # A single mistake among 36 must still be seen, so any count above 0 starts at a visible tint.
    strength = 0.18 + 0.82 * share if count else 0.0
    fill = tuple(round(paper + (full - paper) * strength) for paper, full in zip(PAPER, hue, strict=True))
    x, y = corner
    draw.rectangle((x, y, x + CELL, y + CELL), fill=fill, outline=FAINT)
    if count:
        draw.text((x + CELL / 2, y + CELL / 2), str(count), PAPER if strength > 0.6 else INK, font, anchor="mm")


def _draw_upwards(
    canvas: Image.Image, middle: tuple[int, int], text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    box = font.getbbox(text)
    strip = Image.new("RGB", (round(box[2]) + 4, round(box[3]) + 4), PAPER)
    ImageDraw.Draw(strip).text((2, 2), text, INK, font)
    turned = strip.rotate(90, expand=True)
    canvas.paste(turned, (middle[0] - turned.width // 2, middle[1] - turned.height // 2))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
