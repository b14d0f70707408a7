"""The density of the SDE model in one dimension, by the Fokker-Planck equation of the reverse SDE.

The reverse SDE dx = (f x - g^2 s) dt + g dw carries the prior at T back to a density p_t. With e = s - grad ln q_t,

    KL(q_min || p_min) = KL(q_T || prior) + integral of g^2 / 2 (E|e|^2 - E|s - grad ln p_t|^2) dt,

so first-order score matching (l_SM) bounds the KL of the SDE, and the last term is the gap of that bound ([L22]
App. C).

In the variables y = x / S, S^2 = alpha^2 variance + sigma^2, and v = -ln(sigma / alpha), all terms are of order one:

    dp/dv = sigma^2 / S^2 d/dy ( -(2 S s + y) p + dp/dy ).

Fluxes are exponentially fitted (Scharfetter and Gummel, 1969), which conserves mass, and steps are Crank-Nicolson's.

Sources: [L22] Lu et al., ICML 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_banded

from arrays import ScoreFn, as_pytree
from sde_lib import SDE
from sources.marginals import Marginals

Grid = Float[np.ndarray, " cells"]


class SDEDivergence(NamedTuple):
    """The KL divergence of the SDE model from the data, in nats, and the parts of its bound."""

    kl: float
    """KL(q_min || p_min)."""
    end: float
    """KL(q_T || prior)."""
    score_matching: float
    """The integral of g^2 / 2 E|e|^2."""
    gap: float
    """The integral of g^2 / 2 E|s - grad ln p_t|^2."""


def sde_divergence(
    score_fn: ScoreFn,
    sde: SDE,
    density: Marginals,
    variance: float,
    *,
    t_min: float,
    num_steps: int = 1000,
    num_cells: int = 4000,
    limit: float = 7.0,
) -> SDEDivergence:
    """Computes the KL divergence of the SDE model from data in one dimension, and the gap of its bound.

    Args:
        variance: of the data. x = +-limit S are the ends of the grid.
        num_steps: steps of equal length in ln(sigma / alpha).
    """
    edges = np.linspace(-limit, limit, num_cells + 1)
    y, dy = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
    first, last = (float(sde.log_noise_level(jnp.asarray(t))) for t in (sde.t_max, t_min))
    log_rho, step = np.linspace(first, last, num_steps + 1), (last - first) / num_steps
    t = np.asarray(sde.time_of_log_noise_level(jnp.asarray(log_rho)), np.float64)
    alpha, sigma = (np.asarray(a, np.float64) for a in sde.alpha_sigma(jnp.asarray(t)))
    scale = np.sqrt(alpha**2 * variance + sigma**2)
    fields = _Fields(score_fn, sde, density, y, edges)
    p = np.exp(-0.5 * (y * scale[0] / sde.prior_sigma) ** 2) * scale[0] / (np.sqrt(2 * np.pi) * sde.prior_sigma)
    log_q, q_score, s = fields.at(t[0], scale[0])
    end = _relative_entropy(log_q, p, dy)
    integrals = np.zeros(2)
    for number in range(num_steps + 1):
        log_q, q_score, s = fields.at(t[number], scale[number])
        bands = -step * (sigma[number] / scale[number]) ** 2 * fields.generator(t[number], scale[number], dy)
        if number > 0:  # each step is half explicit, at its start, and half implicit, at its end
            p = _implicit_half(bands, p)
        q = np.exp(log_q) * dy
        errors = np.array([q @ (s - q_score) ** 2, q @ (s - scale_gradient(p, dy) / scale[number]) ** 2])
        weight = 0.5 if number in (0, num_steps) else 1.0
        integrals += -step * weight * sigma[number] ** 2 * errors
        if number < num_steps:
            p = _explicit_half(bands, p)
    return SDEDivergence(_relative_entropy(log_q, p, dy), end, *map(float, integrals))


def scale_gradient(p: Grid, dy: float) -> Grid:
    """Returns d ln p / dy."""
    return np.gradient(np.log(np.maximum(p, SMALLEST)), dy)


SMALLEST = 1e-200
"""Smaller densities are replaced by this number before their logarithm is taken."""


def _relative_entropy(log_q: Grid, p: Grid, dy: float) -> float:
    q = np.exp(log_q)
    return float(dy * np.sum(q * (log_q - np.log(np.maximum(p, SMALLEST)))))


class _Fields:
    """The data's density and score and the model's score on the grid, in the coordinates x of a time."""

    def __init__(self, score_fn: ScoreFn, sde: SDE, density: Marginals, y: Grid, edges: Float[np.ndarray, " edges"]):
        self._y, self._edges, self._model = y, edges, as_pytree(score_fn)
        self._score = jax.jit(lambda score_fn, x, t: score_fn(x, t))
        self._data = jax.jit(lambda x, t: (density.log_density(sde, x, t), density.score(sde, x, t)))

    def at(self, t: float, scale: float) -> tuple[Grid, Grid, Grid]:
        """Returns three values at the centres of the cells: the log-density of y, the data's score and the model's."""
        x, times = self._points(self._y, t, scale)
        log_q, q_score = (np.asarray(a, np.float64) for a in self._data(x, times))
        return log_q + np.log(scale), q_score[:, 0], self._model_score(x, times)

    def generator(self, t: float, scale: float, dy: float) -> Float[np.ndarray, "3 cells"]:
        """Returns the bands of d/dy (-(2 S s + y) p + dp/dy), with no flux through the ends."""
        edges = self._edges[1:-1]
        drift = dy * (2 * scale * self._model_score(*self._points(edges, t, scale)) + edges)
        right, left = _bernoulli(-drift) / dy**2, _bernoulli(drift) / dy**2  # from the left cell, and from the right
        bands = np.zeros((3, len(self._y)))
        bands[0, 1:], bands[2, :-1] = left, right
        bands[1, :-1] -= right
        bands[1, 1:] -= left
        return bands

    def _points(self, y: Grid, t: float, scale: float) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(y[:, None] * scale, jnp.float32), jnp.full(len(y), t, jnp.float32)

    def _model_score(self, x: jax.Array, times: jax.Array) -> Grid:
        return np.asarray(self._score(self._model, x, times), np.float64)[:, 0]


def _bernoulli(z: Grid) -> Grid:
    """z / (exp(z) - 1)."""
    small = np.abs(z) < 1e-6
    safe = np.where(small, 1.0, np.clip(z, -700, 700))
    return np.where(small, 1 - z / 2, safe / np.expm1(safe))


def _explicit_half(bands: Float[np.ndarray, "3 cells"], p: Grid) -> Grid:
    change = bands[1] * p
    change[:-1] += bands[0, 1:] * p[1:]
    change[1:] += bands[2, :-1] * p[:-1]
    return p + 0.5 * change


def _implicit_half(bands: Float[np.ndarray, "3 cells"], p: Grid) -> Grid:
    matrix = -0.5 * bands
    matrix[1] += 1
    return np.maximum(solve_banded((1, 1), matrix, p), 0)
