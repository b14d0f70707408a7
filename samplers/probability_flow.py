"""Samples by the probability-flow ODE, and latent codes by the same ODE."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, ReportProgress, ScoreFn, as_pytree
from configs.default import Config
from samplers.sampler import (
    DataRange,
    ImageKeys,
    Sampler,
    Samples,
    check_choice,
    check_positive,
    common_fields,
    denoise_at,
)
from sde_lib import SDE
from solvers import ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODESampler(Sampler):
    """Solves the probability-flow ODE by an adaptive solver, see `ode.integrate` ([S21a] Sec. 4.3 and App. D.4).

    The tolerances bound an error averaged over the batch, so images depend on the batch within the tolerances.

    Raises:
        RuntimeError: if a solve fails.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sampling.ode_solver", self.method, ("dopri5", "scipy"))
        ode.check_processes(self.method, "sampling.ode_solver")
        check_positive("sampling.rtol", self.rtol)
        check_positive("sampling.atol", self.atol)

    @property
    def follows_ode(self) -> bool:
        return True

    def solve(self, score_fn: ScoreFn, x: Batch, keys: ImageKeys, progress: ReportProgress | None = None) -> Samples:
        x, nfe = self._integrate(score_fn, x, self.sde.t_max, self.smallest_time, progress)
        if self.noise_removal:
            x = denoise_at(score_fn, self.sde, x, self.smallest_time)
        return Samples(x, nfe + self.noise_removal)

    def encode(self, score_fn: ScoreFn, x: Batch, progress: ReportProgress | None = None) -> Samples:
        """Computes the latents of images: x at t_max from x at smallest_time."""
        return Samples(*self._integrate(as_pytree(score_fn), x, self.smallest_time, self.sde.t_max, progress))

    def decode(self, score_fn: ScoreFn, latents: Batch, progress: ReportProgress | None = None) -> Samples:
        """Inverts `encode`, to the tolerances of the solver. It removes no noise."""
        return Samples(*self._integrate(as_pytree(score_fn), latents, self.sde.t_max, self.smallest_time, progress))

    def _integrate(
        self, score_fn: ScoreFn, x: Batch, start: float, end: float, progress: ReportProgress | None
    ) -> tuple[Batch, int]:
        settings = {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        x, info = ode.integrate(_ProbabilityFlow(self.sde, score_fn), x, start, end, **settings, progress=progress)
        info.require_success()
        return x, int(info.nfe)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("score_fn",), meta_fields=("sde",))
@dataclasses.dataclass(frozen=True)
class _ProbabilityFlow:
    sde: SDE
    score_fn: ScoreFn

    def __call__(self, t: Float[Array, ""], x: Batch) -> Batch:
        return self.sde.probability_flow(self.score_fn, x, jnp.full(x.shape[0], t))


def ode_from_config(config: Config, sde: SDE, data_range: DataRange = None) -> ODESampler:
    """Builds the sampler by the ODE with the fields of `sampling`, for every sampling.method."""
    del data_range
    sampling = config.sampling
    fields = common_fields(config, sde)
    return ODESampler(method=sampling.ode_solver, rtol=sampling.rtol, atol=sampling.atol, **fields)
