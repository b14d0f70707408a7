"""The golden data pass, and a wrong number in them is noticed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sde_lib import StraightPathSDE, sde_from_config
from tests.golden import KINDS, check, kind_of, main
from tests.golden_common import UnknownKind, relative_error
from tests.golden_idode import golden_idode_config

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.iterdir())
LIKELIHOODS = [path for path in FILES if path.name.startswith("likelihood_") and kind_of(path) == "likelihood"]


def run_command(folder: Path, *files: Path | str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, where programs are compiled as a user's are."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent.parent), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.golden", *map(str, files)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_golden_likelihoods(tmp_path: Path) -> None:
    # An adaptive solver follows the rounding of the compiled program: with the flags of the other tests, latents of
    # the sub-VP SDE move by 3e-3, and the bits/dim by 7e-5.
    done = run_command(tmp_path, *LIKELIHOODS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("latent, published protocol") == len(LIKELIHOODS) >= 3
    updates = [line for line in done.stdout.splitlines() if line.split()[0].endswith(("_x", "_x_mean"))]
    results = [name for path in LIKELIHOODS for name in np.load(path).files if name.endswith(("_x", "_x_mean"))]
    assert len(updates) == len(results) - len(LIKELIHOODS)  # sampler_x is an input
    assert len(updates) >= 12 + 12 + 6  # sub-VP has neither correctors nor ancestral sampling


@pytest.mark.parametrize("path", [path for path in FILES if path not in LIKELIHOODS], ids=lambda path: path.name)
def test_golden_file(path: Path) -> None:
    results = list(check(path))
    assert results
    failed = [str(result) for result in results if not result.passed]
    assert not failed, "\n".join(failed)


def rewrite_npz(path: Path, **changes: Callable[[np.ndarray], Any]) -> Path:
    data = dict(np.load(path))
    np.savez(path, **{**data, **{name: change(data[name]) for name, change in changes.items()}})
    return path


def rewrite_json(path: Path, change: Callable[[Any], None]) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def copy(name: str, folder: Path) -> Path:
    target = folder / name
    target.write_bytes((FOLDER / name).read_bytes())
    return target


def failed(path: Path) -> list[str]:
    return [result.quantity for result in check(path) if not result.passed]


def test_a_wrong_field_is_noticed(tmp_path: Path) -> None:
    path = copy("configs.json", tmp_path)
    rewrite_json(
        path, lambda golden: golden["differences"]["vp/cifar10_ddpmpp_continuous"].update({"model.dropout": 0.2})
    )
    assert failed(path) == ["vp/cifar10_ddpmpp_continuous"]
    rewrite_json(path, lambda golden: golden["common"].update({"model.no_such_field": 1}))
    assert len(failed(path)) == 13


@pytest.mark.parametrize("change", [{"Conv_0/bias": [127]}, {"Conv_9/bias": [3]}, {"Conv_0/bias": None}])
def test_a_wrong_tree_is_noticed(change: dict[str, list[int] | None], tmp_path: Path) -> None:
    name = "vp.cifar10_ddpmpp_continuous"
    tree = {**json.loads((FOLDER / "param_trees.json").read_text())[name], **change}
    path = tmp_path / "param_trees_changed.json"
    path.write_text(json.dumps({name: {key: shape for key, shape in tree.items() if shape is not None}}))
    assert failed(path) == [name]


@pytest.mark.parametrize(
    "change", [lambda x: x * (1 + 3e-4), lambda x: x[:1], lambda x: np.where(x == x.max(), np.nan, x)]
)
def test_a_wrong_output_is_noticed(change: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    path = rewrite_npz(copy("network_vp_unconditional_gray.npz", tmp_path), output=change)
    assert failed(path) == ["output"]


def test_a_wrong_output_of_one_noise_level_is_noticed(tmp_path: Path) -> None:
    """Outputs are divided by sigma, so the first example is thousands of times smaller than the last."""
    path = copy("network_ncsnv2_variancenorm.npz", tmp_path)
    assert np.ptp(np.load(path)["output"][0]) < 1e-3 * np.ptp(np.load(path)["output"][-1])
    rewrite_npz(path, output=lambda x: x * np.array([1 + 3e-4, 1, 1])[:, None, None, None])
    assert failed(path) == ["output, label 0"]


def test_a_wrong_parameter_shape_is_noticed(tmp_path: Path) -> None:
    path = rewrite_npz(copy("network_vp_unconditional_gray.npz", tmp_path), **{"params/Conv_0/bias": lambda b: b[:-1]})
    assert failed(path) == ["parameters"]


def test_wrong_resampling_is_noticed(tmp_path: Path) -> None:
    path = rewrite_npz(copy("resample.npz", tmp_path), upsample=lambda x: x + 1e-4, naive_down=lambda x: -x)
    assert failed(path) == ["upsample", "naive_down"]


@pytest.mark.parametrize("sde", ["vesde", "linearvesde", "vpsde", "subvpsde"])
def test_a_wrong_sde_is_noticed(sde: str, tmp_path: Path) -> None:
    path = rewrite_npz(copy(f"sde_{sde}.npz", tmp_path), diffusion=lambda g: g * 1.001, mean=lambda x: x[::-1])
    assert {"diffusion", "mean"} <= set(failed(path)) <= {"diffusion", "mean", "diffusion (small t)", "mean (small t)"}


def test_wrong_importance_sampling_is_noticed(tmp_path: Path) -> None:
    path = copy("sde_vpsde.npz", tmp_path)
    rewrite_npz(path, **{"time_of_quantile_eps0.01": lambda t: t * 1.001, "cum_weight_T_eps1e-05": lambda w: w * 1.001})
    assert failed(path) == ["cum_weight, eps 1e-05", "time_of_quantile, eps 0.01"]


def test_a_wrong_schedule_is_noticed(tmp_path: Path) -> None:
    path = copy("schedule_idode.npz", tmp_path)
    rewrite_npz(path, vp_map_F_target=lambda f: f * 1.001, sp_gamma_of_quantile_float64=lambda gamma: gamma + 1e-4)
    assert failed(path) == ["vp F_target", "sp_gamma_of_quantile_float64"]


def test_the_configuration_of_idode_follows_the_file() -> None:
    """Images may be oblong and grey, and the ends of gamma others than the published ones."""
    overrides = {"model.with_attention": True, "model.gamma_min": -10.5, "model.schedule": "SP", "exp_name": "other"}
    data = {"config": json.dumps({"base": "imagenet32", "overrides": overrides})}
    config = golden_idode_config(data, np.zeros((2, 5, 7, 1)))
    assert (config.data.image_size, config.data.num_channels, config.model.attn_resolutions) == (5, 1, (5,))
    assert sde_from_config(config) == StraightPathSDE(-10.5, 5.0)


def test_a_wrong_update_of_a_chain_is_noticed(tmp_path: Path) -> None:
    chain, path = "vp_short", tmp_path / "samplers_discrete.npz"
    data = np.load(FOLDER / path.name)
    config = json.dumps({chain: json.loads(str(data["config"]))[chain]})
    kept = {key: data[key] for key in data.files if key.startswith(f"{chain}/")}
    np.savez(path, config=np.asarray(config), **{**kept, f"{chain}/ald_x": kept[f"{chain}/ald_x"] * (1 + 2e-4)})
    assert failed(path) == [f"{chain} ald, x"]


def test_a_wrong_field_of_score_sde_is_noticed(tmp_path: Path) -> None:
    path = copy("score_sde_configs.json", tmp_path)
    rewrite_json(path, lambda golden: golden["differences"]["vp/ddpm/cifar10"].update({"model.num_scales": 999}))
    assert failed(path) == ["vp/ddpm/cifar10"]


@pytest.mark.parametrize("name", ["unknown.npz", "networks.npz", "sde_heat.npz"])
def test_unknown_kinds_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((FOLDER / "sde_vesde.npz").read_bytes())
    with pytest.raises(UnknownKind, match=name):
        list(check(tmp_path / name))
    assert main([str(tmp_path / name)]) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nofile\.npz"):
        list(check(tmp_path / "nofile.npz"))


def test_a_tree_of_an_unknown_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "param_trees_new.json"
    path.write_text('{"ve.no_such_config": {}}')
    with pytest.raises(UnknownKind, match="no_such_config"):
        list(check(path))


def test_the_longest_kind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "network_other", KINDS["network"])
    assert kind_of(Path("network_other_mix.npz")) == "network_other"
    assert kind_of(Path("network_otherwise.npz")) == "network"


def test_relative_error() -> None:
    assert relative_error([1.0, 10.1], [1.0, 10.0]) == pytest.approx(0.01)
    assert relative_error([0.1, 10.0], [0.0, 10.0]) == np.inf
    assert relative_error([0.1, 10.0], [0.0, 10.0], floor=0.1) == pytest.approx(0.1)
    assert relative_error([0.0], [0.0]) == 0
    assert np.isnan(relative_error([np.nan], [1.0]))


def test_the_command_from_another_folder(tmp_path: Path) -> None:
    good = copy("resample.npz", tmp_path)
    bad = tmp_path / "resample_bad.npz"
    bad.write_bytes(good.read_bytes())
    rewrite_npz(bad, downsample=lambda x: x * 2)
    done = run_command(tmp_path, good.name, bad.name)
    assert done.returncode == 1, done.stderr
    over = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("OVER")]
    assert over == ["downsample"]
    assert done.stdout.splitlines()[-1] == "1 failed"
