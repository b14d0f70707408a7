"""The results of a checkpoint, as JSON: what each part of its evaluations found and, beside it, what that took.

<label>.json            a stamp that tells checkpoint and parameters; each part, `loss`, `bpd`, ..., as evaluated last;
                        `earlier`: parts as evaluated before with other settings, oldest first, so that none is lost
<label>_seconds.json    the time that each part took: all else is the same however often it was interrupted
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from infra.files import write_atomic

IDENTITY = ("values", "n", "features_hash", "statistics_hash")
"""Fields that tell parts of other settings apart: where their values are kept, what samples are compared with."""


class Results:
    """The files of one checkpoint, read anew for each addition: another evaluation may have added to them meanwhile.

    Raises:
        ValueError: if there is a file that cannot be read.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]):
        self.path, self.stamp = path, stamp
        for each in (path, seconds_file(path)):
            _read(each)  # what is damaged is said before any work

    def add(self, name: str, part: Mapping[str, Any]) -> None:
        """Takes in a part: in place of one of the same settings, while one of other settings goes to `earlier`."""
        part = dict(part)
        content, seconds = self._content(), _read(seconds_file(self.path))
        if "seconds" in part:
            seconds[_seconds_key(name, part)] = part.pop("seconds")
        before = [*content.pop("earlier", []), *([{name: content[name]}] if name in content else [])]
        earlier = [each for each in before if not (name in each and _identity(each[name]) == _identity(part))]
        content |= {name: part} | ({"earlier": earlier} if earlier else {})
        write_atomic(seconds_file(self.path), json.dumps(seconds, indent=1))
        write_atomic(self.path, json.dumps(content, indent=1))

    def _content(self) -> dict[str, Any]:
        """What the file holds of these parameters: results of a model that was here before do not mix with theirs."""
        content = _read(self.path)
        if content.get("parameters", self.stamp.get("parameters")) != self.stamp.get("parameters"):
            logging.warning("%s had results of other parameters at this step; they are replaced", self.path)
            content = {}
        return content | self.stamp


def seconds_file(path: Path) -> Path:
    """Where the seconds that each part took are, for a file of results."""
    return path.with_name(f"{path.stem}_seconds.json")


def evaluations(content: Mapping[str, Any], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """What a file of results holds as results of one evaluation each: the last one, which is the last here, too.

    Each part has its `seconds` again, where they are known.
    """
    last = {name: value for name, value in content.items() if name != "earlier"}
    stamp = {name: value for name, value in last.items() if not isinstance(value, Mapping)}
    results = [*(stamp | part for part in content.get("earlier", [])), last]
    return [{name: _with_seconds(name, value, seconds) for name, value in result.items()} for result in results]


def _with_seconds(name: str, value: Any, seconds: Mapping[str, float]) -> Any:
    if not isinstance(value, Mapping) or (key := _seconds_key(name, value)) not in seconds:
        return value
    return {**value, "seconds": seconds[key]}


def _seconds_key(name: str, part: Mapping[str, Any]) -> str:
    return part.get("values", name)


def _identity(part: Mapping[str, Any]) -> Iterable[Any]:
    return [part.get(field) for field in IDENTITY]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON ({error}); delete it to evaluate again") from error
