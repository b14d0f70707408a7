"""NCSN, NCSNv2 and DDPM: normalisations, the ladder of noise levels, and fields that are refused."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ddpm import DDPM
from models.ladder import Ladder
from models.ncsn import NCSN
from models.ncsnpp import NCSNpp
from models.ncsnv2 import NCSNv2, NCSNv2_256
from models.normalization import ConditionalInstanceNorm2dPlus, InstanceNorm2d, InstanceNorm2dPlus, VarianceNorm2d

KEY = jax.random.key(0)
LADDER = Ladder(sigma_min=0.01, sigma_max=10.0, levels=4)
X = 3 + jnp.array([1.0, 2.0, 5.0]).reshape(1, 1, 1, 3) * jax.random.normal(jax.random.key(1), (2, 4, 6, 3))


def test_the_ladder_is_geometric_from_the_largest_level() -> None:
    np.testing.assert_allclose(LADDER.sigma(jnp.arange(4.0)), [10, 1, 0.1, 0.01], rtol=1e-5)


def test_instance_normalisation_standardises_channels() -> None:
    out, _ = InstanceNorm2d().init_with_output(KEY, X)
    np.testing.assert_allclose(jnp.mean(out, (1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.var(out, (1, 2)), 1, rtol=1e-3)


def test_variance_normalisation_keeps_the_ratio_of_mean_and_deviation() -> None:
    out, _ = VarianceNorm2d().init_with_output(KEY, X)
    ratio = lambda x: jnp.mean(x, (1, 2)) / jnp.std(x, (1, 2))  # noqa: E731
    np.testing.assert_allclose(ratio(out), ratio(X), rtol=1e-4)


def test_conditional_normalisation_has_the_factors_of_its_level() -> None:
    variables: Any = ConditionalInstanceNorm2dPlus(2).init(KEY, X, jnp.zeros(2))
    out = ConditionalInstanceNorm2dPlus(2).apply(variables, X, jnp.array([1.0, 0.0]))
    for example, level in ((0, 1), (1, 0)):
        row = variables["params"]["Embed_0"]["embedding"][level]
        gamma, alpha, beta = (part.reshape(1, 1, 1, 3) for part in jnp.split(row, 3))
        assert float(jnp.abs(beta).max()) == 0
        plain: Any = InstanceNorm2dPlus().apply({"params": {"gamma": gamma, "alpha": alpha, "beta": beta}}, X)
        np.testing.assert_allclose(jnp.asarray(out)[example], plain[example], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ladder(0.1, 1.0, 1), "at least 2 noise levels"),
        (lambda: Ladder(1.0, 0.1, 10), "sigma_min < sigma_max"),
        (lambda: NCSNv2(LADDER, normalization="BatchNorm"), "known: GroupNorm"),
        (lambda: NCSNv2(LADDER, interpolation="cubic"), "known: bilinear"),
        (lambda: NCSN(LADDER, normalization="InstanceNorm"), "must be 'InstanceNorm\\+\\+'"),
        (lambda: DDPM(nf=48), "a multiple of 32"),
        (lambda: NCSNv2(LADDER, nf=48, normalization="GroupNorm"), "a multiple of 32"),
        (lambda: NCSNpp(ladder=LADDER, embedding_type="fourier"), "positional"),
    ],
)
def test_fields_out_of_range_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_images_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        jax.eval_shape(lambda: NCSNv2_256(LADDER).init(KEY, jnp.zeros((1, 12, 8, 1)), jnp.zeros(1), False))
