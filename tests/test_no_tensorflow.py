"""What trains and evaluates loads none of the other frameworks, through whatever library."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOADED = """
import sys
import main, run_lib
import diffrax, scipy.io, sklearn.datasets  # what solvers and sources import when they are asked for
print(sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_no_other_framework_is_loaded() -> None:
    result = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(eval(result.stdout))
    assert {"jax", "flax", "grain", "diffrax"} <= loaded
    assert loaded & {"tensorflow", "torch", "wandb", "clu", "tensorflow_datasets"} == set()
