"""Reads back what a run has written into its folder, whatever of it exists."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from features import Images
from files import read_npz
from results import evaluations, seconds_file


@dataclasses.dataclass(frozen=True)
class Curve:
    """One quantity against the step."""

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]

    def smoothed(self) -> Float[np.ndarray, " n"]:
        """The mean over a window of a twentieth of the curve, narrower at its ends; gaps are left out."""
        window = np.ones(2 * (len(self.values) // 40) + 1)
        known = np.isfinite(self.values)
        total = np.convolve(np.where(known, self.values, 0), window, mode="same")
        count = np.convolve(known, window, mode="same")
        return np.where(known, total / np.maximum(count, 1), np.nan)


RunCurves = Mapping[str, Mapping[str, Curve]]
"""The curves of a run: split ("train", "test"), then the name of the quantity."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Some images, and the training step they were drawn at."""

    images: Images
    levels: int
    step: int
    name: str = ""
    """Of their file."""


@dataclasses.dataclass(frozen=True)
class Points:
    """Points drawn of a model, and the training step they were drawn at; or points of the data."""

    points: Float[np.ndarray, "n d"]
    step: int


@dataclasses.dataclass(frozen=True)
class DensityGrid:
    """The density of a model of points, and of its data, on a grid over [-limit, limit]^d, d = 1 or 2."""

    density: Float[np.ndarray, "*cells"]
    data: Float[np.ndarray, "*cells"] | None
    limit: float
    step: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The same images of a kept checkpoint, by its averaged and by its raw weights."""

    ema: Grid
    raw: Grid


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a folder holds of a run; None or empty for what it does not."""

    name: str
    metrics: RunCurves
    config: Mapping[str, Any] | None
    environment: Mapping[str, Any] | None
    results: list[dict[str, Any]]  # evaluations, by checkpoint
    samples: Grid | None  # the newest
    data: Grid | None  # real images
    problems: list[str]  # files that cannot be read
    points: Points | None = None  # the newest
    data_points: Points | None = None
    snapshots: Sequence[Snapshot] = ()  # by step
    density: DensityGrid | None = None  # the newest

    @property
    def order(self) -> int | None:
        """The highest order of the training loss: of the last record, else of the configuration."""
        orders = self.metrics.get("train", {}).get("order")
        if orders is not None:
            return int(orders.values[-1])
        return (self.config or {}).get("training", {}).get("score_matching_order")

    @property
    def last_step(self) -> int | None:
        """The newest step with a record."""
        return max((int(curve.steps[-1]) for curve in self.metrics.get("train", {}).values()), default=None)

    def has_curves(self, names: Iterable[str]) -> bool:
        """Whether training has recorded any of these."""
        return any(name in self.metrics.get("train", {}) for name in names)


def read_run(workdir: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"no folder {workdir}")
    problems: list[str] = []
    metrics = read_metrics(workdir / "train" / "metrics.jsonl")
    grids = {path.stem: _read_grid(path, problems) for path in sorted((workdir / "samples").glob("*.npz"))}
    drawn = [grid for stem, grid in grids.items() if stem != "data" and grid is not None]
    clouds = {path.stem: _read_points(path, problems) for path in sorted((workdir / "samples/points").glob("*.npz"))}
    drawn_points = [points for stem, points in clouds.items() if stem != "data" and points is not None]
    return RunFiles(
        name=workdir.resolve().name,
        metrics=metrics,
        config=_read_json(workdir / "config.json", problems),
        environment=_read_json(workdir / "environment.json", problems),
        results=_read_results(workdir, metrics, problems),
        samples=max(drawn, key=lambda grid: grid.step, default=None),
        data=grids.get("data"),
        problems=problems,
        points=max(drawn_points, key=lambda points: points.step, default=None),
        data_points=clouds.get("data"),
        snapshots=_read_snapshots(workdir / "samples" / "snapshots", problems),
        density=_newest_density(workdir / "density", problems),
    )


def read_metrics(path: Path) -> dict[str, dict[str, Curve]]:
    """The curves in a file of JSON lines, by split and quantity.

    Where a resumed run has written a step again, the later line counts. Lines that a kill cut short are left out.
    """
    by_step: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            by_step.setdefault(record["split"], {})[int(record["step"])] = record
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            continue
    return {split: _curves(records) for split, records in by_step.items()}


def _curves(records: dict[int, dict[str, Any]]) -> dict[str, Curve]:
    steps = sorted(records)
    names = {name for record in records.values() for name, value in record.items() if isinstance(value, int | float)}
    curves = {}
    for name in names - {"step"}:
        having = [step for step in steps if isinstance(records[step].get(name), int | float)]
        curves[name] = Curve(np.array(having), np.array([records[step][name] for step in having], np.float64))
    return curves


def _read_results(workdir: Path, metrics: RunCurves, problems: list[str]) -> list[dict[str, Any]]:
    """Evaluations in any folder of the run, each with its `run`, its `file`, and the `train_seconds` up to it."""
    results, run = [], {"run": workdir.resolve().name}
    for path in sorted(workdir.glob("**/*.json")):
        content = _read_json(path, problems)
        if content is None or "checkpoint_step" not in content:
            continue
        file, seconds = str(path.relative_to(workdir)), _value_until(metrics, "seconds", content["checkpoint_step"])
        *earlier, last = evaluations(content, _read_json(seconds_file(path), problems) or {})
        each = [result | {"file": f"{file}, earlier {n}"} for n, result in enumerate(earlier, 1)]
        each.append(last | {"file": file})
        about = run if seconds is None else run | {"train_seconds": seconds}
        results += [result | about for result in each]
    return sorted(results, key=lambda result: result["checkpoint_step"])


def trained_order(workdir: Path, step: int) -> int | None:
    """The highest order of the loss that this run was trained with up to a step; None before its first record."""
    order = _value_until(read_metrics(workdir / "train" / "metrics.jsonl"), "order", step)
    return None if order is None else int(order)


def _value_until(metrics: RunCurves, name: str, step: int) -> float | None:
    """Of the last record of training up to a step."""
    curve = metrics.get("train", {}).get(name)
    if curve is None or not (curve.steps <= step).any():
        return None
    return float(curve.values[curve.steps <= step][-1])


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path} is no readable JSON: {error}")
        return None
    return content if isinstance(content, dict) else None


def _newest_density(folder: Path, problems: list[str]) -> DensityGrid | None:
    grids = []
    for path in sorted(folder.glob("*.npz")):
        try:
            arrays = read_npz(path)
            step, limit = int(arrays["step"]), float(arrays["limit"])
            grids.append(DensityGrid(arrays["density"], arrays.get("data"), limit, step))
        except (ValueError, KeyError) as error:
            problems.append(f"{path}: {error}")
    return max(grids, key=lambda grid: grid.step, default=None)


def _read_snapshots(folder: Path, problems: list[str]) -> list[Snapshot]:
    snapshots = []
    for path in folder.glob("step_*.npz"):
        try:
            arrays = read_npz(path)
            levels, step = int(arrays["levels"]), int(arrays["step"])
            snapshots.append(Snapshot(*(Grid(arrays[weights], levels, step) for weights in ("ema", "raw"))))
        except (ValueError, KeyError) as error:
            problems.append(f"{path}: {error}")
    return sorted(snapshots, key=lambda snapshot: snapshot.ema.step)


def _read_grid(path: Path, problems: list[str]) -> Grid | None:
    try:
        arrays = read_npz(path)
        return Grid(arrays["samples"], int(arrays["levels"]), int(arrays.get("step", 0)), path.stem)
    except (ValueError, KeyError) as error:
        problems.append(f"{path}: {error}")
        return None


def _read_points(path: Path, problems: list[str]) -> Points | None:
    try:
        arrays = read_npz(path)
        return Points(arrays["points"], int(arrays["step"]))
    except (ValueError, KeyError) as error:
        problems.append(f"{path}: {error}")
        return None
