"""Compares this project with golden data, which are numbers computed by the published implementation.

    python -m tests.golden FILE...

The first words of a file's name determine its check. The file may be in any folder. For each quantity, the largest
error is printed with its tolerance. The exit code is 0 if every file has a known kind and all errors are within
tolerance.
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
from tests.golden_controllable import check_class_conditional, check_classifier, check_controllable
from tests.golden_dequantizer import check_dequantizer, check_dequantizer_trees
from tests.golden_discrete import check_discrete_losses, check_sampler_chain, check_score_fn, check_updates
from tests.golden_idode import check_idode_configs, check_schedule, check_vdm_network, check_vdm_trees
from tests.golden_idode_likelihood import check_idode_likelihood
from tests.golden_idode_losses import check_idode_losses
from tests.golden_likelihood import check_likelihood
from tests.golden_losses import check_losses
from tests.golden_score_sde import check_discrete_network, check_score_sde_configs, check_score_sde_trees
from tests.golden_sde import check_sde
from train_state import create_state, optimizer_from_config


def check_configs(path: Path) -> Iterator[Result]:
    """Compares every field of every configuration. The error is the number of fields that differ."""
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
    """Compares the parameter paths and shapes of configurations. The error is the number of differences."""
    golden = json.loads(path.read_text())
    same = golden.pop("_same_tree", {})
    for name, tree in golden.items():
        for base in (name, *same.get(name, [])):
            yield count(base, tree_differences(tree_shapes(abstract_params(load_config(base))), tree))


def check_network(path: Path) -> Iterator[Result]:
    """Compares the parameter tree of a network, and its output to 1e-4 of its value plus 1e-5 of the largest value."""
    data = np.load(path)
    config = golden_config(data)
    # build_network would refuse a golden network whose model.scale_by_sigma does not fit the SDE.
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


def check_published_checkpoint(path: Path) -> Iterator[Result]:
    """Compares the output of the averaged parameters in a published checkpoint with the .npz file beside it.

    The path is either of the two files.
    """
    checkpoint = path.with_suffix("") if path.suffix == ".npz" else path
    data = np.load(checkpoint.with_name(f"{checkpoint.name}.npz"))
    config = golden_config(data)
    network: Any = ncsnpp_from_fields(config.model, config.data.centered)
    optimizer = optimizer_from_config(config.optim, config.training.n_iters)
    like = jax.eval_shape(lambda params: create_state(params, optimizer), _abstract(network, data["x"].shape[1:]))
    state = read_published_checkpoint(checkpoint, like)
    output = _network_output(network, state.ema_params, data["x"], data["labels"])
    yield Result("output", relative_error(output, data["output_ema"], floor=0.1), 1e-4)


KINDS: dict[str, Callable[[Path], Iterator[Result]]] = {
    "classifier_wideresnet": check_classifier,
    "configs": check_configs,
    "controllable": check_controllable,
    "controllable_class": check_class_conditional,
    "dequantizer": check_dequantizer,
    "idode_configs": check_idode_configs,
    "likelihood": check_likelihood,
    "likelihood_idode": check_idode_likelihood,
    "losses": check_losses,
    "losses_idode": check_idode_losses,
    "losses_ddpm": check_discrete_losses,
    "losses_smld": check_discrete_losses,
    "param_trees": check_param_trees,
    "param_trees_dequantizer": check_dequantizer_trees,
    "param_trees_score_sde": check_score_sde_trees,
    "param_trees_vdm": check_vdm_trees,
    "network": check_network,
    "network_vdm": check_vdm_network,
    "network_ddpm": check_discrete_network,
    "network_ncsn": check_discrete_network,
    "network_ncsnv2": check_discrete_network,
    "network_ncsnpp_discrete": check_discrete_network,
    "released_checkpoint": check_published_checkpoint,
    "resample": check_resample,
    "samplers_discrete": check_updates,
    "samplers_discrete_chain": check_sampler_chain,
    "schedule_idode": check_schedule,
    "score_fn_discrete": check_score_fn,
    "score_sde_configs": check_score_sde_configs,
    "sde": check_sde,
}
"""The checks, by the first words of the names of their files."""


def check(path: Path) -> Iterator[Result]:
    """Returns all results of one file.

    Raises:
        FileNotFoundError: if there is no such file.
        UnknownKind: if the name of the file is not known, or its content names something unknown.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    return KINDS[kind_of(path)](path)


def kind_of(path: Path) -> str:
    """Returns the longest of `KINDS` that the file's name equals, or begins with before an underscore."""
    name = path.name.split(".")[0]
    kinds = [kind for kind in KINDS if name == kind or name.startswith(f"{kind}_")]
    if not kinds:
        raise UnknownKind(f"{path.name}: unknown kind of file; the name must begin with one of {', '.join(KINDS)}")
    return max(kinds, key=len)


@functools.partial(jax.jit, static_argnums=0)
def _network_output(network: Any, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    return network.apply({"params": params}, x, labels, False)


def abstract_params(config: Config) -> Any:
    """Returns the shapes of the parameters of a configuration, without computing parameters."""
    config.model.dropout = 0.0  # Dropout has no parameters, so networks that differ only in it share a cached result.
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
        except Exception as error:  # The other files are checked even if one cannot be.
            sys.stdout.write(f"  {type(error).__name__}: {error}\n")
            failed += 1
    sys.stdout.write("all within tolerance\n" if not failed else f"{failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        sys.exit(main(sys.argv[1:]))
