import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrays import Batch, PerExample
from infra.parallel import along_batch, device_mesh
from likelihood import METHODS, GaussianReference, LogLikelihood, bits_per_dim, draw_probes, ode_log_likelihood
from sde_lib import SDE, SDES, VPSDE
from sources.marginals import sample_at
from tests.analytic import DISTINCT_SDES, GaussianMixture, asymmetric_mixture, correlated_gaussian, gaussian

# One object each, and mostly one shape of batch, so that the tests share what they compile.
MIXTURE, GAUSSIAN = asymmetric_mixture(3), correlated_gaussian(3)
VP = VPSDE()
VP_SCORE = MIXTURE.score_fn(VP)
SHAPE = (6, 3)
T_MIN = {"vesde": 1e-5, "linearvesde": 1e-3, "vpsde": 1e-5, "subvpsde": 1e-2, "straightpathsde": 0.0}


@partial(jax.jit, static_argnums=(0, 1, 3))
def data_at(density: GaussianMixture, sde: SDE, t: float, shape: tuple[int, ...]) -> Batch:
    return sample_at(density, sde, jax.random.key(0), jnp.full(shape[:1], t)).reshape(shape)


class MixtureAndGaussian:
    """Batches whose first half is of the mixture and whose second half is of the Gaussian, for one solve of both."""

    @staticmethod
    def score(sde: SDE, x: Batch, t: PerExample) -> Batch:
        n = len(x) // 2
        return jnp.concatenate([MIXTURE.score(sde, x[:n], t[:n]), GAUSSIAN.score(sde, x[n:], t[n:])])

    @staticmethod
    def log_density(sde: SDE, x: Batch, t: PerExample) -> PerExample:
        n = len(x) // 2
        return jnp.concatenate([MIXTURE.log_density(sde, x[:n], t[:n]), GAUSSIAN.log_density(sde, x[n:], t[n:])])


@partial(jax.jit, static_argnums=(0, 1, 4))
def bits_error(
    density: GaussianMixture | type[MixtureAndGaussian], sde: SDE, x: Batch, result: LogLikelihood, t_min: float
) -> PerExample:
    """Error in bits/dim of the solve itself: with the exact score it carries q_{t_min} to q_T, not to the prior."""
    times = jnp.ones(len(x), x.dtype)
    logp = result.divergence + density.log_density(sde, result.latent, sde.t_max * times)
    return (logp - density.log_density(sde, x, t_min * times)) / (x[0].size * math.log(2))


@pytest.mark.parametrize("name", DISTINCT_SDES)
@pytest.mark.parametrize(
    ("density", "method"), [(MixtureAndGaussian, "dopri5"), (MIXTURE, "adams_log")], ids=["both-dopri5", "adams_log"]
)
def test_exact_for_known_densities(name, density, method):
    sde, t_min = SDES[name](), T_MIN.get(name, 1e-3)
    parts = [MIXTURE, GAUSSIAN] if density is MixtureAndGaussian else [density]
    x = jnp.asarray(np.concatenate([data_at(part, sde, t_min, SHAPE) for part in parts]))
    solve = {"t_min": t_min, "method": method, "num_steps": 80, "rtol": 1e-6, "atol": 1e-6}
    result = ode_log_likelihood(partial(density.score, sde), sde, x, None, **solve)
    result.info.require_success()
    errors = np.asarray(bits_error(density, sde, x, result, t_min))
    assert np.max(np.abs(errors)) < 1e-4
    np.testing.assert_allclose(result.prior_logp, jax.jit(sde.prior_logp)(result.latent), rtol=1e-6)
    np.testing.assert_allclose(result.logp, result.prior_logp + result.divergence)


def test_near_the_density_of_the_data():
    """What the identity above leaves out, the prior's mismatch at T and the noise at t_min, is small by itself."""
    x = data_at(MIXTURE, VP, 1e-5, (256, 3))
    result = ode_log_likelihood(VP_SCORE, VP, x, None, t_min=1e-5)
    mismatch = jnp.mean(result.logp - MIXTURE.log_density_of_data(x)) / (3 * math.log(2))
    assert abs(mismatch) < 1e-3


def test_published_protocol_agrees_with_the_solver_on_the_device():
    x = data_at(MIXTURE, VP, 1e-3, SHAPE)
    probes = draw_probes(jax.random.key(4), "rademacher", x.shape)
    ours, scipy = (ode_log_likelihood(VP_SCORE, VP, x, probes, t_min=1e-3, method=m) for m in ("dopri5", "scipy"))
    np.testing.assert_allclose(ours.logp, scipy.logp, atol=3e-4)
    np.testing.assert_allclose(ours.latent, scipy.latent, atol=1e-4)
    assert abs(int(ours.info.nfe) - int(scipy.info.nfe)) <= 12


def test_every_method_computes_the_same_estimate():
    # Rademacher probes give the same estimate in either coordinates, whatever the reference.
    x = data_at(MIXTURE, VP, 1e-3, SHAPE)
    probes = draw_probes(jax.random.key(6), "rademacher", x.shape, 2)
    solve = {
        "t_min": 1e-3,
        "rtol": 1e-6,
        "atol": 1e-6,
        "num_steps": 200,
        "reference": GaussianReference(0.1, np.array([0.7, 0.4, 0.2])),
    }
    results = {m: ode_log_likelihood(VP_SCORE, VP, x, probes, method=m, **solve) for m in METHODS}
    for result in results.values():
        np.testing.assert_allclose(result.divergence_estimates, results["scipy"].divergence_estimates, atol=5e-4)
        np.testing.assert_allclose(result.logp, results["scipy"].logp, atol=5e-4)
        np.testing.assert_allclose(result.latent, results["scipy"].latent, atol=2e-4)
        assert float(result.info.t) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "method"), [("rademacher", "dopri5"), ("gaussian", "dopri5"), ("gaussian", "rk4_log")]
)
def test_probes_estimate_the_exact_divergence(kind, method):
    x = data_at(MIXTURE, VP, 1e-3, SHAPE)
    solve = {"t_min": 1e-3, "method": method, "num_steps": 40, "reference": GaussianReference(MIXTURE.mean, 0.5)}
    exact = ode_log_likelihood(VP_SCORE, VP, x, None, **solve)
    probes = draw_probes(jax.random.key(8), kind, x.shape, 200)
    estimate = ode_log_likelihood(VP_SCORE, VP, x, probes, **solve)
    assert jnp.all(estimate.probe_error > 0)
    assert jnp.all(jnp.abs(estimate.logp - exact.logp) < 5 * estimate.probe_error)
    standard_error = jnp.std(estimate.divergence_estimates, axis=1, ddof=1) / math.sqrt(200)
    np.testing.assert_allclose(estimate.probe_error, standard_error, rtol=1e-4)


@pytest.mark.parametrize("name", DISTINCT_SDES)
def test_nothing_is_left_to_integrate_for_the_reference_gaussian(name):
    mean, std = np.array([0.3, -0.2, 0.5]), np.array([0.2, 0.4, 0.3])
    density, sde, t_min = gaussian(mean, np.diag(std**2)), SDES[name](), T_MIN.get(name, 1e-3)
    x = data_at(density, sde, t_min, SHAPE)
    solve = {"t_min": t_min, "method": "rk4_log", "num_steps": 2, "reference": GaussianReference(mean, std)}
    result = ode_log_likelihood(density.score_fn(sde), sde, x, None, **solve)
    assert jnp.max(jnp.abs(bits_error(density, sde, x, result, t_min))) < 1e-5


@pytest.mark.parametrize(
    ("method", "steps", "order"),
    # Adams starts with steps of lower order, whose errors stay when the others have gone.
    [("rk4_log", (40, 80, 160), 3.5), ("adams_log", (64, 128, 256), 3.0)],
)
def test_fixed_steps_converge_fast(method, steps, order):
    with jax.enable_x64(True):
        x = jnp.linspace(-1.5, 1.5, 36, dtype=jnp.float64).reshape(12, 3)

        @partial(jax.jit, static_argnums=0)
        def errors(num_steps: int) -> tuple[PerExample, PerExample]:
            solve = {"t_min": 1e-3, "method": method, "num_steps": num_steps}
            result = ode_log_likelihood(VP_SCORE, VP, x, None, **solve)
            return bits_error(MIXTURE, VP, x, result, 1e-3), result.solver_error / (3 * math.log(2))

        sizes = np.array([[np.sqrt(np.mean(e**2)) for e in errors(n)] for n in steps])
    assert np.all(np.log2(sizes[:-1, 0] / sizes[1:, 0]) > order)
    # the estimate follows the error: near it for Adams, well above it for Runge-Kutta
    ratio = sizes[:, 1] / sizes[:, 0]
    assert np.all((ratio > 0.3) & (ratio < (2 if method == "adams_log" else 20)))


def test_fixed_steps_do_not_depend_on_the_rest_of_the_batch():
    x = data_at(MIXTURE, VP, 1e-3, SHAPE)
    probes = jax.random.rademacher(jax.random.key(14), (1, *x.shape), x.dtype)
    solve = {"t_min": 1e-3, "method": "rk4_log", "num_steps": 20}
    whole = ode_log_likelihood(VP_SCORE, VP, x, probes, **solve)
    other = ode_log_likelihood(VP_SCORE, VP, x.at[3:].multiply(2.0), probes, **solve)
    np.testing.assert_array_equal(whole.logp[:3], other.logp[:3])
    assert jnp.all(whole.logp[3:] != other.logp[3:])
    assert jnp.all(jnp.isnan(whole.probe_error))  # of one probe no error can be told


def score_that_breaks(x, t):
    broken = (t[:, None] > 0.5) & (jnp.arange(len(x))[:, None] == 2)
    return jnp.where(broken, jnp.nan, -x)


@pytest.mark.parametrize("method", ["dopri5", "rk4_log"])
def test_failure_names_time_and_example(method):
    result = ode_log_likelihood(score_that_breaks, VP, jnp.ones(SHAPE), None, t_min=1e-3, method=method)
    with pytest.raises(RuntimeError, match=r"at t = 0\.[45]\d* after \d+ steps; example 2 "):
        result.info.require_success()


def test_new_parameters_trace_nothing_anew():
    traces = []

    def score(weight, x, t):
        traces.append(1)
        return -weight * x

    def solve(weight: float) -> int:
        score_fn = jax.tree_util.Partial(score, jnp.float32(weight))
        ode_log_likelihood(score_fn, VP, jnp.ones(SHAPE), None, t_min=1e-3).info.require_success()
        return len(traces)

    assert solve(1.0) == solve(1.5)


@pytest.mark.parametrize("method", ["dopri5", "rk4_log"])
def test_matrix_products_have_full_precision(method):
    score_fn = jax.tree_util.Partial(lambda weight, x, t: x @ weight, -jnp.eye(3))
    solve = partial(ode_log_likelihood, score_fn, VP, probes=None, t_min=1e-3, method=method)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda x: solve(x=x))(jnp.ones(SHAPE)))


def test_bits_per_dim_are_those_of_the_discrete_image():
    x = data_at(MIXTURE, VP, 1e-3, SHAPE)
    result = ode_log_likelihood(VP_SCORE, VP, x, None, t_min=1e-3, method="rk4_log")
    # y = (x + 1) / 2 has density 2^d p(x), and one of 17 levels a probability of density / 17^d.
    log2_probability = result.logp / math.log(2) + 3 * (math.log2(2) - math.log2(17))
    bits = bits_per_dim(result.terms, num_dims=3, levels=17, unit_scale=0.5)
    np.testing.assert_allclose(bits["bpd"], -log2_probability / 3, rtol=1e-5)
    assert bits.keys() == {"prior", "divergence", "levels", "scaler", "bpd"}
    np.testing.assert_allclose(sum(bits.values()) - bits["bpd"], bits["bpd"], rtol=1e-6)
    constants = bits_per_dim(result.terms, num_dims=3, levels=256, unit_scale=0.5)
    np.testing.assert_allclose(constants["levels"] + constants["scaler"], 7.0)


def test_bits_per_dim_keep_the_kind_and_precision_of_their_terms():
    nats = {"a": np.array([1.0, 2.0]), "b": np.array([0.5, 1e-12])}
    scaling = {"num_dims": 5, "levels": 17, "unit_scale": 0.5}
    bits = bits_per_dim(nats, **scaling, importance_sampling=np.array([-0.1, -0.2]))
    assert list(bits) == ["a", "b", "levels", "scaler", "importance_sampling", "bpd"]
    assert {value.dtype for value in bits.values()} == {np.dtype(np.float64)}
    total = (nats["a"] + nats["b"] + [-0.1, -0.2]) / (5 * math.log(2)) + math.log2(17) - 1
    np.testing.assert_allclose(bits["bpd"], total, rtol=1e-14)
    on_device = jax.jit(lambda nats: bits_per_dim(nats, **scaling))({k: jnp.asarray(v) for k, v in nats.items()})
    np.testing.assert_allclose(on_device["bpd"], bits["bpd"] - bits["importance_sampling"], rtol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "scipy", "rk4_log"])
def test_over_several_devices(method):
    assert jax.device_count() == 4
    x, mesh = data_at(MIXTURE, VP, 1e-3, (8, 3)), device_mesh()
    probes = jax.random.rademacher(jax.random.key(1), (1, *x.shape), x.dtype)
    one = ode_log_likelihood(VP_SCORE, VP, x, probes, t_min=1e-3, method=method)
    shards = jax.device_put(x, along_batch(mesh)), jax.device_put(probes, along_batch(mesh, axis=1))
    many = ode_log_likelihood(VP_SCORE, VP, *shards, t_min=1e-3, method=method)
    many.info.require_success()
    np.testing.assert_allclose(many.logp, one.logp, rtol=1e-4, atol=1e-3)
    assert many.latent.sharding.is_equivalent_to(shards[0].sharding, 2)


def test_bad_arguments():
    x = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match=r"unknown likelihood method 'euler'; known: dopri5, scipy"):
        ode_log_likelihood(lambda x, t: -x, VP, x, None, t_min=1e-3, method="euler")
    with pytest.raises(ValueError, match=r"unknown probe 'cauchy'; known: rademacher, gaussian, exact"):
        draw_probes(jax.random.key(0), "cauchy", x.shape)
    assert draw_probes(jax.random.key(0), "exact", x.shape) is None
    result = ode_log_likelihood(lambda x, t: -x, VP, x, None, t_min=1e-3, method="rk4_log", num_steps=2)
    with pytest.raises(ValueError, match="levels >= 1"):
        bits_per_dim(result.terms, num_dims=3, levels=0, unit_scale=1.0)
