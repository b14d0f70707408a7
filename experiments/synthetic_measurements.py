"""Measurements of a score function on points of a known density, for experiments/reproduce.py."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.entropy import FORMS, draw_entropy_noise, entropy
from analysis.ode_score import likelihood_by_start
from analysis.score_distances import TimeNodes, curve_of, distance_curves, error_sources, order_errors, time_nodes
from analysis.sde_density import sde_divergence
from arrays import ScoreFn, as_pytree
from build import Run
from evaluators.points import grid_points
from experiments.synthetic import (
    ENTROPY_POINTS,
    LOSS_POINTS,
    NUM_TIMES,
    POINTS_AT_TIME,
    SDE_CELLS,
    SDE_STEPS,
    SOURCE_POINTS,
    START_TOLERANCE,
    STARTING_POINTS,
    STARTS,
    TOLERANCE,
    Problem,
)
from likelihood import GaussianReference, ode_log_likelihood
from losses import Objective
from sources.densities import Density
from sources.marginals import Marginals, marginals_of, sample_at


def density_of(run: Run) -> Density:
    """Returns the density of the data, which is known for points."""
    assert run.density is not None
    return run.density


def data_score(run: Run) -> ScoreFn:
    """Returns the score of the data at every time, as a pytree."""
    return as_pytree(partial(_marginals(run).score, run.sde))


def _marginals(run: Run) -> Marginals:
    marginals = marginals_of(density_of(run))
    assert marginals is not None
    return marginals


def t_min_of(run: Run) -> float:
    return run.config.training.smallest_time


def distances_of(run: Run, score_fn: ScoreFn) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the integrals over time of distances and errors of the orders with standard errors, and all curves."""
    density, sde, exact = density_of(run), run.sde, data_score(run)
    nodes = time_nodes(sde, t_min_of(run), NUM_TIMES)

    def sampler(t: jax.Array) -> jax.Array:
        return sample_at(density, sde, jax.random.key(1), t)

    curves = distance_curves(
        score_fn, sde, sampler, nodes, POINTS_AT_TIME, data_score=exact, rtol=TOLERANCE, atol=TOLERANCE
    )
    returned = curves.pop("returned")
    t = jnp.asarray(np.repeat(nodes.t, POINTS_AT_TIME), jnp.float32)
    orders = order_errors(as_pytree(score_fn), exact, sampler(t), t, sde=sde)
    curves |= {name: _curve(nodes, value) for name, value in orders._asdict().items()}
    integrals = {name: curve.integral._asdict() for name, curve in curves.items()}
    arrays = {f"{name}_{part}": getattr(curve, part) for name, curve in curves.items() for part in ("mean", "se")}
    integrals["returned"] = {"mean": float(np.max(returned.mean)), "largest": returned.largest}
    return integrals | _sources_of(run, score_fn, nodes), arrays | {"nodes_t": nodes.t, "nodes_weight": nodes.weight}


def _curve(nodes: TimeNodes, values: jax.Array) -> Any:
    return curve_of(nodes, np.asarray(values, np.float64).reshape(len(nodes.t), -1))


def _sources_of(run: Run, score_fn: ScoreFn, nodes: TimeNodes) -> dict[str, Any]:
    """Returns integrals over ln(sigma / alpha) of the mean sizes of the sources of the ODE's error."""
    sde = run.sde
    t = jnp.asarray(np.repeat(nodes.t, SOURCE_POINTS), jnp.float32)
    x = sample_at(density_of(run), sde, jax.random.key(2), t)
    sources = error_sources(score_fn, data_score(run), sde, x, t, rtol=TOLERANCE, atol=TOLERANCE)
    rate = np.asarray(0.5 * (sde.diffusion(t) / sde.alpha_sigma(t)[1]) ** 2, np.float64)  # d ln(sigma / alpha) / dt
    return {
        f"source_{name}": _curve(nodes, jnp.asarray(rate * np.asarray(value))).integral._asdict()
        for name, value in sources._asdict().items()
    }


def entropies_of(run: Run, score_fn: ScoreFn) -> dict[str, Any]:
    """Returns the entropy of the data at t_min in nats, from the model's score, for each form of the estimate."""
    density, t_min = density_of(run), t_min_of(run)
    x0 = density.sample(jax.random.key(2), (ENTROPY_POINTS, density.dims))
    noise = draw_entropy_noise(jax.random.key(3), run.sde, x0.shape, t_min=t_min)
    return {
        f"entropy_{form}": entropy(score_fn, run.sde, x0, noise, t_min=t_min, form=form)._asdict() for form in FORMS
    }


def sde_of(run: Run, score_fn: ScoreFn) -> dict[str, Any]:
    """Returns the KL divergence of the SDE model and the gap of its bound, in nats, for data in one dimension."""
    density = density_of(run)
    if density.dims > 1:
        return {}
    variance = float(jnp.var(density.sample(jax.random.key(8), (100_000, 1))))
    size = {"num_steps": SDE_STEPS, "num_cells": SDE_CELLS}
    return {"sde": sde_divergence(score_fn, run.sde, _marginals(run), variance, t_min=t_min_of(run), **size)._asdict()}


def loss_variances(run: Run, score_fn: ScoreFn) -> dict[str, Any]:
    """Returns the mean and the variance over examples of the likelihood-weighted loss, for both ways to draw times.

    Both have the same mean up to a constant factor, so the losses are divided by their means ([S21b] Fig. 2).
    """
    density = density_of(run)
    x0 = density.sample(jax.random.key(4), (LOSS_POINTS, density.dims))
    variances = {}
    for name, importance in (("uniform", False), ("importance", True)):
        weighting = Objective(t_min=t_min_of(run), likelihood_weighting=True, importance_weighting=importance)
        noise = weighting.draw_noise(jax.random.key(5), run.sde, x0.shape)
        loss = weighting.losses(score_fn, run.sde, x0, noise)["total"]
        values = np.asarray(loss, np.float64)
        variances[name] = float(values.var(ddof=1) / values.mean() ** 2)
    return {"loss_variance": variances}


def density_on_grid(run: Run, score_fn: ScoreFn, problem: Problem) -> np.ndarray:
    """Returns the density of the ODE at the points of the grid."""
    dims = density_of(run).dims
    x = jnp.asarray(grid_points(problem.limit, problem.grid, dims))
    result = ode_log_likelihood(
        score_fn,
        run.sde,
        x,
        None,
        t_min=t_min_of(run),
        method="rk4_log",
        num_steps=50,
        reference=GaussianReference(0.0, 0.6 if dims == 1 else 2.3),
    )
    result.info.require_success()
    return np.exp(np.asarray(result.logp, np.float64))


def excess_by_start(run: Run, score_fn: ScoreFn) -> np.ndarray:
    """Returns ln q - ln p of points against the start time of the solve ([L22] Fig. 6)."""
    density = density_of(run)
    assert density.log_density_of_data is not None
    x = density.sample(jax.random.key(9), (STARTING_POINTS, density.dims))
    logp, info = likelihood_by_start(score_fn, run.sde, x, STARTS, rtol=START_TOLERANCE, atol=START_TOLERANCE)
    info.require_success()
    return np.asarray(density.log_density_of_data(x), np.float64) - np.asarray(logp, np.float64)
