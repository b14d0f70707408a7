"""Shared parts of the checks of golden data: results, errors, and the configuration and parameters in a file."""

import importlib
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from configs.default import Config


class UnknownKind(ValueError):
    """A golden file without a check, or with content that names an unknown configuration, network or SDE."""


class Result(NamedTuple):
    """The error of one quantity of a golden file."""

    quantity: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # false for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "OVER"
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.quantity:<48} error {self.error:8.1e}  tolerance {self.tolerance:8.1e}  {verdict}{detail}"


def load_config(name: str) -> Config:
    """Loads a configuration of configs/ by its path, written with dots."""
    try:
        return importlib.import_module(f"configs.{name}").get_config()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("configs"):
            raise
        raise UnknownKind(
            f"unknown configuration {name!r}; give the path of a file in configs/, written with dots"
        ) from error


def golden_config(data: Any) -> Config:
    """Returns the configuration of a golden .npz file: a published configuration with some fields changed."""
    description = json.loads(str(data["config"]))
    config = load_config(description["base"])
    for field, value in description["overrides"].items():
        config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
    return config


def golden_params(data: Any) -> Any:
    """Returns the parameters in a golden .npz file, nested like the network's parameters."""
    flat = {key.removeprefix("params/"): jnp.asarray(data[key]) for key in data.files if key.startswith("params/")}
    return unflatten_dict(flat, sep="/")


def relative_error(got: Any, want: Any, floor: float = 0.0, scale: float | None = None) -> float:
    """Returns the largest |got - want| / (|want| + floor * largest |want|), or infinity if the shapes differ.

    If `scale` is given, it is the denominator.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return np.inf
    error = np.abs(got - want)
    size = np.abs(want) + floor * np.abs(want).max(initial=0.0) if scale is None else np.full(error.shape, scale)
    # An error of 0 relative to 0 counts as 0.
    return float(np.max(np.divide(error, size, out=np.where(error == 0, 0.0, np.inf), where=size > 0), initial=0.0))


def tree_shapes(params: Any) -> dict[str, list[int]]:
    """Returns the shape of each parameter by its path."""
    leaves: Any = flatten_dict(params, sep="/")
    return {name: list(leaf.shape) for name, leaf in leaves.items()}


def tree_differences(got: dict[str, list[int]], want: dict[str, list[int]]) -> list[str]:
    """Lists the parameters that are missing, unexpected or of another shape."""
    missing = [f"{name} is missing" for name in want.keys() - got.keys()]
    unexpected = [f"{name} is unexpected" for name in got.keys() - want.keys()]
    both = got.keys() & want.keys()
    other = [f"{name} is {got[name]}, not {want[name]}" for name in both if got[name] != want[name]]
    return sorted(missing + unexpected + other)


def count(quantity: str, wrong: list[str]) -> Result:
    """Returns a result whose error is the number of differences, and whose detail lists the first three."""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Result(quantity, len(wrong), 0, "; ".join(wrong[:3]) + more)
