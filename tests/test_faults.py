"""The experiment with kills: its record of kills survives an interruption."""

import json
import os
from pathlib import Path

import pytest

import run_lib
from experiments import faults

KILL = {"reached": 7, "saved": 5, "saving": 1}


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces trainings and kills. The list has the folder of each kill."""
    killed: list[Path] = []

    def kill_once(config: object, workdir: Path, moments: object) -> dict[str, int]:
        killed.append(workdir)
        return KILL

    monkeypatch.setattr(faults, "kill_once", kill_once)
    monkeypatch.setattr(run_lib, "train", lambda _, workdir: workdir.mkdir(parents=True, exist_ok=True))
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
