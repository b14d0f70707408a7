"""Checkpoints of the training state: saved so that nothing is lost, restored on any number of devices.

A checkpoint is either complete or absent: orbax writes to a temporary folder and renames it. Beside the state it holds
a description of the network, so that a state of another network is refused with one line.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Sharding

from infra import parallel
from infra.published_checkpoints import read_published_checkpoint
from infra.workdir import Workdir
from models.score import Params
from train_state import ResidualTable, TrainState


def abstract_state(state: TrainState, sharding: Sharding) -> TrainState:
    """The shapes, dtypes and placement of a state, given the state or its shapes."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


def initial_residuals(like: TrainState) -> ResidualTable | None:
    """The residuals of a state shaped as `like` whose checkpoint has none."""
    if like.residuals is None:
        return None
    return jax.tree.map(lambda a, shape: jax.device_put(a, shape.sharding), ResidualTable.start(), like.residuals)


def _stored(state: TrainState) -> dict[str, Any]:
    """The arrays that every checkpoint has, by name; the residuals are stored beside them, if there are any."""
    return {name: getattr(state, name) for name in ("step", "params", "ema_params", "opt_state")}


class Checkpoints:
    """The checkpoints of one run, a folder with one subfolder for each step.

    Use it as a context manager: leaving it waits until everything is written.

    Args:
        folder: where the checkpoints are.
        description: of the network; saved with each checkpoint and compared when one is restored.
        like: the shapes, dtypes and placement of a state, see `abstract_state`.
        keep_every: checkpoints at multiples of this step are kept permanently. The newest is always kept.
        read_only: do not create or change the folder.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        like: TrainState,
        keep_every: int = 1,
        *,
        read_only: bool = False,
    ):
        self.description, self.like = description, like
        policies = ocp.checkpoint_managers
        # All but the newest were kept permanently, perhaps with another `keep_every`.
        kept = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())[:-1]
        keep = [policies.LatestN(1), policies.EveryNSteps(keep_every), policies.CustomSteps(kept)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the training loop decides when to save
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "description": ocp.JsonCheckpointHandler(),
            "residuals": ocp.StandardCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    @classmethod
    def existing(cls, folder: Path, description: dict[str, Any], like: TrainState) -> "Checkpoints":
        """Opens a folder for reading.

        Raises:
            FileNotFoundError: if it holds no checkpoint.
        """
        if not folder.is_dir() or not (checkpoints := cls(folder, description, like, read_only=True)).steps():
            raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name the workdir of a trained run")
        return checkpoints

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def steps(self) -> Sequence[int]:
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing the state under its step, unless it is already there."""
        step = int(state.step)
        if step == self.newest():
            return
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(_stored(state)),
            "description": ocp.args.JsonSave(self.description),
        }
        if state.residuals is not None:
            items["residuals"] = ocp.args.StandardSave(state.residuals._asdict())
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int) -> TrainState:
        """The state at `step`. If the checkpoint has no residuals, as older ones, they start anew.

        Raises:
            ValueError: if the checkpoint belongs to another network, naming the first difference, or is damaged.
        """
        description = self._read(step, description=ocp.args.JsonRestore())
        _check_same_network(description, self.description, self._name(step))
        arrays = self._read(step, state=ocp.args.StandardRestore(_stored(self.like)))
        residuals = initial_residuals(self.like)
        if residuals is not None and (self._manager.directory / str(step) / "residuals").is_dir():
            like = ocp.args.StandardRestore(self.like.residuals._asdict())  # type: ignore[union-attr]
            residuals = ResidualTable(**self._read(step, residuals=like))
        return TrainState(**arrays, residuals=residuals)

    def resume(self) -> TrainState | None:
        """The newest state, or None if there is no checkpoint yet."""
        newest = self.newest()
        if newest is None:
            return None
        logging.info("Resuming from step %d in %s", newest, self._manager.directory)
        return self.restore(newest)

    def _name(self, step: int) -> str:
        return f"the checkpoint {self._manager.directory / str(step)}"

    def _read(self, step: int, **item: Any) -> Any:
        """Reads the one item of a checkpoint that is named, with the arguments to restore it."""
        (name,) = item
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # damaged files make orbax, tensorstore and JAX raise a dozen kinds of errors
            raise ValueError(
                f"{self._name(step)} is damaged, or comes from another kind of training; "
                f"remove it to resume from an earlier one: {str(error)[:300]}"
            ) from error


def load_state(path: Path, description: dict[str, Any], like: TrainState) -> TrainState:
    """The state in a published checkpoint file, in one step's folder among a run's checkpoints, or the newest of a run.

    Args:
        path: the file, the step's folder, or the workdir.
        description, like: of the network, as for `Checkpoints`.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it belongs to another network, or is damaged.
    """
    path = path.absolute()
    if path.is_file():
        state = read_published_checkpoint(path, like).replace(residuals=initial_residuals(like))
        return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, like)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint in {path}, which does not exist; name a workdir, a step's folder in its checkpoints, or a "
            "published checkpoint file"
        )
    one_step = path.parent.name == Workdir.CHECKPOINTS and path.name.isdigit()
    with Checkpoints.existing(path.parent if one_step else Workdir(path).checkpoints, description, like) as checkpoints:
        return checkpoints.restore(int(path.name) if one_step else checkpoints.steps()[-1])


def params_digest(params: Params) -> str:
    """The first digits of the SHA-256 of the parameters, which identify them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parallel.fetch(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _check_same_network(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    wanted = json.loads(json.dumps(wanted))  # as it is after reading: tuples are lists
    for field in sorted(found.keys() & wanted.keys()):  # a field that only one of them has is of another version
        if found[field] != wanted[field]:
            raise ValueError(
                f"{what} belongs to another network: {field} is {found[field]!r} there, but {wanted[field]!r} in the "
                "configuration; change the configuration, or choose another workdir or checkpoint"
            )
