"""The folder of a run: where each artefact is, and the files that describe the run. artefacts.py has the arrays.

    config.json, environment.json     the configuration; the commits of all starts, software and devices of the last
    start.json                        the checkpoint that the run starts from, if any, and its step
    checkpoints/STEP/                 training states: checkpoints.py
    train/metrics.jsonl               training metrics, with TensorBoard files in train/tensorboard/: metrics.py
    eval/LABEL.json                   results of one checkpoint, with times in LABEL_seconds.json: results.py
    eval/NAME-DIGEST/                 per-example values behind the results: evaluators/cache.py
    samples/LABEL.npz, .png           the first 64 samples of a checkpoint; data.npz: real images
    samples/LABEL/images_K.npz, .png  all samples, at most 10,000 in a file; K is the number of the first
    samples/points/LABEL.npz          points drawn from a model; data.npz: test points
    samples/snapshots/step_STEP.npz   samples drawn during training, with pictures in .png files
    latents/LABEL.npz                 latent codes of images: evaluators/latents.py
    pictures/LABEL_WHAT.npz, .png     images of latent codes, and conditional samples
    classifier/                       the classifier that guides samples; a folder like a dequantizer's
    density/LABEL.npz                 the density of a model of points on a grid
    cost.json                         costs of a training step, from --mode=cost
    failed_batch.npz                  the batches in which losses were not finite too often: training_loop.py
    exported/checkpoint_STEP          checkpoints in the published format, dequantizer_STEP for dequantizers
    report.html, figures/             the report
    log.txt                           the log; further hosts write log_1.txt, ...

LABEL is `step_STEP`, or the name of a checkpoint elsewhere with a digest of its parameters. A dequantizer's folder,
inside the workdir, has config.json, environment.json, checkpoints/, train/ and log.txt of its own.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8

from configs.default import Config
from infra import parallel
from infra.artefacts import ImageGrid, NumpyImages
from infra.commits import commit
from infra.console import log_to_file
from infra.files import read_json, write_atomic
from infra.image_grid import save_grid

DATA = "data"
"""The name, without its ending, of the files in samples/ and samples/points/ that hold data instead of samples."""

PER_GRID = 64
"""The largest number of images in a picture."""

PER_FILE = 10_000
"""The largest number of images in a file."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths in a run's folder."""

    path: Path

    CHECKPOINTS: ClassVar[str] = "checkpoints"
    OTHER_FOLDERS: ClassVar[tuple[str, ...]] = (
        *(CHECKPOINTS, "train", "samples", "density", "exported", "figures"),
        *("latents", "pictures", "classifier"),
    )
    """Subfolders that are not for results."""

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def start(self) -> Path:
        return self.path / "start.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / self.CHECKPOINTS

    @property
    def train(self) -> Path:
        return self.path / "train"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def snapshots(self) -> Path:
        return self.samples / "snapshots"

    @property
    def points(self) -> Path:
        return self.samples / "points"

    @property
    def density(self) -> Path:
        return self.path / "density"

    @property
    def latents(self) -> Path:
        return self.path / "latents"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def failed_batch(self) -> Path:
        """The batches of the call in which training stopped because losses were not finite."""
        return self.path / "failed_batch.npz"

    @property
    def exported(self) -> Path:
        return self.path / "exported"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def cost(self) -> Path:
        return self.path / "cost.json"

    @property
    def log(self) -> Path:
        """The log of this host."""
        host = jax.process_index()
        return self.path / (f"log_{host}.txt" if host else "log.txt")

    def require_run(self) -> None:
        """Raises FileNotFoundError if the folder does not exist, or holds no run."""
        if not self.config.is_file():
            reason = "it holds no config.json" if self.path.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"no run in {self.path}: {reason}")

    def has_checkpoints(self) -> bool:
        """Whether training has saved a state here."""
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def prepare(self) -> None:
        """Creates the folder, and logs to a file in it from now on.

        Raises:
            OSError: if nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(f"cannot write to --workdir={self.path}: {error.strerror}") from error
        log_to_file(self.log)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Takes an exclusive lock on the folder, so that two trainings cannot mix their metrics and checkpoints.

        Raises:
            OSError: if another process has the lock.
        """
        with (self.path / ".lock").open("a") as file:
            if parallel.any_host(not _lock(file)):
                raise OSError(f"another process is training in {self.path}; wait until it ends, or use another folder")
            yield

    def write_description(self, config: Config, num_parameters: int) -> None:
        """Writes config.json and environment.json, and logs the fields that changed since the last start."""
        if jax.process_index() != 0:
            return
        fields = json.loads(config.to_json_best_effort())
        problems: list[str] = []
        before = read_json(self.config, problems)
        if before is not None:
            _log_changes(before, fields)
        for problem in problems:
            logging.warning("%s; it is written again", problem)
        write_atomic(self.config, json.dumps(fields, indent=1))
        packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy", "scipy")
        environment = {
            "commits": list(dict.fromkeys([*self.commits(), commit()])),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "hosts": jax.process_count(),
            "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
            "num_parameters": num_parameters,
        }
        write_atomic(self.environment, json.dumps(environment, indent=1))

    def commits(self) -> list[str]:
        """The commit of each start of the run, from the first to the last, each once. Empty if none is recorded."""
        return (read_json(self.environment, []) or {}).get("commits", [])

    def write_costs(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows of --mode=cost, in place of those in the file."""
        write_atomic(self.cost, json.dumps({"rows": rows}, indent=1))

    def read_costs(self) -> list[dict[str, Any]]:
        """The rows in the file, none if there is no file.

        Raises:
            ValueError: if the file is damaged.
        """
        problems: list[str] = []
        rows = (read_json(self.cost, problems) or {"rows": []}).get("rows")
        named = isinstance(rows, list) and all(isinstance(row, dict) and "program" in row for row in rows)
        if rows is None or problems or not named:
            raise ValueError(f"cannot read {self.cost} as the rows of --mode=cost; delete it to measure again")
        return rows

    def write_start(self, init_from: str, step: int) -> None:
        """Writes which checkpoint the run starts from. A fresh run, with an empty `init_from`, has no such file."""
        if jax.process_index() != 0:
            return
        if init_from:
            write_atomic(self.start, json.dumps({"init_from": init_from, "step": step}))
        else:
            self.start.unlink(missing_ok=True)  # of a run whose checkpoints have been removed

    def read_start(self) -> dict[str, Any]:
        """Returns `init_from` and `step` of the checkpoint that the run started from; step 0 for a fresh run.

        Raises:
            ValueError: if the file is damaged.
        """
        problems: list[str] = []
        start = read_json(self.start, problems)
        if problems:
            raise ValueError(problems[0])
        return start or {"init_from": "", "step": 0}

    def last_step(self, training: Config) -> int:
        """Returns the step at which training ends: `n_iters`, or `n_iters_from_start` after the start of the run.

        Raises:
            ValueError: as `read_start`.
        """
        start = self.read_start()["step"]
        return start + training.n_iters_from_start if training.n_iters_from_start else training.n_iters

    def write_samples(
        self,
        images: NumpyImages,
        real: UInt8[np.ndarray, "_ height width channels"],
        label: str,
        levels: int,
        step: int,
    ) -> None:
        """Writes all samples of a checkpoint as arrays and pictures, and real images to compare them with.

        Args:
            images, real: integers from 0 to `levels` - 1.
            step: the training step of the checkpoint.
        """
        ImageGrid(real[:PER_GRID], levels, 0).write(self.samples / f"{DATA}.npz")
        ImageGrid(images[:PER_GRID], levels, step).write(self.samples / f"{label}.npz")
        save_grid(self.samples / f"{label}.png", images[:PER_GRID], levels)
        for path in (self.samples / label).glob("images_*"):  # an earlier evaluation may have written more files
            path.unlink()
        for first in range(0, len(images), PER_FILE):
            part, name = images[first : first + PER_FILE], f"images_{first:06d}"
            ImageGrid(part, levels, step).write(self.samples / label / f"{name}.npz")
            save_grid(self.samples / label / f"{name}.png", part[:PER_GRID], levels)


def check_deq_folder(name: str) -> None:
    """Raises ValueError unless this is a subfolder of the workdir that is free for a dequantizer."""
    check_subfolder("--deq_folder", name, "a dequantizer only, like deq_uniform", ("eval",))


def check_subfolder(flag: str, name: str, content: str, reserved: Collection[str] = ()) -> None:
    """Raises ValueError unless `name` is a subfolder of the workdir that nothing else uses.

    Args:
        content: what the folder is for, with an example of a name, for the error message.
        reserved: names that are not allowed besides `Workdir.OTHER_FOLDERS`.
    """
    path, used = Path(name), (*Workdir.OTHER_FOLDERS, *reserved)
    if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0] in used:
        raise ValueError(f"{flag}={name} must name a subfolder of the workdir for {content}")


@dataclasses.dataclass(frozen=True)
class EvaluationFolder:
    """Where the evaluations of one checkpoint write."""

    workdir: Workdir
    name: str
    """The subfolder of the workdir, `--eval_folder`."""
    label: str
    """The name of the checkpoint in file names."""
    step: int
    """The training step of the checkpoint."""

    @property
    def path(self) -> Path:
        return self.workdir.path / self.name

    @property
    def results(self) -> Path:
        return self.path / f"{self.label}.json"

    @property
    def artefact_label(self) -> str:
        """The label outside of `path`, in the folders that hold the artefacts of all evaluation folders."""
        return self.label if self.name == "eval" else f"{self.label}_{self.name.replace('/', '_')}"

    def write_picture(self, what: str, images: NumpyImages, levels: int, columns: int = 0) -> None:
        """Writes images as an array and as a picture to pictures/; without `columns`, at most `PER_GRID` are drawn.

        Args:
            what: what they show, one word.
            columns: images in a row of the picture; 0: as square as possible.
        """
        path = self.workdir.pictures / f"{self.artefact_label}_{what}"
        ImageGrid(images, levels, self.step, columns=columns).write(path.with_name(f"{path.name}.npz"))
        save_grid(path.with_name(f"{path.name}.png"), images if columns else images[:PER_GRID], levels, columns or None)


def _lock(file: IO[str]) -> bool:
    """Returns whether the first host, on behalf of all, got the lock. The lock ends when the process ends."""
    if jax.process_index() == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # Some file systems have no locks.
            logging.warning("Cannot lock %s: %s", file.name, error)
    return True


def _log_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> None:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _log_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            logging.info("Changed since the last start: %s%s was %r, is %r", prefix, name, old, new)
