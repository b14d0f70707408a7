"""Checkpoints of the training state, which can be restored on any number of devices.

A checkpoint is either complete or absent: orbax writes to a temporary folder and renames it. Besides the state, it
holds a description of the network, so that loading a state of another network is an error of one line. It also holds
checksums of all arrays and of the description, so that a changed byte is found. Checkpoints of older versions have no
checksums.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Sharding

from infra import parallel
from infra.published_checkpoints import read_published_checkpoint
from infra.waiting import waiting
from infra.workdir import Workdir
from models.score import Params
from train_state import TrainState


def abstract_state(state: TrainState, sharding: Sharding | TrainState) -> TrainState:
    """The shapes, dtypes and placement of a state, given the state or its shapes.

    Args:
        sharding: of all arrays, or a state that holds the sharding of each array.
    """
    shardings = sharding if isinstance(sharding, TrainState) else jax.tree.map(lambda _: sharding, state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


class DamagedCheckpointError(ValueError):
    """The checkpoint cannot be read, or its contents are not those that were written."""


CHECKSUMS = "checksums"
"""The key in a checkpoint's description that holds the CRC-32 of each array, by its path, and of the description."""


def initial_residuals(like: TrainState) -> Any:
    """The residuals of a state shaped as `like` whose checkpoint has none."""
    if like.residuals is None:
        return None
    return parallel.place(like.residuals.start(), jax.tree.map(lambda shape: shape.sharding, like.residuals))


def _stored(state: TrainState) -> dict[str, Any]:
    """Returns the arrays that every checkpoint has, by name. Residuals, if there are any, are stored separately."""
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
            save_decision_policy=policies.FixedIntervalPolicy(1),  # The loop decides when to save.
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

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            with self._writing(), waiting(f"the checkpoint to be written to {self._manager.directory}"):
                self._manager.wait_until_finished()
                self._manager.close()
        except OSError as error:
            if kind is None:
                raise
            logging.debug("Closing the checkpoints failed after another error: %s", error)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of writing, of which orbax, tensorstore and JAX raise many kinds, into an OSError."""
        try:
            yield
        except Exception as error:
            full = "No space left on device"
            reason = full if full in str(error) else str(error)[:300]
            raise OSError(f"cannot write a checkpoint to {self._manager.directory}: {reason}") from error

    def steps(self) -> Sequence[int]:
        """Returns the steps that have a checkpoint, in increasing order."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing the state under its step, unless it is already there."""
        step = int(state.step)
        if step == self.newest():
            return
        arrays = {"state": _stored(state)}
        if state.residuals is not None:
            arrays["residuals"] = state.residuals._asdict()
        described = self.description | {CHECKSUMS: _checksums(arrays, self.description)}
        items: dict[str, Any] = {name: ocp.args.StandardSave(part) for name, part in arrays.items()}
        with self._writing(), waiting(f"the checkpoint of step {step} in {self._manager.directory}"):
            self._manager.save(step, args=ocp.args.Composite(**items, description=ocp.args.JsonSave(described)))

    def restore(self, step: int) -> TrainState:
        """Restores the state at `step`. Older checkpoints have no residuals, which then have their initial values.

        Raises:
            DamagedCheckpointError: if the checkpoint is damaged.
            ValueError: if it belongs to another network, naming the first difference, or has parameters that are not
                finite.
        """
        name, (description, checksums) = self._name(step), self._description(step)
        arrays = {"state": self._read(step, state=ocp.args.StandardRestore(_stored(self.like)))}
        residuals = self.like.residuals
        if residuals is not None and (self._manager.directory / str(step) / "residuals").is_dir():
            arrays["residuals"] = self._read(step, residuals=ocp.args.StandardRestore(residuals._asdict()))
        if checksums is not None:
            found = _checksums(arrays, description)
            changed = [path for path, checksum in found.items() if checksum != checksums.get(path)]
            if parallel.any_host(bool(changed)):
                raise DamagedCheckpointError(
                    f"{name} is damaged: {len(changed)} of its arrays have changed on the disk"
                )
        stored = arrays.get("residuals")
        table = residuals._replace(**stored) if residuals is not None and stored else initial_residuals(self.like)
        state = TrainState(**arrays["state"], residuals=table)
        if not _all_finite((state.params, state.ema_params)):
            raise ValueError(
                f"{name} has parameters that are not finite: its training has diverged; remove it to use an earlier one"
            )
        return state

    def _description(self, step: int) -> tuple[dict[str, Any], dict[str, int] | None]:
        """Returns the description and the checksums of a checkpoint. Raises the errors of `restore`."""
        description = self._read(step, description=ocp.args.JsonRestore())
        checksums = description.pop(CHECKSUMS, None)
        if checksums is not None and checksums.get(_DESCRIPTION) != _checksum_of_text(description):
            raise DamagedCheckpointError(
                f"{self._name(step)} is damaged: its description has changed since it was written"
            )
        _check_same_network(description, self.description, self._name(step))
        return description, checksums

    def check_network(self) -> None:
        """Raises ValueError if the newest checkpoint belongs to another network. Does not read its arrays."""
        newest = self.newest()
        if newest is not None:
            with contextlib.suppress(DamagedCheckpointError):  # `resume` uses an earlier checkpoint.
                self._description(newest)

    def resume(self) -> TrainState | None:
        """The newest state that can be read, or None if there is no checkpoint yet.

        Newer checkpoints that are damaged are named in the log and renamed to STEP.damaged.

        Raises:
            ValueError: as for `restore`, if the newest checkpoint is of another network or not finite, or if no
                checkpoint can be read.
        """
        if self.newest() is None:
            return None
        step, state = self.restore_newest()
        logging.info("Resuming from step %d in %s", step, self._manager.directory)
        for damaged in self.steps():
            if damaged > step and jax.process_index() == 0:
                path = Path(self._manager.directory / str(damaged))
                path.rename(path.with_name(f"{damaged}.damaged"))
        parallel.agree(True)  # Other hosts must not list the folder before.
        self._manager.reload()
        return state

    def restore_newest(self) -> tuple[int, TrainState]:
        """The newest state that can be read, and its step.

        A training in another process may write a newer checkpoint and remove this one at any time.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: as for `restore`, if the newest checkpoint is of another network or not finite, or if no
                checkpoint can be read.
        """
        failures: dict[int, DamagedCheckpointError] = {}
        while left := [step for step in self.steps() if step not in failures]:
            try:
                return left[-1], self.restore(left[-1])
            except DamagedCheckpointError as error:
                failures[left[-1]] = error
                if len(left) > 1:
                    logging.warning("%s; trying another one", error)
            self._manager.reload()  # A training may have written a newer checkpoint.
        if failures:
            error = failures[max(failures)]
            raise DamagedCheckpointError(f"{error}. No earlier checkpoint can be read; use another workdir") from error
        raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")

    def _name(self, step: int) -> str:
        return f"the checkpoint {self._manager.directory / str(step)}"

    def _read(self, step: int, **item: Any) -> Any:
        """Reads one item of a checkpoint, given as a keyword argument: its name, and the arguments to restore it."""
        (name,) = item
        try:
            with waiting(f"the checkpoint of step {step} in {self._manager.directory}"):
                return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # damaged files make orbax, tensorstore and JAX raise a dozen kinds of errors
            if not (self._manager.directory / str(step)).exists():
                raise DamagedCheckpointError(f"{self._name(step)} was removed while it was read") from error
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedCheckpointError(
                f"{self._name(step)} is damaged, or comes from another kind of training: {first_line[:300]}"
            ) from error


def load_state(path: Path, description: dict[str, Any], like: TrainState) -> TrainState:
    """Loads the state from a published checkpoint file, one step's folder, or the newest checkpoint of a run.

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
        return parallel.place(state, jax.tree.map(lambda shape: shape.sharding, like))
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint in {path}, which does not exist; name a workdir, a step's folder in its checkpoints, or a "
            "published checkpoint file"
        )
    one_step = path.parent.name == Workdir.CHECKPOINTS and path.name.isdigit()
    with Checkpoints.existing(path.parent if one_step else Workdir(path).checkpoints, description, like) as checkpoints:
        return checkpoints.restore(int(path.name)) if one_step else checkpoints.restore_newest()[1]


_DESCRIPTION = "description"


def _checksums(arrays: dict[str, Any], description: dict[str, Any]) -> dict[str, int]:
    """The CRC-32 of each array, by its path, and of the description. All hosts must call this together."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    for _, leaf in leaves:
        leaf.addressable_data(0).copy_to_host_async()
    contents = {jax.tree_util.keystr(path): _on_host(leaf) for path, leaf in leaves}
    sums = {path: zlib.crc32(array.tobytes()) for path, array in contents.items()}
    return sums | {_DESCRIPTION: _checksum_of_text(description)}


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array.addressable_data(0) if array.is_fully_replicated else parallel.fetch(array))


def _checksum_of_text(description: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(description, sort_keys=True).encode())


def _all_finite(params: Params) -> bool:
    """Whether all numbers are finite, checked on the host: XLA would compile a reduction for every array."""
    return all(np.isfinite(_on_host(leaf)).all() for leaf in jax.tree.leaves(params))


def params_digest(params: Params) -> str:
    """The first digits of the SHA-256 of the parameters, which identify them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parallel.fetch(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _check_same_network(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    wanted = json.loads(json.dumps(wanted))  # JSON turns tuples into lists, as in `found`.
    for field in sorted(found.keys() & wanted.keys()):  # Other versions of the program may lack a field.
        if found[field] != wanted[field]:
            raise ValueError(
                f"{what} belongs to another network: {field} is {found[field]!r} there, but {wanted[field]!r} in the "
                "configuration; change the configuration, or choose another workdir or checkpoint"
            )
