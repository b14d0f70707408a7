"""Reads the files that the report shows from the folders of runs, as far as they exist."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.artefacts import Artefact, DensityGrid, ImageGrid, PointCloud, Snapshot, read_all
from infra.files import read_json
from infra.metrics import RunCurves, read_metrics, value_at
from infra.results import evaluations, seconds_file
from infra.workdir import DATA, Workdir
from report.fields import OTHER_CHECKPOINT


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The content of a run's folder. Files that do not exist are None or empty here."""

    name: str  # the name of the folder; read_runs adds a number if another run has the same name
    folder: Path
    metrics: RunCurves
    config: Mapping[str, Any] | None
    environment: Mapping[str, Any] | None
    results: list[dict[str, Any]]  # evaluations, sorted by the step of the checkpoint
    problems: list[str]  # errors of files that cannot be read
    samples: ImageGrid | None = None  # the newest
    data: ImageGrid | None = None  # real images
    points: PointCloud | None = None  # the newest
    data_points: PointCloud | None = None
    snapshots: Sequence[Snapshot] = ()  # sorted by step
    density: DensityGrid | None = None  # the newest
    pictures: Mapping[str, ImageGrid] = dataclasses.field(default_factory=dict)  # by the names of their files

    @property
    def order(self) -> int | None:
        """The highest order of the training loss, from the last record or else from the configuration."""
        orders = self.metrics.get("train", {}).get("order")
        if orders is not None:
            return int(orders.values[-1])
        return (self.config or {}).get("training", {}).get("score_matching_order")

    @property
    def title(self) -> str:
        """The name and the order of the run."""
        return self.name if self.order is None else f"{self.name}, order {self.order}"

    @property
    def last_step(self) -> int | None:
        """The newest step with a record."""
        return max((int(curve.steps[-1]) for curve in self.metrics.get("train", {}).values()), default=None)

    def has_curves(self, names: Iterable[str]) -> bool:
        """Whether training has recorded any of these metrics."""
        return any(name in self.metrics.get("train", {}) for name in names)

    def newest_result(self, part: str) -> tuple[dict[str, Any] | None, str]:
        """Returns the result of the newest checkpoint that has this part, and " of FILE" if it is not the only one.

        Of several results, it returns one in eval/ if there is one, and the most recent of those. Results of the
        checkpoint that eval.checkpoint names are used only if the run has none of its own.
        """
        having = [result for result in self.results if part in result]
        having = [result for result in having if OTHER_CHECKPOINT not in result] or having
        newest = [result for result in having if result["checkpoint_step"] == having[-1]["checkpoint_step"]]
        if not newest:
            return None, ""
        chosen = ([result for result in newest if result["file"].startswith("eval/")] or newest)[-1]
        return chosen, f" of {chosen['file']}" if len(newest) > 1 or OTHER_CHECKPOINT in chosen else ""


def read_runs(paths: Iterable[Path]) -> list[RunFiles]:
    """Reads the folders of several runs, and numbers those with the same name.

    Raises:
        FileNotFoundError: if a folder does not exist.
    """
    runs: dict[str, RunFiles] = {}
    for run in map(read_run, paths):
        name, count = run.name, 2
        while name in runs:
            name, count = f"{run.name} ({count})", count + 1
        results = [result | {"run": name} for result in run.results]
        runs[name] = dataclasses.replace(run, name=name, results=results)
    return list(runs.values())


def read_run(path: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"the folder {path} of a run does not exist")
    workdir, problems = Workdir(path), []
    metrics = read_metrics(workdir.train)
    images = read_all(ImageGrid, workdir.samples.glob("*.npz"), problems)
    points = read_all(PointCloud, workdir.points.glob("*.npz"), problems)
    data, data_points = images.pop(DATA, None), points.pop(DATA, None)
    snapshots = read_all(Snapshot, workdir.snapshots.glob("step_*.npz"), problems)
    densities = read_all(DensityGrid, workdir.density.glob("*.npz"), problems)
    return RunFiles(
        name=path.resolve().name,
        folder=path,
        metrics=metrics,
        config=read_json(workdir.config, problems),
        environment=read_json(workdir.environment, problems),
        results=_read_results(path, metrics, problems),
        problems=problems,
        samples=_newest(images),
        data=data,
        points=_newest(points),
        data_points=data_points,
        snapshots=sorted(snapshots.values(), key=lambda snapshot: snapshot.step),
        density=_newest(densities),
        pictures=read_all(ImageGrid, workdir.pictures.glob("*.npz"), problems),
    )


def _newest(artefacts: Mapping[str, Artefact]) -> Artefact | None:
    return max(artefacts.values(), key=lambda artefact: artefact.step, default=None)


def _read_results(workdir: Path, metrics: RunCurves, problems: list[str]) -> list[dict[str, Any]]:
    """Reads the evaluations in all folders of the run, and adds `run`, `file` and `train_seconds` to each."""
    results = []
    for path in sorted(workdir.glob("**/*.json")):
        content = read_json(path, problems)
        if content is None or "checkpoint_step" not in content:
            continue
        file = str(path.relative_to(workdir))
        seconds = None if OTHER_CHECKPOINT in content else value_at(metrics, "seconds", content["checkpoint_step"])
        common = {"run": workdir.resolve().name} | ({} if seconds is None else {"train_seconds": seconds})
        *earlier, last = evaluations(content, read_json(seconds_file(path), problems) or {})
        results += [result | common | {"file": f"{file}, earlier {n}"} for n, result in enumerate(earlier, 1)]
        results.append(last | common | {"file": file})
    return sorted(results, key=lambda result: result["checkpoint_step"])
