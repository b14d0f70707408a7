"""The commit of the code that runs."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """Returns the short hash of the current commit, with "+changes" if Python files differ from it.

    Without git, or if the code is not a repository of its own, it is "unknown".
    """
    if _git("rev-parse", "--show-toplevel") != str(ROOT.resolve()):
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    """Returns what git prints; nothing if it fails."""
    try:
        result = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
