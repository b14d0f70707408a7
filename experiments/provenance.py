"""Where the numbers of a page come from: the commit and the machine."""

import platform
import subprocess
from pathlib import Path

import jax


def commit() -> str:
    """The short hash of the commit that is checked out; "unknown" without git, or outside of a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def machine() -> str:
    """The kind of its devices and processor, and the version of jax."""
    return f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}"
