"""Which code made a result."""

import json
import re
import subprocess

from configs.toy.smoke import get_config
from infra import commits, workdir
from infra.commits import commit
from infra.workdir import Workdir


def test_without_git_a_page_can_be_written(tmp_path, monkeypatch):
    """Hours of work end in it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


def test_changed_code_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    assert commit() == "unknown", "not a repository"

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(("git", *author, *arguments), cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    unchanged = commit()
    assert re.fullmatch("[0-9a-f]{7,}", unchanged)
    (tmp_path / "code.py").write_text("a = 2\n")
    assert commit() == f"{unchanged}+changes"
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(commits, "ROOT", tmp_path / "inner")
    assert commit() == "unknown", "a copy in the repository of something else"


def test_a_run_keeps_the_commits_of_all_its_starts(tmp_path, monkeypatch):
    folder, config = Workdir(tmp_path), get_config()
    for current in ("1a2b3c4", "1a2b3c4", "5d6e7f8"):
        monkeypatch.setattr(workdir, "commit", lambda current=current: current)
        folder.write_description(config, 1)
    assert json.loads(folder.environment.read_text())["commits"] == ["1a2b3c4", "5d6e7f8"]
