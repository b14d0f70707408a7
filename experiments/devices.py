"""Checks that a run does not depend on its devices: 1, 2, 4 and 8 of them, and 2 processes with 2 devices each.

    python -m experiments.devices

Each layout trains the smallest model of digits for 20 steps of each order, evaluates its bits/dim and draws samples. It
also resumes the run of 8 devices for 5 more steps. Every layout is compared with one device. The parameters must agree
to 1e-4 in relative norm, and bits/dim to 1e-4. At most one in a thousand pixels of the samples may differ, by one
level. --data=points does the same with a model of points, which is much quicker: the likelihood must agree to 1e-4
nats, and all but one in a thousand coordinates to 1e-3. Each commit has a folder of its own, in which finished layouts
are not run again. The exit status is 1 if a difference is larger.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from configs.digits.smoke import get_config as digits
from configs.toy.smoke import get_config as points
from experiments.provenance import noted_commits
from infra.commits import commit
from infra.files import read_npz, write_npz
from infra.startup import set_up_compiler
from infra.waiting import waiting


class Layout(NamedTuple):
    """The number of processes, and of devices in each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.devices}" if self.processes > 1 else str(self.devices)


ORDERS = (1, 2, 3)
FIRST = Layout(1, 8)
LAYOUTS = (FIRST, Layout(1, 1), Layout(1, 2), Layout(1, 4), Layout(2, 2))
STEPS, MORE_STEPS = 20, 5
LARGEST, LARGEST_SHARE = 1e-4, 1e-3
FIELDS: dict[str, Any] = {
    "training.snapshot_freq": STEPS,
    "training.snapshot_freq_for_preemption": STEPS,
    "training.log_freq": STEPS,
    "training.eval_freq": 1000,
    "eval.enable_sampling": False,
    "eval.ode_solver": "rk4_log",
    "eval.ode_steps": 2,
    "eval.num_repeats": 1,
}
FIELDS_OF_POINTS: dict[str, Any] = {
    "eval.enable_sampling": True,
    "eval.num_samples": 64,
    "eval.density_grid": 0,
    "eval.ode_steps": 8,
}
MOST_SECONDS = 1500.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/devices"), help="folder of the runs")
    parser.add_argument("--data", choices=("images", "points"), default="images", help="data of the models")
    parser.add_argument("--layout", nargs=2, type=int, metavar=("PROCESSES", "DEVICES"), help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", nargs=2, metavar=("ADDRESS", "NUMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    images = arguments.data == "images"
    if arguments.layout is not None:
        run_layout(Layout(*arguments.layout), arguments.folder, images, arguments.coordinator)
        return 0
    # Layouts run by different code could differ because of the code.
    folder = arguments.folder / commit() / arguments.data
    for layout in LAYOUTS:
        start_layout(layout, folder, arguments.data)
    rows = list(compare(folder, images))
    measured = "bits/dim | pixels" if images else "nats | coordinates"
    print(f"| order | devices | parameters | {measured} | parameters after resuming from 8 devices |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row) + " |")
    print(f"\nCommits of the runs: {', '.join(sorted(noted_commits(folder.iterdir())))}.")
    # A comparison with NaN is false, so it counts as a difference.
    return int(not all(max(row[2], row[3], row[5]) <= LARGEST and row[4] <= LARGEST_SHARE for row in rows))


def start_layout(layout: Layout, folder: Path, data: str) -> None:
    """Runs a layout in new processes, unless its results exist.

    Raises:
        RuntimeError: if a process fails.
    """
    if all(result_file(folder, layout, order).exists() for order in ORDERS):
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "experiments.devices", f"--folder={folder}", f"--data={data}"]
    command += ["--layout", *map(str, layout)]
    forced = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={layout.devices}"}
    processes = []
    for number in range(layout.processes):
        joined = ["--coordinator", address, str(number)] if layout.processes > 1 else []
        processes.append(subprocess.Popen([*command, *joined], env=os.environ | forced))
    with waiting(f"the runs on {layout} devices", MOST_SECONDS):
        statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"the runs on {layout} devices ended with status {statuses}")


def run_layout(layout: Layout, folder: Path, images: bool, coordinator: tuple[str, str] | None) -> None:
    """Trains, evaluates and resumes a run of each order in a process of this layout, and writes the parameters."""
    import jax

    import run_lib
    from infra import parallel

    set_up_compiler()
    if coordinator is not None:
        parallel.join_processes(coordinator[0], layout.processes, int(coordinator[1]))
    for order in ORDERS:
        workdir = folder / f"{layout.processes}x{layout.devices}_order{order}"
        resumed = workdir.with_name(f"{workdir.name}_resumed")
        if jax.process_index() == 0:
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.rmtree(resumed, ignore_errors=True)
        parallel.any_host(False)
        run_lib.train(config_of(images, order, STEPS), workdir)
        run_lib.evaluate(config_of(images, order, STEPS), workdir, "eval")
        if jax.process_index() == 0:
            source = folder / f"{FIRST.processes}x{FIRST.devices}_order{order}"
            shutil.copytree(source / "checkpoints", resumed / "checkpoints")
        parallel.any_host(False)
        run_lib.train(config_of(images, order, STEPS + MORE_STEPS), resumed)
        states = {"params": params_of(images, order, workdir), "resumed": params_of(images, order, resumed)}
        if jax.process_index() == 0:
            write_npz(result_file(folder, layout, order), **states)


def config_of(images: bool, order: int, last_step: int) -> ConfigDict:
    config = digits() if images else points()
    fields = FIELDS if images else FIELDS | FIELDS_OF_POINTS
    config.update_from_flattened_dict({**fields, "training.n_iters": last_step})
    config.training.score_matching_order = order
    return config


def params_of(images: bool, order: int, workdir: Path) -> np.ndarray:
    """Returns the parameters of the newest checkpoint, and their averages, in one vector."""
    import jax

    from build import build
    from infra import parallel

    state = build(config_of(images, order, STEPS)).load_state(workdir)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(parallel.fetch((state.params, state.ema_params)))])


def result_file(folder: Path, layout: Layout, order: int) -> Path:
    return folder / f"{layout.processes}x{layout.devices}_order{order}.npz"


def compare(folder: Path, images: bool) -> Iterator[tuple[int, str, float, float, float, float]]:
    """Yields, for each order and layout, the differences from one device, and the differences between resumed runs."""
    for order in ORDERS:
        found = {layout: measurements(folder, layout, order, images) for layout in LAYOUTS}
        one, eight = found[Layout(1, 1)], found[FIRST]
        for layout in LAYOUTS:
            here = found[layout]
            off = np.abs(here["samples"] - one["samples"])
            share = float(np.mean(off > (0 if images else 1e-3))) if off.max() <= 1 else 1.0
            yield (
                order,
                str(layout),
                relative(here["params"], one["params"]),
                abs(here["mean"] - one["mean"]),
                share,
                relative(here["resumed"], eight["resumed"]),
            )


def measurements(folder: Path, layout: Layout, order: int, images: bool) -> Mapping[str, Any]:
    workdir = folder / f"{layout.processes}x{layout.devices}_order{order}"
    result = json.loads((workdir / "eval" / f"step_{STEPS}.json").read_text())
    if images:
        drawn = read_npz(workdir / "samples" / "snapshots" / f"step_{STEPS}.npz")
        samples = np.stack([drawn["ema"], drawn["raw"]]).astype(int)
    else:
        samples = read_npz(workdir / "samples" / "points" / f"step_{STEPS}.npz")["points"]
    mean = result["bpd" if images else "nll"]["mean"]
    return read_npz(result_file(folder, layout, order)) | {"mean": mean, "samples": samples}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


if __name__ == "__main__":
    sys.exit(main())
