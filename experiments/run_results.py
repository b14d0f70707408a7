"""Reads the results of a run from its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.main_calls import RESULTS
from infra.metrics import read_metrics
from infra.workdir import Workdir


def seconds_per_step(workdir: Path) -> float:
    """Returns the median over the records of a run, without the first record, which includes the compilation."""
    rates = read_metrics(Workdir(workdir).train)["train"]["steps_per_second"].values
    return 1 / float(np.median(rates[1:] if len(rates) > 1 else rates))


def newest_result(folder: Path) -> dict[str, Any]:
    """Returns the result of the newest checkpoint in the folder of an evaluation.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    paths = {int(path.stem.split("_")[1]): path for path in folder.glob(RESULTS)}
    if not paths:
        raise FileNotFoundError(f"no results in {folder}")
    return json.loads(paths[max(paths)].read_text())
