"""The batches of a pass on disk, so that nothing is worked out twice."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from infra import parallel
from infra.checkpoints import params_digest
from infra.console import progress
from infra.files import read_npz, write_atomic, write_npz
from models.score import Params
from sampling import Progress

Values = dict[str, np.ndarray]
"""Named numbers for each image of a batch."""

Compute = Callable[[int, Progress], Values]
"""Works out a batch, of which it gets the position; it may report its steps."""


class BatchCache:
    """The batches of a pass on disk: worked out once for the same settings and parameters, read back after that.

    Raises:
        ValueError: if the hosts differ in the settings, which name the data, or in the parameters.
    """

    def __init__(self, folder: Path, what: str, settings: Mapping[str, Any], params: Params):
        self.settings = {**settings, "parameters": params_digest(params)}
        text = json.dumps(self.settings, sort_keys=True, indent=1)
        parallel.require_same(text, "data, settings and parameters")
        self.folder = folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if jax.process_index() == 0:
            write_atomic(self.folder / "settings.json", text)

    def __call__(self, name: str, compute: Callable[[], Values]) -> Values:
        """What `compute` gives, or gave an earlier run.

        Raises:
            OSError: if the hosts do not share the folder.
        """
        path = self._path(name)
        stored = _read(path)
        if parallel.agree(stored is not None):
            if stored is None:
                raise OSError(f"{path} is there on the first host but not on this one; all need the same folder")
            return stored
        values = compute()
        if jax.process_index() == 0:
            write_npz(path, **values)
        return values

    def all(self, sizes: Mapping[str, int], compute: Compute, description: str, unit: str) -> list[Values]:
        """These batches, names with sizes, in order, each as `compute` gives it or gave it to an earlier run.

        A progress bar begins with what is there already, so that its rate is that of the others.

        Raises:
            OSError: if the hosts do not share the folder.
        """
        batches, done = [], 0
        there = sum(size for name, size in sizes.items() if self._path(name).exists())
        with progress(sum(sizes.values()), description, unit, initial=there) as bar:

            def show(step: int, steps: int) -> None:
                bar.set_postfix(step=f"{step}/{steps}", refresh=False)
                bar.update(0)  # draws it, if it is time to

            for number, (name, size) in enumerate(sizes.items()):
                batches.append(self(name, functools.partial(compute, number, show)))
                done += size
                bar.update(max(0, done - bar.n))
        return batches

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _read(path: Path) -> Values | None:
    """What is there, or None; a damaged file is worked out again."""
    if not path.exists():
        return None
    try:
        return read_npz(path)
    except ValueError as error:
        logging.warning("%s; working it out again", error)
        return None
