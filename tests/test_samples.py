"""Samples in rounds: the same images whatever the devices and interruptions; and snapshots of a run in training."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image

import run_lib
from build import build
from configs.digits.smoke import get_config
from evaluators import cache, evaluators_from_config, samples
from evaluators.cache import BatchCache, draw_in_rounds
from evaluators.extractor import Features
from evaluators.fid import Comparison
from evaluators.samples import SamplesEvaluator, draw_images
from evaluators.snapshots import Snapshots, snapshot_sampler
from evaluators.statistics import statistics_of
from infra import console, workdir
from infra.artefacts import ImageGrid
from infra.files import read_npz
from infra.image_grid import image_grid
from infra.workdir import EvaluationFolder, Workdir
from report.figures import snapshot_grid
from report.run_files import read_run
from samplers.few_step import DPMSolverSampler
from tests.tiny_network import tiny_network


def config_with(**fields):
    config = get_config()
    config.sampling.update(method="dpm_solver", max_nfe=6, batch_size=16)
    config.training.update(n_iters=12, snapshot_freq=6, snapshot_freq_for_preemption=4, snapshot_sampling=True)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module", autouse=True)
def in_place_of_ncsnpp():
    with tiny_network():
        yield


@pytest.fixture(scope="module")
def run():
    # sigma_max: few pixels of an untrained network's samples shall be beyond black and white
    return build(config_with(model__sigma_max=1.0))


@pytest.fixture(scope="module")
def params(run):
    """Of a network whose last layers are not nearly zero, as they are at first."""
    fresh = run.fresh_state().params
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


class Pixels:
    """A feature extractor whose features are the pixels."""

    name, hash, num_features = "pixels", "none", 64

    def __call__(self, images):
        flat = images.reshape(len(images), -1).astype(np.float64)
        return Features(flat, flat[:, :10])


@pytest.fixture(scope="module")
def comparison():
    real = np.random.default_rng(0).integers(0, 17, (100, 8, 8, 1)).astype(np.uint8)
    pool = Pixels()(real).pool
    return Comparison(Pixels, lambda _: statistics_of([pool], features="pixels", features_hash="none", data="noise"))


def evaluate(run, comparison, params, path):
    """The result, and the images that were written."""
    result = SamplesEvaluator(run, comparison)(params, EvaluationFolder(Workdir(path), "eval", "step_7", 7))
    (file,) = (path / "samples" / "step_7").glob("*.npz")
    return result, read_npz(file)["samples"]


def on_devices(run, count):
    return dataclasses.replace(run, mesh=jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",)))


def test_images_do_not_depend_on_devices_and_interruptions(run, params, comparison, tmp_path, monkeypatch):
    drawn, interruptions = [], [1, 2]

    def draw(run, params, numbers, show):
        if len(drawn) in interruptions:
            interruptions.remove(len(drawn))
            raise KeyboardInterrupt
        drawn.append(numbers[0])
        return draw_images(run, params, numbers, show)

    monkeypatch.setattr(samples, "draw_images", draw)
    for devices in (4, 1):
        with pytest.raises(KeyboardInterrupt):
            evaluate(on_devices(run, devices), comparison, params, tmp_path / "parts")
    result, parts = evaluate(on_devices(run, 4), comparison, params, tmp_path / "parts")
    assert drawn == [0, 16, 32], "a round was drawn twice, or not at all"
    assert (result["n"], result["nfe"], result["rounding"]) == (48, 6, "down")

    whole = {n: evaluate(on_devices(run, n), comparison, params, tmp_path / f"on{n}")[1] for n in (1, 4)}
    assert len(np.unique(parts.reshape(48, -1), axis=0)) == 48
    assert np.mean((parts > 0) & (parts < 16)) > 0.2, "saturated pixels would hide differences"
    for images in whole.values():
        off = np.abs(images.astype(int) - parts.astype(int))
        assert off.max() <= 1
        assert np.mean(off > 0) <= 1e-3


OTHERS = {
    "sampling__batch_size": 24,
    "sampling__max_nfe": 8,
    "seed": 1,
    "data__uniform_dequantization": False,  # what pixels are rounded to
    "data__centered": True,
    "model__sigma_max": 2.0,
    "model__num_scales": 10,
}


@pytest.mark.parametrize("field", OTHERS)
def test_other_settings_draw_anew(comparison, tmp_path, monkeypatch, field):
    drawn = []

    def draw(run, params, numbers, show):
        drawn.append(numbers)
        return np.zeros((len(numbers), 8, 8, 1), np.uint8), 6

    monkeypatch.setattr(samples, "draw_images", draw)
    for fields, rounds in (({}, 3), ({}, 0), ({field: OTHERS[field]}, 2 if field == "sampling__batch_size" else 3)):
        drawn.clear()
        _, images = evaluate(build(config_with(**fields)), comparison, {}, tmp_path)
        assert len(drawn) == rounds
        assert len(images) == 48


def test_the_rate_is_that_of_samples_drawn_now(tmp_path, monkeypatch):
    bars = []

    def progress(*arguments, **options):
        bars.append(console.progress(*arguments, **options))
        return bars[-1]

    monkeypatch.setattr(cache, "progress", progress)
    for wanted in (6, 20):  # of 8: one round, then two more
        stored = BatchCache(tmp_path, "samples", {}, {})
        drawn = draw_in_rounds(stored, "sample", wanted, 8, lambda numbers, _: (numbers.copy(), 5))
        np.testing.assert_array_equal(drawn.samples, np.arange(wanted))
    assert [(bar.initial, bar.n) for bar in bars] == [(0, 6), (8, 20)]


def test_the_number_of_evaluations_is_the_mean_over_rounds(tmp_path):
    """An adaptive solver needs a different number in each round."""
    stored = BatchCache(tmp_path, "samples", {}, {})
    drawn = draw_in_rounds(stored, "sample", 20, 8, lambda numbers, _: (numbers.copy(), 500 + int(numbers[0])))
    assert drawn.nfe == 508


def test_a_result_names_the_commits_that_computed_its_values(tmp_path, monkeypatch):
    for commit, wanted, commits in (("a", 8, ["a"]), ("b", 8, ["a"]), ("c", 16, ["a", "c"])):
        monkeypatch.setattr(cache, "commit", lambda commit=commit: commit)
        stored = BatchCache(tmp_path, "samples", {}, {})
        draw_in_rounds(stored, "sample", wanted, 8, lambda numbers, _: (numbers.copy(), 5))
        assert stored.origin() == {"values": stored.folder.name, "commits": commits}
    (stored.folder / "commits.json").unlink()
    assert BatchCache(tmp_path, "samples", {}, {}).origin()["commits"] == [], "written by an older version"


@pytest.mark.parametrize(
    ("before", "now", "warns"),
    [
        ("a", "a", False),
        ("a", "b", True),
        ("a+changes", "a+changes", True),
        ("a", "unknown", True),
        ("unknown", "unknown", False),
    ],
)
def test_values_of_other_code_are_used_with_one_warning(tmp_path, monkeypatch, caplog, before, now, warns):
    """The key of stored values does not have the code."""
    for running, wanted, warnings in ((before, 16, 0), (now, 24, int(warns))):
        monkeypatch.setattr(cache, "commit", lambda running=running: running)
        caplog.clear()
        with caplog.at_level("WARNING"):
            stored = BatchCache(tmp_path, "samples", {}, {})
            for _ in range(2):  # values that this evaluation has computed itself are not of other code
                draw_in_rounds(stored, "sample", wanted, 8, lambda numbers, _: (numbers.copy(), 5))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == warnings
        assert all(f"{stored.folder} holds" in line and f"from commit {before}, and" in line for line in said)


@pytest.mark.parametrize(
    ("sde", "fields", "warns"),
    [
        ("vesde", {"eta": 0.0}, True),
        ("vesde", {"eta": 1.0}, False),
        ("vpsde", {"eta": 0.0}, False),
        ("vesde", {"method": "pc", "probability_flow": True, "corrector": "none"}, True),
        ("vesde", {"method": "pc", "probability_flow": True}, False),
    ],
)
def test_odes_of_ve_models_are_warned_of(comparison, tmp_path, monkeypatch, sde, fields, warns):
    said = []
    monkeypatch.setattr(samples.logging, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(samples, "draw_images", lambda *_: (np.zeros((16, 8, 8, 1), np.uint8), 6))
    config = config_with(training__sde=sde, model__scale_by_sigma=sde == "vesde")
    config.sampling.update(fields)
    evaluate(build(config), comparison, {}, tmp_path)
    assert any("follows the SDE" in text for text in said) == warns


def test_samples_that_are_not_finite_are_an_error(run, params):
    broken = jax.tree.map(lambda p: p * np.nan, params)
    with pytest.raises(RuntimeError, match=r"Sample 16 is not finite \(16 of 16 are not\).*sampling.method=dpm_solver"):
        draw_images(run, broken, np.arange(16, 32))


def test_samples_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "PER_FILE", 20)
    images, real = np.random.default_rng(0).integers(0, 17, (2, 70, 8, 8, 1)).astype(np.uint8)
    images = images[:48]
    Workdir(tmp_path).write_samples(images, real, "step_7", 17, 7)
    folder = tmp_path / "samples" / "step_7"
    shards = [read_npz(path) for path in sorted(folder.glob("*.npz"))]
    assert [path.stem for path in sorted(folder.glob("*.png"))] == ["images_000000", "images_000020", "images_000040"]
    np.testing.assert_array_equal(np.concatenate([shard["samples"] for shard in shards]), images)
    assert {(int(shard["levels"]), int(shard["step"])) for shard in shards} == {(17, 7)}
    assert len(read_npz(tmp_path / "samples" / "data.npz")["samples"]) == 64
    Workdir(tmp_path).write_samples(images[:25], real, "step_7", 17, 7)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"images_{first:06d}.{kind}" for first in (0, 20) for kind in ("npz", "png")
    ], "of an earlier evaluation nothing is left"


def test_the_size_of_rounds_matters_where_samples_are_drawn():
    config = config_with(sampling__batch_size=30, eval__enable_sampling=False, eval__enable_loss=True)
    config.eval.enable_bpd = False
    assert [evaluator.name for evaluator in evaluators_from_config(build(config), no_dequantizer)] == ["loss"]
    config.eval.enable_sampling = True
    with pytest.raises(
        ValueError, match=r"sampling\.batch_size is 30, which is not divisible by 4 devices; use 28 or 32"
    ):
        evaluators_from_config(build(config), no_dequantizer)


def no_dequantizer():
    pytest.fail("bits/dim are not asked for")


# Snapshots


def pc_config():
    config = config_with()
    config.sampling.update(method="pc", corrector="none", num_steps=3, batch_size=8)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("snapshots") / "run"
    run_lib.train(pc_config(), workdir)
    return workdir


def snapshot_files(workdir):
    return sorted(path.name for path in (workdir / "samples" / "snapshots").iterdir())


def test_a_run_leaves_snapshots_of_its_kept_checkpoints(trained):
    kept = sorted(int(path.name) for path in (trained / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [6, 12]
    files = [f"step_{step}{end}" for step in kept for end in (".npz", "_ema.png", "_raw.png")]
    assert snapshot_files(trained) == sorted(files)
    snapshot = read_npz(trained / "samples" / "snapshots" / "step_12.npz")
    assert snapshot["ema"].shape == snapshot["raw"].shape == (8, 8, 8, 1)
    with Image.open(trained / "samples" / "snapshots" / "step_12_raw.png") as picture:
        assert picture.size == (3 * 42 - 2, 3 * 42 - 2)


def test_the_report_shows_snapshots(trained):
    page = (trained / "report.html").read_text()
    assert "Samples during training" in page
    assert all(f"{kind} parameters, steps 6, 12" in page for kind in ("averaged", "raw"))
    first, second = read_run(trained).snapshots
    assert (first.ema.step, second.raw.step) == (6, 12)
    rows = np.asarray(snapshot_grid([first.raw, second.raw], per_row=4))
    assert rows.shape == (2 * 42 - 2, 4 * 42 - 2)
    for row, grid in ((rows[:40], first.raw), (rows[42:], second.raw)):
        np.testing.assert_array_equal(row, np.asarray(image_grid(grid.images[:4], 17, columns=4)))


def test_snapshots_of_different_numbers_of_images_have_a_row_each():
    grids = [ImageGrid(np.zeros((count, 8, 8, 1), np.uint8), 17, 0) for count in (4, 8)]
    both = np.asarray(snapshot_grid(grids))
    assert both.shape == np.asarray(snapshot_grid([grids[0], grids[0]])).shape
    np.testing.assert_array_equal(both.shape, np.asarray(snapshot_grid(grids[::-1])).shape)


def test_a_snapshot_shows_its_weights_by_the_same_noise(params, tmp_path):
    """The images are those that evaluation numbers 0 to 7, of each set of weights."""
    run = build(pc_config())
    assert snapshot_sampler(run) == DPMSolverSampler(sde=run.sde, eta=1.0, data_range=run.preprocess.data_range)
    config = pc_config()
    config.training.smallest_time = 0.01
    assert snapshot_sampler(build(config)).smallest_time == 0.01, "not at times that training does not use"
    config = pc_config()
    config.training.snapshot_sampler = "configured"
    run = build(config)
    state = run.fresh_state().replace(step=np.int32(6), ema_params=params)
    Snapshots(run, Workdir(tmp_path)).draw(state)
    snapshot = read_npz(tmp_path / "samples" / "snapshots" / "step_6.npz")
    for weights, of in (("ema", state.ema_params), ("raw", state.params)):
        np.testing.assert_array_equal(snapshot[weights], draw_images(run, of, np.arange(8))[0])
    assert np.any(snapshot["ema"] != snapshot["raw"])


def test_a_resumed_run_draws_what_is_missing_and_nothing_twice(trained):
    folder = trained / "samples" / "snapshots"
    before = read_npz(folder / "step_12.npz")
    (folder / "step_12.npz").write_bytes(b"PK")  # as an interruption never leaves it
    (folder / "step_12_ema.png").unlink()
    os.utime(folder / "step_6.npz", (1, 1))
    run_lib.train(pc_config(), trained)  # nothing left to train
    after = read_npz(folder / "step_12.npz")
    np.testing.assert_array_equal(after["ema"], before["ema"])
    assert (folder / "step_12_ema.png").exists()
    os.utime(folder / "step_12.npz", (1, 1))
    run_lib.train(pc_config(), trained)
    assert {(folder / f"step_{step}.npz").stat().st_mtime for step in (6, 12)} == {1}


def test_snapshots_of_other_weights_are_replaced(trained, params):
    run = build(pc_config())
    state = run.fresh_state().replace(step=np.int32(6), params=params)
    path = trained / "samples" / "snapshots" / "step_6.npz"
    before = read_npz(path)
    Snapshots(run, Workdir(trained)).draw(state)
    assert np.any(read_npz(path)["raw"] != before["raw"])


def test_asked_to_stop_it_gives_up(tmp_path, stop_requested):
    run = build(pc_config())
    Snapshots(run, Workdir(tmp_path)).draw(run.fresh_state().replace(step=np.int32(6)))
    assert not (tmp_path / "samples").exists()


def test_failing_to_sample_does_not_end_training(tmp_path):
    run = build(pc_config())
    state = run.fresh_state()
    broken = jax.tree.map(lambda p: p * np.nan, state.params)
    Snapshots(run, Workdir(tmp_path)).draw(state.replace(step=np.int32(6), params=broken))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(("step", "due"), [(0, False), (4, False), (6, True), (11, False), (12, True), (13, True)])
def test_when_snapshots_are_due(run, tmp_path, step, due):
    assert Snapshots(run, Workdir(tmp_path)).due(step) == due
    assert not Snapshots(build(config_with(training__snapshot_sampling=False)), Workdir(tmp_path)).due(step)


def test_a_continued_run_has_a_snapshot_of_its_last_step(tmp_path):
    run = build(config_with(training__n_iters_from_start=5, training__init_from="elsewhere"))
    workdir = Workdir(tmp_path)
    workdir.write_start("elsewhere", 20)
    assert [step for step in range(19, 27) if Snapshots(run, workdir).due(step)] == [24, 25, 26]


def test_a_bad_sampler_is_found_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"sampling\.order is 4; it must lie in"):
        run_lib.train(config_with(sampling__order=4, training__snapshot_sampler="configured"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"snapshot_sampler is 'pc'; it must be few_step or configured"):
        run_lib.train(config_with(training__snapshot_sampler="pc"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"sampling\.batch_size is -1; it must not be negative"):
        run_lib.train(config_with(sampling__batch_size=-1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
