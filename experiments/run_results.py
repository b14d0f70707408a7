"""Reads the results of a run from its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.main_calls import RESULTS
from infra.files import read_npz
from infra.metrics import read_metrics
from infra.workdir import Workdir


def seconds_per_step(workdir: Path) -> float:
    """Returns the median over the records of a run, without the first record, which includes the compilation."""
    rates = read_metrics(Workdir(workdir).train)["train"]["steps_per_second"].values
    return 1 / float(np.median(rates[1:] if len(rates) > 1 else rates))


def newest_result(folder: Path) -> dict[str, Any]:
    """Returns the result of the newest checkpoint in the folder of an evaluation."""
    return json.loads(max(folder.glob(RESULTS), key=lambda path: int(path.stem.split("_")[1])).read_text())


def bits_per_dim_of_images(stored: Path, repeat: int = 0) -> Float[np.ndarray, " images"]:
    """Returns the bits/dim of each image in one pass, from the folder of values that a result names."""
    batches = range(len(list(stored.glob(f"repeat{repeat}_batch*.npz"))))
    each = [read_npz(stored / f"repeat{repeat}_batch{number}.npz")["bpd"] for number in batches]
    return np.concatenate(each).astype(np.float64)
