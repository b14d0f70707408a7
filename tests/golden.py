"""Compares this project with golden data: numbers that the published implementation computed.

    python -m tests.golden FILE...

The first words of a file's name say what it holds; the file may lie anywhere. For each quantity the largest error is
printed with its tolerance; the exit code is 0 if none is over and every file is of a known kind.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.default import Config
from infra.published_checkpoints import read_published_checkpoint
from models import resample
from models.ncsnpp import ncsnpp_from_fields
from models.score import ScoreModel, build_network
from sde_lib import VESDE
from tests.golden_common import (
    Result,
    UnknownKind,
    count,
    golden_config,
    golden_params,
    load_config,
    relative_error,
    tree_differences,
    tree_shapes,
)
from tests.golden_dequantizer import check_dequantizer, check_dequantizer_trees
from tests.golden_likelihood import check_likelihood
from tests.golden_losses import check_losses
from tests.golden_sde import check_sde
from train_state import create_state, optimizer_from_config


def check_configs(path: Path) -> Iterator[Result]:
    """Every field of every configuration; the error counts the fields that differ."""
    golden = json.loads(path.read_text())
    for name, differences in golden["differences"].items():
        config = load_config(name.replace("/", "."))
        wrong = []
        for field, value in {**golden["common"], **differences}.items():
            got = functools.reduce(lambda part, key: part.get(key) if part else None, field.split("."), config)
            if (list(got) if isinstance(got, tuple) else got) != value:
                wrong.append(f"{field} is {got!r}, not {value!r}")
        yield count(name, wrong)


def check_param_trees(path: Path) -> Iterator[Result]:
    """Parameter paths and shapes of configurations; the error counts those missing, unexpected or of another shape."""
    golden = json.loads(path.read_text())
    same = golden.pop("_same_tree", {})
    for name, tree in golden.items():
        for base in (name, *same.get(name, [])):
            yield count(base, tree_differences(tree_shapes(abstract_params(load_config(base))), tree))


def check_network(path: Path) -> Iterator[Result]:
    """A network's parameter tree, and its output for given parameters: to 1e-4 of itself plus 1e-5 of the largest."""
    data = np.load(path)
    config = golden_config(data)
    # whether or not it fits the SDE
    network: Any = ncsnpp_from_fields(config.model, config.data.centered)
    params = golden_params(data)
    differences = tree_differences(tree_shapes(_abstract(network, data["x"].shape[1:])), tree_shapes(params))
    yield count("parameters", differences)
    if not differences:
        output = _network_output(network, params, data["x"], data["labels"])
        yield Result("output", relative_error(output, data["output"], floor=0.1), 1e-4)


def check_resample(path: Path) -> Iterator[Result]:
    data = np.load(path)
    x, weight, taps = jnp.asarray(data["x"]), jnp.asarray(data["w"]), tuple(data["kernel"].tolist())
    got = {
        "upsample": resample.upsample(x, taps),
        "downsample": resample.downsample(x, taps),
        "upsample_conv": resample.upsample_conv(x, weight, taps),
        "conv_downsample": resample.conv_downsample(x, weight, taps),
        "naive_up": resample.upsample(x, None),
        "naive_down": resample.downsample(x, None),
    }
    for name, value in got.items():
        yield Result(name, relative_error(value, data[name], floor=1.0), 1e-5)


def check_released(path: Path) -> Iterator[Result]:
    """A released checkpoint, and the output of its averaged parameters in the .npz beside it; either may be given."""
    checkpoint = path.with_suffix("") if path.suffix == ".npz" else path
    data = np.load(checkpoint.with_name(f"{checkpoint.name}.npz"))
    config = golden_config(data)
    network: Any = ncsnpp_from_fields(config.model, config.data.centered)
    optimizer = optimizer_from_config(config.optim)
    like = jax.eval_shape(lambda params: create_state(params, optimizer), _abstract(network, data["x"].shape[1:]))
    state = read_published_checkpoint(checkpoint, like)
    output = _network_output(network, state.ema_params, data["x"], data["labels"])
    yield Result("output", relative_error(output, data["output_ema"], floor=0.1), 1e-4)


KINDS: dict[str, Callable[[Path], Iterator[Result]]] = {
    "configs": check_configs,
    "dequantizer": check_dequantizer,
    "likelihood": check_likelihood,
    "losses": check_losses,
    "param_trees": check_param_trees,
    "param_trees_dequantizer": check_dequantizer_trees,
    "network": check_network,
    "released_checkpoint": check_released,
    "resample": check_resample,
    "sde": check_sde,
}
"""The checks, by how the names of their files begin."""


def check(path: Path) -> Iterator[Result]:
    """All results of one file.

    Raises:
        UnknownKind: the file's name, or what its content names, is not known.
    """
    return KINDS[kind_of(path)](path)


def kind_of(path: Path) -> str:
    """The longest of `KINDS` that the name is or begins with, before an underscore."""
    name = path.name.split(".")[0]
    kinds = [kind for kind in KINDS if name == kind or name.startswith(f"{kind}_")]
    if not kinds:
        raise UnknownKind(f"{path.name}: unknown kind of file; known names begin with {', '.join(KINDS)}")
    return max(kinds, key=len)


@functools.partial(jax.jit, static_argnums=0)
def _network_output(network: Any, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    return network.apply({"params": params}, x, labels, False)


def abstract_params(config: Config) -> Any:
    """The shapes of a configuration's parameters, without computing any."""
    config.model.dropout = 0.0  # has no parameters; networks that differ in it share a computation
    size = config.data.image_size
    return _abstract(build_network(config), (size, size, config.data.num_channels))


@functools.cache
def _abstract(network: Any, image_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(lambda: ScoreModel(network, VESDE()).init(jax.random.key(0), image_shape))


def main(paths: Sequence[str]) -> int:
    if not paths:
        sys.stderr.write("usage: python -m tests.golden FILE...\n")
        return 2
    failed = 0
    for path in paths:
        sys.stdout.write(f"{path}\n")
        try:
            for result in check(Path(path)):
                sys.stdout.write(f"  {result}\n")
                failed += not result.passed
        except Exception as error:  # whatever is wrong with one file, the others are checked
            sys.stdout.write(f"  {type(error).__name__}: {error}\n")
            failed += 1
    sys.stdout.write("all within tolerance\n" if not failed else f"{failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        sys.exit(main(sys.argv[1:]))
