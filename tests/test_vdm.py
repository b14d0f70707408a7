"""The network of VDM: its initial output, its features, and the configurations that it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.default import Config, get_config
from models.score import ScoreModel, build_network
from models.vdm import VDM, fourier_features
from sde_lib import VPSDE

KEY = jax.random.key(0)


def vdm_config(**fields: Any) -> Config:
    config = get_config()
    config.training.sde = "vpsde"
    config.data.centered = True
    config.model.update(name="vdm", scale_by_sigma=False)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def small() -> tuple[VDM, Any]:
    """Returns a network with attention after every block, and its initial parameters."""
    network = VDM(nf=32, num_res_blocks=1, attn_resolutions=(4,), dropout=0.5)
    return network, jax.jit(lambda key: ScoreModel(network, VPSDE()).init(key, (4, 4, 1)))(KEY)


def test_it_starts_as_the_identity(small: tuple[VDM, Any]) -> None:
    """So the initial score is -x / sigma, as if all of x were noise."""
    network, params = small
    sde, x, t = VPSDE(), jax.random.normal(KEY, (2, 4, 4, 1)), jnp.array([0.1, 0.9])
    sigma = sde.alpha_sigma(t)[1]
    score = jax.jit(lambda params: ScoreModel(network, sde).score_fn(params)(x, t))(params)
    np.testing.assert_allclose(score, -x / sigma[:, None, None, None], rtol=1e-6)


def test_dropout_and_rematerialization(small: tuple[VDM, Any]) -> None:
    """Dropout changes the output; recomputing blocks changes neither parameters nor gradients."""
    network, initial = small
    params = jax.tree.map(lambda leaf: leaf + 0.05 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), initial)
    x, labels = jax.random.normal(KEY, (1, 4, 4, 1)), jnp.array([300.0])

    def loss(network: Any, params: Any, train: bool) -> jax.Array:
        return jnp.sum(network.apply({"params": params}, x, labels, train, rngs={"dropout": KEY}) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=(0, 2))
    plain, grads = gradient(network, params, False)
    again, recomputed = gradient(network.clone(remat="block"), params, False)
    dropped = jax.jit(loss, static_argnums=(0, 2))(network, params, True)
    np.testing.assert_allclose(again, plain, rtol=1e-5)
    # Gradients of biases that a normalisation removes are zero up to rounding, so one scale serves all leaves.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), recomputed, grads)
    assert abs(dropped - plain) > 1e-3 * plain


def test_fourier_features_are_those_of_the_paper() -> None:
    x = jnp.array([0.001, -0.3]).reshape(1, 1, 1, 2)
    angles = 2 * np.pi * np.array([64 * 0.001, 128 * 0.001, 64 * -0.3, 128 * -0.3])
    want = np.concatenate([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(fourier_features(x)[0, 0, 0], want, atol=3e-5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("training__sde", "vesde", "variance exploding"),
        ("training__sde", "linearvesde", "variance exploding"),
        ("model__scale_by_sigma", True, "model.scale_by_sigma is True; with model.name=vdm it must be False"),
        ("model__nf", 48, "multiple of 32"),
        ("model__num_res_blocks", 0, "at least 1"),
        ("model__dropout", 1.0, r"in \[0, 1\)"),
        ("model__dtype", "bfloat16", "'float32'"),
        ("model__remat", "all", "none or one of block, conv"),
        ("data__centered", False, r"needs images in \[-1, 1\]"),
    ],
)
def test_bad_fields_are_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        build_network(vdm_config(**{field: value}))


def test_the_fields_of_the_configuration() -> None:
    network = build_network(vdm_config(model__fourier_features=False, model__remat="True", model__nf=64))
    assert network == VDM(
        nf=64, num_res_blocks=4, attn_resolutions=(16,), fourier_features=False, dropout=0.1, remat="block"
    )
