"""Check of golden losses_*.npz files: losses of every order and their gradients, for given times, noise and probe."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from losses import ORDERS, TERMS, Noise, Objective
from models.score import score_model_from_config
from tests.golden_common import Result, golden_config, golden_params, relative_error


def check_losses(path: Path) -> Iterator[Result]:
    """Compares the losses of every order in the file, and their gradients."""
    data = np.load(path)
    orders = [order for order in ORDERS if f"order{order}_losses" in data]
    losses_and_gradient = _losses_and_gradient(data, max(orders))
    for order in orders:
        weights = {name: float(term.order <= order) for name, term in TERMS.items() if 0 < term.order <= max(orders)}
        means, gradient = losses_and_gradient(golden_params(data), weights)
        yield from _compare(data, order, {name: float(means[name] * weights[name]) for name in weights}, gradient)


def _compare(data: Any, order: int, means: dict[str, float], gradient: Any) -> Iterator[Result]:
    sums = [sum(mean for name, mean in means.items() if TERMS[name].order == each) for each in ORDERS]
    for name, value, want in zip(("total", *ORDERS), (sum(sums), *sums), data[f"order{order}_losses"], strict=True):
        yield Result(f"order {order}, loss {name}", relative_error(value, want), 1e-3)
    norm = data[f"order{order}_grad_norm"]
    yield Result(f"order {order}, gradient norm", relative_error(optax.tree.norm(gradient), norm), 1e-2)
    leaves: Any = flatten_dict(gradient, sep="/")
    prefix = f"order{order}_grad/"
    for key in (key for key in data.files if key.startswith(prefix)):
        leaf = key.removeprefix(prefix)
        # The error is relative to the largest entry of the leaf, because far smaller entries are sums that cancel.
        error = relative_error(leaves[leaf], data[key], scale=float(np.abs(data[key]).max()))
        yield Result(f"order {order}, gradient of {leaf}", error, 1e-2)


def _losses_and_gradient(data: Any, order: int) -> Callable[[Any, dict[str, float]], tuple[dict[str, Any], Any]]:
    """Returns a function from parameters and weights to the terms' batch means and the gradient of their weighted sum.

    All orders share one compiled program, because the weights are arguments of it.
    """
    config = golden_config(data)
    model = score_model_from_config(config)
    likelihood_weighting = bool(data["likelihood_weighting"])
    objective = Objective(
        order=order,
        t_min=float(data["smallest_time"]),
        likelihood_weighting=likelihood_weighting,
        # The published code ignores importance_weighting unless likelihood_weighting is on.
        importance_weighting=likelihood_weighting and bool(data["importance_weighting"]),
        reduce_mean=bool(data["reduce_mean"]),
    )
    noise = Noise(*(jnp.asarray(data[name]) for name in ("t", "z", "v")))

    def means(params: Any) -> dict[str, Any]:
        losses = objective.losses(model.score_fn(params), model.sde, jnp.asarray(data["x"]), noise)
        return {term: jnp.mean(value) for term, value in losses.items() if term != "total"}

    # It runs only a few times, so nearly all of the time is spent compiling.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def losses_and_gradient(params: Any, weights: dict[str, float]) -> tuple[dict[str, Any], Any]:
        values, pull_back = jax.vjp(means, params)
        return values, pull_back(weights)[0]

    return losses_and_gradient
