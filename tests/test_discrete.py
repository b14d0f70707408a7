"""Discrete time: chains against their SDEs, the loss against the continuous-time loss, labels, and configurations."""

import functools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from build import build
from configs.default import Config
from configs.digits.smoke import get_config as digits
from configs.score_sde import CONFIGURATIONS, get_config
from configs.toy.smoke import get_config as points
from losses import TERMS, Objective
from models.score import ScoreModel
from objectives.discrete import DiscreteNoise, DiscreteObjective
from objectives.objective import Noise
from sde_lib import SDE, VESDE, VPSDE, chain_times
from tests.analytic import asymmetric_mixture

ROOT = Path(__file__).parent.parent
VE, VP = VESDE(0.01, 5.0), VPSDE()
DENSITY = asymmetric_mixture(2)

each_chain = pytest.mark.parametrize("sde", [VE, VP], ids=["SMLD", "DDPM"])


@each_chain
@pytest.mark.parametrize("levels", [21, 232, 1000])
def test_every_level_has_a_time_of_its_own(sde: SDE, levels: int) -> None:
    """i / (N - 1) in float32, times N - 1, would be rounded to less than i for some levels."""
    times = np.asarray(chain_times(levels))
    assert (times[0], times[-1]) == (0, 1)
    np.testing.assert_allclose(times, np.arange(levels) / (levels - 1), atol=1e-7)
    sigma = np.asarray(sde.chain_alpha_sigma(chain_times(levels), levels)[1])
    assert np.all(np.diff(sigma) > 0)


@each_chain
def test_steps_of_the_forward_chain_compose_to_its_marginals(sde: SDE) -> None:
    """x_i = x_{i-1} + f_i + G_i z has the scale and the variance of `chain_alpha_sigma`, by recursion in float64."""
    levels = 50
    times = chain_times(levels)
    drift, diffusion = sde.discretize(jnp.ones((levels, 1)), times, levels)
    kept, added = 1 + np.asarray(drift[:, 0], np.float64), np.asarray(diffusion, np.float64) ** 2
    variance, variances = 0.0, []
    for factor, noise in zip(kept, added, strict=True):
        variance = factor**2 * variance + noise
        variances.append(variance)
    alpha, sigma = sde.chain_alpha_sigma(times, levels)
    np.testing.assert_allclose(alpha, np.cumprod(kept), rtol=1e-5)
    np.testing.assert_allclose(sigma, np.sqrt(variances), rtol=1e-5)


@each_chain
def test_marginals_of_the_chain_approach_those_of_the_sde(sde: SDE) -> None:
    """The distance between alpha and sigma of level i = t N and the SDE's alpha and sigma at t falls as 1 / N."""

    def distance(levels: int) -> float:
        t = jnp.array([0.25, 0.5, 0.75])
        got, exact = sde.chain_alpha_sigma(t, levels), sde.alpha_sigma(t)
        return float(sum(jnp.max(jnp.abs(a / b - 1)) for a, b in zip(got, exact, strict=True)))

    # floor(t (N - 1)) moves the level by up to one step, so the distances are bounded, not proportional
    assert 0 < distance(4000) < 0.2 * distance(200) < 0.1


@each_chain
def test_the_loss_approaches_that_of_continuous_time(sde: SDE) -> None:
    """The mean over N levels converges to the integral over times as 1 / N, for the same examples and noise."""
    keys = jax.random.split(jax.random.key(0))
    x0, z = DENSITY.sample(keys[0], (64, 2)), jax.random.normal(keys[1], (64, 2))
    score_fn = DENSITY.score_fn(sde)

    def mean_over(times: jax.Array, loss: Any) -> float:
        """Returns the mean of the loss over times and examples."""
        return float(jnp.mean(jax.jit(jax.vmap(lambda t: loss(jnp.full(64, t))["first"]))(times)))

    def discrete(levels: int) -> float:
        objective = DiscreteObjective(levels)
        loss = functools.partial(objective.losses, score_fn, sde, x0)
        return mean_over(chain_times(levels), lambda t: loss(DiscreteNoise(t, z)))

    continuous = functools.partial(Objective().losses, score_fn, sde, x0)
    middles = (jnp.arange(1000) + 0.5) / 1000
    exact = mean_over(middles, lambda t: continuous(Noise(t, z, z)))
    errors = [abs(discrete(levels) - exact) for levels in (40, 400)]
    assert errors[1] < 0.01 * exact
    assert 4 < errors[0] / errors[1] < 25


@each_chain
def test_half_the_sum_and_uniform_levels(sde: SDE) -> None:
    objective = DiscreteObjective(21, reduce_mean=False)
    noise = objective.draw_noise(jax.random.key(0), sde, (4000, 3))
    losses, means = (
        o.losses(lambda x, t: -x, sde, jnp.ones((4000, 3)), noise) for o in (objective, DiscreteObjective(21))
    )
    np.testing.assert_allclose(losses["total"], 1.5 * means["total"], rtol=1e-6)
    assert losses.keys() - {"total"} <= TERMS.keys()
    levels = np.rint(np.asarray(noise.t) * 20).astype(int)
    np.testing.assert_array_equal(noise.t, chain_times(21)[levels])
    counts = np.bincount(levels, minlength=21)
    assert np.all(np.abs(counts - 4000 / 21) < 5 * np.sqrt(4000 / 21))


class Labels(nn.Module):
    """A network that returns its labels."""

    scale_by_sigma: bool = False

    @nn.compact
    def __call__(self, x: Any, labels: Any, train: bool) -> Any:
        return jnp.broadcast_to(labels[:, None], x.shape)


def test_labels_and_scores_of_discrete_models() -> None:
    """SMLD counts levels from the largest noise, and its output is the score. DDPM predicts the noise."""
    levels = 25
    x, t = jnp.zeros((levels, 1)), chain_times(levels)
    number = np.arange(levels)
    smld = ScoreModel(Labels(), VE, levels).score_fn({})(x, t)[:, 0]
    np.testing.assert_array_equal(smld, levels - 1 - number)
    ddpm = ScoreModel(Labels(), VP, levels).score_fn({})(x, t)[:, 0]
    sigma = np.asarray(VP.chain_alpha_sigma(t, levels)[1])
    np.testing.assert_allclose(-ddpm * sigma, number, rtol=1e-6)
    between = ScoreModel(Labels(), VP, levels).score_fn({})(x[:1], jnp.array([3.5 / 24]))[0, 0]
    assert -between * sigma[3] == pytest.approx(3.5), "labels are not rounded, but sigma is that of the level below"


def test_continuous_models_are_as_before() -> None:
    x, t = jnp.zeros((3, 1)), jnp.array([0.2, 0.5, 1.0])
    by_sigma = ScoreModel(Labels(scale_by_sigma=True), VE)
    np.testing.assert_allclose(by_sigma.score_fn({})(x, t)[:, 0], VE.alpha_sigma(t)[1])
    expected = -999 * t / VP.alpha_sigma(t)[1]
    np.testing.assert_allclose(ScoreModel(Labels(), VP).score_fn({})(x, t)[:, 0], expected, rtol=1e-6)


def ddpm_of_points() -> Config:
    config = points()
    config.training.update(sde="vpsde", continuous=False, batch_size=16, score_matching_order=1)
    config.model.update(scale_by_sigma=False, num_scales=30)
    return config


def test_training_in_discrete_time() -> None:
    run = build(ddpm_of_points())
    assert run.model.levels == 30
    described = run.network_description()
    assert (described["training.continuous"], described["model.num_scales"]) == (False, 30)
    batch = jnp.asarray(DENSITY.sample(jax.random.key(1), (16, 2)))
    state, metrics = jax.jit(run.trainer.train_step)(run.fresh_state(), batch, run.key(1))
    assert metrics.keys() == {"total", "first", "grad_norm", "failed", "largest_times"}
    assert (int(state.step), int(metrics["failed"])) == (1, 0)
    assert np.all(np.isin(metrics["largest_times"], chain_times(30)))


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (digits, {}, "embedding_type is 'fourier'.* 'positional'"),
        (
            digits,
            {"training.sde": "subvpsde", "model.scale_by_sigma": False, "model.embedding_type": "positional"},
            "is False.* vesde or",
        ),
        (digits, {"model.name": "ncsn", "training.sde": "vpsde", "model.scale_by_sigma": False}, "training.sde=vesde"),
        (digits, {"model.name": "ncsnv2_64", "training.continuous": True}, "training.continuous=False"),
        (digits, {"model.name": "ddpm", "training.continuous": True}, "set training.continuous=False"),
        (digits, {"model.name": "ddpm", "model.normalization": "GroupNorm"}, "multiple of 32"),
        (points, {}, "mlp sees numbers of noise levels"),
        (ddpm_of_points, {"model.num_scales": 20}, "needs more than 20.0 steps, got 20"),
        (ddpm_of_points, {"model.num_scales": 1, "training.sde": "vesde"}, "at least 2 noise levels"),
        (ddpm_of_points, {"training.score_matching_order": 2}, "score_matching_order is 2.*continuous=True"),
        (ddpm_of_points, {"model.beta_min": 0.0}, "model.beta_min is 0, so the first noise level has no noise"),
        (ddpm_of_points, {"training.likelihood_weighting": True}, "likelihood_weighting is True.*continuous=True"),
        (ddpm_of_points, {"training.first_order_weighting": "residual"}, "first_order_weighting.*continuous=True"),
    ],
)
def test_what_discrete_time_does_not_have_is_refused(make: Any, fields: dict[str, Any], message: str) -> None:
    config = make()
    config.training.continuous = False
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        build(config)


def test_configurations_of_score_sde_can_be_built() -> None:
    for name in CONFIGURATIONS:
        run = build(get_config(name))
        assert (run.model.levels is None) == run.config.training.continuous
        run.sampler()


@pytest.mark.parametrize("name", ["", "vp/ddpm/cifar100"])
def test_unknown_configurations_of_score_sde_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a name after the colon.*vp/ddpm/cifar10,"):
        get_config(name)


def test_names_that_are_also_files() -> None:
    files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/*/*.py")}
    docstring = (ROOT / "configs" / "score_sde.py").read_text().split('"""')[1]
    count = re.search(r"(\d+) of the\s+names are also", docstring)
    assert count is not None
    assert int(count[1]) == len(files & CONFIGURATIONS.keys())
