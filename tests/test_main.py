"""What the command says to flags and configurations that it cannot read."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from absl.testing import flagsaver

import main
import run_lib
from infra import console

ROOT = Path(__file__).parent.parent
# ml_collections loads files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

UNREADABLE = {
    "no Python": (["--config=README.md"], "cannot parse the configuration --config=README.md: unterminated string"),
    "unknown section": (
        ["--config=configs/digits/smoke.py", "--config.trainin.batch_size=3"],
        'no such field: trainin; did you mean "training"',
    ),
    "unknown field": (
        ["--config=configs/digits/smoke.py", "--config.training.batchsize=3"],
        'no such field: batchsize; did you mean "batch_size"',
    ),
    "field of a number": (["--config=configs/digits/smoke.py", "--config.seed.a=3"], "no such field: seed.a"),
    "forgotten config.": (
        ["--config=configs/digits/smoke.py", "--training.n_iters=3"],
        "flag 'training.n_iters'; did you mean --config.training.n_iters?",
    ),
    "no Boolean": (
        ["--config=configs/digits/smoke.py", "--config.eval.enable_sampling=flase"],
        "flag --config.eval.enable_sampling=flase: it must be True or False",
    ),
    "name for a file without names": (["--config=configs/digits/smoke.py:foo"], "this file takes no name after the"),
    "unknown name": (
        ["--config=configs/score_sde.py:nope"],
        "has no configuration 'nope': it needs a name after the colon; known: ve/",
    ),
    "twice": (["--config=configs/digits/smoke.py", "--workdir=other"], "--workdir is given twice; give one"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    arguments, message = UNREADABLE[name]
    command = [sys.executable, "main.py", *arguments, "--mode=train", f"--workdir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == main.BAD_INPUT
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_where_an_error_comes_from_is_shown_on_demand(tmp_path):
    command = [sys.executable, "main.py", "--config=configs/toy/smoke.py", "--mode=train", f"--workdir={tmp_path}"]
    result = subprocess.run([*command, "--config.seed=-1", "--verbosity=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: seed is -1")


@pytest.fixture
def flags_of_main():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["main.py"])
    level = logging.getLogger("absl").level
    yield flagsaver.as_parsed
    logging.getLogger("absl").setLevel(level)  # which main.py sets


CONFIG = str(ROOT / "configs" / "toy" / "smoke.py")

REFUSED = {
    "compare": (
        {"mode": "eval", "config": CONFIG, "workdir": "x", "compare": "y"},
        "--compare has no effect with --mode",
    ),
    "workdir": ({"mode": "stats", "config": CONFIG, "workdir": "x"}, "--workdir has no effect with --mode=stats"),
    "eval_folder": ({"mode": "train", "config": CONFIG, "workdir": "x", "eval_folder": "e"}, "only with eval"),
    "config": ({"mode": "report", "config": CONFIG, "workdir": "x"}, "--config has no effect with --mode=report"),
    "no name": ({"mode": "report", "workdir": "x", "compare": "y,"}, "--compare has an empty name"),
    "no coordinator": ({"mode": "eval", "config": CONFIG, "workdir": "x", "process_id": "0"}, "need --coordinator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_without_effect_are_refused(name, flags_of_main, capsys):
    values, message = REFUSED[name]
    with flags_of_main(**values):
        assert main.main(["main.py"]) == main.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_all_runs_to_compare_with_are_shown(flags_of_main, monkeypatch):
    seen = []
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)  # which would stay for other tests
    monkeypatch.setattr(run_lib, "report", lambda workdir, others: seen.extend([workdir, *others]))
    with flags_of_main(mode="report", workdir="a", compare=["b,c", "d"]):
        assert main.main(["main.py"]) == 0
    assert seen == [Path(name).absolute() if name == "a" else Path(name) for name in "abcd"]


def test_exit_codes_and_paths(flags_of_main, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)  # which would stay for other tests
    seen = []

    def train(config, workdir, started):
        seen.append((config.data.path, workdir))
        raise errors.pop(0)

    errors = [KeyboardInterrupt(), FloatingPointError("loss\nnot finite"), OSError("disk full")]
    monkeypatch.setattr(run_lib, "train", train)
    values = {"mode": "train", "config": CONFIG, "workdir": "~/run"}
    lines = ["Interrupted. Run the same command again to resume.", "error: loss not finite", "error: disk full"]
    for code, line in zip((75, 1, 2), lines, strict=True):
        with flags_of_main(**values):
            config: Any = flags.FLAGS["config"].value
            config.data.path = "~/data"
            assert main.main(["main.py"]) == code
        assert capsys.readouterr().err.splitlines()[-1] == line
    assert seen == [(str(tmp_path / "data"), tmp_path / "run")] * 3
