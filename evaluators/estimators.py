"""What a pass estimates of each image's data: the ODE's likelihood, or a bound on the SDE's."""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

import bound_likelihood
import datasets
from arrays import Batch, PerExample, ScoreFn
from configs.default import Config
from coordinates import TAIL_DENSITY, GaussianReference
from datasets import SPLITS, Source
from derivatives import PROBES
from infra import parallel
from likelihood import METHODS, Probes, draw_probes, ode_log_likelihood
from ode import FIXED_STEP, Info, check_processes
from sde_lib import SDE


class Estimate(NamedTuple):
    """-ln p(x) of each example in nats, in parts, for data x at a given time."""

    terms: dict[str, PerExample]
    """They add up to -ln p(x)."""
    errors: dict[str, PerExample]
    """Estimates of the error of -ln p(x), by where it comes from; NaN where nothing can be told."""
    nfe: int | Array
    """Evaluations of the network for each example, one with its derivatives counting as one."""
    info: Info | None
    """How the solve went, if there was one."""


def checked(estimate: Estimate, numbers: np.ndarray, kind: str, context: str) -> Estimate:
    """The estimate on the host.

    Args:
        numbers: of the examples in their data set.
        kind: what an example is called.
        context: ends the message: of which data, and what cannot be had.

    Raises:
        RuntimeError: if it is none, naming the example and, of a solve, the time.
    """
    terms, errors, info = parallel.fetch((estimate.terms, estimate.errors, estimate.info))
    if info is not None and not info.success:
        example = f"{kind} {numbers[info.worst_example]}"
        raise RuntimeError(f"the likelihood's solve broke down at t = {info.t:.6g}, at {example} {context}")
    finite = np.isfinite(np.sum(list(terms.values()), axis=0))
    if not np.all(finite):
        raise RuntimeError(f"the likelihood is not finite at {kind} {numbers[np.argmin(finite)]} {context}")
    return Estimate(terms, errors, int(estimate.nfe), info)


class Estimator(Protocol):
    """estimator(score_fn, sde, x, keys, t_min, reference) -> Estimate, of data x at t_min."""

    @property
    def description(self) -> dict[str, Any]:
        """All settings that its numbers depend on."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether its numbers depend on the reference."""
        ...

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, x: Batch, keys: Array, t_min: float, reference: GaussianReference
    ) -> Estimate: ...


@dataclasses.dataclass(frozen=True)
class OdeEstimator:
    """The ODE's likelihood; see `likelihood.ode_log_likelihood`."""

    method: str
    rtol: float
    atol: float
    num_steps: int
    probe: str
    num_probes: int

    @property
    def needs_reference(self) -> bool:
        return METHODS[self.method][0] == "reference"

    @property
    def description(self) -> dict[str, Any]:
        probes = {"probe": self.probe} | ({} if self.probe == "exact" else {"num_probes": self.num_probes})
        if METHODS[self.method][1] not in FIXED_STEP:
            return {"solver": self.method, "rtol": self.rtol, "atol": self.atol} | probes
        return {"solver": self.method, "steps": self.num_steps, "tail_density": TAIL_DENSITY} | probes

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, x: Batch, keys: Array, t_min: float, reference: GaussianReference
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
        )
        errors = {"solver_error": -result.solver_error, "probe_error": result.probe_error}
        return Estimate(
            {"prior": -result.prior_logp, "divergence": -result.divergence}, errors, result.info.nfe, result.info
        )


@functools.partial(jax.jit, static_argnames=("kind", "shape", "num_probes"))
def _probes_of_keys(keys: Array, kind: str, shape: tuple[int, ...], num_probes: int) -> Probes | None:
    """Each example's probes, by its own key."""
    draw = functools.partial(draw_probes, kind=kind, shape=shape, num_probes=num_probes)
    return jax.vmap(draw, out_axes=1)(keys)


@dataclasses.dataclass(frozen=True)
class BoundEstimator:
    """The bound on the SDE's likelihood; see `bound_likelihood.likelihood_bound`."""

    form: str
    importance_sampling: bool
    num_times: int
    num_starts: int
    needs_reference: bool = True

    @property
    def description(self) -> dict[str, Any]:
        names = ("importance_sampling", "num_times", "num_starts")
        return {"bound": self.form} | {name: getattr(self, name) for name in names}

    def __call__(
        self, score_fn: ScoreFn, sde: SDE, x: Batch, keys: Array, t_min: float, reference: GaussianReference
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
        )
        terms = {"prior": bound.prior, "integral": bound.integral, "start_correction": bound.start}
        return Estimate(terms, {"sampling_error": bound.error}, bound.nfe, None)


def examined_source(config: Config) -> Source:
    """The images, or points, of `eval.bpd_dataset`, with the fields checked that say how they are counted.

    Raises:
        ValueError: for a field whose value is not allowed.
        OSError: if the data are not there.
    """
    settings = config.eval
    if settings.max_examples < 0:
        raise ValueError(f"eval.max_examples is {settings.max_examples}; it must be 0, for all, or more")
    if settings.bpd_dataset not in SPLITS:
        raise ValueError(f"eval.bpd_dataset is {settings.bpd_dataset!r}; known are {', '.join(SPLITS)}")
    parallel.divisible(settings.batch_size, "eval.batch_size")
    return datasets.source_from_config(config, settings.bpd_dataset)


def estimator_from_config(config: Config) -> OdeEstimator | BoundEstimator:
    """What `eval` asks to be estimated.

    Raises:
        ValueError: for a field whose value is not allowed.
    """
    settings = config.eval
    if settings.bound:
        return _bound_from_config(settings)
    if settings.ode_solver not in METHODS:
        raise ValueError(f"eval.ode_solver is {settings.ode_solver!r}; known are {', '.join(METHODS)}")
    if settings.probe not in (*PROBES, "exact"):
        raise ValueError(f"eval.probe is {settings.probe!r}; known are {', '.join((*PROBES, 'exact'))}")
    check_processes(METHODS[settings.ode_solver][1], "eval.ode_solver")
    for field in ("rtol", "atol", "ode_steps", "num_probes"):
        if not settings[field] > 0:
            raise ValueError(f"eval.{field} is {settings[field]}; it must be positive")
    if METHODS[settings.ode_solver][1] == "adams" and settings.ode_steps % 2:
        raise ValueError(f"eval.ode_steps is {settings.ode_steps}; {settings.ode_solver} needs an even number")
    return OdeEstimator(
        settings.ode_solver, settings.rtol, settings.atol, settings.ode_steps, settings.probe, settings.num_probes
    )


def _bound_from_config(settings: Config) -> BoundEstimator:
    if settings.bound_times < 2:
        raise ValueError(f"eval.bound_times is {settings.bound_times}; it must be at least 2")
    if settings.bound_starts < 1:
        raise ValueError(f"eval.bound_starts is {settings.bound_starts}; it must be at least 1")
    if settings.num_importance_samples > 1:
        raise ValueError(
            f"eval.num_importance_samples is {settings.num_importance_samples}, but eval.bound=True estimates a bound "
            "on ln p, not ln p: an average inside the logarithm would be none; use 1, and eval.num_repeats"
        )
    if settings.dequantization != "uniform" and not settings.dequantizer:
        raise ValueError(
            f"eval.dequantization is {settings.dequantization!r}, which leads to x at t > 0; eval.bound=True needs "
            "that of the data: use uniform"
        )
    return BoundEstimator(
        form="dsm" if settings.dsm else "sm",
        importance_sampling=settings.bound_importance_sampling,
        num_times=settings.bound_times,
        num_starts=settings.bound_starts if settings.offset else 0,
    )
