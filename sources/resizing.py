"""Decodes an image file to a square of integer levels, cropped and resized as the published code does it.

Every image is reduced to 8 bits per channel, in grey or in colour, by one rule:

- Palettes are replaced by their colours.
- Transparency is dropped: the colours that the file stores below it are kept.
- 16-bit channels keep their high byte. Pillow does the same with 16-bit colour.
- Only the first frame of an animation, or the first page of a document, is used.
- Images with 32-bit pixels, integers or floats, raise an error, because their range is not known.

Pillow resizes. Its filters widen when an image shrinks, like tf.image.resize(antialias=True) in the published code. It
rounds to integer levels, where the published code keeps fractions, because bits/dim are defined for integer levels.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

CHANNELS = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_AS_32 = ("PNG", "PPM")
"""Formats without 32-bit integers, whose 16-bit grey images some versions of Pillow give 32-bit pixels."""

NEED_OTHER_PROGRAMS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow recognises, but cannot decode by itself."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a viewer turns the stored image."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Framing = Callable[[Image.Image, int], Image.Image]
"""Turns an image into a square of the given size."""


def shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` by a bilinear filter, then crops the centre: LSUN at 128."""
    if min(image.size) != size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return centre(image, size)


def centre_140(image: Image.Image, size: int) -> Image.Image:
    """Crops the centre of 140x140 pixels and resizes it by a bilinear filter: CelebA's aligned images of 178x218.

    Raises:
        ValueError: if the image is smaller than 140x140.
    """
    if min(image.size) < 140:
        raise ValueError(f"has {image.width}x{image.height} pixels, fewer than the crop of 140x140")
    return shorter_side(centre(image, 140), size)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Crops the largest square in the centre and resizes it by a bicubic filter: LSUN at sizes other than 128."""
    square = centre(image, min(image.size))
    return square if square.width == size else square.resize((size, size), Image.Resampling.BICUBIC)


def block_means(image: Image.Image, size: int) -> Image.Image:
    """Computes rounded means over square blocks, as FFHQ and CelebA-HQ made their published records of small images.

    Raises:
        ValueError: if the image is not a square, or its side is not a multiple of `size`.
    """
    if image.width != image.height or image.width % size:
        raise ValueError(f"has {image.width}x{image.height} pixels, not a square whose side is a multiple of {size}")
    factor = image.width // size
    blocks = np.asarray(image, np.float64).reshape(size, factor, size, factor, -1)
    means = np.rint(blocks.mean((1, 3))).astype(np.uint8)
    return Image.fromarray(means if image.mode == "RGB" else means[..., 0])


def exact(image: Image.Image, size: int) -> Image.Image:
    """Returns the image unchanged. Raises ValueError if it has another size."""
    if image.size != (size, size):
        raise ValueError(f"has {image.width}x{image.height} pixels, not {size}x{size}")
    return image


def centre(image: Image.Image, size: int) -> Image.Image:
    """Crops the square of `size` pixels in the centre. An odd margin is one pixel smaller at the left or at the top."""
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def decode_image(
    encoded: Path | bytes, framing: Framing, size: int, num_channels: int, *, turn: bool = False
) -> UInt8[np.ndarray, "height width channel"]:
    """Decodes an image file of any format that Pillow can read, converts it to grey or colour, and frames it.

    Args:
        turn: applies the orientation in the EXIF data, as viewers do.

    Raises:
        ValueError: if it cannot be decoded, reduced to 8 bits, or framed. The message lacks the name of the image.
    """
    image = _eight_bit(_load(encoded))
    if turn:
        image = _turned(image)
    framed = framing(image.convert(CHANNELS[num_channels]), size)
    return np.asarray(framed).reshape(size, size, num_channels)


def decode_grey(path: Path) -> UInt8[np.ndarray, "height width"]:
    """Decodes an image file as grey, as large as it is. Raises ValueError as `decode_image` does."""
    return np.asarray(_eight_bit(_load(path)).convert("L"))


def _load(encoded: Path | bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=formats()) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:  # The message of Pillow repeats the path.
        raise ValueError("cannot be read as an image: its format is unknown, or its beginning is damaged") from error
    except Exception as error:  # For damaged bytes, Pillow's decoders raise many kinds of errors.
        raise ValueError(f"cannot be read as an image: {error}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in EIGHT_BIT:
        return image
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in SIXTEEN_BIT_AS_32):
        reduced = Image.fromarray((np.asarray(image, np.int64) >> 8).astype(np.uint8))
        reduced.info = image.info
        return reduced
    raise ValueError(
        f"has pixels of Pillow's mode {image.mode}; supported are {', '.join(EIGHT_BIT)} and 16-bit grey, so convert it"
    )


def _turned(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Damaged EXIF data raise many kinds of errors. Viewers ignore such data, too.
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns the formats that Pillow can decode by itself."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NEED_OTHER_PROGRAMS)


@functools.cache
def extensions() -> frozenset[str]:
    """Returns the extensions, in lower case, of the formats that Pillow can decode by itself."""
    known = Image.registered_extensions()
    return frozenset(extension for extension, name in known.items() if name in formats())
