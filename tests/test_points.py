"""Points of a density through the same loops as images: training, evaluation, report; and the network for them."""

import dataclasses
import json
import math
import re
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import datasets
import run_lib
from build import build
from configs.default import get_config as default
from configs.toy.checkerboard_ve_published import get_config as published
from configs.toy.mixture_vp import get_config as mixture_vp
from configs.toy.smoke import get_config as smoke
from evaluators import points
from evaluators.points import PointLikelihoodEvaluator, summary
from infra import parallel
from infra.workdir import EvaluationFolder, Workdir
from models.mlp import MLP
from models.score import ScoreModel
from report.content import Note
from report.result_tables import nats
from report.run_files import read_run
from sde_lib import SDE, VESDE
from sources.densities import paper_mixture
from tests.golden_common import load_config

ROOT = Path(__file__).parent.parent
TOY = sorted(path for path in (ROOT / "configs" / "toy").glob("*.py") if path.stem != "__init__")


def config_with(get_config=smoke, **fields):
    config = get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run_lib.train(config_with(training__score_matching_order=3, training__n_iters=40), workdir)
    return workdir


def parameters(config, workdir):
    state = build(config).load_state(workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]


def test_training_records_the_exact_terms_and_resumes_bit_for_bit(trained, tmp_path):
    records = [json.loads(line) for line in (trained / "train" / "metrics.jsonl").read_text().splitlines()]
    assert {record["split"] for record in records} == {"start", "train", "test"}
    for record in (record for record in records if record["split"] != "start"):
        total = record["first"] + 0.5 * record["second_frob"] + 0.1 * record["third"]
        assert record["total"] == pytest.approx(total, rel=1e-5)
    for last in (20, 40):
        config = config_with(training__score_matching_order=3, training__n_iters=last)
        run_lib.train(config, tmp_path / "run")
    for one, other in zip(parameters(config, trained), parameters(config, tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bound_draws_no_density(trained):
    """The report says that densities are those of the ODE."""
    fields = {"eval__bound": True, "eval__bound_times": 4, "eval__bound_starts": 2, "eval__max_examples": 8}
    run_lib.evaluate(config_with(eval__enable_sampling=False, **fields), trained, "bound")
    assert json.loads((trained / "bound" / "step_40.json").read_text())["nll"]["bound"] == "dsm"
    assert not (trained / "density" / "step_40_bound.npz").exists()


def test_evaluation_reports_nats_and_resumes(trained, monkeypatch, capsys):
    config = config_with(training__score_matching_order=3, eval__enable_loss=True)
    run_lib.evaluate(config, trained, "eval")
    result = json.loads((trained / "eval" / "step_40.json").read_text())
    nll = result["nll"]
    assert (nll["n"], nll["unit"], nll["nfe"]) == (100, "nats", 9)
    assert sum(nll["terms"].values()) == pytest.approx(nll["mean"], abs=1e-5)
    # ln q is the same at every point of the checkerboard
    assert nll["kl"]["mean"] == pytest.approx(nll["mean"] - math.log(32), abs=1e-5)
    assert nll["kl"]["se"] == pytest.approx(nll["se"], rel=1e-5)
    assert set(result["loss"]) == {"total", "first", "second_frob", "third"}
    assert "bpd" not in result
    with np.load(trained / "samples" / "points" / "step_40.npz") as drawn:
        assert drawn["points"].shape == (100, 2)
        assert drawn["step"] == 40
    run_lib.evaluate(config, trained, "other")
    for shown in ("samples/points", "density"):
        names = {path.name for path in (trained / shown).glob("step*")}
        assert names == {"step_40.npz", "step_40_other.npz"}, "one evaluation does not replace what another shows"
    monkeypatch.setattr(PointLikelihoodEvaluator, "_batch", lambda *_: pytest.fail("a batch was worked out again"))
    run_lib.evaluate(config, trained, "eval")
    assert json.loads((trained / "eval" / "step_40.json").read_text())["nll"] == nll
    run_lib.report(trained)
    assert "NLL nats" in capsys.readouterr().out


@flax.struct.dataclass
class ShiftedScore:
    """The score of the paper's mixture, moved to the right by its one parameter."""

    params: jax.Array
    sde: SDE = flax.struct.field(pytree_node=False)

    def __call__(self, x, t):
        return paper_mixture().score(self.sde, x - self.sde.alpha_sigma(t)[0][:, None] * self.params, t)


@dataclasses.dataclass(frozen=True)
class ShiftedModel:
    """A score model whose score is a `ShiftedScore`."""

    sde: SDE
    levels: None = None

    def score_fn(self, params: jax.Array) -> ShiftedScore:
        return ShiftedScore(params, self.sde)


@pytest.mark.usefixtures("unchecked")  # the model has no network
def test_the_divergence_is_that_of_the_models_density(tmp_path):
    """0 for the data's own score; for the data's density moved by c, the mean of ln q(x) - ln q(x - c)."""
    config = config_with(mixture_vp, data__num_test_points=200, eval__batch_size=100, data__num_points=2000)
    config.eval.update(ode_steps=98, density_grid=0)
    run = build(config)
    run = dataclasses.replace(run, model=ShiftedModel(run.sde))  # pyright: ignore[reportArgumentType]
    density = PointLikelihoodEvaluator(run)
    folder = EvaluationFolder(Workdir(tmp_path), "eval", "step_7", 7)
    exact = density(jnp.zeros(()), folder)
    assert abs(exact["kl"]["mean"]) < 1e-3, "the solve's error"
    assert abs(exact["mean"] - exact["entropy"]) < 5 * exact["se"]
    moved = density(jnp.full((), 0.1), folder)
    x = jnp.asarray(density.source.images(np.arange(200)))
    expected = paper_mixture().log_density_of_data(x) - paper_mixture().log_density_of_data(x - 0.1)
    assert moved["kl"]["mean"] == pytest.approx(float(jnp.mean(expected)), abs=2e-3)
    assert moved["kl"]["mean"] > 5 * moved["kl"]["se"]


def test_without_a_known_density_there_is_no_divergence():
    batch = {"nll": np.arange(4.0), "prior": np.arange(4.0), "nfe": np.asarray(9), "seconds": np.asarray(1.0)}
    result = summary([batch, batch], entropy=None)
    assert (result["mean"], result["n"], result["terms"]) == (1.5, 8, {"prior": 1.5})
    assert result.keys().isdisjoint({"kl", "entropy", "solver_error"})


def test_a_coarse_solve_of_points_is_warned_about(tmp_path):
    nll = np.linspace(0, 4, 8)
    batch = {"nll": nll, "prior": nll, "nfe": np.asarray(9), "seconds": np.asarray(1.0)}
    fine, coarse = (summary([batch | {"solver_error": np.full(8, error)}], None) for error in (1e-3, -4.0))
    assert "warning" not in fine
    assert coarse["warning"].startswith("The solver estimates that nats are off by 4")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "step_1.json").write_text(json.dumps({"checkpoint_step": 1, "nll": coarse}))
    *_, last = nats([read_run(tmp_path)])
    assert last == Note(f"{coarse['warning']}.", "warning")


def test_points_are_those_of_every_run_and_split():
    train, test = (datasets.source_from_config(config_with(), split) for split in datasets.SPLITS)
    assert (len(train), len(test), train.image_shape) == (1000, 100, (2,))
    assert train.images(np.arange(3)).dtype == np.float32
    assert not np.array_equal(train.images(np.arange(100)), test.images(np.arange(100)))
    again = datasets.source_from_config(config_with(seed=7), "train")
    np.testing.assert_array_equal(train.images(np.arange(1000)), again.images(np.arange(1000)))
    assert again.description == train.description
    batch = next(datasets.training_batches(train, 8, seed=0, first_step=0, num_steps=1))
    x = build(config_with()).preprocess(jax.random.key(0), jnp.asarray(batch))
    np.testing.assert_array_equal(x, batch)


@pytest.mark.parametrize("path", TOY, ids=lambda path: path.stem)
def test_configurations_can_be_built_and_say_how_to_run(path):
    docstring, command = path.read_text().split('"""')[1], f"python main.py --config=configs/toy/{path.name}"
    for mode in ("train", "eval"):
        assert re.search(rf"{command} --workdir=runs/\S+ --mode={mode}", docstring)
    config = load_config(f"toy.{path.stem}")
    config.data.num_test_points = 100
    run = build(config)
    assert run.density is not None
    assert run.data_shape == (run.density.dims,)
    PointLikelihoodEvaluator(run)
    points.PointSamplesEvaluator(run)


def test_the_published_network():
    """Section by section: 64 to 128-128-128 for the time, 2 to 128-128-128, and 256 to 512-512-2."""
    run = build(published())
    shapes = jax.eval_shape(lambda: run.model.init(jax.random.key(0), (2,)))
    branch = 2 * (128 * 128 + 128)
    expected = (64 * 128 + 128) + (2 * 128 + 128) + 2 * branch + (256 * 512 + 512) + (512 * 512 + 512) + (512 * 2 + 2)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


def test_noise_levels_scale_what_the_network_sees():
    """Far beyond the data's scale, x / sigma is all that matters, and the score falls off like 1 / sigma."""
    network = MLP(8, (8,), (8,), (16,), scale_by_sigma=True)
    x, sigma = jax.random.normal(jax.random.key(0), (5, 2)), jnp.full(5, 1e4)
    params = ScoreModel(network, VESDE()).init(jax.random.key(1), (2,))
    # the time's part without its weights: only the points tell noise levels apart
    params["time_0"] = jax.tree.map(jnp.zeros_like, params["time_0"])
    output = jax.jit(lambda x, sigma: jnp.asarray(network.apply({"params": params}, x, sigma)))
    small, large = output(1e4 * x, sigma), output(4e4 * x, 4 * sigma)
    np.testing.assert_allclose(small, 4 * large, rtol=1e-4)
    assert jnp.max(jnp.abs(small)) > 1e-6


def test_the_network_of_the_paper() -> None:
    """Its first parameters lie within 1/sqrt(fan in), and it is a composition of affine maps, written out here."""
    config = config_with(model__name="mlp_published", model__scale_by_sigma=False, model__mlp_widths=(400, 3))
    model = build(config).model
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), (2,)))
    for layer in params.values():
        limit = 1 / math.sqrt(len(layer["kernel"]))
        for values in layer.values():
            assert np.max(np.abs(values)) < limit
    spread = np.std(params["trunk_0"]["bias"])  # 400 numbers, uniform in +-1/4
    assert spread == pytest.approx(0.25 / math.sqrt(3), abs=5 * 0.25 / math.sqrt(3) / math.sqrt(2 * 400))

    def affine(name: str, h: np.ndarray) -> np.ndarray:
        return h @ params[name]["kernel"] + params[name]["bias"]

    x, t = np.array([[0.3, -2.0], [5.0, 1.0]], np.float32), np.array([0.2, 0.9], np.float32)
    angles = t[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    time = affine("time_0", np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    trunk = affine("trunk_0", np.concatenate([time, affine("data_0", x)], axis=1))
    hidden = affine("trunk_1", trunk / (1 + np.exp(-trunk)))
    noise = affine("trunk_2", hidden / (1 + np.exp(-hidden)))
    score = model.score_fn(params)(jnp.asarray(x), jnp.asarray(t))
    expected = -noise / np.asarray(model.sde.alpha_sigma(jnp.asarray(t))[1])[:, None]
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="mlp_published sees unscaled points"):
        build(config_with(model__name="mlp_published"))


BAD = {
    "data__path": ("mine.npz", "data.path is 'mine.npz', but data.dataset=checkerboard reads no files"),
    "data__random_flip": (True, "data.random_flip is True, but checkerboard has points"),
    "data__centered": (True, "data.centered is True"),
    "data__num_points": (0, "data.num_points is 0; it must be at least 1"),
    "model__name": ("ncsnpp", "model.name is 'ncsnpp', but checkerboard has points: set it to 'mlp'"),
    "model__mlp_widths": ((16, 0), r"model.mlp_widths is \(16, 0\)"),
    "model__mlp_embedding": (7, "model.mlp_embedding is 7; it must be even"),
    "model__nonlinearity": ("gelu", "model.nonlinearity is 'gelu'; known: swish"),
    "training__snapshot_sampling": (True, "training.snapshot_sampling is True"),
    "eval__probe": ("rademacher", "eval.probe is 'rademacher'.*set it to 'exact'"),
    "eval__dequantizer": (True, "eval.dequantizer is True, but points have no levels: set it to False"),
    "eval__dequantization": ("truncated_normal", "eval.dequantization is 'truncated_normal', but points"),
    "eval__num_importance_samples": (4, "eval.num_importance_samples is 4, but points"),
    "eval__likelihood_at": ("x_tmin", "eval.likelihood_at is 'x_tmin', but likelihoods of points are computed at x"),
    "training__bits_per_dim": (True, "training.bits_per_dim is True, but points have no levels"),
    "eval__batch_size": (6, "eval.batch_size is 6"),
    "eval__max_examples": (-1, "eval.max_examples is -1"),
    "eval__density_grid": (-1, "eval.density_grid is -1; it must not be negative"),
    "eval__bpd_dataset": ("all", "eval.bpd_dataset is 'all'; known: train, test"),
}


@pytest.mark.parametrize("field", BAD)
def test_settings_that_do_not_fit_are_refused(field):
    value, message = BAD[field]
    config = config_with(**{field: value})

    def open_all():
        datasets.source_from_config(config, "train")
        PointLikelihoodEvaluator(build(config))

    with pytest.raises(ValueError, match=message):
        open_all()


def test_images_refuse_what_is_for_points():
    config = default()
    config.model.name = "mlp"
    with pytest.raises(ValueError, match=r"model.name is 'mlp', but CIFAR10 has images: set it to 'ncsnpp'"):
        build(config)
    config = default()
    config.training.exact_derivatives = True
    with pytest.raises(ValueError, match=r"training.exact_derivatives is True, but images"):
        build(config)
    with pytest.raises(ValueError, match="the data are shaped"):
        MLP().init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.ones(1))


def test_devices_divide_the_batches():
    assert parallel.device_mesh().size == 4, "the tests above ran on several devices"
