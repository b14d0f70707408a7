"""Convolutions as they are lowered for CPUs: their derivatives, and what XLA makes of them in loops."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

import models.cpu_convolution  # noqa: F401  # changes how JAX lowers convolutions

CASES: dict[str, dict[str, Any]] = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "uneven": {"window_strides": (1, 1), "padding": ((2, 0), (0, 1))},
    "strided": {"window_strides": (2, 1), "padding": "VALID"},
    "dilated": {"window_strides": (1, 1), "padding": ((1, 1), (0, 2)), "lhs_dilation": (2, 2), "rhs_dilation": (1, 2)},
    "in groups": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}


def convolution(x: Array, kernel: Array, **settings: Any) -> Array:
    return lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def drawn(number: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(number), shape)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_gradients_are_the_transposes_of_the_convolution(settings):
    """A convolution is linear in the image and in the kernel, so <A x, w> = <x, A^T w>, and so for the kernel."""
    x, kernel = drawn(0, 2, 6, 5, 4), drawn(1, 3, 2, 4 // settings.get("feature_group_count", 1), 6)

    @jax.jit
    def products(x, kernel):
        out, transpose = jax.vjp(lambda x, kernel: convolution(x, kernel, **settings), x, kernel)
        w = jax.random.normal(jax.random.key(2), out.shape)
        of_x, of_kernel = transpose(w)
        return jnp.stack([jnp.vdot(out, w), jnp.vdot(x, of_x), jnp.vdot(kernel, of_kernel)])

    expected, of_x, of_kernel = map(float, products(x, kernel))
    assert of_x == pytest.approx(expected, rel=1e-4)
    assert of_kernel == pytest.approx(expected, rel=1e-4)


def test_another_order_of_the_axes_gives_the_same():
    x, kernel = drawn(0, 2, 6, 5, 4), drawn(1, 3, 2, 4, 6)
    settings = {"window_strides": (1, 1), "padding": "SAME"}
    other = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), kernel.transpose(3, 0, 2, 1), dimension_numbers=("CHWN", "OHIW", "WCNH"), **settings
    )
    np.testing.assert_allclose(other.transpose(2, 3, 0, 1), convolution(x, kernel, **settings), atol=1e-5)


def test_gradients_in_a_loop_have_the_form_of_the_fast_routine():
    def gradients(carry):
        x, kernel = carry
        return jax.grad(lambda x, kernel: jnp.sum(convolution(x, kernel, **CASES["plain"]) ** 2), (0, 1))(x, kernel)

    loop = jax.jit(lambda *carry: lax.fori_loop(0, 3, lambda _, carry: gradients(carry), carry))
    compiled = loop.lower(drawn(0, 2, 6, 5, 4), drawn(1, 3, 2, 4, 6)).compile().as_text() or ""
    assert "while(" in compiled
    forms = re.findall(r"convolution\(.*dim_labels=(\S+?),? ", compiled)
    assert forms == ["b01f_01io->b01f"] * 3, "forward, and the gradients of the image and of the kernel"
