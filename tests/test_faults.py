"""The experiment with kills: its record of kills survives an interruption, and is not used for other code."""

import json
import os
import sys
from pathlib import Path

import pytest

import run_lib
from experiments import faults
from infra.files import write_atomic
from infra.workdir import Workdir

KILL = {"reached": 7, "saved": 5, "saving": 1}


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces trainings and kills, at the commit abc. The list has the folder of each kill."""
    killed: list[Path] = []

    def kill_once(config: object, workdir: Path, moments: object) -> dict[str, int]:
        killed.append(workdir)
        return KILL

    monkeypatch.setattr(faults, "kill_once", kill_once)

    def train(config: object, workdir: Path) -> None:
        write_atomic(Workdir(workdir).environment, json.dumps({"commits": [faults.commit()]}))

    monkeypatch.setattr(faults, "commit", lambda: "abc")
    monkeypatch.setattr(run_lib, "train", train)
    monkeypatch.setattr(faults, "differing_arrays", lambda *_: 0)
    return killed


def test_an_interrupted_write_leaves_whole_records(
    tmp_path: Path, kills: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third write is interrupted before its end. The experiment resumes with the third kill."""
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if len(kills) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            faults.row(1, 4, 0, tmp_path)
    (log,) = tmp_path.rglob("*.jsonl")
    assert [json.loads(line) for line in log.read_text().splitlines()] == [KILL] * 2
    assert faults.row(1, 4, 0, tmp_path)["kills"] == 4
    assert len(kills) == 3 + 2


def test_kills_of_another_commit_are_not_counted(
    tmp_path: Path, kills: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "--kills=2", f"--folder={tmp_path}"])
    for commit, total in (("abc", 6), ("abc", 6), ("def", 12)):
        monkeypatch.setattr(faults, "commit", lambda commit=commit: commit)
        assert faults.main() == 0
        assert len(kills) == total
        printed = capsys.readouterr().out
        assert "| 3 | 2 | 2 | 2 | 0 |" in printed
        assert f"`python -m experiments.faults --kills=2 --seed=0`, commit {commit}, " in printed
