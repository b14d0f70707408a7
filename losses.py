"""Denoising score matching of first, second and third order.

Notation: x_t = alpha x_0 + sigma z with z ~ N(0, I). The minimiser of the first order is the score: sigma s(x_t, t) =
-E[z | x_t]. Orders two and three match the Jacobian J of the score and the gradient of its trace in the same way. Their
targets are built from u = z + sigma s, the part of the noise that the score does not explain ([L22] Theorems 4.1 and
4.3). A bar, as in s-bar, marks a value that is held constant: the higher orders use the lower ones, but send them no
gradient.

Every term is a pure function that returns one number for each example and takes its noise as an argument.
`Objective.losses` computes the terms, and `weighted_total` adds them up.

Orders 2 and 3 have three forms: exact, for few dimensions; the published estimates with one probe; and unbiased
estimates of the exact form with two probes, which are ours (`objectives/unbiased.py`). The published estimates have
(u.v)^2 where the exact form has |u|^2. The probe multiplies the standard deviation by about sqrt(d).

Sources: [L22] Lu et al., ICML 2022; [S21b] Song et al., NeurIPS 2021.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from arrays import Batch, Factor, PerExample, ScoreFn, append_dims, inner, level_values, mean_square, num_dims
from configs.default import Config
from derivatives import PROBES, Field, exact_jacobian, exact_trace_gradient, probe_trace_gradient
from objectives.baselines import meng_from_config, ode_likelihood_from_config
from objectives.bound import prior_divergence, reconstruction
from objectives.discrete import DiscreteObjective, discrete_from_config
from objectives.objective import Noise, Residual, TrainingObjective
from objectives.sliced import SLICED, sliced_from_config
from objectives.times import NEEDS_LIKELIHOOD_WEIGHTING, TimeDistribution, times_from_config, with_density
from objectives.trace import squared_trace, unbiased_trace
from objectives.unbiased import unbiased_terms
from sde_lib import SDE

ORDERS = (1, 2, 3)
WEIGHTINGS = ("constant", "residual")
"""Weights by noise level: the published constants, or one over the variance of each term's error."""

HIGH_ORDER_WEIGHTINGS = (*WEIGHTINGS, "first_order")
"""The weightings of orders 2 and 3. "first_order": the first order's weights, with its likelihood weighting ([Z23])."""


class Term(NamedTuple):
    """A term of the objective."""

    order: int
    """The order of score matching, whose weight multiplies the term. 0: the term has no gradient, and weight 1."""
    title: str
    """The title in plots and tables."""


TERMS = {
    "reconstruction": Term(0, "reconstruction of levels"),
    "prior": Term(0, "divergence from the prior"),
    "first": Term(1, "first order: score"),
    "second_frob": Term(2, "second order: Jacobian"),
    "second_trace": Term(2, "second order: trace"),
    "third": Term(3, "third order: gradient of the trace"),
}
"""The terms by name. Metrics, the report and its tables show the terms that an objective has, in this order."""


@dataclasses.dataclass(frozen=True)
class Objective(TrainingObjective):
    """The loss that training minimises, over times t in [t_min, 1].

    With `exact`, orders 2 and 3 are computed from the whole Jacobian, for data of few dimensions; otherwise they are
    estimated with Hutchinson probes, as `estimator` says. The exact second order has only the term of the Jacobian.
    In one dimension, the trace is the Jacobian.

    Weightings are the published constants, or follow the residual r(t); see `term_weights`. Only every
    `1 / high_order_fraction`-th example has the terms of orders 2 and 3; their expectation is the same.

    Raises:
        ValueError: for an order other than 1, 2, 3; for orders 2 and 3 without `reduce_mean`; for importance weighting
            without likelihood weighting, because it is another estimator of the likelihood-weighted loss; for an
            unknown estimator or weighting, or a fraction that is not one over an integer.
    """

    order: int = 1
    t_min: float = 1e-5
    likelihood_weighting: bool = False
    importance_weighting: bool = False
    reduce_mean: bool = True
    second_weight: float = 1.0
    third_weight: float = 1.0
    exact: bool = False
    residual_first: bool = False
    """Compute the third order as `_residual_first_terms` does, for less memory; values and gradients are the same."""
    estimator: str = "published"
    first_order_weighting: str = "constant"
    high_order_weighting: str = "constant"
    high_order_fraction: float = 1.0
    stratified_times: bool = False
    noise_level: float = 0.0
    """The only noise level sigma / alpha; 0: all times."""
    importance_density: str = "noise"
    level_values: tuple[float, ...] = ()
    """The data of each grey level. If given, all losses are in bits/dim, order 1 has the weight that it has in the
    bound on -ln P(x0), and the objective includes the other terms of this bound; see objectives/bound.py."""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"training.score_matching_order is {self.order}; it must be 1, 2 or 3")
        if self.order > 1 and not self.reduce_mean:
            raise ValueError(
                "training.reduce_mean is False, but orders 2 and 3 average over dimensions: set it to True"
            )
        if self.importance_weighting and not self.likelihood_weighting:
            raise ValueError(NEEDS_LIKELIHOOD_WEIGHTING)
        if self.residual_first and self.exact:
            raise ValueError("training.residual_first needs training.exact_derivatives=False: it is for probes")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"training.high_order_estimator is {self.estimator!r}; known: {', '.join(ESTIMATORS)}")
        if self.residual_first and self.estimator != "published":
            raise ValueError("training.residual_first needs training.high_order_estimator=published")
        if self.order == 3 and self.estimator in TRACE_ESTIMATORS:
            raise ValueError(
                f"training.high_order_estimator is {self.estimator!r}, which has no third order: set "
                "training.score_matching_order to at most 2"
            )
        choices = {"first_order_weighting": WEIGHTINGS, "high_order_weighting": HIGH_ORDER_WEIGHTINGS}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"training.{field} is {getattr(self, field)!r}; known: {', '.join(known)}")
        if self.level_values and not (self.likelihood_weighting and self.reduce_mean):
            raise ValueError(
                "training.bits_per_dim needs training.likelihood_weighting=True and training.reduce_mean=True"
            )
        if not 0 < (fraction := self.high_order_fraction) <= 1 or abs(round(1 / fraction) * fraction - 1) > 1e-3:
            raise ValueError(
                f"training.high_order_fraction is {self.high_order_fraction}; it must be 1, 1/2, 1/3, 1/4 and so on"
            )
        if self.noise_level and self.needs_residual:
            raise ValueError(
                f"training.noise_level is {self.noise_level}, but weights that follow the residual need all times: "
                "set it to 0"
            )
        _ = self.times  # It checks its fields when it is built.

    @property
    def times(self) -> TimeDistribution:
        """The distribution of the times t. Raises ValueError for a field that is not allowed."""
        return TimeDistribution(
            self.t_min,
            self.importance_weighting,
            self.importance_density,
            stratified=self.stratified_times,
            noise_level=self.noise_level,
        )

    @property
    def needs_two_probes(self) -> bool:
        """Whether the estimator of orders 2 and 3 takes two probes per example."""
        return self.order > 1 and self.estimator in ("unbiased", "unbiased_trace") and not self.exact

    @property
    def needs_jacobian(self) -> bool:
        return self.exact

    @property
    def every(self) -> int:
        """The number k such that every k-th example has the terms of orders 2 and 3."""
        return round(1 / self.high_order_fraction) if self.order > 1 else 1

    @property
    def needs_residual(self) -> bool:
        """Whether weights follow the residual."""
        return "residual" in (self.first_order_weighting, self.high_order_weighting)

    @property
    def draws_own_times(self) -> bool:
        """Whether the examples with orders 2 and 3 draw their times from another density than the other examples."""
        return self.order > 1 and self.every > 1 and self.high_order_weighting == "residual"

    def for_evaluation(self) -> "Objective":
        """Returns the objective with the same terms on all examples, without weights that follow the residual."""
        high = "constant" if self.high_order_weighting == "residual" else self.high_order_weighting
        return dataclasses.replace(
            self, first_order_weighting="constant", high_order_weighting=high, high_order_fraction=1.0
        )

    def quantiles(self, sde: SDE, t: PerExample) -> PerExample:
        return self.times.quantiles(sde, t)

    def draw_noise(
        self, key: Array, sde: SDE, shape: tuple[int, ...], density: Float[Array, " bins"] | None = None
    ) -> Noise:
        """Draws times, noise and Rademacher probes for a batch of the given shape.

        Args:
            density: the density of times for the examples that have orders 2 and 3, relative to the objective's
                density, on equal parts of [0, 1], the range of `quantiles`. Its mean is 1. None: the objective's
                density.
        """
        t_key, z_key, probe_key = jax.random.split(key, 3)
        rademacher, quantiles, time_weight = PROBES["rademacher"], self.times.draw_quantiles(t_key, shape[0]), None
        if density is not None:
            own = jnp.arange(shape[0]) % self.every == 0
            moved, weight = with_density(quantiles, density)
            quantiles, time_weight = jnp.where(own, moved, quantiles), jnp.where(own, weight, 1.0)
        return Noise(
            t=self.times.at_quantiles(sde, quantiles),
            z=jax.random.normal(z_key, shape),
            probe=rademacher(probe_key, shape),
            second_probe=rademacher(jax.random.fold_in(probe_key, 1), shape) if self.needs_two_probes else None,
            z_start=jax.random.normal(jax.random.fold_in(probe_key, 2), shape) if self.level_values else None,
            time_weight=time_weight,
        )

    def losses(
        self, score_fn: ScoreFn, sde: SDE, x0: Batch, noise: Noise, residual: Residual | None = None
    ) -> dict[str, PerExample]:
        """Computes the objective of each example as `total`, and its unweighted terms by their names in `TERMS`.

        With one probe, order k costs one network evaluation with k derivatives. With two probes, it costs about twice
        that. With a high_order_fraction below 1, the terms of orders 2 and 3 are 0 for some examples, and divided by
        the fraction for the others. So means over a batch have the same expectation.

        Raises:
            ValueError: if the weights follow the residual, but `residual` is None.
        """
        if self.needs_residual and residual is None:
            raise ValueError("the objective's weights follow the residual: give it, or use objective.for_evaluation()")
        score, terms = _score_and_terms(score_fn, sde, self, x0, noise)
        terms = {"first": first_order(score, sde, self, noise)} | terms
        if noise.time_weight is not None:
            terms = {name: noise.time_weight * value for name, value in terms.items()}
        terms = self._bound_terms(sde, x0, noise) | terms
        if not self.needs_residual:
            residual = None
        weights = term_weights(sde, self, noise.t, residual, num_dims(x0))
        known = {} if residual is None else {"residual": mean_square(score + noise.z)}
        return {"total": weighted_total(terms, self, weights)} | terms | known

    def _bound_terms(self, sde: SDE, x0: Batch, noise: Noise) -> dict[str, PerExample]:
        """Computes the terms of the bound that have no gradient, in bits/dim."""
        if not self.level_values:
            return {}
        if noise.z_start is None:
            raise ValueError("losses in bits/dim need noise at the start; draw the noise for their objective")
        values = jnp.asarray(self.level_values)
        nats = {
            "reconstruction": reconstruction(sde, x0, noise.z_start, self.t_min, values),
            "prior": prior_divergence(sde, x0, sde.prior_sigma),
        }
        return {name: value / (num_dims(x0) * math.log(2)) for name, value in nats.items()}


def _score_and_terms(
    score_fn: ScoreFn, sde: SDE, objective: Objective, x0: Batch, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """Returns sigma times the score at x_t, and the terms of orders 2 and 3 (0 for examples without them)."""
    mean, sigma = sde.marginal(x0, noise.t)
    sigma = append_dims(sigma, x0)
    xt = mean + sigma * noise.z
    if objective.order == 1:
        return sigma * score_fn(xt, noise.t), {}
    every = objective.every
    if len(x0) % every:
        raise ValueError(
            f"orders 2 and 3 are computed for one of every {every} examples, but the batch has {len(x0)}; "
            f"use a multiple of {every}"
        )

    def of_each_group(a: Array, first: bool) -> Array:
        groups = a.reshape(-1, every, *a.shape[1:])
        return groups[:, 0] if first else groups[:, 1:].reshape(-1, *a.shape[1:])

    def with_orders(a: Array) -> Array:
        return of_each_group(a, first=True)

    t, own_xt, own_sigma = with_orders(noise.t), with_orders(xt), with_orders(sigma)
    own_noise = jax.tree.map(with_orders, noise)

    def scaled(score_fn: ScoreFn) -> Field:
        return lambda x: own_sigma * score_fn(x, t)

    if objective.order == 3 and objective.residual_first:
        constant = scaled(_constant(score_fn))
        score, terms = _residual_first_terms(scaled(score_fn), constant, own_xt, own_sigma, own_noise)
    else:
        higher_orders = _exact_terms if objective.exact else ESTIMATORS[objective.estimator]
        score, terms = higher_orders(scaled(score_fn), own_xt, own_sigma, objective.order, own_noise)
    if every == 1:
        return score, terms
    rest_xt, rest_t, rest_sigma = (of_each_group(a, first=False) for a in (xt, noise.t, sigma))
    rest = (rest_sigma * score_fn(rest_xt, rest_t)).reshape(-1, every - 1, *x0.shape[1:])
    score = jnp.concatenate([score[:, None], rest], axis=1).reshape(x0.shape)
    only_first = jnp.zeros(every).at[0].set(every)[None]
    return score, {name: (value[:, None] * only_first).reshape(-1) for name, value in terms.items()}


def weighted_total(
    terms: Mapping[str, PerExample], objective: Objective, weights: Mapping[str, PerExample] | None = None
) -> PerExample:
    """Returns the sum over orders of the order's weight times the sum of its terms.

    Args:
        weights: the weight of each example, by term; see `term_weights`. Missing weights are 1.
    """
    weighted = {name: value * weights[name] if weights and name in weights else value for name, value in terms.items()}
    order_weights = (1.0, 1.0, objective.second_weight, objective.third_weight)
    total = jnp.zeros(())
    for order, weight in zip((0, *ORDERS), order_weights, strict=True):
        total += weight * sum(value for name, value in weighted.items() if TERMS[name].order == order)
    return total


def term_weights(
    sde: SDE, objective: Objective, t: PerExample, residual: Residual | None, d: int
) -> dict[str, PerExample]:
    """Returns the weight of each term at each time, for the terms with a weight other than 1.

    Weights that follow the residual come from generalised least squares (ours), which divides each squared error by
    its variance. The variance is known if u given x_t is N(0, r I). The weights of the first order are proportional to
    1 / r, with mean 1 over all times. The weights of orders 2 and 3 are relative to the weight of the first order.
    """
    weights = {}
    if residual is not None and objective.first_order_weighting == "residual":
        weights["first"] = residual.harmonic_mean / residual.value
    if objective.high_order_weighting == "first_order":
        relative = {name: jnp.ones_like(t) for name, term in TERMS.items() if term.order > 1}
    elif residual is None or objective.high_order_weighting == "constant":
        return weights
    else:
        r = residual.value
        unbiased = {"second_frob": d / (2 * r), "second_trace": 1 / (2 * r), "third": d / (2 * r**2)}
        relative = {
            "published": {"second_frob": 1 / r, "second_trace": 1 / (2 * r * d), "third": 1 / (2 * r**2)},
            "exact": {"second_frob": d / (2 * r), "third": 1 / (2 * r**2 * d)},
        }.get("exact" if objective.exact else objective.estimator, unbiased)
    first = likelihood_weight(sde, objective, t) * weights.get("first", 1.0)
    return weights | {name: first * weight for name, weight in relative.items()}


def _probe_terms(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """sigma times the score, and the terms of orders 2 and 3 as Hutchinson estimates ([L22] App. G)."""
    if order == 2:
        score, jacobian_probe = jax.jvp(scaled_score, (xt,), (noise.probe,))
        trace_gradient = None
    else:
        score, jacobian_probe, trace_gradient = probe_trace_gradient(scaled_score, xt, noise.probe)
    # scaled_score already holds one factor of sigma
    jacobian_probe = sigma * jacobian_probe
    terms = _second_order_terms(score, jacobian_probe, noise)
    if trace_gradient is not None:
        u = noise.z + stop_gradient(score)
        terms["third"] = third_order(sigma**2 * trace_gradient, stop_gradient(jacobian_probe), u, noise.probe)
    return score, terms


def _second_order_terms(score: Batch, jacobian_probe: Batch, noise: Noise) -> dict[str, PerExample]:
    """The terms of order 2. Args: score: sigma s. jacobian_probe: sigma^2 J v."""
    u = noise.z + stop_gradient(score)
    return {
        "second_frob": second_order_frob(jacobian_probe, u, noise.probe),
        "second_trace": second_order_trace(jacobian_probe, u, noise.probe),
    }


def _residual_first_terms(
    scaled_score: Field, constant_score: Field, xt: Batch, sigma: Factor, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """The values and gradients of `_probe_terms` of order 3, without a reverse pass inside the one for the gradient.

    The third term is the mean square of a residual r, so its gradient is that of <w, sigma^2 grad_x (v.Jv)> with the
    constant w = 2 r / d, and <w, grad_x (v.Jv)> = v.D^2 field [v, w] is a forward derivative along v and then w. The
    gradient runs through forward derivatives only, all of which can be recomputed block by block, as with model.remat.

    Args:
        constant_score: the same field, without a gradient for its parameters.
    """
    value, tangent, trace_gradient = probe_trace_gradient(constant_score, xt, noise.probe)
    u, d = noise.z + value, float(num_dims(xt))  # as an integer, d^2 of large images has more than 32 bits
    residual = stop_gradient(third_order_residual(sigma**2 * trace_gradient, sigma * tangent, u, noise.probe))
    direction = 2 * sigma**2 * residual / d**2

    def along_probe(x: Batch) -> tuple[Batch, Batch]:
        return jax.jvp(scaled_score, (x,), (noise.probe,))

    (score, jacobian_probe), (_, second_derivative) = jax.jvp(along_probe, (xt,), (direction,))
    terms = _second_order_terms(score, sigma * jacobian_probe, noise)
    gradient_carrier = inner(noise.probe, second_derivative)
    terms["third"] = mean_square(residual) + (gradient_carrier - stop_gradient(gradient_carrier))
    return score, terms


def _constant(score_fn: ScoreFn) -> ScoreFn:
    """The score function without a gradient for the parameters in it, if it is a pytree that holds them."""
    return jax.tree.map(lambda leaf: stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, score_fn)


TRACE_ESTIMATORS = {"squared_trace": squared_trace, "unbiased_trace": unbiased_trace}
"""Estimators of the second order that use only its trace."""

ESTIMATORS = {"published": _probe_terms, "unbiased": unbiased_terms, **TRACE_ESTIMATORS}
"""Estimators of orders 2 and 3 with probes, by training.high_order_estimator."""


def _exact_terms(
    scaled_score: Field, xt: Batch, sigma: Factor, order: int, noise: Noise
) -> tuple[Batch, dict[str, PerExample]]:
    """sigma times the score, and the terms of orders 2 and 3 from the whole Jacobian ([L22] Theorems 4.1 and 4.3)."""
    if order == 2:
        score, jacobian = exact_jacobian(scaled_score, xt)
        trace_gradient = None
    else:
        score, jacobian, trace_gradient = exact_trace_gradient(scaled_score, xt)
    batch, d = len(xt), num_dims(xt)
    flat_sigma = sigma.reshape(batch, 1)
    u = (noise.z + stop_gradient(score)).reshape(batch, d)
    jacobian = flat_sigma[..., None] * jacobian
    terms = {"second_frob": exact_second_order(jacobian, u)}
    if trace_gradient is not None:
        trace_gradient = flat_sigma**2 * trace_gradient.reshape(batch, d)
        terms["third"] = exact_third_order(trace_gradient, stop_gradient(jacobian), u)
    return score, terms


def first_order(scaled_score: Batch, sde: SDE, objective: Objective, noise: Noise) -> PerExample:
    """|sigma s + z|^2, weighted for the score (sigma^2) or for the likelihood (g^2) ([S21b] Eqn. 8 and Sec. 5.1)."""
    error = mean_square(scaled_score + noise.z)
    if not objective.reduce_mean:
        error = 0.5 * num_dims(noise.z) * error
    return error * likelihood_weight(sde, objective, noise.t)


def likelihood_weight(sde: SDE, objective: Objective, t: PerExample) -> PerExample:
    """Returns g^2 / sigma^2 over the unnormalised density of times with likelihood weighting; otherwise 1.

    For losses in bits/dim, it includes the constant factors of the bound.
    """
    if not objective.likelihood_weighting:
        return jnp.ones_like(t)
    weight = objective.times.likelihood_weight(sde, t)
    return weight * objective.times.total(sde) / (2 * math.log(2)) if objective.level_values else weight


def second_order_frob(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """|sigma^2 J v + v - (u.v) u|^2 / d^2: the columns of the Jacobian, along a probe ([L22] Eqn. 172).

    Args:
        jacobian_probe: sigma^2 J v.
        u: z + sigma s-bar.
        probe: v.
    """
    target = append_dims(inner(u, probe), u) * u - probe
    return mean_square(jacobian_probe - target) / num_dims(u)


def second_order_trace(jacobian_probe: Batch, u: Batch, probe: Batch) -> PerExample:
    """(sigma^2 v.J v + |v|^2 - (u.v)^2)^2 / d^2: the Jacobian's trace ([L22] Eqn. 173). Arguments as above."""
    trace = inner(probe, jacobian_probe)
    target = inner(u, probe) ** 2 - inner(probe, probe)
    return ((trace - target) / num_dims(u)) ** 2


def third_order(trace_gradient: Batch, jacobian_probe_bar: Batch, u: Batch, probe: Batch) -> PerExample:
    """The gradient of the Jacobian's trace, over d^3 ([L22] Eqn. 174).

    |sigma^3 grad(v.J v) + (u.v)^2 u - (sigma^2 v.J-bar v + |v|^2) u - 2 (u.v) (sigma^2 J-bar v + v)|^2 / d^3

    Arguments as in `third_order_residual`.
    """
    return mean_square(third_order_residual(trace_gradient, jacobian_probe_bar, u, probe))


def third_order_residual(trace_gradient: Batch, jacobian_probe_bar: Batch, u: Batch, probe: Batch) -> Batch:
    """The vector of `third_order` whose mean square is the term: the one between the bars there, over d.

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
        + append_dims(along**2 - spread, u) * u
        - 2 * append_dims(along, u) * (jacobian_probe_bar + probe)
    )
    return error / num_dims(u)


def exact_second_order(jacobian: Float[Array, "batch d d"], u: Float[Array, "batch d"]) -> PerExample:
    """|sigma^2 J + I - u u^T|_F^2 / d^2: the Jacobian of the score ([L22] Theorem 4.1).

    Args:
        jacobian: sigma^2 J.
        u: z + sigma s-bar.
    """
    identity = jnp.eye(u.shape[1], dtype=u.dtype)[None]
    return mean_square(jacobian + identity - u[:, :, None] * u[:, None, :])


def exact_second_order_trace(jacobian: Float[Array, "batch d d"], u: Float[Array, "batch d"]) -> PerExample:
    """(sigma^2 tr J + d - |u|^2)^2 / d: the Jacobian's trace ([L22] Corollary 4.2). Arguments as above."""
    d = u.shape[1]
    return (jnp.trace(jacobian, axis1=1, axis2=2) + d - inner(u, u)) ** 2 / d


def exact_third_order(
    trace_gradient: Float[Array, "batch d"], jacobian_bar: Float[Array, "batch d d"], u: Float[Array, "batch d"]
) -> PerExample:
    """The gradient of the Jacobian's trace ([L22] Theorem 4.3).

    |sigma^3 grad tr J + |u|^2 u - (sigma^2 tr J-bar + d) u - 2 (sigma^2 J-bar + I) u|^2 / d

    Args:
        trace_gradient: sigma^3 grad_x tr J.
        jacobian_bar: sigma^2 J-bar.
        u: z + sigma s-bar.
    """
    spread = jacobian_bar + jnp.eye(u.shape[1], dtype=u.dtype)[None]
    trace = jnp.trace(spread, axis1=1, axis2=2)
    error = trace_gradient + (inner(u, u) - trace)[:, None] * u - 2 * jnp.einsum("bij,bj->bi", spread, u)
    return mean_square(error)


def denoising_from_config(config: Config) -> Objective | DiscreteObjective:
    """Builds denoising score matching as config.training describes it, in continuous or discrete time.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    training, data = config.training, config.data
    if not training.continuous:
        return discrete_from_config(config)
    if training.bits_per_dim and data.uniform_dequantization:
        raise ValueError(
            "training.bits_per_dim is True, which needs levels without noise: set data.uniform_dequantization to False"
        )
    times_from_config(training)  # raises ValueError
    values = level_values(data.levels, data.centered, not data.bin_centers).tolist() if training.bits_per_dim else ()
    return Objective(
        order=training.score_matching_order,
        t_min=training.smallest_time,
        likelihood_weighting=training.likelihood_weighting,
        importance_weighting=training.importance_weighting,
        reduce_mean=training.reduce_mean,
        second_weight=training.second_order_weight,
        third_weight=training.third_order_weight,
        exact=training.exact_derivatives,
        residual_first=training.residual_first,
        estimator=training.high_order_estimator,
        first_order_weighting=training.first_order_weighting,
        high_order_weighting=training.high_order_weighting,
        high_order_fraction=training.high_order_fraction,
        stratified_times=training.stratified_times,
        noise_level=training.noise_level,
        importance_density=training.importance_density,
        level_values=tuple(values),
    )


OBJECTIVES: dict[str, Callable[[Config], TrainingObjective]] = {
    "denoising": denoising_from_config,
    **dict.fromkeys(SLICED, sliced_from_config),
    "meng": meng_from_config,
    "ode_likelihood": ode_likelihood_from_config,
}
"""The builders of objectives, by training.objective."""


def objective_from_config(config: Config) -> TrainingObjective:
    """Builds the objective that config.training names and describes.

    Raises:
        ValueError: for an unknown name, or a field whose value is not allowed.
    """
    name = config.training.objective
    if name not in OBJECTIVES:
        raise ValueError(f"training.objective is {name!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](config)
