"""From an image file to a square of levels, cut and resized as the published code does it for each data set.

Resizing is Pillow's, whose filters widen as they shrink an image, like tf.image.resize(antialias=True) in the published
code; but it rounds to levels, of which bits/dim are, where the published code goes on with fractions of a level.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sources.source import ImageLevels

CHANNELS = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

Framing = Callable[[Image.Image, int], Image.Image]
"""Makes a square of the given size of an image."""


def shorter_side(image: Image.Image, size: int) -> Image.Image:
    """The shorter side is brought to `size` by a bilinear filter, then the centre is cut out; LSUN at 128."""
    if min(image.size) != size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return centre(image, size)


def centre_140(image: Image.Image, size: int) -> Image.Image:
    """The centre of 140x140 pixels, resized by a bilinear filter: CelebA's aligned images of 178x218.

    Raises:
        ValueError: if the image is smaller than that.
    """
    if min(image.size) < 140:
        raise ValueError(f"has {image.width}x{image.height} pixels, fewer than the 140x140 to be cut out")
    return shorter_side(centre(image, 140), size)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the centre, resized by a bicubic filter: LSUN but at 128."""
    square = centre(image, min(image.size))
    return square if square.width == size else square.resize((size, size), Image.Resampling.BICUBIC)


def block_means(image: Image.Image, size: int) -> Image.Image:
    """Means over square blocks, rounded: FFHQ and CelebA-HQ, whose published records of smaller images are made so.

    Raises:
        ValueError: if the image is no square of a multiple of `size` pixels.
    """
    if image.width != image.height or image.width % size:
        raise ValueError(f"has {image.width}x{image.height} pixels, no square of a multiple of {size}")
    factor = image.width // size
    blocks = np.asarray(image, np.float64).reshape(size, factor, size, factor, -1)
    means = np.rint(blocks.mean((1, 3))).astype(np.uint8)
    return Image.fromarray(means if image.mode == "RGB" else means[..., 0])


def exact(image: Image.Image, size: int) -> Image.Image:
    """Nothing is done. Raises ValueError for an image of another size."""
    if image.size != (size, size):
        raise ValueError(f"has {image.width}x{image.height} pixels, not {size}x{size}")
    return image


def centre(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the centre; one pixel nearer to the upper left where that cannot be."""
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def decode_image(encoded: Path | bytes, framing: Framing, size: int, num_channels: int) -> ImageLevels:
    """Decodes a PNG, JPEG or WebP image, converts it to grey or colour, dropping alpha, and frames it.

    Raises:
        ValueError: if it is no image of 8 bits per channel, or cannot be framed; without the image's name.
    """
    image = _load(encoded)
    if image.mode not in EIGHT_BIT:
        raise ValueError(f"has pixels of Pillow's mode {image.mode}; known are {', '.join(EIGHT_BIT)}")
    framed = framing(image.convert(CHANNELS[num_channels]), size)
    return np.asarray(framed).reshape(size, size, num_channels)


def _load(encoded: Path | bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image: {error}") from error
