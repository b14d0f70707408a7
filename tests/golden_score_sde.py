"""Checks of golden networks of score_sde, whose labels number the levels of discrete time."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import Config, get_config
from models.ddpm import ddpm_from_fields
from models.ladder import ladder_from_fields
from models.ncsn import ncsn_from_fields
from models.ncsnpp import ncsnpp_from_fields
from models.ncsnv2 import NETWORKS as NCSNV2_NETWORKS
from models.ncsnv2 import ncsnv2_from_fields
from models.score import ScoreModel
from sde_lib import VESDE
from tests.golden_common import (
    Result,
    UnknownKind,
    count,
    golden_params,
    relative_error,
    tree_differences,
    tree_shapes,
)

CONFIGS = Path(__file__).parent / "golden" / "score_sde_configs.json"

U_NETS: dict[str, Callable[..., Any]] = {"ddpm": ddpm_from_fields, "ncsnpp": ncsnpp_from_fields}
"""The builders of networks whose labels can number the levels of a ladder, by model.name."""

NOT_CONFIGURATIONS = ("classifier_wideresnet",)
"""Trees in the file of trees that are not of a score network."""


def check_discrete_network(path: Path) -> Iterator[Result]:
    """Compares the parameter tree and the output, each example to 1e-4 of its largest value.

    With model.scale_by_sigma, the first example is thousands of times smaller than the last.
    """
    data = np.load(path)
    description = json.loads(str(data["config"]))
    network = _network(score_sde_config(description["base"].replace(".", "/"), description["overrides"]))
    params = golden_params(data)
    differences = tree_differences(tree_shapes(_abstract(network, data["x"].shape[1:])), tree_shapes(params))
    yield count("parameters", differences)
    if not differences:
        labels = jnp.asarray(data["labels"], jnp.float32)
        output = jax.jit(network.apply, static_argnums=3)({"params": params}, data["x"], labels, False)
        for number, (got, want) in enumerate(zip(output, data["output"], strict=True)):
            error = relative_error(got, want, scale=float(np.abs(want).max()))
            yield Result(f"output, label {data['labels'][number]}", error, 1e-4)


def check_score_sde_trees(path: Path) -> Iterator[Result]:
    """Compares the parameter paths and shapes of configurations. The error is the number of differences.

    The numbers of parameters are compared, too. The trees of classifiers are skipped.
    """
    golden = json.loads(path.read_text())
    same, counts = golden.pop("_same_tree", {}), golden.pop("_counts", {})
    for name, tree in golden.items():
        if name in NOT_CONFIGURATIONS:
            continue
        for base in (name, *same.get(name, [])):
            network, image_shape = _published_network(base)
            shapes = tree_shapes(_abstract(network, image_shape))
            differences = tree_differences(shapes, tree)
            total = sum(map(int, map(np.prod, shapes.values())))
            if total != counts.get(base, total):
                differences.append(f"{total} parameters, not {counts[base]}")
            yield count(base, differences)


def score_sde_config(name: str, overrides: dict[str, Any]) -> Config:
    """Returns score_sde's configuration of this name (`vp/ddpm/cifar10`) with some fields changed.

    Fields that score_sde does not have keep this project's defaults.
    """
    golden = json.loads(CONFIGS.read_text())
    if name not in golden["differences"]:
        raise UnknownKind(f"unknown configuration of score_sde: {name!r}")
    config = get_config()
    with config.unlocked(), config.ignore_type():
        for field, value in {**golden["common"], **golden["differences"][name], **overrides}.items():
            *parts, last = field.split(".")
            functools.reduce(getattr, parts, config)[last] = tuple(value) if isinstance(value, list) else value
    return config


def _published_network(name: str) -> tuple[Any, tuple[int, int, int]]:
    """Returns the network of a configuration at its real size, and the shape of its images.

    The name is that of a configuration, or begins with a network's name and ends with a configuration's.
    """
    other_name, _, base = name.rpartition(" with the fields of ")
    overrides = {"model.dropout": 0.0, **({"model.name": other_name} if other_name else {})}
    config = score_sde_config(base, overrides)
    # The SDE's fields have no parameters, so networks that differ only in them share a cached result.
    network = _network(config).clone(scale_by_sigma=False, centered=True)
    if config.model.name in U_NETS:
        network = network.clone(ladder=None)
    return network, (config.data.image_size, config.data.image_size, config.data.num_channels)


def _network(config: Config) -> Any:
    model, centered = config.model, config.data.centered
    if model.name == "ncsn":
        return ncsn_from_fields(model, centered)
    if model.name in NCSNV2_NETWORKS:
        return ncsnv2_from_fields(model, centered)
    if model.name not in U_NETS:
        raise UnknownKind(f"unknown network of score_sde: {model.name!r}")
    # DDPM has no form for continuous noise levels.
    has_ladder = model.scale_by_sigma and (model.name == "ddpm" or not config.training.continuous)
    return U_NETS[model.name](model, centered, ladder_from_fields(model) if has_ladder else None)


@functools.cache
def _abstract(network: Any, image_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(lambda: ScoreModel(network, VESDE()).init(jax.random.key(0), image_shape))
