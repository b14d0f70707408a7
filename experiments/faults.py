"""Kills trainings at random moments, and compares their results with those of uninterrupted ones.

    python -m experiments.faults --kills=30

For each order, the smallest model of digits is trained twice: once without interruption, and once in processes that are
killed (SIGKILL) at moments drawn from a seed, also while they save, and started again. The parameters, averages and
states of the optimizer must be the same bit for bit. A restarted training repeats the steps since the last complete
checkpoint: at most one save interval, or two if the kill interrupts a save. Each kill is recorded in a .jsonl file
beside the run, so the experiment resumes. Each commit has a folder of its own, because results of older code say
nothing about the current code. The exit status is 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import run_lib
from build import build
from configs.default import Config
from configs.digits.smoke import get_config
from experiments.main_calls import newest_step
from experiments.provenance import noted_commits, origin
from infra.commits import commit
from infra.files import write_atomic
from infra.metrics import read_metrics
from infra.startup import use_fast_convolutions
from infra.workdir import Workdir

ORDERS = (1, 2, 3)
SAVE_EVERY = 5
SETTINGS = {"log_freq": 1, "eval_freq": 1000, "snapshot_freq": 10_000, "snapshot_freq_for_preemption": SAVE_EVERY}
STEPS_PER_KILL = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills at each order")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="where the runs are")
    arguments = parser.parse_args()
    use_fast_convolutions()  # as main.py does, so that its results are the same
    kills, seed = arguments.kills, arguments.seed
    folder = arguments.folder / commit() / f"seed{seed}_kills{kills}"
    rows = [row(order, kills, seed, folder) for order in ORDERS]
    print("| order | kills | while saving | steps repeated, at most | arrays that differ |\n|---|---|---|---|---|")
    for entry in rows:
        print("| " + " | ".join(map(str, entry.values())) + " |")
    command = f"python -m experiments.faults --kills={kills} --seed={seed}"
    print(f"\n{origin(command, noted_commits(folder.iterdir()))}")
    return int(any(entry["differing"] or entry["repeated"] > 2 * SAVE_EVERY for entry in rows))


def row(order: int, kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Returns one row of the table: the effects of the kills on a training of this order."""
    config = config_of(order, kills)
    whole, killed = (folder / f"order{order}_{name}" for name in ("whole", "killed"))
    run_lib.train(config, whole)
    log = killed.with_suffix(".jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not records:
        shutil.rmtree(killed, ignore_errors=True)
    for number in range(len(records), kills):
        records.append(kill_once(config, killed, random.Random(f"{seed} {order} {number}")))
        write_atomic(log, "".join(json.dumps(record) + "\n" for record in records))
    run_lib.train(config, killed)
    return {
        "order": order,
        "kills": len(records),
        "saving": sum(record["saving"] for record in records),
        "repeated": max(record["reached"] - record["saved"] for record in records),
        "differing": differing_arrays(config, whole, killed),
    }


def config_of(order: int, kills: int) -> Config:
    config = get_config()
    config.training.update(SETTINGS, n_iters=STEPS_PER_KILL * (kills + 2), score_matching_order=order)
    return config


def kill_once(config: Config, workdir: Path, moments: random.Random) -> dict[str, int]:
    """Starts the training and kills it after some steps and a random time; every second kill waits for a save to begin.

    Returns:
        The step it reached, the step of the newest checkpoint it left, and whether it was saving.

    Raises:
        RuntimeError: if the training ends by itself.
    """
    first = newest_step(workdir)
    settings = {**SETTINGS, "n_iters": config.training.n_iters, "score_matching_order": order_of(config)}
    flags = [f"--config.training.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "main.py", "--config=configs/digits/smoke.py", f"--workdir={workdir}", "--mode=train"]
    with workdir.with_suffix(".log").open("ab") as output:
        process = subprocess.Popen([*command, *flags], stderr=output, stdout=output)
        wanted, saving = first + moments.randrange(1, STEPS_PER_KILL), moments.random() < 0.5
        while process.poll() is None and (last_step(workdir) < wanted or (saving and not is_saving(workdir))):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.02))
        seen_saving = is_saving(workdir)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the training ended with status {process.returncode}; see {output.name}")
    return {"reached": last_step(workdir), "saved": newest_step(workdir), "saving": int(seen_saving)}


def order_of(config: Config) -> int:
    return config.training.score_matching_order


def is_saving(workdir: Path) -> bool:
    """Returns whether a checkpoint is incomplete, so that a save is running or was interrupted."""
    return any("tmp" in path.name for path in Workdir(workdir).checkpoints.glob("*"))


def last_step(workdir: Path) -> int:
    """The last step in the record of the training; 0 before the first."""
    curves = read_metrics(Workdir(workdir).train).get("train", {})
    return int(curves["order"].steps[-1]) if "order" in curves else 0


def differing_arrays(config: Config, one: Path, other: Path) -> int:
    """The number of arrays of the newest states that are not the same bit for bit."""
    run, states = build(config), []
    for workdir in (one, other):
        with run.existing_checkpoints(Workdir(workdir)) as checkpoints:
            states.append(jax.device_get(checkpoints.restore(config.training.n_iters)))
    pairs = zip(*map(jax.tree.leaves, states), strict=True)
    return sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
