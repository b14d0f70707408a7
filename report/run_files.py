"""Reads what a run has written into its folder, as far as it exists, for the report."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.metrics import RunCurves, read_metrics, value_at
from infra.results import evaluations, seconds_file
from infra.workdir import DensityGrid, ImageGrid, PointCloud, Snapshot, Workdir, read_all, read_json

DATA = "data"
"""The name of the files in samples/ that hold data instead of samples."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a folder holds of a run; None or empty for what it does not."""

    name: str
    metrics: RunCurves
    config: Mapping[str, Any] | None
    environment: Mapping[str, Any] | None
    results: list[dict[str, Any]]  # evaluations, by checkpoint
    samples: ImageGrid | None  # the newest
    data: ImageGrid | None  # real images
    problems: list[str]  # files that cannot be read
    points: PointCloud | None = None  # the newest
    data_points: PointCloud | None = None
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


def read_run(path: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    workdir, problems = Workdir(path), []
    metrics = read_metrics(workdir.train)
    images = read_all(ImageGrid, workdir.samples.glob("*.npz"), problems)
    points = read_all(PointCloud, workdir.points.glob("*.npz"), problems)
    data, data_points = images.pop(DATA, None), points.pop(DATA, None)
    snapshots = read_all(Snapshot, workdir.snapshots.glob("step_*.npz"), problems)
    densities = read_all(DensityGrid, workdir.density.glob("*.npz"), problems)
    return RunFiles(
        name=path.resolve().name,
        metrics=metrics,
        config=read_json(workdir.config, problems),
        environment=read_json(workdir.environment, problems),
        results=_read_results(path, metrics, problems),
        samples=max(images.values(), key=lambda grid: grid.step, default=None),
        data=data,
        problems=problems,
        points=max(points.values(), key=lambda cloud: cloud.step, default=None),
        data_points=data_points,
        snapshots=sorted(snapshots.values(), key=lambda snapshot: snapshot.step),
        density=max(densities.values(), key=lambda grid: grid.step, default=None),
    )


def _read_results(workdir: Path, metrics: RunCurves, problems: list[str]) -> list[dict[str, Any]]:
    """Evaluations in any folder of the run, each with its `run`, its `file`, and the `train_seconds` up to it."""
    results, run = [], {"run": workdir.resolve().name}
    for path in sorted(workdir.glob("**/*.json")):
        content = read_json(path, problems)
        if content is None or "checkpoint_step" not in content:
            continue
        file, seconds = str(path.relative_to(workdir)), value_at(metrics, "seconds", content["checkpoint_step"])
        *earlier, last = evaluations(content, read_json(seconds_file(path), problems) or {})
        each = [result | {"file": f"{file}, earlier {n}"} for n, result in enumerate(earlier, 1)]
        each.append(last | {"file": file})
        about = run if seconds is None else run | {"train_seconds": seconds}
        results += [result | about for result in each]
    return sorted(results, key=lambda result: result["checkpoint_step"])
