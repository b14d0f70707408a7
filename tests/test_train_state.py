import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from arrays import LabelledBatch
from build import TRAIN_KEY, build
from configs.digits.smoke import get_config
from datasets import source_from_config, training_batches
from infra import parallel
from losses import Objective
from models.layers import ResnetBlockDDPMpp, conv
from models.ncsnpp import NCSNpp, apply_with_remat
from models.score import ScoreModel
from objectives.residuals import ResidualTable
from sde_lib import VPSDE
from train_state import Trainer, create_state, optimizer_from_config, schedules_at


@pytest.fixture(scope="module")
def batches():
    source = source_from_config(get_config(), "train")
    return list(training_batches(source, 16, seed=0, first_step=0, num_steps=20))


class OneBlock(nn.Module):
    """The smallest score network with a residual block: larger ones take minutes to compile at order 3."""

    remat: str
    init_scale: float = 1.0
    scale_by_sigma: bool = False

    @nn.compact
    def __call__(self, x, labels, train):
        block = ResnetBlockDDPMpp(nn.swish, dropout=0.0, init_scale=1.0, skip_rescale=True)
        h = apply_with_remat(self.remat, block, (conv(3)(x), x), labels[:, None] / 999, train)
        return conv(x.shape[-1], init_scale=self.init_scale)(h)


def with_one_block(run, init_scale=1.0):
    """The run with the smallest network, which compiles fast."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, network=OneBlock("none", init_scale)))


def run_of_order(order):
    config = get_config()
    config.training.score_matching_order = order
    return with_one_block(build(config))


def train_on(devices, run, batches):
    """Parameters after one step for each batch, data-parallel over the devices, and the last metrics."""
    mesh = Mesh(np.array(devices), ("data",))
    whole, along = parallel.replicated(mesh), parallel.along_batch(mesh)
    step = jax.jit(run.trainer.train_step, in_shardings=(whole, along, whole), out_shardings=whole, donate_argnums=0)
    state, metrics = jax.device_put(run.fresh_state(), whole), {}
    for images in batches:
        state, metrics = step(state, images, run.key(TRAIN_KEY))
    return jax.device_get(state), jax.device_get(metrics)


def relative_distance(a, b):
    """|a - b| / |b| over all leaves, computed on the host."""
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_four_devices_train_as_one(order, batches):
    """20 steps give the same parameters to 1e-4; also that the steps were worth comparing, and the metrics finite."""
    run = build(get_config()) if order == 1 else run_of_order(order)
    one, metrics_of_one = train_on(jax.devices()[:1], run, batches)
    four, metrics_of_four = train_on(jax.devices(), run, batches)
    assert relative_distance(four.params, one.params) < 1e-4
    assert relative_distance(four.ema_params, one.ema_params) < 1e-4
    assert relative_distance(one.params, jax.device_get(run.fresh_state().params)) > 1e-2
    assert one.step == 20
    terms = {1: {"first"}, 2: {"first", "second_frob", "second_trace"}}.get(
        order, {"first", "second_frob", "second_trace", "third"}
    )
    assert set(metrics_of_one) == terms | {"total", "grad_norm", "failed", "largest_times"}
    for name in metrics_of_one:
        np.testing.assert_allclose(metrics_of_four[name], metrics_of_one[name], rtol=1e-3)


def test_accumulated_gradient_is_that_of_the_whole_batch(batches):
    run = run_of_order(1)
    params = run.fresh_state().params
    split = dataclasses.replace(run.trainer, accumulation_steps=4)
    key = jax.random.key(0)
    whole, metrics = jax.jit(run.trainer.gradient)(params, batches[0], key)
    parts, metrics_of_parts = jax.jit(split.gradient)(params, batches[0], key)
    assert relative_distance(parts, whole) < 1e-4
    np.testing.assert_allclose(metrics_of_parts["total"], metrics["total"], rtol=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_precision_of_matrix_products_reaches_every_derivative(order):
    run = run_of_order(order)
    trainer = dataclasses.replace(run.trainer, model=ScoreModel(OneBlock("none"), VPSDE()), matmul_precision="highest")
    params = jax.eval_shape(lambda: trainer.model.init(jax.random.key(0), (4, 4, 1)))
    images = jax.ShapeDtypeStruct((4, 4, 4, 1), jnp.uint8)
    jaxpr = jax.make_jaxpr(trainer.gradient)(params, images, jax.random.key(0))
    text = str(jaxpr)
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products > 5 * order
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_bfloat16_leaves_gradients_and_losses_with_32_bits():
    run = run_of_order(3)
    network = NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dtype="bfloat16")
    trainer = dataclasses.replace(run.trainer, model=ScoreModel(network, VPSDE()))
    params = jax.eval_shape(lambda: trainer.model.init(jax.random.key(0), (4, 4, 1)))
    images = jax.ShapeDtypeStruct((4, 4, 4, 1), jnp.uint8)
    gradient, metrics = jax.eval_shape(trainer.gradient, params, images, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient, metrics))} == {jnp.dtype(jnp.float32)}


MEMORY = {
    "block, parts in a loop": {"remat": "block", "accumulation_steps": 2},
    "conv, parts in a loop": {"remat": "conv", "accumulation_steps": 2},
    "residual first, block": {"remat": "block", "residual_first": True},
}


def gradient_with(order, remat="none", residual_first=False, **options):
    """The gradient of a trainer with these memory settings, on the smallest network, and the metrics."""
    run = run_of_order(order)
    trainer = dataclasses.replace(
        run.trainer,
        model=ScoreModel(OneBlock(remat), VPSDE()),
        objective=Objective(order=order, residual_first=residual_first, third_weight=20.0),
        **options,
    )
    params = jax.jit(trainer.model.init, static_argnums=1)(jax.random.key(0), (4, 4, 1))
    images = np.random.default_rng(1).integers(0, 17, (4, 4, 4, 1), np.uint8)
    return jax.jit(trainer.gradient)(params, images, jax.random.key(0))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_memory_settings_do_not_change_the_gradient(order):
    expected, expected_metrics = gradient_with(order)
    for name, options in MEMORY.items():
        if order == 3 or "residual_first" not in options:
            gradient, metrics = gradient_with(order, **options)
            assert relative_distance(gradient, expected) < 1e-5, name
            for term in expected_metrics:
                np.testing.assert_allclose(metrics[term], expected_metrics[term], rtol=1e-5, err_msg=f"{name}: {term}")


def test_several_steps_in_one_call(batches):
    run = run_of_order(1)
    key = run.key(TRAIN_KEY)
    together, metrics = jax.jit(run.trainer.train_steps)(run.fresh_state(), np.stack(batches[:3]), key)
    state, losses = run.fresh_state(), []
    step = jax.jit(run.trainer.train_step)
    for images in batches[:3]:
        state, values = step(state, images, key)
        losses.append(values["total"])
    assert relative_distance(together.params, state.params) < 1e-5
    np.testing.assert_allclose(metrics["total"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_metric_that_is_not_a_scalar_is_named(batches, monkeypatch, steps):
    """One step dropped it silently, and several failed while broadcasting."""
    train_step = Trainer.train_step

    def with_gradients(*arguments):
        state, metrics = train_step(*arguments)
        return state, metrics | {"norms": jnp.ones(3)}

    monkeypatch.setattr(Trainer, "train_step", with_gradients)
    run = run_of_order(1)
    with pytest.raises(ValueError, match=r"the metric 'norms' has shape \(3,\); it must be a scalar"):
        jax.eval_shape(run.trainer.train_steps, run.fresh_state(), np.stack(batches[:steps]), run.key(TRAIN_KEY))


def test_optimizer_is_the_published_one():
    """Clip by the global norm, Adam with warm-up from 0, by hand for three steps on a small vector."""
    optim = get_config().optim
    optim.lr, optim.warmup, optim.grad_clip, optim.eps = 0.1, 2, 1.0, 1e-8
    optimizer = optimizer_from_config(optim, 100)
    params: Any = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    m = v = np.zeros(2)
    w = np.array([1.0, -2.0])
    for step, gradient in enumerate(np.array([[3.0, 4.0], [0.3, -0.1], [-2.0, 1.0]])):
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        clipped = gradient / max(np.linalg.norm(gradient), 1)
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        rate = 0.1 * min(step / 2, 1)
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(np.asarray(params["w"]), w, rtol=1e-5)


def test_a_limit_of_zero_for_the_gradient_is_no_limit():
    optim, updates = get_config().optim, []
    optim.warmup = 0
    for optim.grad_clip in (0.0, -1.0):
        optimizer = optimizer_from_config(optim, 100)
        params: Any = {"w": jnp.ones(3)}
        update: Any = optimizer.update({"w": 100 * jnp.ones(3)}, optimizer.init(params), params)[0]
        updates.append(update["w"])
    np.testing.assert_array_equal(*updates)
    assert np.all(updates[0] < 0)


def test_a_step_that_is_not_finite_changes_only_the_step(batches):
    """In a call of three steps, the second fails. Its metrics do not count, and its largest loss has its time."""
    run = run_of_order(1)
    key, before = run.key(TRAIN_KEY), run.fresh_state()

    def preprocess(key, images):
        x = run.trainer.preprocess(key, images)
        return x.at[5].multiply(jnp.where(images[0, 0, 0, 0] == 255, jnp.nan, 1.0))

    trainer = dataclasses.replace(run.trainer, preprocess=preprocess)
    images = np.stack(batches[:3])
    images[1, 0, 0, 0] = 255
    after, metrics = jax.jit(trainer.train_steps)(before, images, key)
    assert metrics["failed"].tolist() == [0, 1, 0]
    assert all(np.isfinite(value).all() for value in metrics.values())
    first, _ = jax.jit(trainer.train_step)(before, images[0], key)
    skipped, failure = jax.jit(trainer.train_step)(first, images[1], key)
    assert failure["failed"] == 1
    noise_key = jax.random.split(jax.random.fold_in(key, 1), 3)[1]
    noise = trainer.objective.draw_noise(noise_key, run.sde, images[1].shape)
    assert failure["largest_times"][0] == pytest.approx(float(noise.t[5]), rel=1e-5)
    unchanged = first.replace(step=first.step + 1, opt_state=schedules_at(first.opt_state, first.step + 1))
    jax.tree.map(np.testing.assert_array_equal, skipped, unchanged)
    assert optax.tree.get(skipped.opt_state, "ScaleByScheduleState").count == skipped.step == 2, "the learning rate"
    third, _ = jax.jit(trainer.train_step)(skipped, images[2], key)
    assert relative_distance(after.params, third.params) < 1e-5


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", (1, 1, 1)), ("linear", (0.75, 0.5, 0)), ("cosine", (0.5 + 0.5**1.5, 0.5, 0))],
)
def test_learning_rate_falls_to_zero(schedule, factors):
    """Adam makes steps of the learning rate if all gradients are equal; beta2 does not matter then."""
    optim = get_config().optim
    optim.lr, optim.warmup, optim.eps, optim.schedule, optim.beta2 = 0.1, 10, 1e-12, schedule, 0.99
    optimizer = optimizer_from_config(optim, 80)
    params: Any = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for step, factor in zip((20, 40, 80), factors, strict=True):
        updates: Any = optimizer.update(params, schedules_at(state, jnp.asarray(step)), params)[0]
        np.testing.assert_allclose(updates["w"], -0.1 * factor, rtol=1e-4, atol=1e-8)


def test_the_average_warms_up(batches):
    trainer = dataclasses.replace(run_of_order(1).trainer, ema_rate=0.9, ema_warmup=True)
    rates = [float(trainer.ema_rate_at(jnp.asarray(step))) for step in (0, 9, 1000)]
    np.testing.assert_allclose(rates, (0.1, 10 / 19, 0.9), rtol=1e-6)


def test_residuals_are_measured_by_noise_level(batches):
    """After many batches the table has r at each time; weights of the first order have mean 1 over all times."""
    table = ResidualTable.start()
    np.testing.assert_allclose(table.values(), 1)
    assert not any(a.weak_type for a in table), "the second training step would compile again"

    @jax.jit
    def after_all(table, quantiles):
        return jax.lax.scan(lambda t, q: (t.updated(ResidualTable.of_batch(q, 0.1 + q)), None), table, quantiles)[0]

    table = after_all(table, jax.random.uniform(jax.random.key(0), (2000, 64)))
    middles = (np.arange(64) + 0.5) / 64
    np.testing.assert_allclose(table.values(), 0.1 + middles, rtol=0.03)
    residual = table.at(jnp.asarray(middles))
    np.testing.assert_allclose(residual.value, 0.1 + middles, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(residual.harmonic_mean / residual.value), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(table.density()), 1, rtol=1e-5)


def test_all_options_together_train_alike_on_four_devices_in_parts(batches):
    """Unbiased order 2 on half the batch, weights by the residual, even times; r falls during training."""
    config = get_config()
    config.training.update(
        score_matching_order=2,
        high_order_estimator="unbiased",
        high_order_fraction=0.5,
        high_order_weighting="residual",
        first_order_weighting="residual",
        stratified_times=True,
    )
    config.training.batch_size, config.optim.grad_clip = 16, -1.0
    config.training.sde, config.model.scale_by_sigma = "vpsde", False  # keeps values small, as one block needs
    run = with_one_block(build(config), init_scale=0.0)
    config = config.copy_and_resolve_references()
    config.training.accumulation_steps = 2
    in_parts = with_one_block(build(config), init_scale=0.0)
    one, metrics = train_on(jax.devices()[:1], run, batches[:8])
    four, _ = train_on(jax.devices(), in_parts, batches[:8])
    assert relative_distance(four.params, one.params) < 1e-3
    terms = {"first", "second_frob", "second_trace", "total", "residual", "grad_norm"}
    assert set(metrics) == terms | {"failed", "largest_times"}
    assert all(np.isfinite(value).all() for value in metrics.values())
    of_one, of_four = (jax.tree.map(jnp.asarray, state.residuals).values() for state in (one, four))
    np.testing.assert_allclose(of_four, of_one, rtol=1e-3)
    assert np.mean(of_one) < 0.99


def test_classes_are_hidden_by_other_random_numbers_than_the_data(monkeypatch):
    """`jax.random.split` and `jax.random.fold_in` of a key derive the same keys."""
    keys = {}

    def hide_classes(trainer, key, labels):
        keys["classes"] = key
        return labels

    monkeypatch.setattr(Trainer, "_hide_classes", hide_classes)
    monkeypatch.setattr(Trainer, "loss_gradient", lambda *_: ({}, {}, None))

    def preprocess(key, images):
        keys["data"] = key
        return jnp.zeros(images.shape)

    trainer = dataclasses.replace(build(get_config()).trainer, preprocess=preprocess)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    trainer.gradient_and_residuals({}, LabelledBatch(images, np.zeros(2, np.int32)), jax.random.key(0), None)
    derived = [jax.random.key_data(key).tolist() for key in jax.random.split(keys["data"])]
    assert jax.random.key_data(keys["classes"]).tolist() not in derived


def test_average_of_parameters(batches):
    """ema <- rate ema + (1 - rate) params, from the parameters at step 0."""
    run = run_of_order(1)
    before = run.fresh_state()
    after, _ = jax.jit(run.trainer.train_step)(before, batches[0], run.key(TRAIN_KEY))
    rate = run.config.model.ema_rate
    expected = jax.tree.map(lambda a, b: rate * a + (1 - rate) * b, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema_params, expected)


def test_a_state_shares_no_buffers():
    """Donation would free one buffer twice."""
    params = {"w": jnp.ones(3)}
    state = create_state(params, optax.adam(1e-3))
    pointers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves((state.params, state.ema_params))]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    ("field", "value"), [("warmup", 0), ("grad_clip", -1.0), ("weight_decay", 0.1), ("schedule", "cosine")]
)
def test_another_optimizer_goes_on_with_the_state(field, value):
    optim = get_config().optim
    usual = optimizer_from_config(optim, 100).init({"w": jnp.ones(3)})
    optim[field] = value
    other = optimizer_from_config(optim, 100).init({"w": jnp.ones(3)})
    assert jax.tree.structure(other) == jax.tree.structure(usual)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "SGD"),
        ("lr", 0.0),
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("schedule", "step"),
        ("warmup", -1),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_optimizers_are_refused(field, value):
    optim = get_config().optim
    optim[field] = value
    with pytest.raises(ValueError, match=f"optim.{field} is"):
        optimizer_from_config(optim, 100)
