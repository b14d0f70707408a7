"""One of the processes of tests/test_hosts.py: trains, trains a dequantizer, and evaluates, all in one start.

python -m tests.host_process WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import sys
from pathlib import Path
from typing import Any

from configs.digits.smoke import get_config

FIELDS: dict[str, Any] = {
    "training.n_iters": 6,
    "training.snapshot_freq": 4,
    "training.log_freq": 2,
    "training.snapshot_sampling": False,
    "data.random_flip": True,
    "deq.n_iters": 3,
    "eval.dequantizer": True,
    "eval.ode_solver": "rk4_log",
    "eval.ode_steps": 2,
    "eval.num_repeats": 1,
    "sampling.num_steps": 2,
}


def run_modes(workdir: Path) -> None:
    """The modes train, train_deq and eval, as main.py runs them."""
    import run_lib

    config = get_config()
    config.update_from_flattened_dict({**FIELDS, "eval.statistics_dir": f"{workdir.parent}/stats"})
    run_lib.train(config, workdir)
    run_lib.train_deq(config, workdir, "deq")
    run_lib.evaluate(config, workdir, "eval")


if __name__ == "__main__":
    from infra import parallel, selftest

    parallel.join_processes(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(selftest.collective(Path(sys.argv[1])), selftest.devices())
    run_modes(Path(sys.argv[1]))
