"""Published checkpoints: training states in the msgpack files of score_sde, score_flow and the code of [L22].

Paths of the leaves in such a file, where P is the path of a parameter in the network:
    step                                                   step of the state, which the warm-up follows
    optimizer/target/P                                     parameters
    optimizer/state/step                                   Adam's own count of steps
    optimizer/state/param_states/P/{grad_ema,grad_sq_ema}  Adam's first and second moments
    params_ema/P                                           averaged parameters
    model_state                                            empty for these networks
    lr, ema_rate, rng                                      ignored: the configuration sets them here
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict

from infra.files import write_atomic
from train_state import TrainState, schedules_at

Leaves: TypeAlias = dict[str, Any]
"""Leaves by path: those found in a file, or those wanted from it."""

READ = ("step", "optimizer", "params_ema", "model_state")
LISTED = 6
"""The largest number of leaves that an error message names for each kind of difference."""


def read_published_checkpoint(path: Path, like: TrainState) -> TrainState:
    """Reads a training state from a published checkpoint: step, parameters, averaged parameters and Adam's moments.

    The learning rate and the decay of the average come from the configuration, not from the file.

    Args:
        like: a state of this network, or its shapes and dtypes. Its optimizer must have Adam's moments.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is damaged, has another format, or is for another network. For another network, the
            message lists the leaves that are missing, unexpected or of another shape.
    """
    found, wanted = _read_leaves(path), _flat(_published_tree(like))
    _check_leaves(path, found, wanted)
    leaves = {name: np.asarray(found[name], leaf.dtype).reshape(leaf.shape) for name, leaf in wanted.items()}
    broken = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
    if broken:
        raise ValueError(f"{path} is damaged: not all values are finite in {_listed(broken)}")
    # The leaves are copied because training donates the state, which must not share memory with the bytes of the file.
    tree = unflatten_dict({name: jnp.array(leaf) for name, leaf in leaves.items()}, sep="/")
    return like.replace(
        step=tree["step"],
        params=tree["optimizer"]["target"],
        ema_params=tree["params_ema"],
        opt_state=_optimizer_state(tree["optimizer"]["state"], tree["step"], like),
    )


def write_published_checkpoint(path: Path, state: TrainState, *, lr: float, ema_rate: float) -> None:
    """Writes a state as a published checkpoint, from which the published code can resume.

    Args:
        lr, ema_rate: the values of optim.lr and model.ema_rate, which the published code reads from the file.
    """
    extra = {"lr": lr, "ema_rate": ema_rate, "model_state": {}, "rng": np.zeros(2, np.uint32)}
    write_atomic(path, msgpack_serialize(jax.device_get(_published_tree(state)) | extra))


def _published_tree(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a state, nested as in a published checkpoint."""
    adam = _adam_state(state.opt_state)
    moments = jax.tree.map(lambda mu, nu: {"grad_ema": mu, "grad_sq_ema": nu}, adam.mu, adam.nu)
    return {
        "step": state.step,
        "optimizer": {"target": state.params, "state": {"step": adam.count, "param_states": moments}},
        "params_ema": state.ema_params,
    }


def _adam_state(opt_state: optax.OptState) -> optax.ScaleByAdamState:
    (adam,) = filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam))
    return adam


def _optimizer_state(stored: Mapping[str, Any], step: jax.Array, like: TrainState) -> optax.OptState:
    """Returns `like.opt_state` with the stored moments and step count of Adam, and with the schedule at `step`."""
    first, second = (
        jax.tree.map(lambda _, moments, name=name: moments[name], like.params, stored["param_states"])
        for name in ("grad_ema", "grad_sq_ema")
    )

    def fill(node: Any) -> Any:
        return optax.ScaleByAdamState(stored["step"], first, second) if _is_adam(node) else node

    return jax.tree.map(fill, schedules_at(like.opt_state, step), is_leaf=_is_adam)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _read_leaves(path: Path) -> Leaves:
    content = path.read_bytes()
    try:
        tree: Any = msgpack_restore(content)
        return _flat({name: part for name, part in tree.items() if name in READ})
    except Exception as error:  # msgpack, flax and NumPy raise many kinds of errors for bytes of another format
        raise ValueError(
            f"{path} is not a published checkpoint (a training state in msgpack), or is damaged: {error}"
        ) from error


def _flat(tree: dict[str, Any]) -> Leaves:
    leaves: Any = flatten_dict(tree, sep="/")
    return leaves


def _check_leaves(path: Path, found: Leaves, wanted: Leaves) -> None:
    """Raises ValueError with a list of the differences between `found` and `wanted`, if there are any."""
    differences = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": sorted(found.keys() - wanted.keys(), key=lambda name: ("/state/" in name, name)),  # moments last
        "of another shape": [
            f"{name} is {_described(found[name])}, not {_described(leaf)}"
            for name, leaf in wanted.items()
            if name in found and not _fits(found[name], leaf)
        ],
    }
    if any(differences.values()):
        lists = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in differences.items() if names]
        raise ValueError(f"{path} does not fit the network of the configuration: leaves {'. '.join(lists)}")


def _fits(found: Any, wanted: Any) -> bool:
    """Returns whether a stored leaf holds numbers of the wanted kind and shape.

    Older files store the parameters of GroupNorm with shape [1, 1, 1, C], which fits [C].
    """
    if not isinstance(found, np.ndarray | np.generic | jax.Array | int | float):
        return False
    kind = jnp.integer if jnp.issubdtype(wanted.dtype, jnp.integer) else jnp.floating
    shapes = [wanted.shape, (1, 1, 1, *wanted.shape)] if len(wanted.shape) == 1 else [wanted.shape]
    return jnp.issubdtype(jnp.result_type(found), kind) and np.shape(found) in shapes


def _described(leaf: Any) -> str:
    """Describes an array by dtype and shape, and anything else by its type."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else type(leaf).__name__


def _listed(names: list[str]) -> str:
    """Joins the first `LISTED` names, and says how many more there are."""
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return "; ".join(names[:LISTED] + more)
