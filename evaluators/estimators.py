"""Estimators of -ln p(x): the likelihood of the ODE, or a bound on the likelihood of the SDE."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import bound_likelihood
import datasets
from arrays import Batch, PerExample, ReportProgress, ScoreFn, append_dims
from configs.default import Config
from configs.usage import unrecorded
from coordinates import TAIL_DENSITY, GaussianReference
from datasets import SPLITS, Source
from infra import parallel
from likelihood import METHODS, PROBE_KINDS, Probes, draw_probes, ode_log_likelihood
from sde_lib import SDE
from solvers.ode import FIXED_STEP, Info, check_processes


class Estimate(NamedTuple):
    """-ln p(x) of each example in nats, in parts, for data x at a given time."""

    terms: dict[str, PerExample]
    """The terms of -ln p(x)."""
    errors: dict[str, PerExample]
    """Estimates of the error of -ln p(x), by its source; NaN where there is no estimate."""
    nfe: int | Array
    """Evaluations of the network for each example. One with its derivatives counts as one."""
    info: Info | None
    """Cost and success of the ODE solve; None without a solve."""


class HostEstimate(NamedTuple):
    """An `Estimate` on the host, in float64. All terms are finite."""

    terms: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    nfe: int


def fetch_and_check(estimate: Estimate, indices: np.ndarray, kind: str, context: str) -> HostEstimate:
    """Fetches the estimate to the host.

    Args:
        indices: the indices of the examples in their data set.
        kind: what an example is: "image" or "point".
        context: the beginning of an error message: what cannot be computed, and with which settings.

    Raises:
        RuntimeError: if the solve failed or a value is not finite. The message names the example, and the time of the
            failure.
    """
    terms, errors, info = parallel.fetch((estimate.terms, estimate.errors, estimate.info))
    if info is not None and not info.success:
        example = f"{kind} {indices[info.worst_example]}"
        raise RuntimeError(
            f"{context}: the ODE solve failed at t = {info.t:.6g}, at {example}; try another eval.ode_solver"
        )
    finite = np.isfinite(np.sum(list(terms.values()), axis=0))
    if not np.all(finite):
        raise RuntimeError(f"{context}: the likelihood is not finite at {kind} {indices[np.argmin(finite)]}")
    return HostEstimate(as_float64(terms), as_float64(errors), int(estimate.nfe))


def as_float64(values: Mapping[str, PerExample | np.ndarray]) -> dict[str, np.ndarray]:
    """The values as NumPy arrays in float64."""
    return {name: np.asarray(value, np.float64) for name, value in values.items()}


@runtime_checkable
class Estimator(Protocol):
    """estimator(score_fn, sde, x, keys, t_min, reference, progress) -> Estimate, for data x at t_min.

    Calls `progress` between parts of the computation.
    """

    @property
    def description(self) -> dict[str, Any]:
        """All settings that the estimate depends on."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the estimate depends on the reference."""
        ...

    def __call__(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        x: Batch,
        keys: Array,
        t_min: float,
        reference: GaussianReference,
        progress: ReportProgress | None = None,
    ) -> Estimate: ...


@dataclasses.dataclass(frozen=True)
class OdeEstimator:
    """The likelihood of the ODE; see `likelihood.ode_log_likelihood`."""

    method: str
    probe: str
    num_probes: int = 1
    rtol: float = 1e-5
    """Tolerances of adaptive methods."""
    atol: float = 1e-5
    num_steps: int = 100
    """Steps of methods with fixed steps."""

    @property
    def needs_reference(self) -> bool:
        return METHODS[self.method].coordinates == "reference"

    @property
    def description(self) -> dict[str, Any]:
        probes = {"probe": self.probe} | ({} if self.probe == "exact" else {"num_probes": self.num_probes})
        if METHODS[self.method].solver not in FIXED_STEP:
            return {"solver": self.method, "rtol": self.rtol, "atol": self.atol} | probes
        return {"solver": self.method, "steps": self.num_steps, "tail_density": TAIL_DENSITY} | probes

    def __call__(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        x: Batch,
        keys: Array,
        t_min: float,
        reference: GaussianReference,
        progress: ReportProgress | None = None,
    ) -> Estimate:
        result = ode_log_likelihood(
            score_fn,
            sde,
            x,
            _probes_of_keys(keys, self.probe, x.shape[1:], self.num_probes),
            t_min=t_min,
            method=self.method,
            reference=reference,
            rtol=self.rtol,
            atol=self.atol,
            num_steps=self.num_steps,
            progress=progress,
        )
        errors = {"solver_error": -result.solver_error, "probe_error": result.probe_error}
        return Estimate(result.terms, errors, result.info.nfe, result.info)


@functools.partial(jax.jit, static_argnames=("kind", "shape", "num_probes"))
def _probes_of_keys(keys: Array, kind: str, shape: tuple[int, ...], num_probes: int) -> Probes | None:
    """Draws the probes of each example from its own key."""
    draw = functools.partial(draw_probes, kind=kind, shape=shape, num_probes=num_probes)
    return jax.vmap(draw, out_axes=1)(keys)


@dataclasses.dataclass(frozen=True)
class BoundEstimator:
    """The bound on the likelihood of the SDE; see `bound_likelihood.likelihood_bound`."""

    form: str
    importance_sampling: bool
    num_times: int
    num_starts: int
    """Draws in the start-time correction, which makes it a bound for x. 0: a bound for x_tmin."""
    needs_reference: bool = True

    @property
    def description(self) -> dict[str, Any]:
        names = ("importance_sampling", "num_times", "num_starts")
        settings = {name: getattr(self, name) for name in names}
        return {"bound": self.form, "smallest_std": bound_likelihood.SMALLEST_STD} | settings

    def __call__(
        self,
        score_fn: ScoreFn,
        sde: SDE,
        x: Batch,
        keys: Array,
        t_min: float,
        reference: GaussianReference,
        progress: ReportProgress | None = None,
    ) -> Estimate:
        bound = bound_likelihood.likelihood_bound(
            score_fn,
            sde,
            x,
            keys,
            t_min=t_min,
            form=self.form,
            importance_sampling=self.importance_sampling,
            num_times=self.num_times,
            num_starts=self.num_starts,
            reference=reference,
            progress=progress,
        )
        return Estimate(bound.terms, {"sampling_error": bound.error}, bound.nfe, None)


def evaluation_source(config: Config) -> Source:
    """Loads the images, or points, of `eval.bpd_dataset`, and checks the fields that select them.

    Raises:
        ValueError: for a field whose value is not allowed.
        OSError: if the data are missing.
    """
    settings = config.eval
    with unrecorded(config):  # Some evaluators choose the number of examples by another field.
        if settings.max_examples < 0:
            raise ValueError(
                f"eval.max_examples is {settings.max_examples}; use 0 for all examples, or a positive number"
            )
    if settings.bpd_dataset not in SPLITS:
        raise ValueError(f"eval.bpd_dataset is {settings.bpd_dataset!r}; known: {', '.join(SPLITS)}")
    return datasets.source_from_config(config, settings.bpd_dataset)


AT = ("x", "x_tmin")
"""Where a likelihood is evaluated: at the data, or at the data with the noise of t_min, alpha x + sigma z."""


def places_from_config(config: Config) -> tuple[str, ...]:
    """The places that `eval.likelihood_at` asks for.

    Raises:
        ValueError: for an unknown place; for x_tmin with noise that gives x at t > 0 already.
    """
    settings, choices = config.eval, (*AT, "both")
    if settings.likelihood_at not in choices:
        raise ValueError(f"eval.likelihood_at is {settings.likelihood_at!r}; known: {', '.join(choices)}")
    if settings.likelihood_at != "x" and settings.dequantization != "uniform":
        raise ValueError(
            f"eval.likelihood_at is {settings.likelihood_at!r}, but eval.dequantization={settings.dequantization} "
            "already adds the noise of the SDE to the data; use eval.likelihood_at=x"
        )
    return AT if settings.likelihood_at == "both" else (settings.likelihood_at,)


@functools.partial(jax.jit, static_argnames=("sde", "t_min"))
def noised(sde: SDE, x: Batch, keys: Array, t_min: float) -> Batch:
    """Draws x_tmin = alpha x + sigma z. Each example has its own key."""
    z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2), x.shape[1:]))(keys)
    mean, sigma = sde.marginal(x, jnp.full(len(x), t_min))
    return mean + append_dims(sigma, x) * z


def estimator_from_config(config: Config, at: str = "x") -> OdeEstimator | BoundEstimator:
    """Builds the estimator that `eval` describes.

    Args:
        at: x or x_tmin. The bound for x_tmin has no start-time correction.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    return _bound_from_config(config.eval, at) if config.eval.bound else ode_estimator_from_config(config)


def ode_estimator_from_config(config: Config) -> OdeEstimator:
    """Builds the estimator by the likelihood of the ODE, as `eval` describes it.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    settings = config.eval
    if settings.ode_solver not in METHODS:
        raise ValueError(f"eval.ode_solver is {settings.ode_solver!r}; known: {', '.join(METHODS)}")
    if settings.probe not in PROBE_KINDS:
        raise ValueError(f"eval.probe is {settings.probe!r}; known: {', '.join(PROBE_KINDS)}")
    check_processes(METHODS[settings.ode_solver].solver, "eval.ode_solver")
    solver = METHODS[settings.ode_solver].solver
    fields = ("ode_steps",) if solver in FIXED_STEP else ("rtol", "atol")
    values = {field: settings[field] for field in (*fields, *(() if settings.probe == "exact" else ("num_probes",)))}
    for field, value in values.items():
        if not value > 0:
            raise ValueError(f"eval.{field} is {value}; it must be positive")
    if solver == "adams" and settings.ode_steps % 2:
        raise ValueError(f"eval.ode_steps is {settings.ode_steps}; {settings.ode_solver} needs an even number")
    if "ode_steps" in values:
        values["num_steps"] = values.pop("ode_steps")
    return OdeEstimator(settings.ode_solver, settings.probe, **values)


def _bound_from_config(settings: Config, at: str) -> BoundEstimator:
    if settings.num_importance_samples > 1:
        raise ValueError(
            f"eval.num_importance_samples is {settings.num_importance_samples}, but eval.bound=True estimates a bound "
            "on ln p, and an average inside the logarithm needs ln p itself; use 1, and eval.num_repeats for more draws"
        )
    if settings.dequantization != "uniform" and not settings.dequantizer:
        raise ValueError(
            f"eval.dequantization is {settings.dequantization!r}, which gives x at t > 0, but eval.bound=True "
            "bounds the likelihood of the data; use eval.dequantization=uniform"
        )
    return BoundEstimator(
        form="dsm" if settings.dsm else "sm",
        importance_sampling=settings.bound_importance_sampling,
        num_times=settings.bound_times,
        num_starts=settings.bound_starts if at == "x" and settings.offset else 0,
    )
