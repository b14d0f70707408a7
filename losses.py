"""Denoising score matching of first, second and third order.

Noise: x_t = alpha x_0 + sigma z, z ~ N(0, I). At the optimum of the first order, sigma s(x_t, t) = -E[z | x_t]; the
higher orders match the Jacobian J of the score and the gradient of its trace in the same way, from u = z + sigma s,
the noise that the score leaves unexplained ([L22] Theorems 4.1 and 4.3). There, a bar marks what is held constant:
lower orders serve the higher ones as given, without receiving their gradients.

All losses are per example, pure, and take their noise as an argument. One function, `score_matching_losses`, weights
and adds them.

Sources: [L22] Lu et al., ICML 2022; [S21b] Song et al., NeurIPS 2021.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, inner, mean_square, num_dims, per_example
from derivatives import PROBES, Field, exact_jacobian, exact_trace_gradient, probe_trace_gradient
from sde_lib import SDE

ORDERS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised over t in [t_min, 1].

    With `exact`, the higher orders are exact, for few dimensions, else estimated by probes. The exact second order is
    that of the Jacobian alone, which in one dimension is that of the trace.

    Raises:
        ValueError: for an order other than 1, 2, 3; for orders 2 and 3 without `reduce_mean`; for importance
            weighting without likelihood weighting, which it is an estimator of.
    """

    order: int = 1
    t_min: float = 1e-5
    likelihood_weighting: bool = False
    importance_weighting: bool = False
    reduce_mean: bool = True
    second_weight: float = 1.0
    third_weight: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"training.score_matching_order is {self.order}; it must be 1, 2 or 3")
        if self.order > 1 and not self.reduce_mean:
            raise ValueError("training.reduce_mean is False; orders 2 and 3 are means over dimensions: set it to True")
        if self.importance_weighting and not self.likelihood_weighting:
            raise ValueError("training.importance_weighting needs training.likelihood_weighting=True")
        if not 0 < self.t_min < SDE.t_max:
            raise ValueError(f"training.smallest_time is {self.t_min}; it must lie in (0, {SDE.t_max})")


class Noise(NamedTuple):
    """The randomness of one evaluation of the losses."""

    t: PerExample
    z: Batch
    probe: Batch


class Losses(NamedTuple):
    """The total and its parts, unweighted, each [batch]; None stands for a term that the objective does not have.

    An exact `second_frob` is what that of a probe estimates; an exact `third` is a mean over dimensions, see
    `exact_terms`.
    """

    total: PerExample
    first: PerExample
    second_frob: PerExample | None = None
    second_trace: PerExample | None = None
    third: PerExample | None = None

    def named(self) -> dict[str, PerExample]:
        """The terms that are there, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def draw_noise(key: Array, sde: SDE, objective: Objective, shape: tuple[int, ...]) -> Noise:
    """Times, noise and Rademacher probes for a batch of the given shape."""
    t_key, z_key, probe_key = jax.random.split(key, 3)
    return Noise(
        t=draw_times(t_key, sde, objective, shape[0]),
        z=jax.random.normal(z_key, shape),
        probe=PROBES["rademacher"](probe_key, shape),
    )


def draw_times(key: Array, sde: SDE, objective: Objective, batch: int) -> PerExample:
    """t uniform on [t_min, 1], or with density proportional to g^2 / sigma^2 ([S21b] Sec. 5.1)."""
    uniform = jax.random.uniform(key, (batch,))
    if objective.importance_weighting:
        total = sde.importance_weight(jnp.asarray(sde.t_max), objective.t_min)
        return sde.time_of_quantile(uniform * total, objective.t_min)
    return objective.t_min + uniform * (sde.t_max - objective.t_min)


def score_matching_losses(score_fn: ScoreFn, sde: SDE, objective: Objective, x0: Batch, noise: Noise) -> Losses:
    """The objective and its terms; order k costs one network pass with k derivatives, if estimated by a probe.

    Estimated: total = first + second_weight (second_frob + second_trace) + third_weight third
    Exact:     total = first + second_weight second_frob + third_weight third
    """
    mean, sigma = sde.marginal(x0, noise.t)
    sigma = per_example(sigma, x0)
    xt = mean + sigma * noise.z

    def scaled_score(x: Batch) -> Batch:
        return sigma * score_fn(x, noise.t)

    if objective.order == 1:
        first = first_order(scaled_score(xt), sde, objective, noise)
        return Losses(total=first, first=first)
    if objective.exact:
        return _exact_losses(scaled_score, xt, sigma, sde, objective, noise)
    return _probe_losses(scaled_score, xt, sigma, sde, objective, noise)


def _probe_losses(scaled_score: Field, xt: Batch, sigma: Batch, sde: SDE, objective: Objective, noise: Noise) -> Losses:
    """Orders 2 and 3 with Hutchinson estimates ([L22] App. G)."""
    if objective.order == 2:
        score, jacobian_probe = jax.jvp(scaled_score, (xt,), (noise.probe,))
        trace_gradient = None
    else:
        score, jacobian_probe, trace_gradient = probe_trace_gradient(scaled_score, xt, noise.probe)
    # scaled_score already holds one factor of sigma
    jacobian_probe = sigma * jacobian_probe
    u = noise.z + stop_gradient(score)

    first = first_order(score, sde, objective, noise)
    frob = second_order_frob(jacobian_probe, u, noise.probe)
    trace = second_order_trace(jacobian_probe, u, noise.probe)
    total = first + objective.second_weight * (frob + trace)
    if trace_gradient is None:
        return Losses(total, first, frob, trace)
    third = third_order(sigma**2 * trace_gradient, stop_gradient(jacobian_probe), u, noise.probe)
    return Losses(total + objective.third_weight * third, first, frob, trace, third)


def _exact_losses(scaled_score: Field, xt: Batch, sigma: Batch, sde: SDE, objective: Objective, noise: Noise) -> Losses:
    """Orders 2 and 3 from the whole Jacobian ([L22] Theorems 4.1 and 4.3)."""
    if objective.order == 2:
        score, jacobian = exact_jacobian(scaled_score, xt)
        trace_gradient = None
    else:
        score, jacobian, trace_gradient = exact_trace_gradient(scaled_score, xt)
    batch, d = len(xt), num_dims(xt)
    flat_sigma = sigma.reshape(batch, 1)
    if trace_gradient is not None:
        trace_gradient = flat_sigma**2 * trace_gradient.reshape(batch, d)
    u = (noise.z + stop_gradient(score)).reshape(batch, d)
    terms = exact_terms(flat_sigma[..., None] * jacobian, trace_gradient, u)
    first = first_order(score, sde, objective, noise)
    total = first + objective.second_weight * terms.second_jacobian
    if terms.third is None:
        return Losses(total, first, terms.second_jacobian)
    return Losses(total + objective.third_weight * terms.third, first, terms.second_jacobian, None, terms.third)


def first_order(scaled_score: Batch, sde: SDE, objective: Objective, noise: Noise) -> PerExample:
    """|sigma s + z|^2, weighted for the score (sigma^2) or for the likelihood (g^2) ([S21b] Eqn. 8 and Sec. 5.1)."""
    error = mean_square(scaled_score + noise.z)
    if not objective.reduce_mean:
        error = 0.5 * num_dims(noise.z) * error
    if objective.likelihood_weighting and not objective.importance_weighting:
        error = error * (sde.diffusion(noise.t) / sde.alpha_sigma(noise.t)[1]) ** 2
    return error


def second_order_frob(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """|sigma^2 J v + v - (u.v) u|^2 / d^2: the columns of the Jacobian, along a probe ([L22] Eqn. 172).

    Args:
        jacobian_probe: sigma^2 J v.
        u: z + sigma s-bar.
        probe: v.
    """
    target = per_example(inner(u, probe), u) * u - probe
    return mean_square(jacobian_probe - target) / num_dims(u)


def second_order_trace(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """(sigma^2 v.J v + |v|^2 - (u.v)^2)^2 / d^2: the Jacobian's trace ([L22] Eqn. 173). Arguments as above."""
    trace = inner(probe, jacobian_probe)
    target = inner(u, probe) ** 2 - inner(probe, probe)
    return ((trace - target) / num_dims(u)) ** 2


def third_order(trace_gradient: Batch, jacobian_probe_bar: Batch, u: Batch, probe: Batch) -> PerExample:
    """The gradient of the Jacobian's trace, over d^3 ([L22] Eqn. 174).

    |sigma^3 grad(v.J v) + (u.v)^2 u - (sigma^2 v.J-bar v + |v|^2) u - 2 (u.v) (sigma^2 J-bar v + v)|^2 / d^3

    Args:
        trace_gradient: sigma^3 grad_x (v.J v).
        jacobian_probe_bar: sigma^2 J-bar v.
        u: z + sigma s-bar.
        probe: v.
    """
    along = inner(u, probe)
    spread = inner(probe, jacobian_probe_bar) + inner(probe, probe)
    error = (
        trace_gradient
        + per_example(along**2 - spread, u) * u
        - 2 * per_example(along, u) * (jacobian_probe_bar + probe)
    )
    return mean_square(error / num_dims(u))


class ExactTerms(NamedTuple):
    """The higher orders without probes, each [batch] ([L22] Theorems 4.1 and 4.3, Corollary 4.2)."""

    second_jacobian: PerExample
    second_trace: PerExample
    third: PerExample | None


def exact_terms(
    jacobian: Float[Array, "batch d d"], trace_gradient: Float[Array, "batch d"] | None, u: Float[Array, "batch d"]
) -> ExactTerms:
    """The exact higher-order terms from sigma^2 J, sigma^3 grad tr J and u = z + sigma s-bar.

    second_jacobian is |sigma^2 J + I - u u^T|_F^2 / d^2, second_trace (sigma^2 tr J + d - |u|^2)^2 / d, and third
    |sigma^3 grad tr J + |u|^2 u - (sigma^2 tr J-bar + d) u - 2 (sigma^2 J-bar + I) u|^2 / d; it is None without a
    trace's gradient.
    """
    d = u.shape[1]
    spread = jacobian + jnp.eye(d, dtype=u.dtype)[None]
    trace = jnp.trace(spread, axis1=1, axis2=2)
    norm = inner(u, u)
    third = None
    if trace_gradient is not None:
        spread_bar, trace_bar = stop_gradient(spread), stop_gradient(trace)
        error = trace_gradient + (norm - trace_bar)[:, None] * u - 2 * jnp.einsum("bij,bj->bi", spread_bar, u)
        third = mean_square(error)
    return ExactTerms(
        second_jacobian=mean_square(spread - u[:, :, None] * u[:, None, :]),
        second_trace=(trace - norm) ** 2 / d,
        third=third,
    )
