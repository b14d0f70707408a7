"""Checks, while tests run, of the types and shapes that functions and dataclasses are annotated with."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).parent.parent

CONFIGURATION = BeartypeConf(is_pep484_tower=True)
"""An int is also a float, as for pyright."""


def check_annotations() -> None:
    """Checks the annotations of all modules that are imported from now on: those of the root and of its packages."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {Path(__file__).parent.name}
    modules = {path.stem for path in ROOT.glob("*.py")}
    install_import_hook(sorted(modules | packages), f"{__name__}.check")


def check(function: Callable) -> Callable:
    """The function with checks of its arguments and result.

    Constructors of pytrees have none: JAX also calls them with leaves that are not arrays, such as placeholders.
    """
    checked = beartype(conf=CONFIGURATION)(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def check_unless_pytree(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (function if _is_pytree(type(self)) else checked)(self, *args, **kwargs)

    return check_unless_pytree


@functools.cache
def _is_pytree(kind: type) -> bool:
    try:
        return not jax.tree_util.all_leaves([object.__new__(kind)])
    except AttributeError:  # from a field, which JAX looks up and an empty instance lacks
        return True
