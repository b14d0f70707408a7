"""Convolutions in loops on CPUs.

XLA's CPU compiler calls its fast routine only for convolutions whose arrays are laid out as [batch, *space, channels]
and whose kernels as [*space, in, out]. It transposes others to this form, but only outside of loops: in a loop, the
gradients of convolutions, which exchange the roles of batch and channels, run 5 to 25 times longer. So they are
transposed here, where JAX lowers them for a CPU.
"""

from typing import Any

import jax
from jax import lax
from jax._src.lax.convolution import _conv_general_dilated_lower as lower  # JAX has no public name for it
from jax.interpreters import mlir


def _lower_transposed(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    """Lowers a convolution for a CPU, with transposes of its arguments and result if they have another order."""
    numbers = params["dimension_numbers"]
    rank = len(numbers.lhs_spec)
    # The spec of an image lists its axes in the order batch, channels, space; of a kernel: out, in, space.
    image, kernel = (0, rank - 1, *range(1, rank - 1)), (rank - 1, rank - 2, *range(rank - 2))
    wanted = lax.ConvDimensionNumbers(image, kernel, image)
    if numbers == wanted or params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return lower(ctx, lhs, rhs, expand_complex_convolutions=True, **params)

    def transposed(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        lhs = lax.transpose(lhs, _order(numbers.lhs_spec, image))
        rhs = lax.transpose(rhs, _order(numbers.rhs_spec, kernel))
        out = lax.conv_general_dilated_p.bind(lhs, rhs, **{**params, "dimension_numbers": wanted})
        return lax.transpose(out, _order(image, numbers.out_spec))

    return mlir.lower_fun(transposed, multiple_results=False)(ctx, lhs, rhs)


def _order(given: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the permutation of the axes of an array with one spec that gives it the other."""
    return tuple(given[wanted.index(axis)] for axis in range(len(given)))


mlir.register_lowering(lax.conv_general_dilated_p, _lower_transposed, platform="cpu")
