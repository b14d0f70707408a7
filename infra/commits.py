"""The commit of the code that runs."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """Returns the short hash of the current commit, with "+changes" if Python files differ from it.

    Without git, or if the code is not a repository of its own, it is "unknown".
    """
    top, _, short_hash = _git("rev-parse", "--show-toplevel", "--short", "HEAD").partition("\n")
    if top != str(ROOT.resolve()):
        return "unknown"
    return short_hash + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", "--", "*.py") else "")


def _git(*arguments: str) -> str:
    """Returns what git prints; nothing if it fails."""
    try:
        result = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
