"""Checks of golden data of i-DODE [Z23]: the network of VDM [K21], its parameter trees and its output."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import Config, get_config
from models.mlp import TIMES_PER_UNIT
from models.score import ScoreModel, ScoreNetwork, build_network
from sde_lib import sde_from_config
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
    model = ScoreModel(build_network(config), sde_from_config(config))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), shape))


@functools.partial(jax.jit, static_argnums=0)
def _output(network: ScoreNetwork, params: Any, z: jax.Array, labels: jax.Array, conditioning: jax.Array) -> jax.Array:
    return network.apply({"params": params}, z, labels, False, conditioning)
