"""The preconditioned parameterization, and what it changes for networks that do not see the length of their input."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import Batch, PerExample
from configs.digits.smoke import get_config
from models.score import ScoreModel, score_model_from_config
from sde_lib import SDE, VESDE, VPSDE, SubVPSDE

D = 64
each_sde = pytest.mark.parametrize("sde", [VESDE(), VPSDE(), SubVPSDE()], ids=lambda sde: type(sde).__name__)
T = np.array([1e-3, 0.2, 0.6, 1.0])
X = np.random.default_rng(0).normal(size=(4, D))


class Network:
    """A function of what a network receives, in the place of a network."""

    scale_by_sigma = False

    def __init__(self, function: Any) -> None:
        self.function = function

    def lazy_init(self, rngs: Any, *args: Any) -> Any:
        raise NotImplementedError

    def apply(self, variables: Any, x: Batch, labels: PerExample, *args: Any, **kwargs: Any) -> Any:
        return self.function(x)


def score(function: Any, sde: SDE, x: Batch, t: PerExample, parameterization: str = "preconditioned") -> Batch:
    return ScoreModel(Network(function), sde, parameterization=parameterization).score_fn({})(x, t)


@each_sde
def test_without_a_network_it_is_the_score_of_gaussian_data(sde: SDE) -> None:
    with jax.enable_x64(True):
        x, t = jnp.asarray(X), jnp.asarray(T)
        alpha, sigma = sde.alpha_sigma(t)

        def log_density(x: Batch) -> Any:
            return -0.5 * jnp.sum(jnp.sum(x**2, axis=1) / ((0.5 * alpha) ** 2 + sigma**2))

        np.testing.assert_allclose(score(jnp.zeros_like, sde, x, t), jax.grad(log_density)(x), rtol=1e-12)


@each_sde
def test_it_is_the_denoiser_of_the_paper(sde: SDE) -> None:
    """(alpha D - x) / sigma^2 with D of [K22] Eqn. 7 and Table 1 at x / alpha."""
    with jax.enable_x64(True):
        x, t = jnp.asarray(X), jnp.asarray(T)
        alpha, sigma = (a[:, None] for a in sde.alpha_sigma(t))
        y, level, std = x / alpha, sigma / alpha, 0.5
        skip, out = std**2 / (level**2 + std**2), level * std / jnp.sqrt(level**2 + std**2)
        denoised = skip * y + out * jnp.sin(y / jnp.sqrt(level**2 + std**2))
        np.testing.assert_allclose(score(jnp.sin, sde, x, t), (alpha * denoised - x) / sigma**2, rtol=1e-9)


def test_group_norms_leave_an_error_in_the_length_of_the_noise() -> None:
    """A network that sees only the direction of x has r = E|u|^2 / d of at least about 1 / (2 d) at large noise.

    The best length of its output is E|z|, and the variance of |z| is about 1 / 2. The preconditioned score is exact.
    """
    n = 20_000
    z = jax.random.normal(jax.random.key(0), (n, D))
    sde = VESDE(sigma_max=1000.0)
    sigma, t = sde.sigma_max, jnp.ones(n)
    length = math.sqrt(2) * math.exp(math.lgamma((D + 1) / 2) - math.lgamma(D / 2))

    def direction(x: Batch) -> Batch:
        return length * x / jnp.linalg.norm(x, axis=1, keepdims=True)

    square = np.asarray(jnp.sum((z + sigma * score(direction, sde, sigma * z, t, "noise")) ** 2, axis=1))
    assert abs(square.mean() - (D - length**2)) < 5 * square.std() / math.sqrt(n)
    assert (D - length**2) == pytest.approx(0.5, rel=0.01)
    unexplained = z + sigma * score(jnp.zeros_like, sde, sigma * z, t)
    assert float(jnp.max(jnp.abs(unexplained))) < 1e-5


def test_configurations_name_it() -> None:
    config = get_config()
    config.model.parameterization = "preconditioned"
    with pytest.raises(ValueError, match=r"scale_by_sigma is True, .* model.parameterization=preconditioned need"):
        score_model_from_config(config)
    config.model.scale_by_sigma = False
    assert score_model_from_config(config).parameterization == "preconditioned"
