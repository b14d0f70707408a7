import jax
import jax.numpy as jnp
import numpy as np
import pytest

from derivatives import (
    PROBES,
    exact_divergence,
    exact_jacobian,
    exact_trace_gradient,
    probe_divergence,
    probe_trace_gradient,
)
from sde_lib import VPSDE
from sources.marginals import sample_at
from tests.analytic import asymmetric_mixture

DENSITY = asymmetric_mixture(4)
T = jnp.full(3, 0.2)


@jax.jit
def field(x):
    return DENSITY.score(VPSDE(), x, jnp.full(len(x), 0.2))


# One compilation each: operation by operation, they would take a hundred.
compiled_jacobian = jax.jit(exact_jacobian, static_argnums=0)
compiled_trace_gradient = jax.jit(exact_trace_gradient, static_argnums=0)


@pytest.fixture
def x():
    return sample_at(DENSITY, VPSDE(), jax.random.key(0), T).reshape(-1, 2, 2)


@jax.jit
def jacobians(x):
    """By reverse mode on single examples, independent of the code under test."""
    return jax.vmap(jax.jacrev(lambda one: field(one.reshape(1, 2, 2)).reshape(-1)))(x.reshape(len(x), -1))


def test_exact_forms(x):
    value, jacobian = compiled_jacobian(field, x)
    np.testing.assert_allclose(value, field(x))
    np.testing.assert_allclose(jacobian, jacobians(x), rtol=1e-4, atol=1e-4)
    _, divergence = jax.jit(exact_divergence, static_argnums=0)(field, x)
    np.testing.assert_allclose(divergence, jnp.trace(jacobians(x), axis1=1, axis2=2), rtol=1e-4)
    trace = jax.jit(jax.vmap(jax.grad(lambda one: jnp.trace(jacobians(one[None])[0]))))(x)
    value, jacobian, gradient = compiled_trace_gradient(field, x)
    np.testing.assert_allclose(gradient, trace, rtol=1e-3, atol=1e-3)
    assert jnp.max(jnp.abs(trace)) > 0.1, "a field with no third derivatives tests nothing"


def test_many_columns_at_once_are_those_one_by_one(x, monkeypatch):
    one_by_one = compiled_trace_gradient(field, x)
    monkeypatch.setattr("derivatives.UNROLLED_DIMS", 3)
    at_once = jax.jit(lambda x: exact_trace_gradient(field, x))(x)
    for a, b in zip(at_once, one_by_one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_probe_forms_agree_with_the_jacobian(x):
    probe = PROBES["gaussian"](jax.random.key(1), x.shape)
    flat = probe.reshape(len(x), -1)
    expected = jnp.einsum("bi,bij,bj->b", flat, jacobians(x), flat)
    divergence, (value, jacobian_probe, gradient) = jax.jit(
        lambda x, probe: (probe_divergence(field, x, probe)[1], probe_trace_gradient(field, x, probe))
    )(x, probe)
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)
    np.testing.assert_allclose(value, field(x))
    np.testing.assert_allclose(
        jacobian_probe.reshape(len(x), -1), jnp.einsum("bij,bj->bi", jacobians(x), flat), rtol=1e-3, atol=1e-3
    )
    quadratic = jax.jit(jax.grad(lambda x: jnp.sum(jnp.einsum("bi,bij,bj->b", flat, jacobians(x), flat))))(x)
    np.testing.assert_allclose(gradient, quadratic, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", PROBES)
def test_probes_are_unbiased(x, kind):
    """Over many probes, the mean of each estimate is the exact derivative within 5 standard errors."""
    keys = jax.random.split(jax.random.key(2), 2000)

    def estimates(key):
        derivatives = probe_trace_gradient(field, x, PROBES[kind](key, x.shape))
        return probe_divergence(field, x, PROBES[kind](key, x.shape))[1], derivatives.trace_gradient

    divergences, gradients = jax.jit(lambda keys: jax.lax.map(estimates, keys))(keys)
    _, jacobian, exact_gradient = compiled_trace_gradient(field, x)
    for values, truth in ((divergences, jnp.trace(jacobian, axis1=1, axis2=2)), (gradients, exact_gradient)):
        error = jnp.std(values, axis=0, ddof=1) / jnp.sqrt(len(keys))
        assert jnp.all(jnp.abs(jnp.mean(values, axis=0) - truth) < 5 * error)
