"""The inputs of latent codes and conditional samples: images, and their known components."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from arrays import Batch
from build import EVAL_KEY, Run
from configs.default import Config
from datasets import MemorySource, Preprocess, Source, decode_grey
from evaluators.estimators import evaluation_source
from evaluators.extractor import array_hash
from infra import parallel
from infra.files import read_npz
from samplers.controllable import basis_of_matrix, colorization_basis
from samplers.sampler import image_keys


def require_images(run: Run, mode: str) -> Preprocess:
    """Returns the scaling of images, without mirroring. Raises ValueError for points."""
    if run.density is not None or not isinstance(run.preprocess, Preprocess):
        raise ValueError(f"data.dataset is {run.config.data.dataset!r}, but --mode={mode} is for images")
    return run.preprocess.without_flip()


def require_images_of_levels(run: Run, mode: str) -> Preprocess:
    """Returns the scaling of `require_images` for modes that reproduce levels: they round to the nearest level.

    Pixels that are known or decoded differ from their level by the rounding of 32-bit numbers or the error of a solver.
    Truncation, which is for samples, would lower about half of them by a level.
    """
    return dataclasses.replace(require_images(run, mode), rounding="nearest")


def input_source(run: Run) -> Source:
    """Opens the images of `control.images`, or of `eval.bpd_dataset` if that field is empty.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the images do not fit the fields of `data`.
    """
    path, data = run.config.control.images, run.config.data
    if not path:
        return evaluation_source(run.config)
    images = named_array(Path(path), "images", "control.images")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != run.data_shape or not len(images):
        raise ValueError(
            f"images in control.images={path} are {images.dtype} of shape {images.shape}; they must be uint8 of shape "
            f"[n, {', '.join(map(str, run.data_shape))}]"
        )
    if images.max() >= data.levels:
        raise ValueError(f"control.images={path} has level {images.max()}, but data.levels is {data.levels}")
    return MemorySource(images, f"{Path(path).name} {array_hash(images)}")


def named_array(path: Path, name: str, field: str) -> np.ndarray:
    """Loads an array from the .npz file that a field names.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged or lacks the array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{field} is {str(path)!r}, but there is no such file")
    arrays = read_npz(path)
    if name not in arrays:
        raise ValueError(f"{field}={path} has the arrays {', '.join(arrays) or '(none)'}, but not {name!r}")
    return arrays[name]


@functools.partial(jax.jit, static_argnums=0)
def network_data(preprocess: Preprocess, key: Array, images: UInt8[Array, "batch h w c"], indices: Array) -> Batch:
    """Returns the data that the network sees. Dequantization noise, if any, depends only on the index of an image."""
    keys = image_keys(key, indices)
    return jax.vmap(lambda key, image: preprocess(key, image[None])[0])(keys, images)


def device_images(run: Run, preprocess: Preprocess, images: np.ndarray, indices: np.ndarray) -> Batch:
    """Computes `network_data` on the devices, from all rows of a batch on the host."""
    rows = parallel.local_rows(len(images))
    on_devices = (parallel.global_array(run.mesh, array[rows]) for array in (images, indices))
    return network_data(preprocess, run.key(EVAL_KEY), *on_devices)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Which components of the images are known.

    Attributes:
        mask: 1 where a component in the basis is known, else 0; one array shaped as an image, or one for each image.
        basis: as in `samplers.controllable.Observation`.
        description: the settings that results depend on.
        fill: value, in [0, 1], of unknown components in pictures of the observation.
        components: known components of images scaled to [0, 1]; None: computed from the images that are given.
    """

    mask: Float[np.ndarray, "*n h w c"]
    basis: Float[np.ndarray, "size size"] | None
    description: dict[str, Any]
    fill: float = 0.0
    components: Float[np.ndarray, "n h w c"] | None = None

    def mask_of(self, indices: np.ndarray) -> Float[np.ndarray, "batch h w c"]:
        """Returns the masks of the images at these indices."""
        shared = self.mask.ndim == 3
        return np.repeat(self.mask[None], len(indices), axis=0) if shared else self.mask[indices]


def inpainting(config: Config, shape: tuple[int, int, int], count: int) -> Problem:
    """Some pixels are known, from `control.mask`.

    Raises:
        FileNotFoundError, ValueError: if the mask cannot be read, does not fit the images, or leaves nothing unknown.
    """
    name = config.control.mask
    known = MASKS[name](*shape[:2]) if name in MASKS else _mask_in_file(Path(name))
    mask = _fitted(known, shape, count)
    if mask is None:
        raise ValueError(
            f"control.mask={name} has shape {known.shape}; it must be [h, w], [h, w, c], [n, h, w] or [n, h, w, c] for "
            f"{count} images of shape {shape}"
        )
    shares = mask.reshape(-1, math.prod(shape)).mean(axis=1)  # one for each image of a mask that has images
    if not np.all((shares > 0) & (shares < 1)):
        which = "all" if shares.max() == 1 else "no"
        raise ValueError(f"control.mask={name} makes {which} pixels known in an image; it must have both")
    return Problem(mask, None, {"mask": name if name in MASKS else array_hash(mask)}, fill=0.5)


def _fitted(
    known: Shaped[np.ndarray, "..."], shape: tuple[int, int, int], count: int
) -> Float[np.ndarray, "*n h w c"] | None:
    """Returns the mask for images of this shape. A mask with an axis for images keeps it. None if it does not fit."""
    if known.ndim == 2 or (known.ndim == 3 and known.shape not in (shape, (*shape[:2], 1))):
        known = known[..., None]
    *images, height, width, channels = known.shape
    fits = (height, width) == shape[:2] and channels in (1, shape[2]) and images in ([], [1], [count])
    return np.broadcast_to(known, (count, *shape) if images else shape).astype(np.float32) if fits else None


def _half(height: int, width: int, rows: slice, columns: slice) -> Bool[np.ndarray, "h w"]:
    known = np.zeros((height, width), bool)
    known[rows, columns] = True
    return known


def _border(height: int, width: int) -> Bool[np.ndarray, "h w"]:
    known = np.ones((height, width), bool)
    known[height // 4 : height - height // 4, width // 4 : width - width // 4] = False
    return known


EVERY = slice(None)
MASKS = {
    "left": lambda h, w: _half(h, w, EVERY, slice(w // 2)),
    "right": lambda h, w: _half(h, w, EVERY, slice(w // 2, None)),
    "top": lambda h, w: _half(h, w, slice(h // 2), EVERY),
    "bottom": lambda h, w: _half(h, w, slice(h // 2, None), EVERY),
    "border": _border,
}
"""Functions that return the known part of an h x w image, by the names that `control.mask` accepts besides files."""


def _mask_in_file(path: Path) -> np.ndarray:
    """Loads a mask from an .npz file, or from a picture, whose bright pixels are known."""
    if not path.is_file():
        raise FileNotFoundError(f"control.mask is {str(path)!r}, which is neither a file nor one of {', '.join(MASKS)}")
    if path.suffix != ".npz":
        try:
            return decode_grey(path) > 127
        except ValueError as error:
            raise ValueError(f"control.mask={path}, which is not an .npz file, {error}") from error
    mask = named_array(path, "mask", "control.mask")
    if mask.ndim not in (2, 3, 4) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"the mask in control.mask={path} has shape {mask.shape}; it must have 2 to 4 axes, and only values 0 and 1"
        )
    return mask


def colorization(config: Config, shape: tuple[int, int, int], count: int) -> Problem:
    """The grey component of each pixel is known. Raises ValueError for images without colour."""
    del config, count
    if shape[-1] != 3:
        raise ValueError(f"data.num_channels is {shape[-1]}, but --mode=colorize is for images of 3 channels")
    mask = np.zeros(shape, np.float32)
    mask[..., 0] = 1
    return Problem(mask, colorization_basis(), {"known": "grey"})


def restoration(config: Config, shape: tuple[int, int, int], count: int) -> Problem:
    """Linear observations without noise are known, from `control.matrix`.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be read, or does not fit the images.
    """
    name, dims = config.control.matrix, int(np.prod(shape))
    observations = None
    if name == "blocks":
        matrix = _block_means(*shape)
    else:
        matrix = named_array(Path(name), "matrix", "control.matrix")
        observations = read_npz(Path(name)).get("observations")
        _check_numbers(matrix, f"the matrix in control.matrix={name}")
    if matrix.ndim != 2 or matrix.shape[1] != dims or not matrix.any():
        raise ValueError(
            f"the matrix in control.matrix={name} has shape {matrix.shape}; it must be [m, {dims}], with an entry that "
            "is not 0"
        )
    basis, to_components, rank = basis_of_matrix(matrix)
    if rank == dims:
        raise ValueError(f"control.matrix={name} has rank {dims}, so nothing is unknown; use fewer rows")
    mask = (np.arange(dims) < rank).astype(np.float32).reshape(shape)
    description = {"matrix": name if name == "blocks" else array_hash(matrix), "rank": rank}
    if observations is None:
        return Problem(mask, basis, description)
    if observations.shape != (count, len(matrix)):
        raise ValueError(
            f"observations in control.matrix={name} have shape {observations.shape}; they must be [{count}, "
            f"{len(matrix)}], one row for each image of control.num_images"
        )
    _check_numbers(observations, f"observations in control.matrix={name}")
    known = observations @ to_components
    difference = np.abs(known @ basis[:, :rank].T @ matrix.T - observations).max()
    if difference > CONTRADICTION * np.abs(observations).max():
        raise ValueError(
            f"observations in control.matrix={name} contradict each other: the nearest ones that an image can have "
            f"differ from them by {difference:.2g}"
        )
    components = np.zeros((count, dims), np.float32)
    components[:, :rank] = known
    described = description | {"observations": array_hash(observations)}
    return Problem(mask, basis, described, components=components.reshape(count, *shape))


CONTRADICTION = 1e-3
"""Observations may be rounded. If each image differs from them by more than this share of the largest observation, they
contradict each other."""


def _check_numbers(array: Shaped[np.ndarray, "..."], what: str) -> None:
    """Raises ValueError if the array has other values than finite real numbers."""
    real = array.dtype.kind in "biuf"
    if not real or not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite real numbers, but there are {'others' if real else array.dtype}")


def _block_means(height: int, width: int, channels: int) -> Float[np.ndarray, "m d"]:
    """Returns the matrix of the means over blocks of 2x2 pixels."""
    if height % 2 or width % 2:
        raise ValueError(f"control.matrix is 'blocks', which needs an even image size, got {height}x{width}")
    pixels = np.arange(height * width * channels).reshape(height, width, channels)
    blocks = pixels.reshape(height // 2, 2, width // 2, 2, channels).transpose(0, 2, 4, 1, 3).reshape(-1, 4)
    matrix = np.zeros((len(blocks), pixels.size))
    np.put_along_axis(matrix, blocks, 0.25, axis=1)
    return matrix


def padded_round(size: int) -> int:
    """Rounds this size up to a multiple of the number of devices, and of 8.

    Langevin correctors average over all images of a round, also those that only fill it. With a multiple of 8, the
    size is the same on 1, 2, 4 and 8 devices, and so are the images.
    """
    multiple = math.lcm(8, jax.device_count())
    return -(-size // multiple) * multiple


def finite_levels(preprocess: Preprocess, x: Batch, what: str) -> UInt8[np.ndarray, "batch h w c"]:
    """Returns x as integer levels on the host. Raises RuntimeError if a value is not finite."""
    levels, finite = parallel.fetch(_levels(preprocess, x))
    if not finite.all():
        raise RuntimeError(
            f"{what}: {np.sum(~finite)} of {len(finite)} images are not finite; check the training of the model"
        )
    return np.asarray(levels)


@functools.partial(jax.jit, static_argnums=0)
def _levels(preprocess: Preprocess, x: Batch) -> tuple[Array, Array]:
    return preprocess.to_levels(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
