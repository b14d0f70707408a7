"""Checks of golden data of i-DODE [Z23]: configurations, the network of VDM [K21], and schedules."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrays import append_dims
from configs.checks import flat
from configs.default import Config
from models.mlp import TIMES_PER_UNIT
from models.score import ScoreModel, ScoreNetwork, build_network
from sde_lib import VPSDE, LinearGammaSDE, LinearGammaVPSDE, StraightPathSDE
from tests.golden_common import (
    Result,
    UnknownKind,
    count,
    golden_params,
    load_config,
    relative_error,
    tree_differences,
    tree_shapes,
)


class Field(NamedTuple):
    """The field of this project that corresponds to a published field."""

    name: str
    values: dict[Any, Any] | None = None
    """Maps published values to ours; None: they are equal."""

    def value(self, published: Any) -> Any:
        return published if self.values is None else self.values[published]


FIELDS = {
    "data.dataset": Field("data.dataset", {"cifar10": "CIFAR10", "imagenet32": "ImageNet"}),
    "data.new": Field("data.variant", {False: "old", True: "new"}),
    "model.antithetic_time_sampling": Field("training.stratified_times"),
    "model.dequantization": Field("eval.dequantization", {"u": "uniform", "tn": "truncated_normal", "v": "normal"}),
    "model.gamma_max": Field("model.gamma_max"),
    "model.gamma_min": Field("model.gamma_min"),
    "model.importance": Field("training.importance_weighting"),
    "model.num_importance": Field("eval.num_importance_samples"),
    "model.schedule": Field("training.sde", {"VP": "lineargammavpsde", "SP": "straightpathsde"}),
    "model.second_order": Field("training.score_matching_order", {False: 1, True: 2}),
    "model.sm_n_embd": Field("model.nf"),
    "model.sm_n_layer": Field("model.num_res_blocks"),
    "model.sm_n_timesteps": Field("training.continuous", {0: True}),
    "model.sm_pdrop": Field("model.dropout"),
    "model.velocity": Field("model.parameterization", {False: "noise", True: "velocity"}),
    "model.vocab_size": Field("data.levels"),
    "model.with_attention": Field("model.attn_resolutions", {False: (), True: (32,)}),
    "model.with_fourier_features": Field("model.fourier_features"),
    "optimizer.args.b1": Field("optim.beta1"),
    "optimizer.args.b2": Field("optim.beta2"),
    "optimizer.args.eps": Field("optim.eps"),
    "optimizer.args.weight_decay": Field("optim.weight_decay"),
    "optimizer.ema_rate": Field("model.ema_rate"),
    "optimizer.gradient_accumulation": Field("training.accumulation_steps"),
    "optimizer.learning_rate": Field("optim.lr"),
    "optimizer.lr_decay": Field("optim.schedule", {False: "constant"}),
    "optimizer.name": Field("optim.optimizer", {"adamw": "Adam"}),
    "training.batch_size_eval": Field("eval.batch_size"),
    "training.batch_size_train": Field("training.batch_size"),
    "training.num_steps_lr_warmup": Field("optim.warmup"),
    "training.num_steps_train": Field("training.n_iters"),
    "training.seed": Field("seed"),
    "training.steps_per_eval": Field("training.eval_freq"),
    "training.steps_per_logging": Field("training.log_freq"),
    "training.steps_per_save": Field("training.snapshot_freq_for_preemption"),
}
"""The published fields that have an equivalent."""

OTHER_FIELDS = (
    *("ckpt_restore_dir", "data.ignore_cache", "exp_name", "model_type", "training.profile", "training.substeps"),
    "model.gamma_type",  # schedules are not learned here
    "model.sample_softmax",  # for a sampler that is not implemented here
    "training.num_steps_eval",  # evaluation takes every image of the test set once
)
"""The published fields without an equivalent."""

AUGMENTED = {"model.nf": 256, "model.attn_resolutions": (32,), "model.dropout": 0.05}
"""The published network of cifar10_aug where it differs from cifar10's. Its augmentation is not implemented here."""


def check_idode_configs(path: Path) -> Iterator[Result]:
    """Compares the published configurations field by field. The error is the number of fields that differ."""
    golden = json.loads(path.read_text())
    for base, differences in golden["differences"].items():
        if base == "cifar10_aug":  # its augmentation is not implemented here
            continue
        config, wrong = flat(idode_config(base, {})), []
        for published, value in {**golden["common"], **differences}.items():
            if published in FIELDS:
                field = FIELDS[published]
                if config[field.name] != field.value(value):
                    wrong.append(f"{field.name} is {config[field.name]!r}, not {field.value(value)!r}")
            elif published not in OTHER_FIELDS:
                wrong.append(f"{published} is unknown")
        yield count(base, wrong)


def check_vdm_trees(path: Path) -> Iterator[Result]:
    """Compares the parameter paths and shapes of the published networks. The error is the number of differences."""
    golden = json.loads(path.read_text())
    same, totals = golden.pop("_same_tree", {}), golden.pop("_total", {})
    for name, tree in golden.items():
        for base in (name, *same.get(name, [])):
            shapes = tree_shapes(_abstract(idode_config(base, {"model.sm_pdrop": 0.0})))
            yield count(base, tree_differences(shapes, tree))
            if base in totals:
                total = sum(np.prod(shape, dtype=int) for shape in shapes.values())
                yield Result(f"{base}, number of parameters", abs(int(total) - totals[base]), 0)


def check_vdm_network(path: Path) -> Iterator[Result]:
    """Compares the parameter tree of a network, and its output to 1e-4 of its value plus 1e-5 of the largest value."""
    data = np.load(path)
    config = golden_idode_config(data, data["z"])
    params = golden_params(data)
    shapes = _shapes(build_network(config), data["z"].shape[1:])
    differences = tree_differences(tree_shapes(shapes), tree_shapes(params))
    yield count("parameters", differences)
    if not differences:
        model = config.model
        labels = TIMES_PER_UNIT * (data["gamma"] - model.gamma_min) / (model.gamma_max - model.gamma_min)
        inputs = (data["z"], labels.astype(np.float32), data["conditioning"])
        output = _output(build_network(config), params, *map(jnp.asarray, inputs))
        yield Result("output", relative_error(output, data["output"], floor=0.1), 1e-4)


def check_schedule(path: Path) -> Iterator[Result]:
    """Compares the two schedules with linear gamma, their importance sampling, and velocities.

    The errors of alpha and of quantiles are absolute, because the published expressions cancel near gamma_max. Our
    quantiles are also compared with the float64 truth.
    """
    data = np.load(path)
    for prefix, kind in (("vp", LinearGammaVPSDE), ("sp", StraightPathSDE)):
        # The shortest decimal number with these 32 bits is the one that was meant, for example -13.3.
        sde = kind(*(float(str(np.float32(data[end]))) for end in ("gamma_min", "gamma_max")))
        t = jnp.asarray(data["t"])
        (alpha, sigma), slope = sde.alpha_sigma(t), sde.drift_coeff(t) / sde.gamma_range
        yield Result(f"{prefix} gamma", relative_error(sde.gamma(t), data["gamma"], floor=1e-2), 1e-5)
        scale = 1.0 if prefix == "vp" else None
        yield Result(f"{prefix} alpha", relative_error(alpha, data[f"{prefix}_alpha"], scale=scale), 1e-5)
        yield Result(f"{prefix} sigma", relative_error(sigma, data[f"{prefix}_sigma"]), 1e-5)
        yield Result(f"{prefix} dlnalpha_dgamma", relative_error(slope, data[f"{prefix}_dlnalpha_dgamma"]), 1e-5)
        total = sde.velocity_weight(jnp.zeros(()))
        yield Result(f"{prefix} importance_total", relative_error(total, data[f"{prefix}_importance_total"]), 1e-5)
        drawn = sde.gamma(sde.time_of_velocity_quantile(jnp.asarray(data["quantiles"]), 0.0))
        for suffix, tolerance in (("", 3e-4), ("_float64", 2e-5)):
            quantity = f"{prefix}_gamma_of_quantile{suffix}"
            yield Result(quantity, relative_error(drawn, data[quantity], scale=1.0), tolerance)
        yield from _check_velocities(sde, prefix, data)


def _check_velocities(sde: LinearGammaSDE, prefix: str, data: Any) -> Iterator[Result]:
    """Compares x_t, the velocity, the noise of a given velocity, and the ODE's d z / d gamma of this noise."""
    x0, noise, velocity = (jnp.asarray(data[f"map_{name}"]) for name in ("x0", "eps", "F"))
    t = sde.time_of_log_noise_level(0.5 * jnp.asarray(data["map_gamma"]))
    alpha, sigma = (append_dims(values, x0) for values in sde.alpha_sigma(t))
    x = jnp.asarray(data[f"{prefix}_map_z"])
    predicted = sde.noise_of_velocity(x, velocity, t)
    flow = sde.probability_flow(lambda x, t: -predicted / sigma, x, t)
    got = {
        "z": alpha * x0 + sigma * noise,
        "F_target": sde.velocity(x0, noise, t),
        "noise_prediction": predicted,
        "ode_drift": flow / sde.gamma_range,
    }
    for name, value in got.items():
        yield Result(f"{prefix} {name}", relative_error(value, data[f"{prefix}_map_{name}"], floor=1.0), 1e-5)


def golden_idode_config(data: Any, images: np.ndarray) -> Config:
    """Returns the configuration of a golden .npz file, for images of the height and the channels of these."""
    description = json.loads(str(data["config"]))
    config = idode_config(description["base"], description["overrides"])
    config.data.update(image_size=images.shape[1], num_channels=images.shape[-1])
    if config.model.attn_resolutions:
        config.model.attn_resolutions = (images.shape[1],)
    return config


def idode_config(base: str, overrides: dict[str, Any]) -> Config:
    """Returns the published configuration of this name with some fields changed, given by their published names."""
    bases = ("cifar10", "cifar10_aug", "imagenet32", "imagenet32_new")
    if base not in bases:
        raise UnknownKind(f"unknown configuration {base!r} of i-DODE; known: {', '.join(bases)}")
    config = load_config(f"idode.{base.removesuffix('_aug')}")
    if base == "cifar10_aug":
        config.update_from_flattened_dict(AUGMENTED)
    for published, value in overrides.items():
        if published in OTHER_FIELDS:
            continue
        if published not in FIELDS:
            raise UnknownKind(f"unknown field {published!r} of i-DODE")
        field = FIELDS[published]
        config.update_from_flattened_dict({field.name: field.value(value)})
    return config


class Conditioned:
    """A network of VDM with its conditioning, to be used like other networks."""

    scale_by_sigma = False

    def __init__(self, network: Any, conditioning: np.ndarray):
        self.network, self.conditioning = network, jnp.asarray(conditioning, jnp.float32)

    def lazy_init(self, rngs: jax.Array, *args: Any) -> Any:
        return self.network.lazy_init(rngs, *args)

    def apply(self, variables: Any, x: jax.Array, labels: jax.Array, train: bool, **kwargs: Any) -> Any:
        return self.network.apply(variables, x, labels, train, self.conditioning, **kwargs)


def _abstract(config: Config) -> Any:
    """Returns the shapes of the parameters."""
    shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    return _shapes(build_network(config), shape)


@functools.cache
def _shapes(network: ScoreNetwork, image_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(lambda: ScoreModel(network, VPSDE()).init(jax.random.key(0), image_shape))


@functools.partial(jax.jit, static_argnums=0)
def _output(network: ScoreNetwork, params: Any, z: jax.Array, labels: jax.Array, conditioning: jax.Array) -> jax.Array:
    return network.apply({"params": params}, z, labels, False, conditioning)
