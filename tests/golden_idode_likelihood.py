"""Check of golden likelihood_idode_*.npz files: bits/dim of i-DODE [Z23] with three kinds of noise."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrays import level_values, num_dims
from dequantization.noise import (
    Dequantized,
    NormalDequantizer,
    TruncatedNormalDequantizer,
    dequantizer_from_config,
    log_mean_exp,
)
from derivatives import probe_divergence
from evaluators.bits_per_dim import importance_weighted
from likelihood import LogLikelihood, bits_per_dim, ode_log_likelihood
from models.score import NetworkScore, score_model_from_config
from tests.golden_common import Result, golden_params, relative_error
from tests.golden_idode import Conditioned, golden_idode_config


def check_idode_likelihood(path: Path) -> Iterator[Result]:
    """Compares bits/dim of five draws of the noise, their importance-weighted mean, and the terms.

    The released code reports numbers that differ from the bound in known ways. Our numbers are changed in the same way.
    """
    data = np.load(path)
    images, draws = np.concatenate([data["images"]] * len(data["draws"])), data["draws"]
    config = golden_idode_config(data, images)
    model = score_model_from_config(config)
    if abs(data["gamma_start"] - config.model.gamma_min) > 1e-3:  # uniform noise, whatever gamma_min is
        config.eval.start_time = float(model.sde.time_of_log_noise_level(jnp.asarray(0.5 * data["gamma_start"])))
    config.eval.truncation = 1e3  # The released code starts at gamma_min for every tau.
    network = Conditioned(model.network, np.concatenate([data["conditioning"]] * len(draws)))
    score_fn = dataclasses.replace(model, network=network).score_fn(golden_params(data))
    dequantizer = dequantizer_from_config(config, model.sde)
    noisy = dequantizer.with_noise(jnp.asarray(draws).reshape(-1, *draws.shape[2:]), jnp.asarray(images, jnp.int32))
    probes = jnp.asarray(np.concatenate([data["hutchinson"]] * len(draws)))
    result = ode_log_likelihood(
        score_fn, model.sde, noisy.x, probes[None], t_min=dequantizer.t_min, method="dopri5", rtol=3e-6, atol=3e-6
    )
    result.info.require_success()
    yield from _constants(dequantizer, data, noisy, num_dims(noisy.x))
    yield from _bits(dequantizer, data, noisy, result, num_dims(noisy.x))
    yield from _point(score_fn, data, Conditioned(model.network, data["conditioning"]))


def _constants(dequantizer: Any, data: Any, noisy: Dequantized, d: int) -> Iterator[Result]:
    """Compares the noise: its width, ln q of each draw as a density of x, and the expectation of ln q."""
    if "log_q_of_draws" not in data:
        return
    log_q = np.asarray(noisy.log_q) + d * math.log(dequantizer.bins_per_unit * dequantizer.unit_scale)
    if isinstance(dequantizer, TruncatedNormalDequantizer):
        mass, tau = math.erf(dequantizer.tau / math.sqrt(2)), dequantizer.tau
        yield Result("tau", relative_error(tau, data["tau"]), 1e-5)
        yield Result("truncated_mass", relative_error(mass, data["truncated_mass"]), 1e-5)
        # x has the width alpha / (2 tau) of bins per unit of the noise
        log_sigma = -math.log(2 * tau * dequantizer.bins_per_unit * dequantizer.unit_scale)
        square = 1 - 2 * tau * math.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi) / mass
    else:
        log_sigma = float(jnp.log(dequantizer.sde.alpha_sigma(jnp.float32(dequantizer.t_min))[1]))
        mass, square = 1.0, 1.0
        logp = _decoded(dequantizer, data, noisy)
        log_q += np.ravel(logp)
        want = data["log_p_image_given_draw_without_second_division"]
        yield Result("log_p_image_given_draw", relative_error(logp, want, floor=1e-2), 1e-3)
    expectation = -d * (log_sigma + 0.5 * math.log(2 * math.pi) + math.log(mass) + 0.5 * square)
    yield Result("log_q_expectation", relative_error(expectation, data["log_q_expectation"]), 1e-5)
    yield Result("log_q_of_draws", relative_error(log_q, np.ravel(data["log_q_of_draws"])), 1e-5)


def _decoded(dequantizer: NormalDequantizer, data: Any, noisy: Dequantized, again: bool = False) -> np.ndarray:
    """Returns ln P(image | x) of each draw and image. again: divides x by alpha twice, as the released code does."""
    values = jnp.asarray(level_values(dequantizer.levels, dequantizer.centered, dequantizer.bare_levels))
    x0 = values[jnp.asarray(np.concatenate([data["images"]] * len(data["draws"])), jnp.int32)]
    t = jnp.full(len(x0), dequantizer.t_min)
    alpha = dequantizer.sde.alpha_sigma(t[0])[0] if again else 1.0
    return np.asarray(dequantizer.sde.level_logp(noisy.x / alpha, x0, t, values)).reshape(len(data["draws"]), -1)


def _bits(dequantizer: Any, data: Any, noisy: Dequantized, result: LogLikelihood, d: int) -> Iterator[Result]:
    """Compares bits/dim. The published value for one draw is the mean over five, with the expectation of ln q."""
    tolerance, shape = 5e-3, data["draws"].shape[:2]
    nats = d * math.log(2)
    constants = {"levels": dequantizer.bins_per_unit, "unit_scale": dequantizer.unit_scale}
    bits = bits_per_dim(result.terms | {"dequantization": noisy.log_q}, num_dims=d, **constants)["bpd"]
    released = np.asarray(bits, np.float64).reshape(shape)
    if isinstance(dequantizer, NormalDequantizer):
        released += (_decoded(dequantizer, data, noisy) - _decoded(dequantizer, data, noisy, again=True)) / nats
    expected = released
    if "log_q_of_draws" in data:
        expected = released + (data["log_q_expectation"] - data["log_q_of_draws"]) / nats
    yield Result("bpd", float(np.abs(expected.mean(axis=0) - data["bpd_tol1e-7"]).max()), tolerance)
    yield Result("bpd_per_draw", float(np.abs(expected - data["bpd_per_draw"]).max()), 2 * tolerance)
    change = np.asarray(result.divergence, np.float64).reshape(shape) - data["delta_logp_tol1e-7"]
    yield Result("delta_logp_tol1e-7, in bits/dim", float(np.abs(change).max()) / nats, tolerance)
    for name in (key for key in data.files if re.fullmatch(r"bpd_k\d+_with_mean", key)):
        k = int(name.removeprefix("bpd_k").removesuffix("_with_mean"))
        mean = -log_mean_exp(-released[:k] * nats) / nats
        yield Result(name, float(np.abs(mean - data[name]).max()), tolerance)
        sums, as_released = mean - math.log(k) / nats, f"bpd_k{k}_as_released"
        yield Result(as_released, float(np.abs(sums - data[as_released]).max()), tolerance)
        terms = {"all": np.asarray(-result.logp + noisy.log_q, np.float64).reshape(shape)}
        draws = [({"all": terms["all"][draw]}, {}) for draw in range(k)]
        ours = importance_weighted(draws, num_dims=d, **constants)["bpd"]
        if not isinstance(dequantizer, NormalDequantizer):
            yield Result(f"bpd of {k} draws, ours", float(np.abs(ours - data[name]).max()), tolerance)


def _point(score_fn: NetworkScore, data: Any, network: Conditioned) -> Iterator[Result]:
    """Compares dx/dgamma and its divergence along the probe at given points, to 1e-3 of each image's largest."""
    score_fn = dataclasses.replace(score_fn.model, network=network).score_fn(score_fn.params)
    sde: Any = score_fn.model.sde
    t = sde.time_of_log_noise_level(0.5 * jnp.asarray(data["point_gamma"]))
    x, probe = jnp.asarray(data["point_x"]), jnp.asarray(data["hutchinson"])

    @jax.jit
    def at_point(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
        return probe_divergence(lambda x: sde.probability_flow(score_fn, x, t), x, probe)

    for name, value in zip(("point_drift", "point_divergence"), at_point(x, probe), strict=True):
        for image, (got, want) in enumerate(zip(value / sde.gamma_range, data[name], strict=True)):
            yield Result(f"{name}, image {image}", relative_error(got, want, scale=float(np.abs(want).max())), 1e-3)
