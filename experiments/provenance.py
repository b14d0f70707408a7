"""The commit and the machine that the numbers of a page come from."""

import platform
import subprocess
from pathlib import Path

import jax


def commit() -> str:
    """Returns the short hash of the current commit, or "unknown" without git or outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def machine() -> str:
    """Describes this machine by its kind of device and processor, and by the version of jax."""
    return f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}"
