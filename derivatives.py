"""Derivatives of a vector field on data space: exact for few dimensions, and by Hutchinson probes for many.

A field maps a batch to a batch, example by example: field(x): [batch, *dims]. J is its Jacobian at one example.
A probe v has independent entries with mean 0 and variance 1, so that E[v.Jv] = tr J (Hutchinson, 1990).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, inner, num_dims

Field: TypeAlias = Callable[[Batch], Batch]

PROBES: dict[str, Callable[..., Batch]] = {
    "rademacher": lambda key, shape: jax.random.rademacher(key, shape, dtype=jnp.float32),
    "gaussian": jax.random.normal,
}
"""Functions of (key, shape) that draw probes, by name."""

UNROLLED_DIMS = 4
"""Up to this dimension, Jacobian columns are computed in an unrolled loop instead of vmap.

The columns share one evaluation of the field, as do their gradients, and XLA runs plain matrix products two to three
times as fast as batched ones on a CPU."""


def probe_divergence(field: Field, x: Batch, probe: Batch) -> tuple[Batch, PerExample]:
    """Computes the field and v.Jv, an unbiased estimate of its divergence, at the cost of one forward derivative."""
    value, tangent = jax.jvp(field, (x,), (probe,))
    return value, inner(probe, tangent)


def exact_divergence(field: Field, x: Batch) -> tuple[Batch, PerExample]:
    """Computes the field and its divergence tr J, at the cost of d forward derivatives."""
    value, jacobian = exact_jacobian(field, x)
    return value, jnp.trace(jacobian, axis1=1, axis2=2)


def divergence_estimates(
    field: Field, x: Batch, probes: Float[Array, "k batch *dims"] | None
) -> tuple[Batch, Float[Array, "batch k"]]:
    """Computes the field and k estimates of its divergence, one per probe. Without probes, it is exact, and k = 1."""
    if probes is None:
        value, divergence = exact_divergence(field, x)
        return value, divergence[:, None]
    return jax.vmap(lambda probe: probe_divergence(field, x, probe), out_axes=(None, 1))(probes)


def exact_jacobian(field: Field, x: Batch) -> tuple[Batch, Float[Array, "batch d d"]]:
    """Computes the field and J[b, i, j] = d field_i / d x_j of each example, over flattened dimensions."""
    value, push_forward = jax.linearize(field, x)
    directions = jnp.eye(num_dims(x), dtype=x.dtype).reshape(-1, *x.shape[1:])

    def column(e: Array) -> Batch:
        return push_forward(jnp.broadcast_to(e, x.shape))

    if len(directions) <= UNROLLED_DIMS:
        columns = jnp.stack([column(e) for e in directions])
    else:
        columns = jax.vmap(column)(directions)
    return value, columns.reshape(len(directions), len(x), -1).transpose(1, 2, 0)


class TraceDerivatives(NamedTuple):
    """The value of a field and, for one probe v, J v and grad_x (v.Jv), an unbiased estimate of grad_x tr J."""

    value: Batch
    jacobian_probe: Batch
    trace_gradient: Batch


def probe_trace_gradient(field: Field, x: Batch, probe: Batch) -> TraceDerivatives:
    """Computes `TraceDerivatives` by one forward derivative and one reverse pass over it ([L22] App. G)."""

    def quadratic_form(x: Batch) -> tuple[Float[Array, ""], tuple[Batch, Batch]]:
        value, tangent = jax.jvp(field, (x,), (probe,))
        return jnp.sum(probe * tangent), (value, tangent)

    # Examples do not interact, so the gradient of the sum over the batch is each example's own.
    trace_gradient, (value, tangent) = jax.grad(quadratic_form, has_aux=True)(x)
    return TraceDerivatives(value, tangent, trace_gradient)


class ProbeDerivatives(NamedTuple):
    """The value of a field and, for k probes v and a direction w, its derivatives along them."""

    value: Batch
    jacobian_probes: list[Batch]
    """J v for each probe."""
    jacobian_direction: Batch
    """J w."""
    trace_gradients: list[Batch]
    """grad_x (v.Jv) for each probe; empty without `trace_gradients`."""


def probe_derivatives(
    field: Field, x: Batch, probes: tuple[Batch, ...], direction: Callable[[Batch], Batch], *, trace_gradients: bool
) -> ProbeDerivatives:
    """Computes `ProbeDerivatives`: k + 1 forward derivatives and, with `trace_gradients`, k reverse passes over them.

    The first probe and the direction share one linearisation of the field; without `trace_gradients`, all probes do.
    With them, each further probe has its own, because a reverse pass over all probes at once costs more.

    Args:
        direction: computes w from the value of the field. It must treat the value as constant.
    """
    shared = probes[:1] if trace_gradients else probes

    def quadratic_form(x: Batch) -> tuple[Float[Array, ""], tuple[Batch, list[Batch], Batch]]:
        value, push_forward = jax.linearize(field, x)
        tangents = [push_forward(probe) for probe in shared]
        return jnp.sum(probes[0] * tangents[0]), (value, tangents, push_forward(direction(value)))

    if not trace_gradients:
        _, (value, tangents, along) = quadratic_form(x)
        return ProbeDerivatives(value, tangents, along, [])
    # Examples do not interact, so the gradient of the sum over the batch is each example's own.
    gradient, (value, tangents, along) = jax.grad(quadratic_form, has_aux=True)(x)
    others = [probe_trace_gradient(field, x, probe) for probe in probes[1:]]
    return ProbeDerivatives(
        value,
        [*tangents, *(other.jacobian_probe for other in others)],
        along,
        [gradient, *(other.trace_gradient for other in others)],
    )


def exact_trace_gradient(field: Field, x: Batch) -> tuple[Batch, Float[Array, "batch d d"], Batch]:
    """Computes the field, its Jacobian, and grad_x tr J, for few dimensions.

    One reverse pass over the d forward derivatives gives all d entries of the gradient, at about the same cost again.
    This is cheaper than the d (d + 1) / 2 second forward derivatives by nested jvp or by jet, whose gradients XLA does
    not merge.
    """

    def total_trace(x: Batch) -> tuple[Float[Array, ""], tuple[Batch, Float[Array, "batch d d"]]]:
        value, jacobian = exact_jacobian(field, x)
        return jnp.sum(jnp.trace(jacobian, axis1=1, axis2=2)), (value, jacobian)

    trace_gradient, (value, jacobian) = jax.grad(total_trace, has_aux=True)(x)
    return value, jacobian, trace_gradient
