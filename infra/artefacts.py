"""The .npz files of evaluations: images, points, densities and snapshots. workdir.py says where they are."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from infra.files import read_npz, write_npz
from infra.image_grid import save_grid

NumpyImages = UInt8[np.ndarray, "n height width channels"]


@dataclasses.dataclass(frozen=True)
class ImageGrid:
    """Images, and the training step of the model that drew them; 0 for real images."""

    images: NumpyImages
    levels: int
    step: int
    name: str = ""
    """The name of the file, without its ending."""
    columns: int = 0
    """Images in a row of the picture; 0: as square as possible."""

    def write(self, path: Path) -> None:
        """Writes the images as an .npz file."""
        columns = {"columns": self.columns} if self.columns else {}
        write_npz(path, samples=self.images, levels=self.levels, step=self.step, **columns)

    @classmethod
    def read(cls, path: Path) -> "ImageGrid":
        """Raises ValueError if the file is damaged."""
        arrays = _named_arrays(path, "samples", "levels")
        step, columns = int(arrays.get("step", 0)), int(arrays.get("columns", 0))
        return cls(arrays["samples"], int(arrays["levels"]), step, path.stem, columns)


@dataclasses.dataclass(frozen=True)
class PointCloud:
    """Points, and the training step of the model that drew them; 0 for points of the data."""

    points: Float[np.ndarray, "n d"]
    step: int

    def write(self, path: Path) -> None:
        """Writes the points as an .npz file."""
        write_npz(path, points=self.points, step=self.step)

    @classmethod
    def read(cls, path: Path) -> "PointCloud":
        """Raises ValueError if the file is damaged."""
        arrays = _named_arrays(path, "points", "step")
        return cls(arrays["points"], int(arrays["step"]))


@dataclasses.dataclass(frozen=True)
class DensityGrid:
    """The densities of a model of points and of its data, on a grid over [-limit, limit]^d with d = 1 or 2."""

    density: Float[np.ndarray, "*cells"]
    data: Float[np.ndarray, "*cells"] | None
    limit: float
    step: int

    def write(self, path: Path) -> None:
        """Writes the densities as an .npz file."""
        data = {} if self.data is None else {"data": self.data}
        write_npz(path, limit=self.limit, step=self.step, density=self.density, **data)

    @classmethod
    def read(cls, path: Path) -> "DensityGrid":
        """Raises ValueError if the file is damaged."""
        arrays = _named_arrays(path, "density", "limit", "step")
        return cls(arrays["density"], arrays.get("data"), float(arrays["limit"]), int(arrays["step"]))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The same images of a checkpoint drawn with its averaged and with its raw parameters."""

    ema: ImageGrid
    raw: ImageGrid
    parameters: str
    """A digest of the raw parameters."""

    @property
    def step(self) -> int:
        return self.ema.step

    @staticmethod
    def file(folder: Path, step: int) -> Path:
        """The file with the arrays of the snapshot at this step."""
        return folder / f"step_{step}.npz"

    def write(self, folder: Path) -> None:
        """Writes two pictures, then the arrays, whose file says that the snapshot is complete."""
        grids = {"ema": self.ema, "raw": self.raw}
        for weights, grid in grids.items():
            save_grid(folder / f"step_{self.step}_{weights}.png", grid.images, grid.levels)
        arrays = {weights: grid.images for weights, grid in grids.items()}
        write_npz(
            self.file(folder, self.step),
            **arrays,
            levels=self.ema.levels,
            step=self.step,
            parameters=self.parameters,
        )

    @classmethod
    def read(cls, path: Path) -> "Snapshot":
        """Raises ValueError if the file is damaged."""
        arrays = _named_arrays(path, "ema", "raw", "levels", "step")
        levels, step = int(arrays["levels"]), int(arrays["step"])
        ema, raw = (ImageGrid(arrays[weights], levels, step) for weights in ("ema", "raw"))
        return cls(ema, raw, str(arrays.get("parameters")))


Artefact = TypeVar("Artefact", ImageGrid, PointCloud, DensityGrid, Snapshot)


def read_all(kind: type[Artefact], paths: Iterator[Path], problems: list[str]) -> dict[str, Artefact]:
    """Reads artefacts, by the names of their files. For a file that cannot be read, adds the error to `problems`."""
    artefacts = {}
    for path in sorted(paths):
        try:
            artefacts[path.stem] = kind.read(path)
        except ValueError as error:
            problems.append(str(error))
    return artefacts


def _named_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    arrays = read_npz(path)
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}")
    return arrays
