"""Denoising score matching of first, second and third order.

Notation: x_t = alpha x_0 + sigma z with z ~ N(0, I). The minimiser of the first order is the score: sigma s(x_t, t) =
-E[z | x_t]. Orders two and three match the Jacobian J of the score and the gradient of its trace in the same way. Their
targets are built from u = z + sigma s, the part of the noise that the score does not explain ([L22] Theorems 4.1 and
4.3). A bar, as in s-bar, marks a value that is held constant: the higher orders use the lower ones, but send them no
gradient.

Every term is a pure function that returns one number for each example and takes its noise as an argument.
`Objective.losses` computes the terms, and `weighted_total` adds them up.

Orders 2 and 3 have several forms, each with its formulas in a file of objectives/: exact.py, for few dimensions;
published.py, the paper's estimates with one probe; and unbiased.py and trace.py, the estimates with |u|^2 as target.

Sources: [L22] Lu et al., ICML 2022; [S21b] Song et al., NeurIPS 2021.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, ScoreFn, append_dims, level_values, mean_square, num_dims
from configs.default import Config
from configs.usage import count_reads, fields_of_orders, unrecorded
from derivatives import PROBES, Field
from objectives.baselines import meng_from_config, ode_likelihood_from_config
from objectives.bound import bound_terms
from objectives.discrete import DiscreteObjective, discrete_from_config
from objectives.exact import exact_terms
from objectives.objective import Noise, Residual, TrainingObjective, split_groups
from objectives.published import constant_score, published_terms, residual_first_terms
from objectives.residuals import HIGH_ORDER_WEIGHTINGS, WEIGHTINGS, variance_weights
from objectives.sliced import SLICED, sliced_from_config
from objectives.times import NEEDS_LIKELIHOOD_WEIGHTING, TimeDistribution, times_from_config, with_density
from objectives.trace import TRACE_ESTIMATORS
from objectives.unbiased import unbiased_terms
from sde_lib import SDE

ORDERS = (1, 2, 3)


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
    """Compute the third order as `residual_first_terms` does, for less memory; values and gradients are the same."""
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
        if self.noise_level and self.level_values:
            raise ValueError(
                f"training.noise_level is {self.noise_level}, but training.bits_per_dim=True states losses as parts of "
                "a bound, which has all noise levels: set it to 0"
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
        if self.level_values:
            terms = bound_terms(sde, x0, noise.z_start, self.t_min, jnp.asarray(self.level_values)) | terms
        if not self.needs_residual:
            residual = None
        weights = term_weights(sde, self, noise.t, residual, num_dims(x0))
        known = {} if residual is None else {"residual": mean_square(score + noise.z)}
        return {"total": weighted_total(terms, self, weights)} | terms | known


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

    def with_orders(a: Array) -> Array:
        return split_groups(a, every)[0]

    t, own_xt, own_sigma = with_orders(noise.t), with_orders(xt), with_orders(sigma)
    own_noise = jax.tree.map(with_orders, noise)

    def scaled(score_fn: ScoreFn) -> Field:
        return lambda x: own_sigma * score_fn(x, t)

    if objective.order == 3 and objective.residual_first:
        constant = scaled(constant_score(score_fn))
        score, terms = residual_first_terms(scaled(score_fn), constant, own_xt, own_sigma, own_noise)
    else:
        higher_orders = exact_terms if objective.exact else ESTIMATORS[objective.estimator]
        score, terms = higher_orders(scaled(score_fn), own_xt, own_sigma, objective.order, own_noise)
    if every == 1:
        return score, terms
    rest_xt, rest_t, rest_sigma = (split_groups(a, every)[1] for a in (xt, noise.t, sigma))
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

    Weights that follow the residual divide each squared error by its variance; see `variance_weights`. Those of the
    first order are proportional to 1 / r, with mean 1 over all times.
    """
    weights = {}
    if residual is not None and objective.first_order_weighting == "residual":
        weights["first"] = residual.harmonic_mean / residual.value
    if objective.high_order_weighting == "first_order":
        relative = {name: jnp.ones_like(t) for name, term in TERMS.items() if term.order > 1}
    elif residual is None or objective.high_order_weighting == "constant":
        return weights
    else:
        relative = variance_weights("exact" if objective.exact else objective.estimator, residual.value, d)
    first = likelihood_weight(sde, objective, t) * weights.get("first", 1.0)
    return weights | {name: first * weight for name, weight in relative.items()}


ESTIMATORS = {"published": published_terms, "unbiased": unbiased_terms, **TRACE_ESTIMATORS}
"""Estimators of orders 2 and 3 with probes, by training.high_order_estimator."""


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


RENAMED = {
    "order": "score_matching_order",
    "t_min": "smallest_time",
    "second_weight": "second_order_weight",
    "third_weight": "third_order_weight",
    "exact": "exact_derivatives",
    "estimator": "high_order_estimator",
}
"""Fields of `Objective` that have another name in config.training."""


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
    names = [field.name for field in dataclasses.fields(Objective) if field.name != "level_values"]
    with unrecorded(config):
        fields = {name: training[RENAMED.get(name, name)] for name in names}
        objective = Objective(**fields, level_values=tuple(values))
    always = ("score_matching_order", "likelihood_weighting", "reduce_mean", "first_order_weighting")
    count_reads(training, *always, *fields_of_orders(training))
    return objective


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
