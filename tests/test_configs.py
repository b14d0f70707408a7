"""The published configurations: their networks' sizes, their documentation, and fields that follow other fields."""

import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from build import build
from configs.default import Config
from sde_lib import sde_from_config
from tests.golden import abstract_params
from tests.golden_common import load_config

ROOT = Path(__file__).parent.parent
FAMILIES = [ROOT / "configs" / family for family in ("ve", "vp", "subvp")]
PUBLISHED = sorted(path.relative_to(ROOT) for family in FAMILIES for path in family.glob("*_continuous.py"))
FACES, VP_NCSNPP, VP_NCSNPP_DEEP = 105_785_896, 62_693_251, 107_521_411
NCSNPP, NCSNPP_DEEP, DDPMPP, DDPMPP_DEEP, CHURCH = 62_758_915, 107_587_075, 61_804_419, 106_632_579, 65_574_549
COUNTS = {
    "ve.cifar10_ncsnpp_continuous": NCSNPP,
    "ve.cifar10_ncsnpp_deep_continuous": NCSNPP_DEEP,
    "ve.imagenet32_ncsnpp_continuous": NCSNPP,
    "ve.imagenet32_ncsnpp_deep_continuous": NCSNPP_DEEP,
    "ve.church_ncsnpp_continuous": CHURCH,
    "ve.bedroom_ncsnpp_continuous": CHURCH,
    "ve.celebahq_256_ncsnpp_continuous": CHURCH,
    "ve.ffhq_256_ncsnpp_continuous": CHURCH,
    "ve.celebahq_ncsnpp_continuous": FACES,
    "ve.ffhq_ncsnpp_continuous": FACES,
    "vp.cifar10_ncsnpp_continuous": VP_NCSNPP,
    "vp.cifar10_ncsnpp_deep_continuous": VP_NCSNPP_DEEP,
    "subvp.cifar10_ncsnpp_continuous": VP_NCSNPP,
    "subvp.cifar10_ncsnpp_deep_continuous": VP_NCSNPP_DEEP,
    "vp.cifar10_ddpmpp_continuous": DDPMPP,
    "vp.cifar10_ddpmpp_deep_continuous": DDPMPP_DEEP,
    "vp.imagenet32_ddpmpp_continuous": DDPMPP,
    "vp.imagenet32_ddpmpp_deep_continuous": DDPMPP_DEEP,
    "subvp.cifar10_ddpmpp_continuous": DDPMPP,
    "subvp.cifar10_ddpmpp_deep_continuous": DDPMPP_DEEP,
    "subvp.imagenet32_ddpmpp_continuous": DDPMPP,
    "subvp.imagenet32_ddpmpp_deep_continuous": DDPMPP_DEEP,
}
# ml_collections loads files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CommandLine: TypeAlias = Callable[[str, list[str]], Config]
BOTH_WEIGHTINGS = ["training.likelihood_weighting=True", "training.importance_weighting=True"]


def test_all_published_configurations_are_there() -> None:
    assert {".".join(path.with_suffix("").parts[1:]) for path in PUBLISHED} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_published_size(name: str) -> None:
    config = load_config(name)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config))) == COUNTS[name]
    assert sde_from_config(config).prior_sigma == (config.model.sigma_max if name.startswith("ve") else 1)


@pytest.mark.parametrize("path", PUBLISHED, ids=str)
def test_docstrings_give_command_and_size(path: Path) -> None:
    docstring = (ROOT / path).read_text().split('"""')[1]
    assert f"python main.py --config={path} --workdir=WORKDIR --mode=train" in docstring
    millions = re.findall(r"([\d.]+)M\s+parameters", docstring)
    assert millions == [f"{COUNTS['.'.join(path.with_suffix('').parts[1:])] / 1e6:.1f}"]


PROTOCOL = {
    "eval.ode_solver": "dopri5",  # RK45
    "eval.rtol": 1e-5,
    "eval.atol": 1e-5,
    "eval.probe": "rademacher",
    "eval.num_probes": 1,
    "eval.dequantization": "uniform",
    "eval.num_samples": 50_000,
    "eval.inception_splits": 1,
    "eval.rounding": "truncate",
    "eval.features": "inception",
    "sampling.method": "ode",
    "sampling.noise_removal": True,
    "sampling.rtol": 1e-5,
    "sampling.atol": 1e-5,
    "sampling.snr": 0.16,
    "sampling.predictor": "reverse_diffusion",
    "sampling.corrector": "langevin",
}
"""The published protocol of evaluation."""

_SKIP_PYRAMIDS = {"sampling.method": "pc", "sampling.snr": 0.075}
_LARGE_FACES = {"sampling.method": "pc", "sampling.snr": 0.15}
_EULER_MARUYAMA = {"sampling.method": "pc", "sampling.predictor": "euler_maruyama", "sampling.corrector": "none"}
OTHERWISE = {
    **dict.fromkeys([name for name, count in COUNTS.items() if count == CHURCH], _SKIP_PYRAMIDS),
    **dict.fromkeys(
        [name for name, count in COUNTS.items() if count == FACES], _SKIP_PYRAMIDS | {"sampling.snr": 0.15}
    ),
    **dict.fromkeys([name for name in COUNTS if "vp.cifar10_ncsnpp" in name], _EULER_MARUYAMA),
    "ve.cifar10_ncsnpp_deep_continuous": {"sampling.method": "pc"},
}
"""Fields of single configurations that differ from `PROTOCOL`."""


@pytest.mark.parametrize("name", COUNTS)
def test_published_configurations_follow_the_published_protocol(name: str) -> None:
    """[S21b] compares ImageNet32 with test images, once; CIFAR-10 is compared with training images, five times."""
    config = load_config(name)
    repeats, split = (1, "test") if "imagenet32" in name else (5, "train")
    expected = PROTOCOL | {"eval.num_repeats": repeats, "eval.statistics_split": split} | OTHERWISE.get(name, {})
    assert {field: functools.reduce(getattr, field.split("."), config) for field in expected} == expected


_256 = {"data.image_size": 256, "training.batch_size": 64, "model.nf": 128, "model.ema_rate": 0.999}
_1024 = {"data.image_size": 1024, "training.batch_size": 8, "model.nf": 16, "model.ema_rate": 0.9999}
_CIFAR10 = {"training.batch_size": 128, "model.fir": True, "model.progressive_input": "residual", "data.centered": True}
_VP_NCSNPP = _CIFAR10 | {"training.smallest_time": 1e-5, "sampling.smallest_time": 1e-3, "training.reduce_mean": True}
SCORE_SDE = {
    "ve.bedroom_ncsnpp_continuous": _256 | {"data.category": "bedroom", "model.sigma_max": 378},
    "ve.celebahq_256_ncsnpp_continuous": _256 | {"data.dataset": "CelebAHQ", "model.sigma_max": 348},
    "ve.ffhq_256_ncsnpp_continuous": _256 | {"data.dataset": "FFHQ", "model.sigma_max": 348},
    "ve.celebahq_ncsnpp_continuous": _1024 | {"model.sigma_max": 1348, "training.reduce_mean": False},
    "ve.ffhq_ncsnpp_continuous": _1024 | {"model.sigma_max": 1348, "training.reduce_mean": True},
    "vp.cifar10_ncsnpp_continuous": _VP_NCSNPP | {"training.n_iters": 1_300_001, "training.sde": "vpsde"},
    "vp.cifar10_ncsnpp_deep_continuous": _VP_NCSNPP | {"training.n_iters": 950_001, "training.sde": "vpsde"},
    "subvp.cifar10_ncsnpp_continuous": _VP_NCSNPP | {"training.n_iters": 1_300_001, "training.sde": "subvpsde"},
    "subvp.cifar10_ncsnpp_deep_continuous": _VP_NCSNPP | {"training.n_iters": 950_001, "training.sde": "subvpsde"},
}
"""Published values of fields in the configurations that are score_sde's only."""


@pytest.mark.parametrize("name", SCORE_SDE)
def test_configurations_of_score_sde_have_its_values(name: str) -> None:
    config, expected = load_config(name), SCORE_SDE[name]
    assert {field: functools.reduce(getattr, field.split("."), config) for field in expected} == expected
    assert build(config).config is config


@pytest.fixture
def from_command_line(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    def parse(path: str, overrides: list[str]) -> Config:
        argv = ["main.py", f"--config={ROOT / path}", *(f"--config.{override}" for override in overrides)]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        values(argv)
        return config.value

    return parse


@pytest.mark.parametrize("size", ["", "_deep"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 1e-5),
        (BOTH_WEIGHTINGS[:1], 1e-5),
        (BOTH_WEIGHTINGS[1:], 1e-5),
        (BOTH_WEIGHTINGS, 5e-5),
        ([*BOTH_WEIGHTINGS, "training.smallest_time=2e-4"], 2e-4),
        (["training.smallest_time=2e-4", *BOTH_WEIGHTINGS], 2e-4),
    ],
)
def test_smallest_time_follows_the_weighting(
    size: str, overrides: list[str], expected: float, from_command_line: CommandLine
) -> None:
    config = from_command_line(f"configs/vp/imagenet32_ddpmpp{size}_continuous.py", overrides)
    assert config.training.smallest_time == expected
    assert config.to_dict()["training"]["smallest_time"] == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/subvp/imagenet32_ddpmpp_continuous.py", 1e-2),
        ("configs/vp/cifar10_ddpmpp_continuous.py", 1e-5),
        ("configs/ve/imagenet32_ncsnpp_continuous.py", 1e-5),
    ],
)
def test_other_smallest_times_do_not(path: str, expected: float, from_command_line: CommandLine) -> None:
    assert from_command_line(path, BOTH_WEIGHTINGS).training.smallest_time == expected


def test_unknown_fields_are_refused(from_command_line: CommandLine) -> None:
    with pytest.raises((AttributeError, KeyError), match="dropuot"):
        from_command_line("configs/ve/cifar10_ncsnpp_continuous.py", ["model.dropuot=0.1"])
