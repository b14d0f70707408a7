"""Evaluation of bits/dim with the smallest network: stored values, rejected settings, and the cache."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
from build import Run, build
from configs.digits.smoke import get_config
from datasets import data_reference
from dequantization.noise import dequantizer_from_config, log_mean_exp
from evaluators import evaluators_from_config
from evaluators.bits_per_dim import BitsPerDimEvaluator, importance_weighted, solver_warning, summary
from evaluators.estimators import estimator_from_config, noised, places_from_config
from infra.workdir import EvaluationFolder, Workdir
from sde_lib import VPSDE

EXACT = {"eval__max_examples": 8, "eval__batch_size": 8, "eval__ode_steps": 4}


def run_with(**fields: Any) -> Run:
    config = get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in (EXACT | fields).items()})
    return build(config)


def evaluator_with(**fields: Any) -> BitsPerDimEvaluator:
    run = run_with(**fields)
    return BitsPerDimEvaluator(run, dequantizer_from_config(run.config, run.sde))


PARAMS = jax.tree.map(lambda p: p, run_with().fresh_state().ema_params)


def folder_in(path: Path) -> EvaluationFolder:
    return EvaluationFolder(Workdir(path), "eval", "step_7", 7)


def stored(result: dict[str, Any], folder: EvaluationFolder) -> dict[str, np.ndarray]:
    (batch,) = (folder.path / result["values"]).glob("*.npz")
    return dict(np.load(batch))


def test_importance_samples_of_truncated_normal_noise(tmp_path, monkeypatch):
    likelihood = evaluator_with(eval__dequantization="truncated_normal", eval__num_importance_samples=3)
    result = likelihood(PARAMS, folder_in(tmp_path))
    assert result["dequantization"] == "truncated normal"
    assert result["tau"] == pytest.approx(0.5 / 17 / 0.01, rel=1e-3)
    assert result["importance_samples"] == 3
    assert result["nfe"] == 3 * 5
    assert sum(result["terms"].values()) == pytest.approx(result["mean"], abs=1e-9)
    assert result["terms"]["importance_sampling"] < 0 < result["terms"]["dequantization"]
    assert abs(result["errors"]["solver_error"]) > 0
    assert result["errors"]["probe_error"] > 0
    values = stored(result, folder_in(tmp_path))
    assert {"bpd", "prior", "divergence", "levels", "scaler", "solver_error", "probe_error"} <= values.keys()
    assert values["bpd"].shape == (8,)
    monkeypatch.setattr(BitsPerDimEvaluator, "_batch", lambda *arguments: pytest.fail("computed again"))
    assert likelihood(PARAMS, folder_in(tmp_path)) == result


def test_bits_per_dim_at_the_noised_data(tmp_path):
    """x_tmin is x with the noise of t_min; the ODE and the bound at x_tmin are parts of their own in the result."""
    run = run_with(eval__likelihood_at="both", eval__num_repeats=1)
    parts = evaluators_from_config(run, lambda: dequantizer_from_config(run.config, run.sde))
    assert [part.name for part in parts if part.name.startswith("bpd")] == ["bpd", "bpd_tmin"]
    at_x: Any
    at_x, at_tmin = parts[:2]
    assert "at" not in at_x.description
    assert at_tmin(PARAMS, folder_in(tmp_path))["at"] == "x_tmin"
    x, keys = jnp.ones((2000, 2)), jax.random.split(jax.random.key(0), 2000)
    sde = VPSDE()
    alpha, sigma = (float(value) for value in sde.alpha_sigma(jnp.asarray(0.3)))
    noisy = np.asarray(noised(sde, x, keys, 0.3))
    assert abs(noisy.mean() - alpha) < 5 * sigma / math.sqrt(4000)
    assert abs(noisy.std() / sigma - 1) < 5 / math.sqrt(2 * 4000)
    bound = run_with(eval__bound=True, eval__bound_starts=5).config
    assert estimator_from_config(bound).description["num_starts"] == 5
    assert estimator_from_config(bound, "x_tmin").description["num_starts"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval__likelihood_at": "0"}, "eval.likelihood_at is '0'; known: x, x_tmin, both"),
        ({"eval__likelihood_at": "both", "eval__dequantization": "truncated_normal"}, "use eval.likelihood_at=x"),
    ],
)
def test_impossible_places_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        places_from_config(run_with(**fields).config)


def test_both_forms_of_the_bound_agree(tmp_path):
    values = {}
    for form, dsm in (("dsm", True), ("sm", False)):
        likelihood = evaluator_with(eval__bound=True, eval__dsm=dsm, eval__bound_times=40, eval__bound_starts=5)
        result = likelihood(PARAMS, folder_in(tmp_path))
        assert result["bound"] == form
        assert result["nfe"] == 45
        assert result["errors"].keys() == {"sampling_error"}
        assert sum(result["terms"].values()) == pytest.approx(result["mean"], abs=1e-9)
        values[form] = stored(result, folder_in(tmp_path))
    difference = values["dsm"]["bpd"] - values["sm"]["bpd"]
    error = np.hypot(values["dsm"]["sampling_error"], values["sm"]["sampling_error"])
    assert np.all(np.abs(difference) < 5 * error)
    assert np.any(values["dsm"]["start_correction"] != 0)


def test_without_the_start_time_correction(tmp_path):
    likelihood = evaluator_with(eval__bound=True, eval__offset=False, eval__bound_times=40)
    result = likelihood(PARAMS, folder_in(tmp_path))
    assert (result["num_starts"], result["nfe"], result["terms"]["start_correction"]) == (0, 40, 0)


CHANGES: dict[str, Any] = {
    "eval__ode_steps": 6,
    "eval__ode_solver": "rk4_log",
    "eval__probe": "gaussian",
    "eval__num_probes": 3,
    "eval__num_importance_samples": 2,
    "eval__dequantization": "truncated_normal",
    "eval__bpd_dataset": "train",
    "eval__max_examples": 4,
    "eval__batch_size": 4,
    "eval__bound": True,
    "seed": 1,
    "model__sigma_min": 0.02,
    "training__smallest_time": 1e-4,
}


def test_whatever_changes_the_numbers_changes_the_settings(monkeypatch):
    settings = [evaluator_with().settings()] + [
        evaluator_with(**{field: value}).settings() for field, value in CHANGES.items()
    ]
    monkeypatch.setattr(datasets, "source_from_config", other_training_images(datasets.source_from_config))
    settings.append(evaluator_with().settings())
    assert len({json.dumps(s, sort_keys=True) for s in settings}) == len(CHANGES) + 2
    for adaptive in (
        evaluator_with(eval__ode_solver="dopri5"),
        evaluator_with(eval__ode_solver="dopri5", eval__rtol=1e-3),
    ):
        assert "reference_data" not in adaptive.settings()
        assert adaptive.settings()["rtol"] == adaptive.run.config.eval.rtol


def other_training_images(source_from_config):
    def changed(config, split):
        source = source_from_config(config, split)
        return dataclasses.replace(source, description="other") if split == "train" else source

    return changed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "solver": ({"eval__ode_solver": "euler"}, r"eval.ode_solver is 'euler'; known: dopri5, scipy"),
    "probe": ({"eval__probe": "cauchy"}, r"eval.probe is 'cauchy'; known: rademacher, gaussian, exact"),
    "probes": ({"eval__num_probes": 0}, r"eval.num_probes is 0; it must be positive"),
    "steps": ({"eval__ode_steps": 5}, r"eval.ode_steps is 5; adams_log needs an even number"),
    "tolerance": ({"eval__rtol": -1.0}, r"eval.rtol is -1.0; it must be positive"),
    "repeats": ({"eval__num_repeats": 0}, r"eval.num_repeats is 0; it must be at least 1"),
    "draws": ({"eval__num_importance_samples": 0}, r"eval.num_importance_samples is 0; it must be at least 1"),
    "examples": ({"eval__max_examples": -1}, r"eval.max_examples is -1"),
    "split": ({"eval__bpd_dataset": "valid"}, r"eval.bpd_dataset is 'valid'; known: train, test"),
    "batch": ({"eval__batch_size": 6}, r"eval.batch_size is 6, which is not divisible by 4 devices"),
    "levels": ({"data__levels": 256}, r"data.levels is 256, but the brightest pixel"),
    "dequantization": ({"eval__dequantization": "normed"}, r"eval.dequantization is 'normed'; known: uniform"),
    "draws of a bound": (
        {"eval__bound": True, "eval__num_importance_samples": 2},
        r"estimates a bound",
    ),
    "late bound": ({"eval__bound": True, "eval__dequantization": "truncated_normal"}, r"x at t > 0, but eval.bound="),
    "times": ({"eval__bound": True, "eval__bound_times": 1}, r"eval.bound_times is 1; it must be at least 2"),
    "starts": ({"eval__bound": True, "eval__bound_starts": 0}, r"eval.bound_starts is 0; it must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_before_any_work(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        evaluator_with(**fields)


def test_several_processes_are_refused_scipys_solver_before_any_work(monkeypatch):
    run = run_with(eval__ode_solver="scipy_log")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"eval.ode_solver asks for SciPy's solver, .* but there are 2"):
        BitsPerDimEvaluator(run, dequantizer_from_config(run.config, run.sde))


def test_missing_data_of_the_reference_are_said_before_any_work(monkeypatch):
    def without_training_images(config, split, original=datasets.source_from_config):
        if split == "train":
            raise FileNotFoundError("no training images")
        return original(config, split)

    monkeypatch.setattr(datasets, "source_from_config", without_training_images)
    with pytest.raises(FileNotFoundError, match="no training images"):
        evaluator_with()
    evaluator_with(eval__ode_solver="dopri5")  # in time, without a reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images / np.float32(16), "has images of type float32, but bits/dim need integer"),
        (lambda images: np.where(np.arange(len(images))[:, None, None, None] == 3, 40, images), "pixel of level 40"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_images_that_are_no_levels_are_refused(change, message, monkeypatch):
    source = datasets.source_from_config(get_config(), "test")
    changed = dataclasses.replace(source, levels_array=change(source.levels_array))  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue]
    monkeypatch.setattr(datasets, "source_from_config", lambda config, split: changed)
    with pytest.raises(ValueError, match=message):
        evaluator_with()


def test_a_likelihood_that_is_not_finite_is_named(tmp_path):
    broken = jax.tree.map(lambda p: p * np.nan, PARAMS)
    with pytest.raises(
        RuntimeError, match=r"Cannot compute bits/dim for digits.*: the ODE solve failed at t = .*, at image 0"
    ):
        evaluator_with(eval__dequantization="truncated_normal")(broken, folder_in(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"Cannot compute bits/dim for digits.*: the likelihood is not finite at image 0"
    ):
        evaluator_with(eval__bound=True, eval__bound_times=40, eval__bound_starts=5)(broken, folder_in(tmp_path))


@pytest.mark.parametrize(("bins", "centered"), [(17, False), (17, True), (16, True)])
def test_the_reference_has_the_moments_of_the_data(bins, centered, monkeypatch):
    images = np.random.default_rng(0).integers(0, 17, (50, 2, 2, 1)).astype(np.uint8)
    unit = images / 16 if bins == 16 else (images[..., None] + np.linspace(0, 1, 2001)[:-1] + 0.5 / 2000) / 17
    x = (2 * unit - 1 if centered else unit).reshape(50, 4, -1)
    monkeypatch.setattr(datasets, "_BLOCK", 16)  # the last is smaller
    reference = data_reference(datasets.MemorySource(images, "some"), 17, bins, centered)
    np.testing.assert_allclose(np.ravel(reference.mean), x.mean(axis=(0, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.ravel(reference.std), x.std(axis=(0, 2)), rtol=1e-4)


def test_draws_are_averaged_inside_the_logarithm():
    rng, nats = np.random.default_rng(1), 5 * math.log(2)
    draws = [({"a": rng.normal(size=6), "b": rng.normal(size=6)}, {"probe_error": np.full(6, e)}) for e in (1.0, 2.0)]
    values = importance_weighted(draws, num_dims=5, levels=8, unit_scale=0.5)
    log_weights = -np.array([terms["a"] + terms["b"] for terms, _ in draws])
    np.testing.assert_allclose(values["bpd"], 2.0 - log_mean_exp(log_weights) / nats, rtol=1e-12)
    names = ("a", "b", "levels", "scaler", "importance_sampling")
    np.testing.assert_allclose(np.sum([values[name] for name in names], axis=0), values["bpd"])
    share = 1 / (1 + np.exp(log_weights[1] - log_weights[0]))
    np.testing.assert_allclose(values["probe_error"], (share + 2 * (1 - share)) / nats)


def test_the_summary_knows_how_sure_it_is():
    rng = np.random.default_rng(2)

    def batch(size: int) -> dict[str, np.ndarray]:
        bpd = rng.normal(size=size)
        errors = {"solver_error": np.full(size, -1e-3), "probe_error": np.full(size, 0.02)}
        return {"prior": bpd, "bpd": bpd, "nfe": np.asarray(9), "seconds": np.asarray(1.0), **errors}

    repeats = [[batch(5), batch(3)] for _ in range(3)]
    result = summary(repeats)
    means = np.array([np.concatenate([b["bpd"] for b in batches]).mean() for batches in repeats])
    assert (result["n"], result["repeats"], result["seconds"], result["nfe"]) == (8, 3, 6.0, 9.0)
    assert result["images_per_second"] == 5.0, "in the faster of two batches"
    assert result["mean"] == pytest.approx(means.mean())
    assert result["se_over_repeats"] == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    assert result["errors"] == pytest.approx({"solver_error": -1e-3, "probe_error": 0.02 / math.sqrt(24)})
    alone = [[{**repeats[0][0], "probe_error": np.full(5, np.nan)}]]
    assert summary(alone)["errors"]["probe_error"] is None
    assert summary(alone)["se_over_repeats"] is None


@pytest.mark.parametrize(
    ("solver_error", "se", "warns"),
    [
        (None, 0.01, False),  # an adaptive solver
        (0.001, 0.01, False),
        (-0.0049, 0.02, False),
        (-0.0051, 0.02, True),  # above the limit in bits/dim
        (0.003, 0.004, True),  # not small against the standard error
        (0.003, math.nan, False),  # a single image
    ],
)
def test_a_solver_that_is_off_by_its_own_estimate_is_warned_about(solver_error, se, warns):
    warning = solver_warning(solver_error, se)
    assert warning.startswith("The solver estimates") == warns
    assert bool(warning) == warns
