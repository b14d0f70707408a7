"""Checks of golden numbers of score_sde's models in discrete time: score functions, losses and samplers."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from configs.default import Config
from models.ladder import ladder_from_fields
from models.score import ScoreModel, score_model_from_config
from objectives.discrete import DiscreteNoise, DiscreteObjective
from samplers.predictor_corrector import CORRECTORS, PREDICTORS, Update
from sampling import PredictorCorrector, sampler_from_config
from sde_lib import SDE, SDES, VPSDE, chain_times
from tests.golden_common import Result, UnknownKind, golden_params, relative_error
from tests.golden_score_sde import score_sde_config

UPDATES = {name: update for name, update in (PREDICTORS | CORRECTORS).items() if update is not None}
RESULTS = ("x", "x_mean")
"""The results of one update, in its order."""


def check_score_fn(path: Path) -> Iterator[Result]:
    """Compares the score at each time, to 2e-4 of the example's largest value.

    The published standard deviations of VP are differences of nearly equal float32 numbers, off by up to 1e-4.
    """
    data = np.load(path)
    model = score_model_from_config(_config(data))
    score_fn = jax.jit(lambda params, x, t: model.score_fn(params)(x, t))
    scores = score_fn(golden_params(data), data["x"], data["t"])
    for t, got, want in zip(data["t"], scores, data["score"], strict=True):
        yield Result(f"score, t = {t:.7g}", relative_error(got, want, scale=float(np.abs(want).max())), 2e-4)


def check_discrete_losses(path: Path) -> Iterator[Result]:
    """Compares the mean loss of the batch and its gradient, at given levels and noise."""
    data = np.load(path)
    config = _config(data)
    model, levels = score_model_from_config(config), config.model.num_scales
    # SMLD numbers its levels from the largest noise, the chain from the smallest.
    index = data["labels"] if isinstance(model.sde, VPSDE) else levels - 1 - data["labels"]
    noise = DiscreteNoise(chain_times(levels)[index], jnp.asarray(data["z"]))
    objective = DiscreteObjective(levels, reduce_mean=bool(data["reduce_mean"]))

    # It runs once, so nearly all of the time is spent compiling.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def loss_and_gradient(params: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            return objective.losses(model.score_fn(params), model.sde, jnp.asarray(data["x"]), noise)["total"].mean()

        return jax.value_and_grad(loss)(params)

    value, gradient = loss_and_gradient(golden_params(data))
    yield Result("loss", relative_error(value, data["loss"]), 1e-4)
    yield Result("gradient norm", relative_error(optax.tree.norm(gradient), data["grad_norm"]), 1e-3)
    leaves: Any = flatten_dict(gradient, sep="/")
    for key in (key for key in data.files if key.startswith("grad/")):
        leaf = key.removeprefix("grad/")
        error = relative_error(leaves[leaf], data[key], scale=float(np.abs(data[key]).max()))
        yield Result(f"gradient of {leaf}", error, 1e-3)


def check_updates(path: Path) -> Iterator[Result]:
    """Compares one update of each predictor and corrector, ladders of noise levels, and tables of the DDPM chain."""
    data = np.load(path)
    for chain, fields in json.loads(str(data["config"])).items():
        yield from _check_chain(data, chain, fields)
    for key in data.files:
        if key.startswith("sigmas/"):
            ladder = ladder_from_fields(score_sde_config(key.removeprefix("sigmas/").replace(".", "/"), {}).model)
            sigmas = ladder.sigma(jnp.arange(len(data[key]), dtype=jnp.float32))
            yield Result(key, relative_error(sigmas, data[key]), 1e-5)
    if any(key.startswith("ddpm/") for key in data.files):
        yield from _check_tables(data)


def _check_chain(data: Any, chain: str, fields: dict[str, Any]) -> Iterator[Result]:
    """Compares the updates of one chain, to 1e-4 of the largest value."""
    sde, num_steps, snr = _sde(fields), int(fields["N"]), float(fields["snr"])
    x, t, score, noise = (jnp.asarray(data[f"{chain}/{name}"]) for name in ("x", "t", "score", "noise"))
    rules = {key.split("/")[1].removesuffix("_x_mean") for key in data.files if key.startswith(f"{chain}/")}
    for rule in sorted(rules & UPDATES.keys()):
        settings = {"snr": snr} if rule in CORRECTORS else {}
        got = UPDATES[rule](lambda x, t: score, sde, x, t, noise, num_steps, **settings)
        for result, value in zip(RESULTS, got, strict=True):
            want = data[f"{chain}/{rule}_{result}"]
            error = relative_error(value, want, scale=float(np.abs(want).max()))
            yield Result(f"{chain} {rule}, {result}", error, 1e-4)


def _check_tables(data: Any) -> Iterator[Result]:
    """Compares the DDPM chain of 1000 steps. Its published sigma is a difference of nearly equal float32 numbers."""
    sde, num_steps = VPSDE(), len(data["ddpm/discrete_betas"])
    times = chain_times(num_steps)
    alpha, sigma = sde.chain_alpha_sigma(times, num_steps)
    got = {
        "discrete_betas": (sde.chain_beta(times, num_steps), 1e-4),
        "alphas_cumprod": (alpha**2, 1e-4),
        "sqrt_alphas_cumprod": (alpha, 1e-4),
        "sqrt_1m_alphas_cumprod": (sigma, 2e-4),
    }
    for name, (value, tolerance) in got.items():
        yield Result(f"ddpm/{name}", relative_error(value, data[f"ddpm/{name}"]), tolerance)


def check_sampler_chain(path: Path) -> Iterator[Result]:
    """Compares a whole run of the predictor-corrector sampler with given noise, to 1e-3 of the largest value.

    Where there is no predictor, the published sample keeps the noise of the last corrector.
    """
    data = np.load(path)
    config = _config(data)
    config.sampling.smallest_time = float(data["eps"])
    model = score_model_from_config(config)
    sampler: Any = sampler_from_config(config, model.sde, None)
    x, x_mean = _run(sampler, model, golden_params(data), data["prior_noise"], data["noise"])
    sample = x_mean if sampler.noise_removal and sampler.predictor != "none" else x
    sample = (sample + 1) / 2 if config.data.centered else sample
    want = data["sample"]
    yield Result("sample", relative_error(sample, want, scale=float(np.abs(want).max())), 1e-3)


def _run(sampler: PredictorCorrector, model: ScoreModel, params: Any, prior: np.ndarray, noise: np.ndarray) -> Update:
    """Runs all steps. `noise` has the shape [steps, draws, batch, ...]: corrector steps, then the predictor."""
    draws = jnp.asarray(noise)

    def step(state: Update, i: Any) -> tuple[Update, None]:
        # Number 0, the predictor's draw, is the last one in the file.
        return sampler.step(model.score_fn(params), state, i, lambda number: draws[i, number - 1]), None

    @jax.jit
    def run(params: Any, x: Any) -> Update:
        return jax.lax.scan(step, (x, x), jnp.arange(sampler.num_steps))[0]

    return run(params, model.sde.prior_sigma * jnp.asarray(prior))


def _config(data: Any) -> Config:
    description = json.loads(str(data["config"]))
    return score_sde_config(description["base"].replace(".", "/"), description["overrides"])


def _sde(fields: dict[str, Any]) -> SDE:
    if fields["sde"] not in SDES:
        raise UnknownKind(f"unknown SDE {fields['sde']!r}; known: {', '.join(SDES)}")
    constants = {name: float(value) for name, value in fields.items() if name not in ("sde", "N", "snr")}
    return SDES[fields["sde"]](**constants)
