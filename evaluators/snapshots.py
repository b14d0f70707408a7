"""A few samples of every permanent checkpoint, drawn during training."""

from pathlib import Path

import jax
import numpy as np
from absl import logging

from build import Run
from evaluators.samples import draw_images
from infra import parallel
from infra.artefacts import ImageGrid, Snapshot
from infra.checkpoints import params_digest
from infra.console import progress
from infra.workdir import PER_GRID, Workdir
from samplers.few_step import DPMSolverSampler
from samplers.sampler import Sampler
from train_state import TrainState


class Snapshots:
    """Draws the same images from each permanent checkpoint, with the averaged and with the raw parameters.

    The noise of image k is the same in every snapshot, so that snapshots are comparable. Each is drawn once. In
    samples/snapshots, step_<step>.npz holds `ema` and `raw`, integers from 0 to `levels` - 1, and PNG files show them.
    If an interruption prevents a snapshot, it is drawn when training resumes from its checkpoint.

    Raises:
        ValueError: from the constructor, if snapshots are enabled but `config.sampling` is not valid, or the data are
            points.
    """

    def __init__(self, run: Run, workdir: Workdir):
        self.run, self.workdir, self.folder = run, workdir, workdir.snapshots
        if run.config.training.snapshot_sampling:
            self.shown = min(PER_GRID, run.config.sampling.batch_size or PER_GRID)
            self.sampler = snapshot_sampler(run)
            if len(run.data_shape) != 3:
                raise ValueError(
                    f"training.snapshot_sampling draws images, but {run.config.data.dataset} has points; use False"
                )

    def due(self, step: int) -> bool:
        """Whether the checkpoint of this step is permanent: every `training.snapshot_freq` steps, and the last one."""
        training = self.run.config.training
        if not training.snapshot_sampling or step <= 0:
            return False
        return step % training.snapshot_freq == 0 or step >= self.workdir.last_step(training)

    def draw(self, state: TrainState) -> None:
        """Draws the snapshot of this state if it is due and missing.

        Returns early on a request to stop. Only warns if sampling fails, because training does not need snapshots.
        """
        step = int(state.step)
        if not parallel.agree(self.due(step)):
            return
        path, digest = Snapshot.file(self.folder, step), params_digest(state.params)
        if parallel.agree(_stored_digest(path) == digest):
            return
        try:
            grids = {"ema": self._grid(parallel.whole(state.ema_params)), "raw": self._grid(state.params)}
        except KeyboardInterrupt:
            return
        except RuntimeError as error:
            logging.warning("Cannot draw a snapshot of step %d: %s", step, error)
            return
        if jax.process_index() != 0:
            return
        levels = self.run.config.data.levels
        ema, raw = (ImageGrid(grids[weights], levels, step) for weights in ("ema", "raw"))
        Snapshot(ema, raw, digest).write(self.folder)

    def _grid(self, params: object) -> np.ndarray:
        devices = self.run.mesh.size
        numbers = np.arange(-(-self.shown // devices) * devices)
        with progress(100, "snapshot", "%") as bar:

            def show(step: int, steps: int) -> None:
                parallel.check_stop()
                bar.update(100 * step // steps - bar.n)

            return draw_images(self.run, params, numbers, show, self.sampler)[0][: self.shown]


def snapshot_sampler(run: Run) -> Sampler:
    """The sampler of snapshots that `training.snapshot_sampler` names.

    Raises:
        ValueError: for an unknown name, or a field of `sampling` whose value is not allowed.
    """
    name = run.config.training.snapshot_sampler
    if name == "configured":
        return run.sampler()
    if name != "few_step":
        raise ValueError(f"training.snapshot_sampler is {name!r}; it must be few_step or configured")
    # Samples from the ODE of a VE model keep every error of the score at large noise.
    eta = 1.0 if run.sde.variance_exploding else 0.0
    smallest = max(DPMSolverSampler.smallest_time, run.config.training.smallest_time)
    return DPMSolverSampler(sde=run.sde, smallest_time=smallest, eta=eta, data_range=run.preprocess.data_range)


def _stored_digest(path: Path) -> str | None:
    """The digest of the parameters of the snapshot at `path`; None if there is no readable snapshot."""
    try:
        return Snapshot.read(path).parameters
    except (FileNotFoundError, ValueError):
        return None
