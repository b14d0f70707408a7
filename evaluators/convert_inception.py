"""Converts the published weights of Inception-2015-12-05 from PyTorch's format.

    pip install -r requirements-convert.txt
    python -m evaluators.convert_inception PATH [--out=assets/inception-2015-12-05.npz]

PATH is weights-inception-2015-12-05-6726825d.pth, 95,628,359 bytes, which torch-fidelity and pytorch-fid distribute.
The file is checked by its SHA-256 and read without running any code in it. Only this command needs torch, and it runs
once.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.default import get_config
from evaluators.features import PUBLISHED_INCEPTION, save_inception
from models.inception import params_from_published

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts the file of the command line, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluators.convert_inception", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("path", type=Path, help=PUBLISHED_INCEPTION)
    parser.add_argument("--out", type=Path, default=Path(get_config().eval.inception), help="the converted file")
    parser.add_argument("--sha256", default=PUBLISHED_SHA256, help="the SHA-256 that the file must have")
    parsed = parser.parse_args(arguments)
    try:
        convert(parsed.path, parsed.out, parsed.sha256)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    print(f"{parsed.out}: Inception-2015-12-05")
    return 0


def convert(path: Path, out: Path, sha256: str = PUBLISHED_SHA256) -> None:
    """Converts the parameters in the file at `path` and writes them to `out`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its SHA-256 differs, or it does not hold the weights of this network.
        ImportError: if torch is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; torch-fidelity and pytorch-fid distribute {PUBLISHED_INCEPTION}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        raise ValueError(
            f"{path} is not the published file, or only a part of it: its SHA-256 is {digest}, not {sha256}; to use it "
            "anyway, add --sha256 with its hash"
        )
    save_inception(out, params_from_published(read_weights(path)), source_sha256=digest)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a PyTorch file by name.

    Raises:
        ImportError: if torch is not installed.
        ValueError: if it is not a PyTorch file, or holds anything but arrays.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("torch is not installed; run pip install -r requirements-convert.txt") from error
    try:
        return {
            name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True, map_location="cpu").items()
        }
    except Exception as error:  # Unpickling raises many kinds of errors.
        raise ValueError(f"Cannot read {path} as a PyTorch file of arrays: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
