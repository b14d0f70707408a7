"""Files that are either complete or absent: written under a temporary name, then renamed; and their readers."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) to `path` and creates its folder. Readers see the old file or the new one.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    # The process id separates processes that write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_npz(path: Path, **arrays: ArrayLike) -> None:
    """`write_atomic` for named arrays, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
    write_atomic(path, buffer.getvalue())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not an .npz file.
    """
    with path.open("rb") as file:
        try:
            with np.load(file) as arrays:
                return dict(arrays)
        except Exception as error:  # For damaged bytes, NumPy, zipfile and zlib raise many kinds of errors.
            raise ValueError(f"cannot read {path} as an .npz file: {error}") from error


def read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Reads the object in a JSON file.

    Returns None if the file does not exist or cannot be read. If it cannot be read, the reason is added to `problems`.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"cannot read {path} as JSON: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"cannot read {path}: it holds {type(content).__name__} instead of an object")
        return None
    return content
