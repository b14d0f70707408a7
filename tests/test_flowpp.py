"""The Flow++ dequantizers: their density is that of the noise they make, also where float32 is hardly enough."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.default import get_config
from models import flowpp
from models.flowpp import ARCHITECTURES, Flowpp, flowpp_from_config, join_columns, mixture_of_logistics, split_columns

SMALL: dict[str, Any] = {"filters": 4, "components": 2, "blocks": 1, "heads": 2, "couplings": 2}


def random_params(network: Flowpp, shape: tuple[int, ...]) -> Any:
    """Parameters with which no layer is nearly the identity."""
    rng, x = np.random.default_rng(0), jnp.zeros(shape)

    def draw(path: Any, like: Any) -> jax.Array:
        normal, name = rng.standard_normal(like.shape), path[-1].key
        if name.endswith(("_g", "_b")):
            value = 0.2 * normal + name.endswith("_g")
        else:
            value = normal / np.sqrt(np.prod(like.shape[:-1]))
        return jnp.asarray(value, like.dtype)

    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, x, False)["params"])
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_q_is_the_density_of_the_noise(name: str) -> None:
    """ln q(u) = ln N(e) - ln |det du/de|, the determinant by autodiff in float64."""
    with jax.enable_x64(True):
        network, shape = Flowpp(**ARCHITECTURES[name] | SMALL), (2, 2, 4, 1)
        params = random_params(network, shape)
        gaussian, images = jax.random.normal(jax.random.key(1), (2, *shape), jnp.float64)
        unit = jax.nn.sigmoid(images)

        @jax.jit
        def evaluate(gaussian: jax.Array) -> Any:
            noise, log_q = network.apply({"params": params}, gaussian, unit, False)
            jacobian = jax.jacfwd(lambda e: network.apply({"params": params}, e, unit, False)[0])(gaussian)
            return noise, log_q, jacobian

        noise, log_q, jacobian = evaluate(gaussian)
        assert noise.dtype == jnp.float64
        assert np.all((noise > 0) & (noise < 1))
        for n in range(2):
            det = np.linalg.slogdet(np.asarray(jacobian[n, ..., n, :, :, :]).reshape(8, 8))[1]
            normal = -0.5 * np.sum(np.square(gaussian[n])) - 4 * np.log(2 * np.pi)
            np.testing.assert_allclose(log_q[n], normal - det, rtol=1e-10)


def test_the_density_integrates_to_one() -> None:
    """E_q[1 / q] is the volume of (0, 1)^d: 1, within 5 standard errors."""
    network, shape = Flowpp(**{**SMALL, "couplings": 1}), (4000, 1, 2, 1)
    params = random_params(network, shape)
    gaussian = jax.random.normal(jax.random.key(2), shape)
    _, log_q = jax.jit(network.apply, static_argnums=3)({"params": params}, gaussian, jnp.full(shape, 0.25), False)
    assert np.std(log_q) > 0.1, "uniform noise would prove nothing"
    volume = np.exp(-np.asarray(log_q, np.float64))
    assert abs(volume.mean() - 1) < 5 * volume.std() / np.sqrt(len(volume))


def test_mixtures_of_logistics_are_exact_far_out() -> None:
    """In float32, 40 widths from every mean, as in float64; the log-determinant as autodiff has it."""
    x = np.array([-40.0, -8.0, -0.3, 0.0, 2.0, 15.0, 40.0])
    raw = np.tile([0.4, -0.7, 1.0, -0.5, 2.0, 0.5, -1.0, 0.8], (len(x), 1))

    def values(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        y, log_det = jax.jit(mixture_of_logistics)(jnp.asarray(x[:, None], dtype), jnp.asarray(raw[:, None], dtype))
        return np.asarray(y[:, 0]), np.asarray(log_det)

    with jax.enable_x64(True):
        exact, exact_log_det = values(jnp.float64)
        slope = jax.jit(jax.vmap(jax.grad(lambda x, r: mixture_of_logistics(x[None, None], r[None, None])[0][0, 0])))
        np.testing.assert_allclose(np.exp(exact_log_det), slope(jnp.asarray(x), jnp.asarray(raw)), rtol=1e-12)
    single, single_log_det = values(jnp.float32)
    np.testing.assert_allclose(single, exact, rtol=2e-6)
    np.testing.assert_allclose(single_log_det, exact_log_det, atol=2e-5)  # sums of terms up to 40 / 0.6


def test_one_logistic_is_an_affine_map() -> None:
    """logit of a logistic's distribution function is (x - mean) / width."""
    x, raw = jnp.linspace(-50.0, 50.0, 11)[:, None], jnp.asarray([0.4, -0.7, 3.0, 1.5, 0.5])
    y, log_det = jax.jit(mixture_of_logistics)(x, jnp.broadcast_to(raw, (11, 1, 5)))
    scale = np.exp(np.tanh(0.4))
    np.testing.assert_allclose(y, scale * (x - 1.5) / np.exp(0.5) - 0.7, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(11, np.tanh(0.4) - 0.5), atol=1e-5)


@pytest.mark.parametrize("layer", ["nin", "conv", "normed_conv"])
def test_first_outputs_are_centered_and_scaled(layer: str) -> None:
    """On the batch it is initialised with, each channel has mean 0 and the standard deviation asked for."""

    class Layer(flowpp.nn.Module):
        @flowpp.nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return getattr(flowpp, layer)(self, "layer", x, 5, init_scale=0.1)

    x = 7 + 3 * jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    out, _ = jax.jit(Layer().init_with_output)(jax.random.key(1), x)
    np.testing.assert_allclose(np.mean(out, axis=(0, 1, 2)), np.zeros(5), atol=1e-5)
    np.testing.assert_allclose(np.std(out, axis=(0, 1, 2)), np.full(5, 0.1), rtol=1e-4)


def test_first_norm_whitens_every_entry() -> None:
    x = 7 + 3 * jax.random.normal(jax.random.key(0), (2, 50, 3, 2, 1))
    ((even, odd), log_det), params = jax.jit(flowpp.Norm().init_with_output)(jax.random.key(1), (x[0], x[1]))
    for half in (even, odd):
        np.testing.assert_allclose(np.mean(half, axis=0), np.zeros((3, 2, 1)), atol=1e-5)
        np.testing.assert_allclose(np.std(half, axis=0), np.ones((3, 2, 1)), rtol=1e-4)
    gains = [params["params"][f"norm{n}_g"] for n in range(2)]
    np.testing.assert_allclose(log_det, np.full(50, np.sum(np.log(gains))), rtol=1e-5)


def test_columns_alternate() -> None:
    images = jnp.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    even, odd = split_columns(images)
    np.testing.assert_array_equal(even[0, :, 1, 0], images[0, :, 2, 0])
    np.testing.assert_array_equal(join_columns((even, odd)), images)


def test_dropout_is_active_in_training_only() -> None:
    shape = (4, 2, 4, 1)
    network, without = (Flowpp(**{**SMALL, "couplings": 1}, dropout=dropout) for dropout in (0.5, 0.0))
    params, x = random_params(without, shape), jnp.full(shape, 0.3)

    def log_q(network: Flowpp, train: bool) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return network.apply({"params": params}, x, x, train, rngs=rngs)[1]

    evaluate = jax.jit(log_q, static_argnums=(0, 1))
    np.testing.assert_array_equal(evaluate(network, False), evaluate(without, False))
    assert np.max(np.abs(evaluate(network, True) - evaluate(network, False))) > 1e-3


def test_an_odd_number_of_columns_is_refused() -> None:
    x = jnp.zeros((1, 4, 5, 1))
    with pytest.raises(ValueError, match="5 columns; the dequantizer needs an even number"):
        jax.eval_shape(lambda: Flowpp(**SMALL).init(jax.random.key(0), x, x, False))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "flow", "deq.name is 'flow'; known: flowpp_cifar10, flowpp_imagenet32, flowpp_imagenet64"),
        ("filters", -8, "deq.filters is -8; it must be at least 1"),
        ("attn_heads", 5, "deq.filters is 96; it must be a multiple of the 5 attention heads"),
        ("dropout", 1.0, r"deq.dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_fields_that_are_not_allowed_are_refused(field: str, value: Any, message: str) -> None:
    deq = get_config().deq
    deq[field] = value
    with pytest.raises(ValueError, match=message):
        flowpp_from_config(deq)
