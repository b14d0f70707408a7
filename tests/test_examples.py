"""The scripts in examples/, each in a small size, and the numbers that they return."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_lib
from build import build
from configs.digits.smoke import get_config as digits
from configs.toy.smoke import get_config as checkerboard
from examples import mixture_likelihood, sample_workdir, train_density
from tests.tiny_network import tiny_network

ROOT = Path(__file__).parent.parent


def assert_picture(path, width, height):
    """The file holds a picture of at least this size with more than one colour."""
    with Image.open(path) as image:
        assert image.width >= width
        assert image.height >= height
        assert np.asarray(image.convert("L")).std() > 5


def test_likelihood_of_a_mixture(tmp_path):
    assert mixture_likelihood.main(tmp_path / "new", num_points=50) < 1e-3
    assert_picture(tmp_path / "new" / "mixture_likelihood.png", 600, 300)


def test_training_on_a_density(tmp_path, capsys):
    nll = train_density.main(tmp_path, first_steps=100, more_steps=50, num_points=100, cells=8)
    assert list(nll) == ["untrained", "order 1", "order 2", "order 3"]
    for order in (1, 2, 3):
        trained = nll[f"order {order}"]
        assert math.log(32) - 5 * trained.se < trained.mean < nll["untrained"].mean - 1
        assert 0 < trained.se < 1
    assert "order 3" in capsys.readouterr().out
    assert_picture(tmp_path / "train_density.png", 600, 300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on digits with a small network, and its configuration."""
    workdir, config = tmp_path_factory.mktemp("trained") / "run", digits()
    config.training.n_iters = 2
    config.training.eval_freq = 2
    with tiny_network():
        run_lib.train(config, workdir)
        yield workdir, config


def test_samples_and_bits_of_a_workdir(trained, tmp_path, capsys, monkeypatch):
    """The devices may be others than those of the training, so they need not divide its batch."""
    workdir, config = trained
    config = config.copy_and_resolve_references()
    config.training.batch_size = 15
    monkeypatch.setattr(sample_workdir, "load_config", lambda _: config)
    bpd = sample_workdir.main(workdir, tmp_path, num_samples=16, num_images=8)
    assert bpd.n == 8
    # uniform noise on 17 levels has log2(17) = 4.1 bits/dim; two steps of training give less than a useful model
    assert 1 < bpd.mean < 20
    assert 0 < bpd.se < 5
    printed = capsys.readouterr().out
    assert "16 samples of step 2" in printed
    assert f"{bpd.mean:.3f} +- {bpd.se:.3f} bits/dim" in printed
    assert_picture(tmp_path / "samples.png", 160, 160)


def test_the_configuration_of_a_workdir_builds_the_same_run(trained):
    """JSON has lists where the configuration has tuples."""
    workdir, config = trained
    restored = sample_workdir.load_config(workdir)
    assert restored.to_dict() == config.to_dict()
    assert build(restored).model == build(config).model


def test_a_run_on_points_has_no_images():
    run = build(checkerboard())
    with pytest.raises(ValueError, match="give the folder of a run on images"):
        sample_workdir.draw_samples(run, run.score_fn({}), 4)


@pytest.mark.parametrize("field", ["num_samples", "num_images"])
def test_no_images_are_refused_before_anything_is_written(trained, tmp_path, field):
    with pytest.raises(ValueError, match=f"^--{field} is 0; it must be at least 1$"):
        sample_workdir.main(trained[0], tmp_path / "out", **{field: 0})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "flag", "line"),
    [
        ("examples.sample_workdir", "", "no run in {}: there is no such folder"),
        ("experiments.sample_devices", "--workdir=", "--workdir={} has no run"),
    ],
)
def test_a_wrong_folder_is_one_line(module, flag, line, tmp_path):
    argument = f"{flag}{tmp_path / 'none'}"
    result = subprocess.run([sys.executable, "-m", module, argument], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert line.format(tmp_path / "none") in result.stderr.splitlines()[-1]
