"""The modes for latent codes and conditional samples, on a small network: files, results, resumption, bad input."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import main
import run_lib
from build import build
from configs.digits.smoke import get_config
from configs.usage import record_reads
from dequantization.training import evaluation_dequantizer
from evaluators import MODES
from evaluators.class_training import ClassifierTraining
from evaluators.conditional import ClassesEvaluator, ConditionalEvaluator
from evaluators.control_inputs import MASKS, inpainting, padded_round, restoration
from evaluators.diagnostics import DiagnosticsEvaluator
from evaluators.latents import EncodeEvaluator, InterpolateEvaluator
from infra.files import read_npz
from infra.workdir import EvaluationFolder, Workdir
from models.ncsnpp import ncsnpp_from_config
from models.score import IMAGE_NETWORKS
from report.run_files import read_run
from sources import load_digits
from tests.tiny_network import tiny_classifier, tiny_network


def config_with(**fields):
    config = get_config()
    config.model.sigma_max = 1.0
    config.eval.update(batch_size=8, max_examples=12)
    config.sampling.update(num_steps=6, batch_size=16, rtol=1e-5, atol=1e-5)
    config.control.update(num_images=3, num_draws=2, num_steps=5)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module", autouse=True)
def in_place_of_ncsnpp():
    with tiny_network(), tiny_classifier():
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns a workdir with a checkpoint whose last layers are not near zero, unlike those of a new network."""
    path = tmp_path_factory.mktemp("control")
    run = build(config_with())
    state = run.fresh_state()
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    with run.open_checkpoints(Workdir(path)) as checkpoints:
        checkpoints.save(state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params)))
    Workdir(path).write_description(run.config, 1)
    return path


def results(workdir: Path) -> dict:
    return json.loads((workdir / "eval" / "step_0.json").read_text())


def picture(workdir: Path, what: str) -> np.ndarray:
    return read_npz(workdir / "pictures" / f"step_0_{what}.npz")["samples"]


def test_codes_are_encoded_decoded_and_interpolated(workdir, monkeypatch):
    config, original = config_with(), EncodeEvaluator._batch

    def interrupted(self, params, number, show):
        if number == 1:
            raise KeyboardInterrupt
        return original(self, params, number, show)

    with monkeypatch.context() as patch:
        patch.setattr(EncodeEvaluator, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_lib.control(config, workdir, "encode")
    (folder,) = (workdir / "eval").glob("latents-*")
    before = (folder / "batch0.npz").stat().st_mtime_ns
    run_lib.control(config, workdir, "encode")
    assert (folder / "batch0.npz").stat().st_mtime_ns == before, "the first batch was encoded twice"
    result, codes = results(workdir)["latents"], read_npz(workdir / "latents" / "step_0.npz")
    assert codes["latents"].shape == (12, 8, 8, 1)
    assert codes["ids"].tolist() == list(range(12))
    assert result["n"] == 12
    assert 0 < result["reconstruction_error"] <= result["largest_error"] < 0.05, "less than a grey level of 1 / 17"

    run_lib.control(config, workdir, "decode")
    originals = load_digits("test").images(np.arange(12))
    decoded = picture(workdir, "decoded")
    assert np.mean(decoded != originals) == pytest.approx(result["changed_levels"], abs=1e-3)
    assert result["changed_levels"] < 0.1, "data have noise up to the next level, so few levels may change"

    run_lib.control(config, workdir, "interpolate")
    strips = picture(workdir, "interpolation").reshape(3, 5, 8, 8, 1)
    assert np.mean(strips[:, 0] != originals[0:6:2]) < 0.1
    assert np.mean(strips[:, -1] != originals[1:6:2]) < 0.1
    assert np.mean(strips[:, 2] != originals[0:6:2]) > 0.3
    assert len(read_run(workdir).pictures) == 3

    run_lib.control(config_with(control__num_images=2), workdir, "interpolate")  # The stored strips are one too many.
    assert picture(workdir, "interpolation").size == 2 * 5 * 8 * 8


class UsedSettings(BaseException):
    """Ends an evaluation where its values would be computed or read."""


def used_settings(evaluator_of, **fields) -> str:
    """Returns the settings that identify the stored values of an evaluator."""

    def stored(folder, what, settings, params):
        raise UsedSettings(json.dumps(settings, sort_keys=True))

    run = build(config_with(**{"data__uniform_dequantization": False, **fields}))
    evaluator = evaluator_of(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(evaluator).__module__}.BatchCache", stored)
        with pytest.raises(UsedSettings) as caught:
            evaluator({}, EvaluationFolder(Workdir(Path("none")), "eval", "step_0", 0))
    return caught.value.args[0]


def diagnostics(run):
    return DiagnosticsEvaluator(run, evaluation_dequantizer(run, Workdir(Path("none"))))


@pytest.mark.parametrize(
    ("evaluator_of", "always"),
    [
        (EncodeEvaluator, {"eval__rounding": None}),
        (InterpolateEvaluator, {"eval__rounding": None}),
        (partial(ConditionalEvaluator, mode="inpaint"), {"eval__rounding": None}),
        (partial(ClassesEvaluator, workdir=Workdir(Path("none"))), {"data__num_classes": 10}),
        (diagnostics, {"eval__rounding": None}),
    ],
    ids=["encode", "interpolate", "inpaint", "classes", "diagnose"],
)
def test_stored_values_belong_to_the_settings_of_data_and_sampler(evaluator_of, always):
    changes = {
        "data__bin_centers": True,
        "data__uniform_dequantization": True,
        "eval__rounding": "truncate",
        "model__num_scales": 7,
    }
    base = {name: value for name, value in always.items() if value is not None}
    if "data__num_classes" not in always:
        del changes["model__num_scales"]
    known = {used_settings(evaluator_of, **base)}
    for field, value in changes.items():
        if field not in always:
            known.add(used_settings(evaluator_of, **base, **{field: value}))
    assert len(known) == 1 + len(changes.keys() - always.keys())


def test_up_to_eight_devices_draw_the_same_images(monkeypatch):
    """Langevin correctors couple the images of a round, those that only fill it, too."""
    for devices, sizes in ((1, [8, 8, 16]), (2, [8, 8, 16]), (8, [8, 8, 16]), (16, [16, 16, 16])):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        assert [padded_round(size) for size in (1, 8, 9)] == sizes


def test_known_and_decoded_pixels_keep_their_level_with_truncation(tmp_path):
    """A pixel is a little above or below its level: by the rounding of 32-bit numbers, or by the error of a solver."""
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    np.savez(tmp_path / "all.npz", images=levels)
    fields = {
        "control__images": str(tmp_path / "all.npz"),
        "control__num_images": 4,
        "data__levels": 256,
        "data__centered": True,
        "data__uniform_dequantization": False,
        "eval__rounding": "truncate",
    }
    run = build(config_with(**fields))
    params = run.fresh_state().params
    folder = EvaluationFolder(Workdir(tmp_path), "eval", "step_0", 0)
    MODES["inpaint"](run, Workdir(tmp_path))(params, folder)
    rows = read_npz(tmp_path / "pictures" / "step_0_inpainting.npz")["samples"].reshape(4, 4, 8, 8, 1)
    known = np.repeat(levels[:, None, :, :4], 3, axis=1)
    np.testing.assert_array_equal(rows[:, 1:, :, :4], known)
    assert MODES["encode"](run, Workdir(tmp_path))(params, folder)["changed_levels"] == 0


def test_all_classes_must_be_among_the_training_images(tmp_path):
    images = np.full((8, 8, 8, 1), 16, np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.arange(8) % 3.0, x_test=images, y_test=np.arange(8) % 4)
    run = build(config_with(data__dataset="npz", data__path=str(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match=r"a.npz, test.* has class 3, but the largest class of the training .* is 2"):
        ClassifierTraining(run)


def test_codes_of_two_evaluation_folders_are_kept_apart(workdir):
    for folder, most in (("first", 2), ("second", 3)):
        run_lib.control(config_with(eval__max_examples=most), workdir, "encode", eval_folder=folder)
    assert len(read_npz(workdir / "latents" / "step_0_first.npz")["latents"]) == 2
    run_lib.control(config_with(eval__max_examples=2), workdir, "decode", eval_folder="first")
    assert json.loads((workdir / "first" / "step_0.json").read_text())["decoded"]["n"] == 2


def test_known_parts_are_kept(workdir, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:, :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run_lib.control(config_with(control__mask=str(tmp_path / "mask.png")), workdir, "inpaint")
    rows = picture(workdir, "inpainting").reshape(3, 4, 8, 8, 1)
    originals = load_digits("test").images(np.arange(3))
    np.testing.assert_array_equal(rows[:, 0], originals)
    np.testing.assert_array_equal(rows[:, 1, 2:], originals[:, 2:])
    np.testing.assert_array_equal(rows[:, 2:, 2:], np.repeat(originals[:, None, 2:], 2, axis=1))
    assert np.mean(rows[:, 2, :2] != rows[:, 3, :2]) > 0.1
    result = results(workdir)["inpainting"]
    assert result["known_error"] < 1e-6
    assert result["unknown_error"] > 0.1
    assert (result["n"], result["draws"], result["nfe"]) == (3, 2, 12)

    run_lib.control(config_with(), workdir, "restore")
    drawn = picture(workdir, "restoration").reshape(3, 4, 4, 2, 4, 2)
    means = drawn.mean(axis=(3, 5))
    # The second column has the observed means, rounded down to levels after noise of up to a level.
    assert np.abs(means[:, 1] - means[:, 0]).max() <= 1
    assert results(workdir)["restoration"]["known_error"] < 1e-5


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Trains the classifier of clean images once, and returns its folder."""
    return tmp_path_factory.mktemp("judge")


def test_classes_are_drawn_with_a_trained_classifier(workdir, judge):
    fields = {"training__batch_size": 8, "control__classifier_n_iters": 3, "training__log_freq": 1}
    sampler = {"sampling__method": "heun", "sampling__max_nfe": 5}
    config = config_with(**fields, **sampler, control__labels=(3, 7), eval__statistics_dir=str(judge))
    with pytest.raises(FileNotFoundError, match=r"no classifier in .*; train one with --mode=train_classifier"):
        run_lib.control(config, workdir, "classes")
    run_lib.train_classifier(config, workdir)
    metrics = [json.loads(line) for line in (workdir / "classifier/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(0 < line["total"] < 20 and 0 <= line["accuracy"] <= 1 for line in metrics)
    run_lib.control(config, workdir, "classes")
    result = results(workdir)["classes"]
    assert (result["labels"], result["n"], result["guidance"]) == ([3, 7], 4, 1.0)
    assert picture(workdir, "classes").shape == (4, 8, 8, 1)
    assert "Samples of classes" in (workdir / "report.html").read_text()


def test_the_network_is_told_classes(monkeypatch):
    """NCSN++ itself: the score depends on the class, and any class has a number of its own."""
    monkeypatch.setitem(IMAGE_NETWORKS, "ncsnpp", ncsnpp_from_config)
    run = build(config_with(data__num_classes=10))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), run.abstract_state().params
    )
    assert params["class_embedding"]["embedding"].shape == (11, 32)
    x, t = jnp.asarray(np.repeat(rng.standard_normal((1, 8, 8, 1)), 2, axis=0)), jnp.full(2, 0.5)
    together, told = jax.jit(
        lambda params: [run.score_fn(params).with_classes(classes)(x, t) for classes in (None, jnp.array([10, 1]))]
    )(params)
    np.testing.assert_allclose(told[0], together[0], rtol=1e-4, atol=1e-5)  # 32-bit sums in another order
    assert np.max(np.abs(told[1] - told[0])) > 1e-2


def test_a_network_that_is_told_classes_is_trained_and_guides_itself(tmp_path, judge):
    fields = {"training__batch_size": 8, "training__n_iters": 3, "training__eval_freq": 5, "data__num_classes": 10}
    sampler = {"sampling__method": "heun", "sampling__max_nfe": 5, "control__labels": (1, 2)}
    config = config_with(**fields, **sampler, eval__statistics_dir=str(judge))
    run_lib.train(config, tmp_path)
    run = build(config)
    state = run.load_state(tmp_path)
    embedding, fresh = (s.params["class_embedding"]["embedding"] for s in (state, run.fresh_state()))
    assert np.all(np.any(embedding != fresh, axis=1)[:10].sum() > 5), "classes are trained"
    run_lib.control(config, tmp_path, "classes")
    result = json.loads((tmp_path / "eval" / "step_3.json").read_text())["classes"]
    assert (result["guided_by"], result["labels"]) == ("the network itself", [1, 2])
    with pytest.raises(ValueError, match="only ncsnpp with"):
        build(config_with(data__num_classes=10, model__conditional=False))
    with pytest.raises(ValueError, match=r"data\.num_classes is 2, but .* has class 9"):
        run_lib.train(config_with(**fields | {"data__num_classes": 2}), tmp_path / "few")


BAD_INPUT = {
    "no image file": ("encode", {"control__images": "none.npz"}, "control.images is 'none.npz', but there is no such"),
    "no latents": ("decode", {"control__latents": "none.npz"}, "control.latents is 'none.npz', but there is no such"),
    "too many pairs": ("interpolate", {"control__num_images": 999}, "which are 179 pairs"),
    "unknown mask": ("inpaint", {"control__mask": "middle"}, "neither a file nor one of left, right, top, bottom"),
    "no colours": ("colorize", {}, "data.num_channels is 1, but --mode=colorize is for images of 3 channels"),
    "no matrix": ("restore", {"control__matrix": "none.npz"}, "control.matrix is 'none.npz', but there is no such"),
    "no such class": ("classes", {"control__labels": (10,)}, "the classes of digits are 0 to 9"),
    "batch size": ("encode", {"eval__batch_size": 7}, "eval.batch_size is 7, which is not divisible by 4 devices"),
}


FIELDS = {
    # fields with an effect in a mode, and fields without one
    "encode": (
        ("sampling.rtol", "eval.batch_size", "eval.max_examples"),
        ("sampling.temperature", "sampling.noise_removal"),
    ),
    "decode": (("sampling.rtol", "eval.batch_size", "sampling.temperature"), ("sampling.noise_removal",)),
    "interpolate": (("eval.batch_size", "sampling.temperature"), ("sampling.noise_removal", "eval.max_examples")),
    "inpaint": (("sampling.temperature", "sampling.noise_removal"), ("eval.batch_size", "eval.max_examples")),
    "restore": (("eval.bpd_dataset", "sampling.batch_size"), ("eval.batch_size", "eval.max_examples")),
}


@pytest.mark.parametrize("mode", FIELDS)
def test_only_fields_with_an_effect_in_a_mode_count_as_read(mode, workdir):
    """A field that counts as read without an effect would be ignored without a warning."""
    used, unused = FIELDS[mode]
    config = config_with()
    recorder = record_reads(config, (*used, *unused))
    MODES[mode](build(config, for_training=False), Workdir(workdir))
    assert recorder.unused() == list(unused)


def test_conditional_modes_accept_an_evaluation_batch_that_they_do_not_use(workdir):
    run = build(config_with(eval__batch_size=7), for_training=False)
    MODES["inpaint"](run, Workdir(workdir))
    with pytest.raises(ValueError, match=r"eval\.batch_size is 7, which is not divisible by 4 devices"):
        DiagnosticsEvaluator(run, evaluation_dequantizer(run, Workdir(workdir)))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_any_work(name, workdir):
    mode, fields, message = BAD_INPUT[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        run_lib.control(config_with(**fields), workdir, mode)
    assert "\n" not in str(raised.value)


def test_masks_and_matrices_in_files(tmp_path):
    shape = (4, 4, 1)
    for name, known in MASKS.items():
        assert known(4, 4).sum() == (12 if name == "border" else 8), name
    each = np.random.default_rng(0).integers(0, 2, (2, *shape))
    np.savez(tmp_path / "mask.npz", mask=each)
    config = config_with(control__mask=str(tmp_path / "mask.npz"))
    problem = inpainting(config, shape, 2)
    np.testing.assert_array_equal(problem.mask_of(np.array([1, 1, 0])), each[[1, 1, 0]])
    with pytest.raises(ValueError, match=r"control\.mask=.* has shape \(2, 4, 4, 1\); it must be \[h, w\]"):
        inpainting(config, shape, 3)
    Image.fromarray(np.where(each[0, ..., 0], 40000, 2000).astype(np.uint16)).save(tmp_path / "mask.png")
    deep = inpainting(config_with(control__mask=str(tmp_path / "mask.png")), shape, 1)
    np.testing.assert_array_equal(deep.mask_of(np.array([0]))[0], each[0], "16-bit pixels")
    for count in (3, 4):  # With four images, [n, h, w] could be [h, w, c] with four channels.
        some = np.random.default_rng(1).integers(0, 2, (count, 4, 4))
        np.savez(tmp_path / "mask.npz", mask=some)
        np.testing.assert_array_equal(inpainting(config, shape, count).mask_of(np.arange(count))[..., 0], some)
    np.savez(tmp_path / "mask.npz", mask=np.array([[1, 0, 1, 0]]))
    with pytest.raises(ValueError, match=r"has shape \(1, 4\); it must be \[h, w\]"):
        inpainting(config, shape, 2)
    np.savez(tmp_path / "mask.npz", mask=np.concatenate([each[:1], np.ones_like(each[:1])]))
    with pytest.raises(ValueError, match="makes all pixels known in an image"):
        inpainting(config, shape, 2)
    np.savez(tmp_path / "mask.npz", mask=np.ones((4, 4)))
    with pytest.raises(ValueError, match="makes all pixels known"):
        inpainting(config, shape, 2)
    matrix = np.arange(32.0).reshape(2, 16)
    np.savez(tmp_path / "matrix.npz", matrix=matrix, observations=np.ones((2, 2)))
    config = config_with(control__matrix=str(tmp_path / "matrix.npz"))
    problem = restoration(config, shape, 2)
    assert problem.components is not None
    assert problem.basis is not None
    image = problem.components.reshape(2, 16) @ problem.basis.T
    np.testing.assert_allclose(image @ matrix.T, 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"observations in control\.matrix=.* must be \[3, 2\]"):
        restoration(config, shape, 3)
    wrong = {
        "the matrix in .* must be finite real numbers, but there are others": {"matrix": matrix * np.nan},
        "the matrix in .* but there are complex128": {"matrix": matrix * 1j},
        "observations in .* must be finite": {"matrix": matrix, "observations": np.full((2, 2), np.inf)},
        "observations in .* but there are <U1": {"matrix": matrix, "observations": np.full((2, 2), "1")},
        "contradict each other: .* differ from them by 0.5": {
            "matrix": np.ones((2, 16)),
            "observations": np.array([[0, 1], [1, 1]]),
        },
    }
    for message, arrays in wrong.items():
        np.savez(tmp_path / "matrix.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            restoration(config, shape, 2)
    np.savez(tmp_path / "matrix.npz", matrix=np.ones((2, 15)))
    with pytest.raises(ValueError, match=r"has shape \(2, 15\); it must be \[m, 16\]"):
        restoration(config, shape, 2)


def test_every_mode_is_on_the_command_line():
    assert set(main.CONTROL) == set(MODES)
