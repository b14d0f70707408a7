"""Checks of golden networks of score_sde, whose labels number the levels of discrete time."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import Config
from configs.score_sde import CONFIGURATIONS, get_config
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

NOT_FIELDS = (
    "data.tfrecords_path",  # a path of the authors; data.path here
    "model.sigma_begin",  # without effect
    "optim.amsgrad",  # never used
    "training.continuouse",  # a misspelling
    "training.loss",  # in place of training.sde
)
"""Published fields that do not exist here."""

RENAMED = {("data.dataset", "CelebA"): "CELEBA"}
"""The published names of values that have another name here."""

MENDED: dict[str, dict[str, Any]] = {
    "ve/ncsn/celeba": {"training.sde": "vesde"},
    "ve/ncsnv2/bedroom": {"training.continuous": False},
}
"""Fields of published configurations that cannot run without a change."""

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


def check_score_sde_configs(path: Path) -> Iterator[Result]:
    """Compares every field of every configuration. The error is the number of fields that differ."""
    golden = json.loads(path.read_text())
    for name, differences in golden["differences"].items():
        config = score_sde_config(name, {})
        wrong = []
        for field, value in {**golden["common"], **differences, **MENDED.get(name, {})}.items():
            got = functools.reduce(lambda part, key: part.get(key) if part else None, field.split("."), config)
            if field in NOT_FIELDS:
                continue
            if RENAMED.get((field, got), list(got) if isinstance(got, tuple) else got) != value:
                wrong.append(f"{field} is {got!r}, not {value!r}")
        yield count(name, wrong)


def score_sde_config(name: str, overrides: dict[str, Any]) -> Config:
    """Returns score_sde's configuration of this name (`vp/ddpm/cifar10`) with some fields changed.

    Raises:
        UnknownKind: if the name is unknown.
    """
    if name not in CONFIGURATIONS:
        raise UnknownKind(f"unknown configuration of score_sde: {name!r}")
    config = get_config(name)
    for field, value in overrides.items():
        config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
    return config


def _published_network(name: str) -> tuple[Any, tuple[int, int, int]]:
    """Returns the network of a configuration at its real size, and the shape of its images.

    The name is a configuration's, or has the form NETWORK with the fields of CONFIGURATION.
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
