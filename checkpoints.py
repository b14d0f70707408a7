"""Checkpoints of the training state: saved so that nothing is lost, restored on any number of devices.

A checkpoint is complete or absent (orbax writes beside its place and renames). Beside the state it holds a
description of the network, so that a state of another network is refused in one line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from train_state import TrainState, schedules_at

RESETTABLE = ("step", "opt", "ema")


class Checkpoints:
    """The checkpoints of one run, in a folder; a context manager that waits for writes to end.

    Args:
        folder: where they are, one folder for each step.
        description: of the network; kept with each checkpoint and compared when one is read.
        keep_every: steps between the checkpoints that are kept for good; besides, the newest is always there.
        read_only: leave the folder as it is, and do not make it.
    """

    def __init__(self, folder: Path, description: dict[str, Any], keep_every: int = 1, *, read_only: bool = False):
        self.description = description
        policies = ocp.checkpoint_managers
        # All but the newest were kept for good, perhaps by another `keep_every`.
        kept = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())[:-1]
        keep = [policies.LatestN(1), policies.EveryNSteps(keep_every), policies.CustomSteps(kept)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the training loop decides
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

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
        """Starts writing the state under its step, unless it is there already."""
        step = int(state.step)
        if step == self.newest():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), description=ocp.args.JsonSave(self.description)
        )
        self._manager.save(step, args=arguments)

    def restore(self, step: int, like: TrainState, sharding: Sharding) -> TrainState:
        """The state at `step`, its arrays placed as `sharding` says.

        Args:
            like: a state, or its shapes and dtypes, of this network and optimizer.

        Raises:
            ValueError: if the checkpoint is of another network, naming the first difference, or damaged.
        """
        description = self._read(step, description=ocp.args.JsonRestore())
        _same_network(description, self.description, self._name(step))
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)
        return self._read(step, state=ocp.args.StandardRestore(abstract))

    def _name(self, step: int) -> str:
        return f"the checkpoint {self._manager.directory / str(step)}"

    def _read(self, step: int, **item: Any) -> Any:
        """The one item of a checkpoint that is asked for, and how to read it."""
        (name,) = item
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # damaged files make orbax, tensorstore and JAX raise a dozen kinds
            raise ValueError(
                f"{self._name(step)} is damaged, or of another kind of training; "
                f"remove it to go on from an earlier one: {str(error)[:300]}"
            ) from error


def _same_network(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    wanted = json.loads(json.dumps(wanted))  # as it reads back: tuples are lists
    for field in sorted(found.keys() & wanted.keys()):  # one that only one of them knows is of another version
        if found[field] != wanted[field]:
            raise ValueError(
                f"{what} is of another network: {field} is {found[field]!r} there, {wanted[field]!r} in the "
                "configuration; change the configuration, or choose another workdir or checkpoint"
            )


def reset_parts(state: TrainState, fresh: TrainState, parts: str) -> TrainState:
    """The state with some of its parts as in `fresh`, for starting a new run from an old one.

    The warm-up of the learning rate belongs to the step: it starts again with that, and only with that. A reset EMA
    starts from the parameters.

    Args:
        parts: as in `parts_to_reset`.
    """
    names = parts_to_reset(parts)
    if "step" in names:
        state = state.replace(step=fresh.step)
    if "opt" in names:
        state = state.replace(opt_state=fresh.opt_state)
    if "ema" in names:
        state = state.replace(ema_params=jax.tree.map(lambda a: a.copy(), state.params))
    return state.replace(opt_state=schedules_at(state.opt_state, state.step))


def parts_to_reset(parts: str) -> list[str]:
    """The parts that `training.init_reset` names: any of step, opt, ema, joined by commas.

    Raises:
        ValueError: for another part.
    """
    names = [name for name in parts.split(",") if name]
    for name in names:
        if name not in RESETTABLE:
            raise ValueError(f"training.init_reset has {name!r}; it takes any of {','.join(RESETTABLE)}")
    return names
