"""Learned dequantization: the bound it is trained on, what it learns, and --mode=train_deq as its users run it."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

import run_lib
from bound_likelihood import bound_draw, likelihood_bound
from build import build
from configs.digits.smoke import get_config
from coordinates import GaussianReference
from dequantization import variational
from dequantization.noise import Bins
from dequantization.training import evaluation_dequantizer
from dequantization.variational import DequantizerTrainer, VariationalDequantizer
from evaluators.export import export
from infra.workdir import Workdir
from models.flowpp import Flowpp
from sde_lib import SDES, VPSDE
from tests.analytic import asymmetric_mixture, gaussian
from tests.tiny_network import tiny_flow, tiny_network


@pytest.mark.parametrize(("name", "started"), [("vesde", True), ("vpsde", False)])
def test_a_draw_of_the_bound_has_its_expectation(name, started):
    """Over times that are equidistant, with a random shift, as in training: within 5 standard errors."""
    density, sde, num = asymmetric_mixture(3), SDES[name](), 4000
    score_fn, t_min, reference = density.score_fn(sde), 1e-3, GaussianReference(density.mean, 0.45)
    x = density.sample(jax.random.key(0), (2, 3))
    keys = jax.random.split(jax.random.key(1), 2)
    starts = 300 if started else 0

    @jax.jit
    def bound_and_draws(x, keys):
        settings = {"t_min": t_min, "reference": reference}
        bound = likelihood_bound(score_fn, sde, x, keys, num_times=500, num_starts=starts, **settings)
        z, start_z = jax.random.normal(jax.random.key(2), (2, 2 * num, 3))
        quantile = jnp.repeat((jnp.arange(num) + 0.3) / num, 2)
        x = jnp.tile(x, (num, 1))
        return bound, bound_draw(score_fn, sde, x, quantile, z, start_z if started else None, **settings)

    bound, draws = bound_and_draws(x, keys)
    draws = np.asarray(draws).reshape(num, 2)
    error = np.sqrt(np.var(draws, axis=0) / num + np.square(bound.error))
    assert np.all(np.abs(np.mean(draws, axis=0) - (bound.prior + bound.integral + bound.start)) < 5 * error)


def test_even_times_of_a_test_are_in_random_order(monkeypatch):
    """In training they rise from row to row. The first rows of a test batch that is not full must have times, too."""
    quantiles = []
    monkeypatch.setattr(variational, "bound_draw", lambda *given: quantiles.append(np.asarray(given[3])) or given[3])
    trainer = DequantizerTrainer(
        Flowpp(2, 2, 1, 1), VPSDE(), optax.identity(), Bins(2, False), 1e-5, False, 0.9, random_flip=False
    )
    images = jnp.zeros((8, 2, 2, 1), jnp.uint8)
    monkeypatch.setattr(variational, "_noise", lambda *given: (jnp.zeros(images.shape), jnp.zeros(len(images))))
    for train in (True, False):
        trainer.bits_per_dim({}, lambda x, t: x, GaussianReference(), images, jax.random.key(0), train=train)
    rising, mixed = (np.diff(each) % 1 for each in quantiles)
    np.testing.assert_allclose(rising, 1 / 8, atol=1e-6)
    np.testing.assert_allclose(np.sort(quantiles[1]), np.sort(quantiles[0]))
    assert np.max(np.abs(mixed - 1 / 8)) > 0.2


def test_training_finds_the_noise_that_the_model_wants():
    """Two pixels of two levels under a Gaussian model: -ln P of each image in closed form.

    The reference is the model itself, so the bound is exact and only the noise is to be learned: most of what uniform
    noise loses is won, and nothing goes below -ln P.
    """
    mean, std, sde, t_min = np.array([0.6, 0.4]), np.array([0.15, 0.2]), VPSDE(), 1e-5
    density = gaussian(mean, np.diag(std**2)).score_fn(sde)
    score_fn = jax.tree_util.Partial(lambda x, t: density(x.reshape(-1, 2), t).reshape(x.shape))
    reference = GaussianReference(jnp.asarray(mean.reshape(1, 2, 1)), jnp.asarray(std.reshape(1, 2, 1)))
    network = Flowpp(  # compiles fast
        filters=4, components=2, blocks=1, heads=1, processor_blocks=1, couplings=2, deep=True, attention=False
    )
    trainer = DequantizerTrainer(network, sde, optax.adam(5e-3), Bins(2, False), t_min, True, 0.98, False)
    every = jnp.asarray([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.uint8).reshape(4, 1, 2, 1)
    images, many = (jnp.tile(every, (num, 1, 1, 1)) for num in (8, 64))

    state, key = jax.jit(trainer.first_state)(images, jax.random.key(0)), jax.random.key(1)
    step = jax.jit(trainer.step)
    for _ in range(200):
        state, _ = step(state, score_fn, reference, images, key)

    evaluate = jax.jit(trainer.bits_per_dim, static_argnames="train")
    parts = evaluate(state.ema_params, score_fn, reference, many, jax.random.key(2), train=False)
    learned = np.mean(np.asarray(parts["total"]).reshape(64, 4), axis=0)
    edges = norm.cdf((np.array([0.0, 0.5, 1.0])[:, None] - mean) / std)
    of_level = np.diff(edges, axis=0)
    probability = np.array([of_level[a, 0] * of_level[b, 1] for a in range(2) for b in range(2)])
    exact = -np.log2(probability) / 2
    grid = (np.arange(1000) + 0.5) / 2000
    mean_logp = np.array([norm.logpdf(grid[:, None] + 0.5 * level, mean, std).mean(axis=0) for level in range(2)])
    uniform = np.array(
        [1 - (mean_logp[a, 0] + mean_logp[b, 1]) / (2 * math.log(2)) for a in range(2) for b in range(2)]
    )
    error = np.std(np.asarray(parts["total"]).reshape(64, 4), axis=0) / 8
    assert np.all(learned > exact - 5 * error - 1e-3)
    assert np.mean(learned - exact) < 0.1 * np.mean(uniform - exact), (learned, exact, uniform)


def config_with(**fields):
    config = get_config()
    config.training.batch_size = 8
    config.training.log_freq = 2
    config.training.eval_freq = 4
    config.training.snapshot_freq = 4
    config.training.snapshot_freq_for_preemption = 3
    config.deq.n_iters = 6
    config.deq.filters = 4
    config.deq.blocks = 1
    config.eval.enable_sampling = False
    config.eval.batch_size = 16
    config.eval.max_examples = 16
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def save_score_model(workdir, config, step):
    """A score model as it is before any training, under the given step."""
    run = build(config)
    with run.open_checkpoints(Workdir(workdir)) as checkpoints:
        state = run.fresh_state()
        checkpoints.save(
            state.replace(step=jnp.asarray(step), ema_params=jax.tree.map(lambda a: a + 1e-3 * step, state.params))
        )


def newest_parameters(workdir):
    dequantizer = evaluation_dequantizer(build(config_with(eval__dequantizer=True)), Workdir(workdir / "deq"))
    assert isinstance(dequantizer, VariationalDequantizer)
    return jax.device_get(dequantizer.params)


@pytest.fixture(scope="module", autouse=True)
def in_place_of_ncsnpp_and_flowpp():
    """What follows is the same for all networks."""
    with tiny_network(), tiny_flow():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A score model, and a dequantizer trained for 6 steps without interruption."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    save_score_model(workdir, config_with(), 4)
    run_lib.train_deq(config_with(), workdir, "deq")
    return workdir


def test_training_leaves_what_the_run_needs(trained):
    folder = trained / "deq"
    records = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == [2, 3, 4, 6]
    assert [r["step"] for r in records if r["split"] == "test"] == [4]
    assert {"total", "dequantization", "grad_norm", "seconds", "steps_per_second"} <= records[0].keys()
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 6], "every snapshot_freq steps, and the newest"
    assert json.loads((folder / "config.json").read_text())["deq"]["filters"] == 4
    assert [p.name for p in (trained / "checkpoints").iterdir() if p.name.isdigit()] == ["4"]


def test_resumed_training_is_bit_for_bit_that_of_one_run(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    run_lib.train_deq(config_with(deq__n_iters=5), tmp_path, "deq")
    run_lib.train_deq(config_with(), tmp_path, "deq")
    for a, b in zip(
        jax.tree.leaves(newest_parameters(tmp_path)), jax.tree.leaves(newest_parameters(trained)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_noise_stays_in_its_bin_and_depends_on_its_image_only(trained):
    config = config_with(eval__dequantizer=True)
    dequantizer = evaluation_dequantizer(build(config), Workdir(trained / "deq"))
    keys = jax.random.split(jax.random.key(0), 4)
    images = jax.random.randint(jax.random.key(1), (4, 8, 8, 1), 0, 17)
    apply = jax.jit(lambda dequantizer, keys, images: dequantizer(keys, images))
    x, log_q = apply(dequantizer, keys, images)
    noise = np.asarray(x, np.float64) * 17 - np.asarray(images)
    assert np.all((noise > -1e-5) & (noise < 1 + 1e-5))
    assert np.std(noise) > 0.05
    other_x, other_log_q = apply(dequantizer, keys[::-1], images[::-1])
    np.testing.assert_allclose(other_x[::-1], x, atol=1e-6)
    np.testing.assert_allclose(other_log_q[::-1], log_q, atol=1e-3)


def test_evaluation_with_the_dequantizer(trained):
    run_lib.evaluate(config_with(), trained, "learned")
    run_lib.evaluate(config_with(eval__dequantizer=True), trained, "learned")
    content = json.loads((trained / "learned" / "step_4.json").read_text())
    assert [part["bpd"]["dequantization"] for part in content["earlier"]] == ["uniform"], "it is not lost"
    result = content["bpd"]
    assert result["dequantization"] == "variational"
    assert result["dequantizer"].startswith("flowpp_cifar10, step 6, ")
    assert result["n"] == 16
    assert abs(result["terms"]["dequantization"]) > 1e-3
    assert sum(result["terms"].values()) == pytest.approx(result["mean"], abs=1e-5)


def test_an_exported_dequantizer_is_used_like_a_released_one(trained, tmp_path):
    """Round trip through the published format, and the fields that choose the file."""
    config = config_with(eval__dequantizer=True)
    path = export(config, trained)
    assert path.parent == trained / "exported"
    assert path.name.startswith("dequantizer_")
    config = config_with(eval__dequantizer=True, eval__dequantizer_checkpoint=str(path))
    loaded = evaluation_dequantizer(build(config), Workdir(tmp_path / "nothing"))
    own = evaluation_dequantizer(build(config_with(eval__dequantizer=True)), Workdir(trained / "deq"))
    assert loaded.description == own.description
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)
    unused = config_with(eval__dequantizer_checkpoint=str(path))
    with pytest.raises(ValueError, match=r"but eval\.dequantizer is False"):
        evaluation_dequantizer(build(unused), Workdir(tmp_path))


def test_what_is_missing_is_said_before_any_work(trained, tmp_path):
    config = config_with(eval__dequantizer=True)
    with pytest.raises(FileNotFoundError, match=r"no dequantizer in .*; train one with --mode=train_deq"):
        run_lib.evaluate(config, trained, "none", "elsewhere")
    assert not (trained / "none").exists()
    config.eval.dequantization = "truncated_normal"
    with pytest.raises(ValueError, match=r"eval.dequantization is 'truncated_normal' and eval.dequantizer is True"):
        run_lib.evaluate(config, trained, "none")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        run_lib.train_deq(config_with(), tmp_path / "empty", "deq")
    with pytest.raises(FileNotFoundError, match=r"ckpt_id is 2, .* no checkpoint for step 8; available steps: 4"):
        run_lib.train_deq(config_with(eval__ckpt_id=2), trained, "deq")
    with pytest.raises(ValueError, match=r"--deq_folder=\. must name a subfolder"):
        run_lib.train_deq(config_with(), trained, ".")
    assert not (tmp_path / "empty").exists()


def test_a_dequantizer_goes_on_with_its_own_score_model_only(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    save_score_model(tmp_path / "run", config_with(), 8)
    with pytest.raises(ValueError, match=r"parameters of the score model \(eval.ckpt_id"):
        run_lib.train_deq(config_with(), tmp_path / "run", "deq")
    run_lib.train_deq(config_with(eval__ckpt_id=1), tmp_path / "run", "deq")  # nothing left to do for its own
    with pytest.raises(ValueError, match=r"deq.n_iters asks for training to step 5, but .* is at step 6: nothing"):
        run_lib.train_deq(config_with(eval__ckpt_id=1, deq__n_iters=5), tmp_path / "run", "deq")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("deq__ema_rate", 1.0, r"deq.ema_rate is 1.0; it must lie in \[0, 1\)"),
        ("deq__n_iters", 0, "deq.n_iters is 0; it must be at least 1"),
        ("deq__name", "glow", "deq.name is 'glow'; known: "),
        ("training__accumulation_steps", 2, "training.accumulation_steps is 2, but --mode=train_deq .*: set it to 1"),
        ("deq__filters", 8, "another network: deq.filters is 4 there, but 8 in the configuration"),
    ],
)
def test_bad_fields_are_named(trained, field, value, message):
    before = (trained / "deq" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run_lib.train_deq(config_with(**{field: value}), trained, "deq")
    assert (trained / "deq" / "config.json").read_bytes() == before


def test_a_dequantizer_folder_without_a_checkpoint_is_none(trained, tmp_path):
    (tmp_path / "deq" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no dequantizer in"):
        evaluation_dequantizer(build(config_with(eval__dequantizer=True)), Workdir(tmp_path / "deq"))
