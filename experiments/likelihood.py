"""Prints evaluations, time and error of each solver of the likelihood's ODE, compared with a float64 solve at 1e-7.

All solvers use the same images, dequantization and probes, in float32. Errors are in bits/dim: the mean absolute error
over images, the error of the mean (bias), and the solver's own estimates of both. The times exclude compilation. The
last column is the change of the first image's result, in bits/dim, if noise replaces the other images of its batch.

    python -m experiments.likelihood --config=configs/digits/ncsnpp.py --workdir=runs/order1
    python -m experiments.likelihood --golden=tests/golden/likelihood_vpsde.npz
"""

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array
from ml_collections import config_flags

from arrays import Batch, num_dims
from build import EVAL_KEY, build
from datasets import preprocess_from_config, source_from_config
from infra.console import one_line_errors, text_table
from likelihood import GaussianReference, LogLikelihood, Probes, draw_probes, ode_log_likelihood
from models.score import NetworkScore, score_model_from_config
from tests.golden_common import golden_config, golden_params

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A run; its newest checkpoint is used.")
_GOLDEN = flags.DEFINE_string("golden", None, "A golden likelihood_*.npz file, in place of a run.")
_IMAGES = flags.DEFINE_integer("images", 32, "Number of test images of the run.", lower_bound=2)

ADAPTIVE = [("scipy", 1e-3), ("scipy", 1e-4), ("scipy", 1e-5), ("dopri5", 1e-5), ("dopri5_log", 1e-5)]
FIXED = [("rk4_log", n) for n in (12, 25, 50)] + [("adams_log", n) for n in (32, 48, 64, 82, 98, 106, 126, 198)]


class Problem(NamedTuple):
    score_fn: NetworkScore
    x: Batch
    probes: Probes
    t_min: float
    reference: GaussianReference


def main(argv: list[str]) -> None:
    del argv
    if not _GOLDEN.value and not (_CONFIG.value and _WORKDIR.value):
        raise app.UsageError("No model is given: set --config and --workdir, or --golden")
    problem = golden_problem(Path(_GOLDEN.value)) if _GOLDEN.value else problem_of_run(Path(str(_WORKDIR.value)))
    truth = converged(problem)
    cases = [(method, f"{tol:.0e}", {"rtol": tol, "atol": tol}) for method, tol in ADAPTIVE]
    cases += [(method, f"{n} steps", {"num_steps": n}) for method, n in FIXED]
    rows = []
    for method, setting, solve in cases:
        rows.append((method, setting, *measured(problem, truth, method=method, **solve)))
        print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{len(problem.x)} images, {jax.devices()[0].device_kind}, bits/dim {-np.mean(truth):.4f} up to a constant")
    errors = ("mean |error|", "bias", "|estimate|", "estimated bias", "effect of batch")
    headers = ("method", "setting", "NFE", "seconds", *errors)
    print(text_table(headers, rows))


def problem_of_run(workdir: Path) -> Problem:
    run = build(_CONFIG.value)
    score_fn = run.score_fn(run.load_state(workdir).ema_params)
    preprocess = preprocess_from_config(run.config, train=False)
    data_key, probe_key, train_key = jax.random.split(run.key(EVAL_KEY), 3)
    images, train = (source_from_config(run.config, split) for split in ("test", "train"))
    x = preprocess(data_key, jnp.asarray(images.images(np.arange(_IMAGES.value))))
    probes = draw_probes(probe_key, "rademacher", x.shape)
    assert probes is not None
    seen = preprocess(train_key, jnp.asarray(train.images(np.arange(min(len(train), 10_000)))))
    reference = GaussianReference(np.asarray(seen.mean(0)), np.asarray(seen.std(0)))
    return Problem(score_fn, x, probes, run.config.training.smallest_time, reference)


def golden_problem(path: Path) -> Problem:
    data = np.load(path)
    config = golden_config(data)
    params = jax.tree.map(jnp.asarray, golden_params(data))
    score_fn = score_model_from_config(config).score_fn(params)
    x = jnp.asarray(data["x"])
    reference = GaussianReference(float(x.mean()), float(x.std()))
    return Problem(score_fn, x, jnp.asarray(data["hutchinson"])[None], float(data["smallest_time"]), reference)


def converged(problem: Problem) -> np.ndarray:
    """Returns log2 p of each image per dimension, from a float64 solve at tolerance 1e-7."""
    with jax.enable_x64(True):
        precise: Problem = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), problem)
        precise = precise._replace(t_min=problem.t_min)
        return per_dim(solve(precise, method="dopri5_log", rtol=1e-7, atol=1e-7).logp, problem.x)


def measured(problem: Problem, truth: np.ndarray, **settings: Any) -> tuple[str, ...]:
    solve(problem, **settings)
    started = time.monotonic()
    result = solve(problem, **settings)
    seconds = time.monotonic() - started
    error = truth - per_dim(result.logp, problem.x)
    estimate = -per_dim(result.solver_error, problem.x)
    replaced = solve(with_noise_images(problem), **settings)
    change = per_dim(replaced.logp, problem.x)[0] - per_dim(result.logp, problem.x)[0]
    values = (np.abs(error).mean(), error.mean(), np.abs(estimate).mean(), estimate.mean(), abs(change))
    return str(int(result.info.nfe)), f"{seconds:.2f}", *(f"{value:.1e}" for value in values)


def with_noise_images(problem: Problem) -> Problem:
    """Returns the problem with noise in place of all images but the first."""
    noise = jax.random.uniform(jax.random.key(0), problem.x[1:].shape, problem.x.dtype)
    return problem._replace(x=problem.x.at[1:].set(noise))


def solve(problem: Problem, **settings: Any) -> LogLikelihood:
    score_fn, x, probes, t_min, reference = problem
    result = ode_log_likelihood(score_fn, score_fn.model.sde, x, probes, t_min=t_min, reference=reference, **settings)
    jax.block_until_ready(result.info).require_success()
    return result


def per_dim(nats: Array, x: Batch) -> np.ndarray:
    return np.asarray(nats, np.float64) / (num_dims(x) * math.log(2))


if __name__ == "__main__":
    with one_line_errors():
        app.run(main)
