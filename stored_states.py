"""Training states on disk: those of a run, and those of other runs or released files that one starts from."""

from pathlib import Path

import jax
from absl import logging

import parallel
from build import Run
from checkpoints import Checkpoints, reset_parts
from released import read_released
from train_state import TrainState


def open_checkpoints(run: Run, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    keep_every = run.config.training.snapshot_freq
    return Checkpoints(workdir / "checkpoints", run.network_description(), keep_every, read_only=read_only)


def starting_state(run: Run, checkpoints: Checkpoints, init_state: TrainState | None) -> TrainState:
    """The newest checkpoint's state; in a new run, the one to start from, or fresh parameters."""
    whole = parallel.replicated(run.mesh)
    newest = checkpoints.newest()
    if newest is not None:
        instead = ", and so not from training.init_from" if run.config.training.init_from else ""
        logging.info("going on from step %d of this workdir%s", newest, instead)
        return checkpoints.restore(newest, jax.eval_shape(run.fresh_state), whole)
    return jax.device_put(init_state if init_state is not None else run.fresh_state(), whole)


def initial_state(run: Run) -> TrainState:
    """The state at `training.init_from`, with the parts of `training.init_reset` as in a new run.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is of another network, damaged, or as far as training is to go already.
    """
    training = run.config.training
    state = reset_parts(stored_state(run, Path(training.init_from)), run.fresh_state(), training.init_reset)
    if (step := int(state.step)) >= training.n_iters:
        raise ValueError(
            f"training.n_iters is {training.n_iters}, but {training.init_from}, named by training.init_from, is of "
            f"step {step}: nothing would be trained; raise n_iters, or start at 0 by training.init_reset=step"
        )
    return state


def stored_state(run: Run, path: Path) -> TrainState:
    """The state in a released file, in a step's folder among a run's checkpoints, or the newest of a workdir.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is of another network, or damaged.
    """
    path, shapes, whole = path.absolute(), jax.eval_shape(run.fresh_state), parallel.replicated(run.mesh)
    if path.is_file():
        return jax.device_put(read_released(path, shapes), whole)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint in {path}, which does not exist; name a workdir, a step's folder in its checkpoints, or a "
            "released file"
        )
    of_step = path.parent.name == "checkpoints" and path.name.isdigit()
    with open_existing_checkpoints(run, path.parent.parent if of_step else path) as checkpoints:
        return checkpoints.restore(int(path.name) if of_step else checkpoints.steps()[-1], shapes, whole)


def open_existing_checkpoints(run: Run, workdir: Path) -> Checkpoints:
    """Raises FileNotFoundError if the folder holds no checkpoint."""
    folder = workdir / "checkpoints"
    if not folder.is_dir() or not (checkpoints := open_checkpoints(run, workdir, read_only=True)).steps():
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name the workdir of a run that has some")
    return checkpoints
