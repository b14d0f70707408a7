"""Check of golden losses_*.npz files: losses of every order and their gradients, for given times, noise and probe."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from losses import ORDERS, TERMS, Noise, Objective, likelihood_weight
from models.score import ScoreModel, ScoreNetwork, score_model_from_config
from sde_lib import SDE
from tests.golden_common import Result, golden_config, golden_params, relative_error


def check_losses(path: Path) -> Iterator[Result]:
    """Compares the losses of every order in the file, and their gradients."""
    data = np.load(path)
    orders = [order for order in ORDERS if f"order{order}_losses" in data]
    params, losses_and_gradient = golden_params(data), _losses_and_gradient(data, max(orders))
    for order in orders:
        weights = {name: float(term.order <= order) for name, term in TERMS.items() if 0 < term.order <= max(orders)}
        means, gradient = losses_and_gradient(params, weights)
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

    All orders share one compiled program, because the weights are arguments of it. So do files that differ in the SDE
    or in importance sampling, which changes only the weights of the examples in the first order.
    """
    model = score_model_from_config(golden_config(data))
    likelihood_weighting = bool(data["likelihood_weighting"])
    objective = Objective(
        order=order,
        t_min=float(data["smallest_time"]),
        likelihood_weighting=likelihood_weighting,
        # The published code ignores importance_weighting unless likelihood_weighting is on.
        importance_weighting=likelihood_weighting and bool(data["importance_weighting"]),
        reduce_mean=bool(data["reduce_mean"]),
    )
    # At given times, the smallest time has no effect on uniform weights.
    compiled = dataclasses.replace(objective, importance_weighting=False, t_min=1e-3)
    noise = Noise(*(jnp.asarray(data[name]) for name in ("t", "z", "v")))
    sde = SDEAtTimes(*model.sde.alpha_sigma(noise.t), model.sde.diffusion(noise.t))
    first, compiled_first = (likelihood_weight(model.sde, each, noise.t) for each in (objective, compiled))
    batch = _Batch(jnp.asarray(data["x"]), noise, first / compiled_first)
    return functools.partial(_means_and_gradient, model.network, compiled, sde, batch)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["alpha", "sigma", "g"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SDEAtTimes(SDE):
    """An SDE at the times of one batch. Its values are arguments of a compiled program, so that SDEs share one."""

    alpha: jax.Array
    sigma: jax.Array
    g: jax.Array

    def alpha_sigma(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.alpha, self.sigma

    def diffusion(self, t: jax.Array) -> jax.Array:
        return self.g

    def drift_coeff(self, t: jax.Array) -> jax.Array:
        raise NotImplementedError

    def log_noise_level(self, t: jax.Array) -> jax.Array:
        raise NotImplementedError

    def time_of_log_noise_level(self, log_rho: jax.Array) -> jax.Array:
        raise NotImplementedError

    @property
    def prior_sigma(self) -> float:
        raise NotImplementedError


class _Batch(NamedTuple):
    """The data of the losses."""

    x0: jax.Array
    noise: Noise
    first_weight: jax.Array
    """The first order's weight of each example, divided by the weight in the compiled objective."""


# It runs only a few times, so nearly all of the time is spent compiling.
@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _means_and_gradient(
    network: ScoreNetwork, objective: Objective, sde: SDE, batch: _Batch, params: Any, weights: dict[str, float]
) -> tuple[dict[str, Any], Any]:
    def means(params: Any) -> dict[str, Any]:
        score_fn = ScoreModel(network, sde).score_fn(params)
        losses = objective.losses(score_fn, sde, batch.x0, batch.noise)
        losses["first"] *= batch.first_weight
        return {term: jnp.mean(value) for term, value in losses.items() if term != "total"}

    values, pull_back = jax.vjp(means, params)
    return values, pull_back(weights)[0]
