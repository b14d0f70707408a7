"""Computes the likelihood of points under a probability-flow ODE, and compares it with the density in closed form.

    python -m examples.mixture_likelihood --out=.

A diffusion carries the data's density q_0 to a Gaussian, and its probability-flow ODE has the same density q_t at all
times. So the ODE carries a point x to noise x_T, and ln q(x) is the log-density of x_T under the Gaussian plus the
integral of the ODE's divergence along the path. A model replaces the score, grad ln q_t, by a network. Here q_0 is a
mixture of three Gaussians, so its score is known in closed form at all times, and so is the result.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from likelihood import ode_log_likelihood
from sde_lib import VPSDE
from sources.densities import GaussianMixture

T_MIN = 1e-5
"""The ODE starts here; the noise in x is still small, with a standard deviation of 0.001."""

DATA = GaussianMixture(
    weights=np.array([0.5, 0.3, 0.2]),
    means=np.array([[-0.6], [0.2], [1.2]]),  # The mean of the mixture is 0, like the mean of the Gaussian at t = 1.
    covariances=np.array([0.2, 0.1, 0.3]).reshape(3, 1, 1) ** 2,
)


def main(out: Path, num_points: int = 400) -> float:
    """Draws the two densities over one another, and returns the largest difference of their logarithms, in nats."""
    sde = VPSDE()
    x = jnp.linspace(-1.8, 2.4, num_points)[:, None]

    # A score function maps points [batch, d] and times [batch] to scores [batch, d]. A network may compute it, too.
    score_fn = DATA.score_fn(sde)

    # No probes: the divergence is exact, from d derivatives of the score. With probes, it would be estimated.
    result = ode_log_likelihood(score_fn, sde, x, None, t_min=T_MIN, rtol=1e-6, atol=1e-6)
    result.info.require_success()

    # The solve uses the points as x at T_MIN, so they are compared with the density at that time.
    exact = DATA.log_density(sde, x, jnp.full(num_points, T_MIN))
    error = float(jnp.max(jnp.abs(result.logp - exact)))

    out.mkdir(parents=True, exist_ok=True)
    path = out / "mixture_likelihood.png"
    densities_figure(np.asarray(x[:, 0]), np.exp(exact), np.exp(result.logp)).savefig(path, dpi=150)
    print(f"largest error of the log-likelihood: {error:.1e} nats; evaluations of the score: {int(result.info.nfe)}")
    print(f"densities: {path}")
    return error


def densities_figure(x: np.ndarray, exact: np.ndarray, ode: np.ndarray) -> Figure:
    """Draws the ODE's density and the density in closed form over one another."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, exact, color="#30363d", alpha=0.18, linewidth=0, label="closed form")
    axes.plot(x, ode, color="#2563a8", linewidth=1.4, label="probability-flow ODE")
    axes.set_title("Density of a Gaussian mixture", loc="left")
    axes.set_xlabel("x")
    axes.set_ylabel("density (per unit of x)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: this one)")
    parser.add_argument("--num_points", type=int, default=400, help="points on the x axis (default: %(default)s)")
    main(**vars(parser.parse_args()))
