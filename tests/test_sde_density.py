"""The density of the SDE model: the identity between its KL divergence, l_SM and the gap of the bound."""

import jax
import jax.numpy as jnp
import pytest

from analysis.sde_density import sde_divergence
from arrays import Batch, PerExample, append_dims
from sde_lib import SDE, VESDE, VPSDE
from sources.densities import paper_mixture

MIXTURE = paper_mixture()


@pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=["ve", "vp"])
def test_the_gap_is_the_difference_of_kl_and_bound(sde: SDE) -> None:
    """KL(q_min || p_min) = KL(q_T || prior) + l_SM - gap, with an imperfect score; and 0 with the exact score."""

    def imperfect(x: Batch, t: PerExample) -> Batch:
        scale = append_dims(1 / jnp.sqrt(1 + sde.alpha_sigma(t)[1] ** 2), x)
        return MIXTURE.score(sde, x, t) + strength * scale * jnp.sin(4 * scale * x + 1)

    variance = float(jnp.var(MIXTURE.sample(jax.random.key(0), (100_000, 1))))
    size = {"t_min": 1e-4, "num_steps": 400, "num_cells": 1000}
    strength = 0.5
    result = sde_divergence(imperfect, sde, MIXTURE, variance, **size)
    assert result.kl > 0.01
    assert result.gap > 0.1
    assert result.kl == pytest.approx(result.end + result.score_matching - result.gap, abs=1e-3)
    strength = 0.0
    exact = sde_divergence(imperfect, sde, MIXTURE, variance, **size)
    assert abs(exact.kl) < 3e-5
    assert exact.gap < 1e-4
