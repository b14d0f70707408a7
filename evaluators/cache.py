"""On-disk cache of per-batch results, so that an interrupted evaluation resumes without recomputing."""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from arrays import ReportProgress
from infra import parallel
from infra.checkpoints import params_digest
from infra.commits import commit
from infra.console import progress
from infra.files import read_json, read_npz, write_atomic, write_npz
from models.score import Params

Values = dict[str, np.ndarray]
"""Named numbers for each example of a batch."""

ComputeBatch = Callable[[int, ReportProgress], Values]
"""compute(number, show): computes the batch with this number, and may report its progress to `show`."""


class BatchCache:
    """Results of batches in a folder whose name is a hash of the settings and parameters.

    A batch is computed once for the same settings and parameters, and read from its file after that. The folder also
    records the commits of the code that computed its batches.

    Raises:
        ValueError: if the hosts have different settings, which identify the data, or different parameters.
    """

    def __init__(self, folder: Path, what: str, settings: Mapping[str, Any], params: Params):
        self.settings = {**settings, "parameters": params_digest(params)}
        text = json.dumps(self.settings, sort_keys=True, indent=1)
        parallel.require_same(text, "data, settings and parameters")
        self.folder = folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if jax.process_index() == 0:
            write_atomic(self.folder / "settings.json", text)
        self.commit = commit()  # Now, because the files of the code may change during a long evaluation.
        self._warned, self._written = False, set[Path]()

    def __call__(self, name: str, compute: Callable[[], Values]) -> Values:
        """Returns the values in the file of this name, or computes and writes them.

        Raises:
            OSError: if the hosts do not share the folder.
        """
        path = self._path(name)
        stored = _read(path)
        if parallel.agree(stored is not None):
            if stored is None:
                raise OSError(f"The first host has {path}, but this host has not; use a folder that all hosts share")
            if not (self._warned or path in self._written):
                self._warned = True
                self._warn_of_other_code()
            return stored
        values = compute()
        if jax.process_index() == 0:
            self._record_commit()
            write_npz(path, **values)
        self._written.add(path)
        return values

    def origin(self) -> dict[str, Any]:
        """The fields of a result that say where its values come from: the name of the folder, and the commits.

        The list of commits is empty if the folder was written by a version that did not record them.
        """
        recorded = read_json(self._record, []) or {"commits": []}
        return {"values": self.folder.name, **recorded}

    @property
    def _record(self) -> Path:
        return self.folder / "commits.json"

    def _record_commit(self) -> None:
        """Adds the commit of this code to those that computed earlier batches."""
        known = self.origin()["commits"]
        if self.commit not in known:
            write_atomic(self._record, json.dumps({"commits": [*known, self.commit]}))

    def _warn_of_other_code(self) -> None:
        """Logs a warning if code that differs from the code that runs may have computed the stored values.

        Their key has the settings and parameters, but not the code. So after a change of a solver or sampler, an
        evaluation would otherwise return the old numbers without a word.
        """
        known = self.origin()["commits"] or ["unknown"]
        if jax.process_index() == 0 and (known != [self.commit] or "+changes" in self.commit):
            logging.warning(
                "%s holds values that other code may have computed: they are from commit %s, and the running code is "
                "commit %s. They are used again; choose another --eval_folder to recompute them",
                self.folder,
                ", ".join(known),
                self.commit,
            )

    def all(self, sizes: Mapping[str, int], compute: ComputeBatch, description: str, unit: str) -> list[Values]:
        """Returns the values of all batches in order, reading or computing each.

        A progress bar starts at the number of stored examples, so that its rate counts only computed examples.

        Args:
            sizes: the number of examples in each batch, by the name of the batch.
            description: the label of the progress bar.
            unit: the name of one example in the progress bar.

        Raises:
            KeyboardInterrupt: after a request to stop, which batches also answer when they report their progress.
            OSError: if the hosts do not share the folder.
        """
        batches, done = [], 0
        stored = sum(size for name, size in sizes.items() if self._path(name).exists())
        with progress(sum(sizes.values()), description, unit, initial=stored) as bar:

            def show(step: int, steps: int) -> None:
                parallel.check_stop()
                bar.set_postfix(step=f"{step}/{steps}", refresh=False)
                bar.update(0)  # This redraws the bar if its interval has passed.

            for number, (name, size) in enumerate(sizes.items()):
                parallel.check_stop()
                batches.append(self(name, functools.partial(compute, number, show)))
                done += size
                bar.update(max(0, done - bar.n))
        return batches

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _read(path: Path) -> Values | None:
    """The stored values, or None if the file is missing or damaged."""
    if not path.exists():
        return None
    try:
        return read_npz(path)
    except ValueError as error:
        logging.warning("%s; computing the batch again", error)
        return None


def mean_evaluations(batches: Iterable[Values]) -> float:
    """Returns the mean of the network evaluations of the batches. An adaptive solver needs other numbers in each."""
    return float(np.mean([batch["nfe"] for batch in batches]))


def examples_per_second(sizes: Iterable[int], batches: Iterable[Values]) -> float:
    """Returns the speed in the fastest batch, given the `seconds` of each: the first batch also compiles."""
    return max(size / float(batch["seconds"]) for size, batch in zip(sizes, batches, strict=True))


DrawSamples = Callable[[np.ndarray, ReportProgress], tuple[np.ndarray, int]]
"""Draws the samples with these numbers, and returns them with the network evaluations for each."""


class CachedSamples(NamedTuple):
    """Samples drawn in rounds."""

    samples: np.ndarray
    nfe: float
    """Network evaluations for each sample, on average over the rounds."""
    seconds: float
    """Total sampling time in seconds, summed over all runs."""
    per_second: float
    """Samples per second in the fastest round."""


def draw_in_rounds(cache: BatchCache, kind: str, count: int, round_size: int, draw: DrawSamples) -> CachedSamples:
    """Draws samples 0, ..., `count` - 1 in rounds of `round_size`, and reads the rounds that an earlier run finished.

    Args:
        kind: what a sample is, one word. A round stores its samples under the plural.
        draw: called with the numbers of a whole round.
    """
    name = f"{kind}s"
    sizes = {f"round{first // round_size}": min(round_size, count - first) for first in range(0, count, round_size)}

    def draw_round(number: int, show: ReportProgress) -> Values:
        started = time.monotonic()
        samples, nfe = draw(np.arange(number * round_size, (number + 1) * round_size), show)
        return {name: samples, "nfe": np.asarray(nfe), "seconds": np.asarray(time.monotonic() - started)}

    rounds = cache.all(sizes, draw_round, "sampling", kind)
    samples = np.concatenate([each[name] for each in rounds])[:count]
    per_second = examples_per_second([round_size] * len(rounds), rounds)  # All rounds are whole.
    return CachedSamples(
        samples,
        mean_evaluations(rounds),
        float(sum(each["seconds"] for each in rounds)),
        per_second,
    )
