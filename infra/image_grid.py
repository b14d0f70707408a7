"""Pictures of image grids with sharp pixels."""

import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from infra.files import write_atomic

_TILE_PIXELS = 40  # smaller images are enlarged by an integer factor, so that each pixel becomes a square
_GAP, _GAP_GREY = 2, 176  # space between images, in a grey that differs from black and white images


def image_grid(
    images: UInt8[np.ndarray, "n height width channels"], levels: int, columns: int | None = None
) -> Image.Image:
    """Draws images side by side, row after row. Level 0 is black and level `levels` - 1 is white.

    Images of three channels are drawn in colour, others as the mean of their channels in grey.

    Args:
        columns: number of images in a row; by default the grid is as square as possible.

    Raises:
        ValueError: if `images` is empty.
    """
    if images.shape[-1] not in (1, 3):
        images = np.rint(images.mean(axis=-1, keepdims=True)).astype(np.uint8)
    n, height, width, channels = images.shape
    if n == 0:
        raise ValueError(f"cannot draw an empty array of images, shape {images.shape}")
    scale = math.ceil(_TILE_PIXELS / height)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    step_y, step_x = scale * height + _GAP, scale * width + _GAP
    canvas = np.full((rows * step_y - _GAP, columns * step_x - _GAP, channels), _GAP_GREY, np.uint8)
    bytes_ = np.rint(np.minimum(images.astype(np.float64) / (levels - 1), 1) * 255).astype(np.uint8)
    for k, image in enumerate(bytes_.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = k // columns * step_y, k % columns * step_x
        canvas[top : top + scale * height, left : left + scale * width] = image
    return Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)


def save_grid(
    path: Path, images: UInt8[np.ndarray, "n height width channels"], levels: int, columns: int | None = None
) -> None:
    """Writes a grid of images to a PNG file."""
    write_atomic(path, image_png(image_grid(images, levels, columns)))


def image_png(image: Image.Image) -> bytes:
    """Returns the image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
