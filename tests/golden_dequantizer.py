"""Checks of golden Flow++ dequantizers: their parameter trees, and the noise and log-densities of small ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import get_config
from models.flowpp import ARCHITECTURES, Flowpp, flowpp_from_config
from tests.golden_common import (
    Result,
    UnknownKind,
    count,
    golden_params,
    relative_error,
    tree_differences,
    tree_shapes,
)


def check_dequantizer_trees(path: Path) -> Iterator[Result]:
    """Compares the parameter paths and shapes of the published dequantizers, by deq.name, for 32x32 images."""
    for name, tree in json.loads(path.read_text()).items():
        shapes = _first_shapes(_network(name), (1, 32, 32, 3))
        yield count(name, tree_differences(tree_shapes(shapes), tree))


def check_dequantizer(path: Path) -> Iterator[Result]:
    """Compares noise and -ln q for given Gaussian noise, images in [0, 1] and parameters.

    The names of the parameters determine the architecture.
    """
    data = np.load(path)
    params = golden_params(data)
    name = "flowpp_imagenet32" if "DeepProcessor_0" in params else "flowpp_cifar10"
    network = _network(name, **json.loads(str(data["config"])))
    shapes = _first_shapes(network, data["gaussian"].shape)
    differences = tree_differences(tree_shapes(shapes), tree_shapes(params))
    yield count("parameters", differences)
    if not differences:
        apply = jax.jit(network.apply, static_argnums=3)
        noise, log_q = apply({"params": params}, data["gaussian"], data["data01"], False)
        yield Result("noise", relative_error(noise, data["noise"], scale=1.0), 1e-3)
        want = data["minus_logq_per_example"]
        yield Result("-ln q", relative_error(-log_q, want, scale=np.abs(want).max()), 1e-3)


def _network(name: str, **sizes: int) -> Flowpp:
    deq = get_config().deq
    if name not in ARCHITECTURES:
        raise UnknownKind(f"unknown dequantizer {name!r}; known: {', '.join(ARCHITECTURES)}")
    deq.name = name
    deq.update(sizes)
    return flowpp_from_config(deq)


def _first_shapes(network: Flowpp, images: tuple[int, ...]) -> Any:
    x = jnp.zeros(images)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), x, x, False)["params"])
