"""Checks of golden data of i-DODE [Z23]: parameter trees and outputs of the network of VDM [K21]; schedules."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrays import append_dims
from configs.default import Config, get_config
from models.mlp import TIMES_PER_UNIT
from models.score import ScoreModel, ScoreNetwork, build_network
from sde_lib import VPSDE, LinearGammaSDE, LinearGammaVPSDE, StraightPathSDE
from tests.golden_common import (
    Result,
    UnknownKind,
    count,
    golden_params,
    relative_error,
    tree_differences,
    tree_shapes,
)

SIZES: dict[str, dict[str, Any]] = {
    "cifar10": {"model.sm_n_embd": 128, "model.with_attention": False},
    "cifar10_aug": {"model.sm_n_embd": 256, "model.with_attention": True},
    "imagenet32": {"model.sm_n_embd": 256, "model.with_attention": False},
    "imagenet32_new": {"model.sm_n_embd": 256, "model.with_attention": False},
}
"""The fields, by their published names, in which the networks of the published configurations differ."""

COMMON: dict[str, Any] = {"model.sm_n_layer": 32, "model.with_fourier_features": True, "model.sm_pdrop": 0.0}
"""The other fields of the networks, without dropout, which has no parameters."""

GAMMA_MIN, GAMMA_MAX = -13.3, 5.0


def check_vdm_trees(path: Path) -> Iterator[Result]:
    """Compares the parameter paths and shapes of the published networks. The error is the number of differences."""
    golden = json.loads(path.read_text())
    same, totals = golden.pop("_same_tree", {}), golden.pop("_total", {})
    for name, tree in golden.items():
        for base in (name, *same.get(name, [])):
            shapes = tree_shapes(_abstract(_config(base, {}, size=32)))
            yield count(base, tree_differences(shapes, tree))
            if base in totals:
                total = sum(np.prod(shape, dtype=int) for shape in shapes.values())
                yield Result(f"{base}, number of parameters", abs(int(total) - totals[base]), 0)


def check_vdm_network(path: Path) -> Iterator[Result]:
    """Compares the parameter tree of a network, and its output to 1e-4 of its value plus 1e-5 of the largest value."""
    data = np.load(path)
    description = json.loads(str(data["config"]))
    config = _config(description["base"], description["overrides"], size=data["z"].shape[1])
    params = golden_params(data)
    differences = tree_differences(tree_shapes(_abstract(config)), tree_shapes(params))
    yield count("parameters", differences)
    if not differences:
        labels = TIMES_PER_UNIT * (data["gamma"] - GAMMA_MIN) / (GAMMA_MAX - GAMMA_MIN)
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
        sde = kind(float(np.round(data["gamma_min"], 4)), float(data["gamma_max"]))
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


def _config(base: str, overrides: dict[str, Any], size: int) -> Config:
    """The configuration of a network from fields with their published names, for images of this size."""
    if base not in SIZES:
        raise UnknownKind(f"unknown configuration {base!r} of i-DODE; known: {', '.join(SIZES)}")
    fields = {**COMMON, **SIZES[base], **overrides}
    config = get_config()
    config.training.sde = "vpsde"
    config.data.update(image_size=size, centered=True)
    config.model.update(
        name="vdm",
        scale_by_sigma=False,
        nf=fields["model.sm_n_embd"],
        num_res_blocks=fields["model.sm_n_layer"],
        attn_resolutions=(size,) if fields["model.with_attention"] else (),
        fourier_features=fields["model.with_fourier_features"],
        dropout=fields["model.sm_pdrop"],
    )
    return config


def _abstract(config: Config) -> Any:
    """The shapes of the parameters."""
    shape = (config.data.image_size, config.data.image_size, config.data.num_channels)
    return _shapes(build_network(config), shape)


@functools.cache
def _shapes(network: ScoreNetwork, image_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(lambda: ScoreModel(network, VPSDE()).init(jax.random.key(0), image_shape))


@functools.partial(jax.jit, static_argnums=0)
def _output(network: ScoreNetwork, params: Any, z: jax.Array, labels: jax.Array, conditioning: jax.Array) -> jax.Array:
    return network.apply({"params": params}, z, labels, False, conditioning)
