"""The score of the density of the ODE itself for images, as the gradient of the likelihood that one solve computes.

`ode_score` solves [L22] App. D with adaptive steps in time, and solves x twice. Images need a cheaper solve: here, the
path forward from x is solved once with equal steps in the coordinates of coordinates.py, and its states are kept. With
y' = F(y) and ln p = ln prior(y_T) + integral of a rate r(y), the gradient c = grad_y ln p along this path obeys

    c' = -grad_y (r + F . c),  c held constant inside the brackets,

and is solved back from the prior along the kept states, with the same steps. Each probe has its own r and c, and all
probes share the path. So k estimates cost one evaluation of the network and k reverse passes at each step. So the solve
back always follows the path. In `ode_score`, it can miss x where the flow contracts.

Sources: [L22] Lu et al., ICML 2022.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arrays import Batch, ReportProgress, Scalar, ScoreFn, as_pytree, inner
from likelihood import GaussianReference, Probes, ReferenceField, ReferencePath
from sde_lib import SDE
from solvers.ode import Node, adams_path, adams_step

Scores = Float[Array, "k batch *dims"]
"""An estimate of the score for each probe."""


def likelihood_gradients(
    score_fn: ScoreFn,
    sde: SDE,
    x: Batch,
    t: float | Scalar,
    probes: Probes,
    *,
    reference: GaussianReference,
    num_steps: int,
    progress: ReportProgress | None = None,
) -> Scores:
    """Computes grad_x ln p_t(x) of the density of the ODE, once with each probe.

    Given x, the results of different probes are independent, and each is unbiased except for the error of the solver.
    The results of an example do not depend on the others. Other times and parameters compile nothing if the score
    function is a pytree.

    The solve back is a loop on the host over compiled steps, because XLA's gradients of convolutions take five times as
    long in compiled loops on CPUs.

    Args:
        t: the time of all examples, in (0, T).
        probes: for the divergence, fixed along the path, with independent entries of mean 0 and variance 1.
        reference: for the coordinates; see coordinates.py. The moments of the data give the smallest error.
        num_steps: equal steps of the Adams method of `ode.integrate`, between t and T.
        progress: called after each step back.

    Returns:
        An estimate for each probe. If a solve fails, they are not finite.
    """
    solve = _Solve(as_pytree(score_fn), probes, reference, jnp.asarray(t, x.dtype), sde)
    taus, ys, gradients = _forward(solve, x, num_steps=num_steps)
    slopes = (jnp.zeros_like(gradients),) * 3
    for number in range(num_steps + 1):
        # Step 0 has no length. It evaluates the rate at T.
        step = jnp.int32(max(number - 1, 0)), jnp.where(number == 0, 0, taus[0] - taus[1])
        gradients, slopes = _step_back(solve, taus[-1 - number], ys[-1 - number], gradients, slopes, *step)
        if progress is not None:
            jax.block_until_ready(gradients)
            progress(number, num_steps)
    return _in_data_space(solve, gradients)


@partial(jax.tree_util.register_dataclass, data_fields=["score_fn", "probes", "reference", "t"], meta_fields=["sde"])
@dataclasses.dataclass(frozen=True)
class _Solve:
    """The settings of a solve from t to T and back."""

    score_fn: ScoreFn
    probes: Probes
    reference: GaussianReference
    t: Scalar
    sde: SDE

    @property
    def path(self) -> ReferencePath:
        return ReferencePath(self.reference, self.sde, self.t)

    def flow(self, tau: Scalar, y: Batch) -> Batch:
        return self.flow_and_rate(tau, y, self.probes[0])[0]  # XLA does not compute the unused rate

    def flow_and_rate(self, tau: Scalar, y: Batch, probe: Batch) -> tuple[Batch, Float[Array, "batch 1"]]:
        field = ReferenceField(self.score_fn, probe[None], self.path)
        return field(tau, (y, jnp.zeros((len(y), 1), y.dtype)))


@partial(jax.jit, static_argnames="num_steps")
def _forward(solve: _Solve, x: Batch, *, num_steps: int) -> tuple[Array, Array, Scores]:
    """Returns the values of tau between t and T, the states there, and the gradients of the prior at T."""
    path, end = solve.path, jnp.asarray(solve.sde.t_max, x.dtype)
    taus = jnp.linspace(*path.ends(x.dtype), num_steps + 1)
    with jax.default_matmul_precision("highest"):
        ys = adams_path(solve.flow, path.normalize(x, solve.t), taus)
        at_end = jax.grad(lambda y: jnp.sum(solve.sde.prior_logp(path.unnormalize(y, end))))(ys[-1])
    return taus, ys, jnp.broadcast_to(at_end[None], solve.probes.shape)


@jax.jit
def _step_back(
    solve: _Solve,
    tau: Scalar,
    y: Batch,
    gradients: Scores,
    slopes: tuple[Scores, Scores, Scores],
    number: Int[Array, ""],
    length: Scalar,
) -> tuple[Scores, tuple[Scores, Scores, Scores]]:
    """Takes a step of the solve back, to tau, where the path is at y. Returns the gradients there and the slopes."""

    def rate(_: Scalar, gradients: Scores) -> Scores:
        def potential(y: Batch, probe: Batch, gradient: Batch) -> Scalar:
            value, rate = solve.flow_and_rate(tau, y, probe)
            # Examples do not interact, so the gradient of the sum over the batch is each example's own.
            return jnp.sum(rate) + jnp.sum(inner(value, gradient))

        return -jax.vmap(jax.grad(potential), in_axes=(None, 0, 0))(y, solve.probes, gradients)

    with jax.default_matmul_precision("highest"):
        gradients, slope = adams_step(rate, Node(tau, gradients, slopes), length, number)
    return gradients, (slope, *slopes[:2])


@jax.jit
def _in_data_space(solve: _Solve, gradients: Scores) -> Scores:
    """x = alpha m + a y, so that a gradient in x is one in y divided by a."""
    return gradients / solve.path.moments(gradients[0], solve.t)[1][None]
