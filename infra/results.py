"""The results of one checkpoint as JSON files, and the time that each part of its evaluations took.

LABEL.json            metadata about the checkpoint and its parameters; the newest result of each part: `loss`, `bpd`,
                      ...; in `earlier`, results with other settings, the oldest first
LABEL_seconds.json    the time of each part, and its images per second; in a file of its own, because times depend on
                      interruptions

A result names the folder with the values of each image, which `bits_per_dim_of_images` reads.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from infra.files import read_json, read_npz, write_atomic

IDENTITY = ("values", "n", "features_hash", "statistics_hash")
"""Fields that differ between settings: the name of the stored values, and what samples are compared with."""

TIMES = {"seconds", "images_per_second"}
"""Fields of a part that depend on the machine and on interruptions."""


class Results:
    """The files of one checkpoint. Re-read before every update, because another evaluation may have written to them.

    Args:
        path: LABEL.json.
        metadata: fields about the checkpoint, such as `checkpoint_step` and `parameters`.

    Raises:
        ValueError: if a file exists but cannot be read, before any work.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata
        for each in (path, seconds_file(path)):
            _read(each)

    def add(self, name: str, part: Mapping[str, Any]) -> None:
        """Adds a part. It replaces the result with the same settings; one with other settings moves to `earlier`."""
        part = dict(part)
        content, seconds = self._content(), _read(seconds_file(self.path))
        for field in TIMES & part.keys():
            seconds[_seconds_key(name, part, field)] = part.pop(field)
        before = [*content.pop("earlier", []), *([{name: content[name]}] if name in content else [])]
        earlier = [each for each in before if not (name in each and _identity(each[name]) == _identity(part))]
        content |= {name: part} | ({"earlier": earlier} if earlier else {})
        write_atomic(seconds_file(self.path), _json(seconds))
        write_atomic(self.path, _json(content))

    def _content(self) -> dict[str, Any]:
        """Returns the metadata, and the results in the file unless they belong to other parameters."""
        content = _read(self.path)
        if content.get("parameters", self.metadata.get("parameters")) != self.metadata.get("parameters"):
            logging.warning("Replacing the results of other parameters at this step in %s", self.path)
            content = {}
        return content | self.metadata


def seconds_file(path: Path) -> Path:
    """Returns the path of the times for a file of results."""
    return path.with_name(f"{path.stem}_seconds.json")


def evaluations(content: Mapping[str, Any], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Splits the content of a file into single evaluations, the newest last, and adds the known `seconds` of parts."""
    last = {name: value for name, value in content.items() if name != "earlier"}
    metadata = {name: value for name, value in last.items() if not isinstance(value, Mapping)}
    results = [*(metadata | part for part in content.get("earlier", [])), last]
    return [{name: _with_seconds(name, value, seconds) for name, value in result.items()} for result in results]


def bits_per_dim_of_images(stored: Path, repeat: int = 0) -> Float[np.ndarray, " images"]:
    """Returns the bits/dim of each image in one pass, from the folder of values that a result names.

    Raises:
        ValueError: if the folder has no values of this pass, or they cannot be read.
    """
    batches = range(len(list(stored.glob(f"repeat{repeat}_batch*.npz"))))
    each = [read_npz(stored / f"repeat{repeat}_batch{number}.npz")["bpd"] for number in batches]
    return np.concatenate(each).astype(np.float64)


def _with_seconds(name: str, value: Any, seconds: Mapping[str, float]) -> Any:
    if not isinstance(value, Mapping):
        return value
    keys = {field: _seconds_key(name, value, field) for field in TIMES}
    return {**value, **{field: seconds[key] for field, key in keys.items() if key in seconds}}


def _seconds_key(name: str, part: Mapping[str, Any], field: str) -> str:
    key = part.get("values", name)
    return key if field == "seconds" else f"{key}_{field}"


def _identity(part: Mapping[str, Any]) -> Iterable[Any]:
    return [part.get(field) for field in IDENTITY]


def _read(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    content = read_json(path, problems)
    if problems:
        raise ValueError(f"{problems[0]}; delete it to evaluate again")
    return content or {}


def _json(content: Any) -> str:
    """Returns the content as JSON, which has no numbers that are not finite: they become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=1)
