"""Check of golden losses_idode_*.npz files: the objective of i-DODE [Z23], its terms and its gradient."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from arrays import append_dims
from losses import Noise, Objective, objective_from_config
from models.score import score_model_from_config
from objectives.bound import prior_divergence
from tests.golden_common import Result, golden_params, relative_error
from tests.golden_idode import Conditioned, golden_idode_config


def check_idode_losses(path: Path) -> Iterator[Result]:
    """Compares times, terms and their weights for each image, the total, and its gradient.

    In the released code, the term of the prior is for a standard normal prior, and the reconstruction divides by alpha
    twice. Both are compared after the same changes here. The reconstruction is also compared without the change.
    """
    data = np.load(path)
    config = golden_idode_config(data, data["images"])
    model = score_model_from_config(config)
    model = dataclasses.replace(model, network=Conditioned(model.network, data["conditioning"]))
    sde: Any = model.sde
    objective = objective_from_config(config)
    assert isinstance(objective, Objective)
    x0 = jnp.asarray(objective.level_values)[jnp.asarray(data["images"], jnp.int32)]
    noise = Noise(
        t=sde.time_of_log_noise_level(0.5 * jnp.asarray(data["gamma_t"])),
        z=jnp.asarray(data["eps"]),
        probe=jnp.asarray(data["v"] if "v" in data else np.zeros_like(data["eps"])),
        z_start=jnp.asarray(data["eps_0"]),
    )
    mean, sigma = sde.marginal(x0, noise.t)
    drawn = sde.gamma(objective.times.at_quantiles(sde, jnp.asarray(data["quantiles"])))
    yield Result("gamma_t", relative_error(drawn, data["gamma_t"], scale=1.0), 3e-4)
    zt = mean + append_dims(sigma, x0) * noise.z
    yield Result("z_t", relative_error(zt, data["z_t"], scale=float(np.abs(data["z_t"]).max())), 1e-5)

    # It runs once, so nearly all of the time is spent compiling.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_losses(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = objective.losses(model.score_fn(params), sde, x0, noise)
        return jnp.mean(losses["total"]), losses

    gradient, losses = gradient_and_losses(golden_params(data))
    yield from _compare_terms(objective, model.parameterization, sde, data, x0, noise, losses)
    yield Result("grad_norm", relative_error(optax.tree.norm(gradient), data["grad_norm"]), 1e-2)
    leaves: Any = flatten_dict(gradient, sep="/")
    for key in (key for key in data.files if key.startswith("grad/")):
        error = relative_error(leaves[key.removeprefix("grad/")], data[key], scale=float(np.abs(data[key]).max()))
        yield Result(f"gradient of {key.removeprefix('grad/')}", error, 1e-2)


def _compare_terms(
    objective: Objective,
    parameterization: str,
    sde: Any,
    data: Any,
    x0: jax.Array,
    noise: Noise,
    losses: dict[str, jax.Array],
) -> Iterator[Result]:
    d = x0[0].size
    nats = {name: np.asarray(value, np.float64) * d * math.log(2) for name, value in losses.items()}
    values = jnp.asarray(objective.level_values)
    t_min = jnp.full(len(x0), objective.t_min)
    mean, sigma = sde.marginal(x0, t_min)
    start = mean + append_dims(sigma, x0) * jnp.asarray(data["eps_0"])
    divided = sde.level_logp(start / append_dims(sde.alpha_sigma(t_min)[0], x0), x0, t_min, values)
    second = nats["total"] - nats["first"] - nats["reconstruction"] - nats["prior"]
    second = second if objective.order == 2 else np.zeros_like(second)
    got = {
        "loss_recon_without_second_division": nats["reconstruction"],
        "loss_recon": -np.asarray(divided),
        "loss_klz": np.asarray(prior_divergence(sde, x0, 1.0)),
        "loss_diff": nats["first"],
    }
    for name, value in got.items():
        size = np.abs(data[name]) + 1e-2 * np.abs(data[name]).max()
        # Where the noise at the start is far smaller than a bin, the reconstruction is below the rounding of logits.
        size, tolerance = (size + 1e-7 * d / 3e-4, 3e-4) if "recon" in name else (size, 1e-4)
        yield Result(name, float(np.max(np.abs(value - data[name]) / size)), tolerance)
    yield Result("loss_diff2", relative_error(second, data["loss_diff2"], floor=1e-2), 1e-2)
    total = (got["loss_recon"] + got["loss_klz"] + nats["first"] + second).mean() / (d * math.log(2))
    yield Result("total_bpd", relative_error(total, data["total_bpd"]), 1e-4)
    alpha = np.asarray(sde.alpha_sigma(noise.t)[0], np.float64)
    scale = sde.k * alpha**2 if parameterization == "velocity" else np.ones_like(alpha)
    weight = 0.5 * np.asarray(objective.times.likelihood_weight(sde, noise.t) * objective.times.total(sde)) * scale
    yield Result("weight", relative_error(weight, data["weight"]), 1e-4)
    if "second_trace" in losses:
        squared = np.sqrt(np.asarray(losses["second_trace"], np.float64)) * d / (np.sqrt(sde.k) * alpha)
        yield Result("residual", relative_error(squared, np.abs(data["residual"]), floor=1e-1), 1e-2)
