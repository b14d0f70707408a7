"""Networks: every option, resampling identities, dropout, and what a score function makes of a network's output."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.ad_checkpoint import print_saved_residuals

from configs.ve.cifar10_ncsnpp_continuous import get_config
from models import resample
from models.ddpm import ddpm_from_fields
from models.layers import (
    NIN,
    NONLINEARITIES,
    Dropout,
    GroupNorm,
    attention,
    kernel_init,
    num_groups,
    positional_embedding,
)
from models.ncsn import ncsn_from_fields
from models.ncsnpp import CHOICES, REMAT_POLICIES, NCSNpp
from models.score import ScoreModel, build_network
from sde_lib import VESDE, VPSDE, sde_from_config

KEY = jax.random.key(0)
TAPS = (1.0, 3.0, 3.0, 1.0)
SMALL: dict[str, Any] = {"nf": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (2,)}
OPTIONS: dict[str, tuple[Any, ...]] = {
    **CHOICES,
    "fir_kernel": (None, TAPS, (1.0, 2.0, 1.0)),
    "conditional": (True, False),
    "skip_rescale": (True, False),
    "resamp_with_conv": (True, False),
    "scale_by_sigma": (True, False),
    "centered": (True, False),
    "channels": (1, 3),
}


def images(*shape: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), shape)


def pairwise_mixes() -> list[dict[str, Any]]:
    """A few mixes of options in which every pair of choices of two options occurs."""
    rng = np.random.default_rng(0)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(OPTIONS, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
    }
    mixes = []
    while pairs:
        drawn = [{name: known[rng.integers(len(known))] for name, known in OPTIONS.items()} for _ in range(200)]
        best = max(drawn, key=lambda mix: len(pairs & set(itertools.combinations(mix.items(), 2))))
        pairs -= set(itertools.combinations(best.items(), 2))
        mixes.append(best)
    return mixes


@pytest.mark.parametrize("mix", pairwise_mixes(), ids=lambda mix: "-".join(str(v) for v in mix.values()))
def test_every_pair_of_options_builds(mix: dict[str, Any]) -> None:
    fields = {name: value for name, value in mix.items() if name != "channels"}
    network = NCSNpp(**SMALL, **fields, dropout=0.1)
    x = jax.ShapeDtypeStruct((2, 4, 8, mix["channels"]), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.float32)
    params = jax.eval_shape(lambda: ScoreModel(network, VESDE()).init(KEY, x.shape[1:]))
    output = jax.eval_shape(
        lambda p, x, labels: network.apply({"params": p}, x, labels, True, rngs={"dropout": KEY}), params, x, labels
    )
    assert (output.shape, output.dtype) == (x.shape, x.dtype)


def test_a_new_network_is_finite_and_nearly_zero() -> None:
    network = NCSNpp(**SMALL)
    params = ScoreModel(network, VESDE()).init(KEY, (4, 4, 1))
    output = jax.jit(network.apply, static_argnums=3)(
        {"params": params}, images(2, 4, 4, 1), jnp.array([0.01, 999.0]), False
    )
    assert 0 < jnp.max(jnp.abs(jnp.asarray(output))) < 1e-3


@pytest.mark.parametrize(("shape", "scale"), [((3, 3, 40, 72), 1.0), ((60, 100), 0.1)])
def test_first_weights_are_spread_as_published(shape: tuple[int, ...], scale: float) -> None:
    """Uniform, of variance scale over the mean of fan-in and fan-out: as flax draws it, but of other numbers."""
    drawn = np.asarray(kernel_init(scale)(KEY, shape), np.float64)
    published = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")(KEY, shape)
    variance = scale / (np.prod(shape[:-2]) * (shape[-2] + shape[-1]) / 2)
    for weights in (drawn, np.asarray(published, np.float64)):
        assert np.abs(weights).max() == pytest.approx(np.sqrt(3 * variance), rel=1e-2)
        # of x^2, x uniform on [-b, b], the standard deviation is b^2 sqrt(4 / 45)
        assert abs(np.mean(weights**2) - variance) < 5 * 3 * variance * np.sqrt(4 / 45 / weights.size)


def test_maps_at_every_pixel_begin_small() -> None:
    params: Any = NIN(50).init(KEY, jnp.zeros((1, 4, 30)))["params"]
    assert float(jnp.abs(params["W"]).max()) == pytest.approx(np.sqrt(3 * 0.1 / 40), rel=1e-2)


def test_dropout_is_active_in_training_only() -> None:
    network = NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, init_scale=1.0, dropout=0.5)
    model = ScoreModel(network, VPSDE())
    score = model.score_fn(model.init(KEY, (4, 4, 1)))
    x, t = images(2, 4, 4, 1), jnp.array([0.1, 0.9])
    evaluate = jax.jit(lambda score: score(x, t))
    first, second = (evaluate(dataclasses.replace(score, dropout_key=jax.random.key(seed))) for seed in (1, 2))
    assert jnp.max(jnp.abs(first - second)) > 1e-3
    np.testing.assert_array_equal(first, evaluate(dataclasses.replace(score, dropout_key=jax.random.key(1))))
    np.testing.assert_array_equal(evaluate(score), evaluate(score))
    without = NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, init_scale=1.0, dropout=0.0)
    np.testing.assert_array_equal(evaluate(score), evaluate(ScoreModel(without, VPSDE()).score_fn(score.params)))


def test_naive_downsampling_undoes_upsampling() -> None:
    x = images(2, 4, 6, 3)
    np.testing.assert_allclose(resample.downsample(resample.upsample(x, None), None), x, rtol=1e-6)


@pytest.mark.parametrize("taps", [TAPS, (1.0, 1.0), (1.0, 4.0, 6.0, 4.0, 1.0, 0.0)])
def test_filters_keep_the_mean(taps: tuple[float, ...]) -> None:
    flat = jnp.ones((1, 16, 16, 1))
    for resampled in (resample.upsample(flat, taps), resample.downsample(flat, taps)):
        np.testing.assert_allclose(resampled[:, 3:-3, 3:-3], 1, rtol=1e-6)


def test_the_usual_filter_keeps_straight_lines() -> None:
    rows, columns = jnp.meshgrid(jnp.arange(8.0), jnp.arange(12.0), indexing="ij")
    plane = (2 * rows - 3 * columns)[None, :, :, None]
    there_and_back = resample.downsample(resample.upsample(plane, TAPS), TAPS)
    np.testing.assert_allclose(there_and_back[:, 1:-1, 1:-1], plane[:, 1:-1, 1:-1], atol=1e-5)


def test_filtered_upsampling_is_four_times_the_adjoint_of_downsampling() -> None:
    small, large = images(2, 4, 6, 3), images(2, 8, 12, 3)
    np.testing.assert_allclose(
        jnp.vdot(resample.upsample(small, TAPS), large),
        4 * jnp.vdot(small, resample.downsample(large, TAPS)),
        rtol=1e-5,
    )


def test_resampling_convolutions_reduce_to_resampling() -> None:
    """With a kernel that is 1 in the middle, and at the border too."""
    x = images(2, 4, 6, 3)
    middle = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    np.testing.assert_allclose(resample.upsample_conv(x, middle, TAPS), resample.upsample(x, TAPS), atol=1e-6)
    np.testing.assert_allclose(resample.conv_downsample(x, middle, TAPS), resample.downsample(x, TAPS), atol=1e-6)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (6, 1), (10, 2), (14, 2), (128, 32), (136, 17), (256, 32)])
def test_groups_are_of_equal_size(channels: int, groups: int) -> None:
    assert num_groups(channels) == groups


def test_derivatives_of_swish() -> None:
    x = jnp.linspace(-20.0, 20.0, 81)
    ours, theirs = NONLINEARITIES["swish"], jax.nn.silu
    # The tolerance is a few roundings of 20; without optimisations there are more.
    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    for _ in range(5):
        np.testing.assert_allclose(compiled(jax.vmap(ours))(x), compiled(jax.vmap(theirs))(x), atol=2e-6)
        ours, theirs = jax.grad(ours), jax.grad(theirs)


def test_swish_is_precise_far_from_zero() -> None:
    """And finite, also where exp(-x) is not."""
    x = np.array([-300.0, -80.0, -30.0, -12.0, -1e-3, 1e-3, 12.0, 300.0])
    expected = x / (1 + np.exp(-x))
    np.testing.assert_allclose(NONLINEARITIES["swish"](jnp.asarray(x, jnp.float32)), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("layer", "saved"),
    [
        (lambda x: lax.conv(x, x[:1], (1, 1), "SAME"), True),
        (lambda x: x @ x[0, 0], True),
        (lambda x: attention(x[0], x[0], x[0]), False),
        (lambda x: resample.downsample(x, TAPS), False),
        (lambda x: resample.upsample(x, TAPS), False),
    ],
)
def test_remat_of_all_but_convolutions_and_linear_maps_of_channels(
    layer: Callable[[Array], Array], saved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The derivative of the sine needs the result of the layer, which is saved or computed again from x."""
    remat = jax.checkpoint(lambda x: jnp.sin(layer(x)).sum(), policy=REMAT_POLICIES["conv"])
    print_saved_residuals(remat, jnp.ones((1, 4, 4, 4)))
    shown = capsys.readouterr().out
    assert "from the argument" in shown
    assert ("output of" in shown) == saved, shown


def derivatives(function: Callable[..., Array], *inputs: Array) -> list[Array]:
    """The value, the first and second forward derivatives along fixed directions, and the gradient of the second."""
    directions = tuple(jax.random.normal(jax.random.key(seed), x.shape) for seed, x in enumerate(inputs))

    def first(*inputs: Array) -> Array:
        return jax.jvp(function, inputs, directions)[1]

    def second(*inputs: Array) -> Array:
        return jax.jvp(first, inputs, directions)[1]

    third = jax.grad(lambda *inputs: jnp.vdot(second(*inputs), function(*inputs)), tuple(range(len(inputs))))
    return [function(*inputs), first(*inputs), second(*inputs), *third(*inputs)]


def assert_same_derivatives(ours: Callable[..., Array], plain: Callable[..., Array], *inputs: Array) -> None:
    for got, expected in zip(*(jax.jit(derivatives, static_argnums=0)(f, *inputs) for f in (ours, plain)), strict=True):
        assert jnp.linalg.norm(got - expected) < 1e-5 * jnp.linalg.norm(expected)


def test_derivatives_of_group_norm() -> None:
    def plain(x: Array) -> Array:
        parts = x.reshape(2, 12, 2, 5)
        mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
        return ((parts - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)

    params = GroupNorm().init(KEY, images(2, 3, 4, 10))
    assert_same_derivatives(lambda x: jnp.asarray(GroupNorm().apply(params, x)), plain, images(2, 3, 4, 10))


def test_derivatives_of_attention() -> None:
    def plain(query: Array, key: Array, value: Array) -> Array:
        return jax.nn.softmax(query @ key.swapaxes(1, 2) / jnp.sqrt(7.0)) @ value

    query, key, value = (images(2, length, 7) for length in (4, 5, 5))
    assert_same_derivatives(attention, plain, query, key, value)


@pytest.mark.parametrize("name", ["group_norm", "_swish", "attention"])
def test_layers_of_one_shape_share_one_trace(name: str) -> None:
    """Otherwise JAX would differentiate each layer of a network anew, and order 3 would take twice as long to trace."""
    fields: dict[str, Any] = SMALL | {"num_res_blocks": 3}
    network, x, labels = NCSNpp(**fields), images(2, 4, 4, 1), jnp.ones(2)
    variables = jax.eval_shape(functools.partial(network.init, train=False), KEY, x, labels)
    traced = jax.make_jaxpr(functools.partial(network.apply, train=False))(variables, x, labels)
    calls = [eqn for eqn in traced.eqns if eqn.params.get("name") == name]
    shapes = {str([variable.aval for variable in eqn.invars]) for eqn in calls}
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == len(shapes) < len(calls)


def test_attention_does_not_overflow() -> None:
    """Weights are exp of up to 1000 before they are normalised, and all on the first key."""
    query, key = jnp.full((1, 2, 4), 10.0), jnp.stack([jnp.full((1, 4), 50.0), jnp.full((1, 4), 1.0)], axis=1)
    np.testing.assert_allclose(attention(query, key, jnp.array([[[3.0], [5.0]]])), 3.0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-3])
def test_dropout_keeps_the_mean(rate: float) -> None:
    """Values are dropped independently, at a rate that need not be a multiple of 1 / 256."""
    shape = (8, 32, 32, 50)
    dropped = jax.jit(lambda key: Dropout(rate).apply({}, jnp.ones(shape), True, rngs={"dropout": key}))(KEY)
    kept = np.asarray(dropped) > 0
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(np.mean(~kept) - rate) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    # Neighbours share 32 random bits or a rounded rate, whose variance is at most 1 / 4 / 256^2.
    for first, second in ((kept[..., ::2], kept[..., 1::2]), (kept[:, ::2], kept[:, 1::2])):
        both, spread = np.mean(~first & ~second), rate / np.sqrt(first.size)
        assert abs(both - rate**2) < 5 * spread + 1 / 4 / 256**2


def operations(jaxpr: Any) -> Iterator[Any]:
    """All operations of a traced program, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                yield from operations(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("resblock_type", ["biggan", "ddpm"])
def test_bfloat16_is_for_feature_maps_only(resblock_type: str) -> None:
    fields: dict[str, Any] = SMALL | {"resblock_type": resblock_type, "fir_kernel": TAPS, "init_scale": 1.0}
    fields |= {"progressive": "residual", "progressive_input": "residual", "dtype": "bfloat16"}
    network = NCSNpp(**fields)
    x, labels = images(2, 4, 4, 3), jnp.array([1.0, 500.0])
    params = ScoreModel(network, VPSDE()).init(KEY, x.shape[1:])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    traced = jax.make_jaxpr(lambda x: network.apply({"params": params}, x, labels, False))(x)
    convolutions = [e for e in operations(traced.jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) > 10
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype(jnp.bfloat16)}


def test_ddpm_has_the_precision_and_the_memory_setting_of_its_fields() -> None:
    model = get_config().model
    model.update(name="ddpm", nf=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dtype="bfloat16")
    x, labels = images(2, 4, 4, 1), jnp.array([1.0, 500.0])
    params = ScoreModel(ddpm_from_fields(model, True), VPSDE()).init(KEY, x.shape[1:])
    model.remat = "block"
    network = ddpm_from_fields(model, True)
    traced = jax.make_jaxpr(lambda x: network.apply({"params": params}, x, labels, False))(x)
    found = list(operations(traced.jaxpr))
    convolutions = [e for e in found if e.primitive.name == "conv_general_dilated"]
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    assert any("remat" in e.primitive.name or "checkpoint" in e.primitive.name for e in found)
    model.normalization = "InstanceNorm"
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', but normalization 'InstanceNorm' needs 'float32'"):
        ddpm_from_fields(model, True)
    model.name = "ncsn"
    with pytest.raises(ValueError, match=r"model.dtype is 'bfloat16'; with model.name=ncsn it must be 'float32'"):
        ncsn_from_fields(model, True)


def test_bfloat16_changes_the_output_by_its_rounding() -> None:
    network = NCSNpp(nf=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), init_scale=1.0, dtype="bfloat16")
    x, labels = images(2, 4, 4, 1), jnp.array([1.0, 500.0])
    params = ScoreModel(network, VPSDE()).init(KEY, x.shape[1:])
    outputs = [
        jnp.asarray(jax.jit(each.apply, static_argnums=3)({"params": params}, x, labels, False))
        for each in (network, dataclasses.replace(network, dtype="float32"))
    ]
    half, full = outputs
    assert half.dtype == full.dtype == jnp.float32
    error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
    assert 1e-4 < error < 3e-2


def test_moments_of_bfloat16_have_32_bits() -> None:
    x = (10 + images(2, 8, 8, 8)).astype(jnp.bfloat16)
    normalized, _ = GroupNorm().init_with_output(KEY, x)
    expected, _ = GroupNorm().init_with_output(KEY, x.astype(jnp.float32))
    assert jnp.asarray(normalized).dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.asarray(normalized, jnp.float32), jnp.asarray(expected), rtol=2**-8)


def test_group_norm_whitens_groups() -> None:
    x = 100 + images(2, 3, 5, 10)
    normalized, _ = jax.jit(GroupNorm().init_with_output)(KEY, x)
    parts = np.asarray(x, np.float64).reshape(2, 15, 2, 5)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    expected = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    # x is near 100 with spread 0.3, so float32 knows it to 3e-5 of the spread
    np.testing.assert_allclose(jnp.asarray(normalized), expected, atol=3e-4)


def test_positional_embedding_has_its_size_and_frequencies() -> None:
    times = jnp.array([0.0, 2.0])
    for size in (8, 9):
        embedding = positional_embedding(times, size)
        assert embedding.shape == (2, size)
        np.testing.assert_allclose(embedding[1, :4], np.sin(2.0 * 10_000.0 ** (-np.arange(4) / 3)), rtol=1e-5)
        np.testing.assert_allclose(embedding[0, 4:8], 1)


class Traces:
    """What a network was called with, at each trace; hashable, as the fields of static arguments must be."""

    def __init__(self) -> None:
        self.train: list[bool] = []


class Echo(nn.Module):
    """Returns its conditioning, times a parameter, and counts how often it is traced."""

    scale_by_sigma: bool
    traces: Traces

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
        self.traces.train.append(train)
        return self.param("factor", nn.initializers.ones, ()) * jnp.broadcast_to(labels[:, None], x.shape)


T = jnp.array([0.1, 0.7])


@pytest.mark.parametrize("sde", [VESDE(), VPSDE()], ids=["ve", "vp"])
def test_score_conventions(sde: VESDE | VPSDE) -> None:
    x, sigma = jnp.zeros((2, 5)), sde.alpha_sigma(T)[1]
    divides, predicts_noise = (
        ScoreModel(Echo(by_sigma, Traces()), sde).score_fn({"factor": jnp.ones(())})(x, T) for by_sigma in (True, False)
    )
    np.testing.assert_allclose(divides, jnp.broadcast_to(sigma[:, None], x.shape), rtol=1e-6)
    np.testing.assert_allclose(predicts_noise, jnp.broadcast_to((-999 * T / sigma)[:, None], x.shape), rtol=1e-6)


def test_two_parameter_sets_share_one_trace() -> None:
    traces = Traces()
    score = ScoreModel(Echo(True, traces), VESDE()).score_fn({"factor": jnp.ones(())})
    evaluate = jax.jit(lambda score: score(jnp.zeros((2, 5)), T))
    one, two = evaluate(score), evaluate(dataclasses.replace(score, params={"factor": 2 * jnp.ones(())}))
    np.testing.assert_allclose(two, 2 * one)
    assert traces.train == [False]
    evaluate(dataclasses.replace(score, dropout_key=KEY))
    assert traces.train == [False, True]


def error_of(field: str, value: Any) -> str:
    """The message for a configuration with this field."""
    config = get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=field.split(".")[-1]) as caught:  # noqa: PT012
        sde_from_config(config)
        build_network(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("model.name", "ncsm", "ncsnpp"),
        ("training.sde", "ve", "vesde, linearvesde, vpsde, subvpsde"),
        ("model.scale_by_sigma", False, "True"),
        ("model.sigma_min", 60.0, "sigma_max"),
        ("model.nonlinearity", "gelu", "swish, elu, relu, lrelu"),
        ("model.resblock_type", "resnet", "biggan, ddpm"),
        ("model.embedding_type", "learned", "fourier, positional"),
        ("model.progressive", "skip", "none, output_skip, residual"),
        ("model.progressive_input", "skip", "none, input_skip, residual"),
        ("model.progressive_combine", "add", "sum, cat"),
        ("model.normalization", "BatchNorm", "GroupNorm"),
        ("model.attention_type", "linear", "ddpm"),
        ("model.conv_size", 5, "3"),
        ("model.nf", 2, "at least 4"),
        ("model.ch_mult", (), "at least one"),
        ("model.ch_mult", (1, 0), "positive"),
        ("model.num_res_blocks", 0, "at least 1"),
        ("model.dropout", 1.0, "[0, 1)"),
        ("model.init_scale", -1.0, "0 or more"),
        ("model.fourier_scale", 0, "positive"),
        ("model.fir_kernel", (1, -1), "positive"),
    ],
)
def test_bad_fields_end_in_one_line(field: str, value: Any, allowed: str) -> None:
    message = error_of(field, value)
    assert "\n" not in message
    assert allowed in message
    assert field == "model.sigma_min" or repr(value) in message or str(value) in message


def test_images_that_cannot_be_halved() -> None:
    network = NCSNpp(**{**SMALL, "ch_mult": (1, 2, 2)})
    with pytest.raises(ValueError, match="6x8 pixels cannot be halved 2 times"):
        ScoreModel(network, VESDE()).init(KEY, (6, 8, 3))
