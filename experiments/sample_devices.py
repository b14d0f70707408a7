"""Checks that samples depend on neither devices nor interruptions, with digits drawn on 1 and on 4 devices.

    python -m experiments.sample_devices --workdir=runs/order1

For each number of devices, three processes in turn draw the images with main.py --mode=eval into the same folder. The
first is asked to stop (SIGINT) after a third of the rounds, the second is killed (SIGKILL) after two thirds, and the
third finishes. The exit status is 1 if more than 0.1 % of the pixels differ, or if a pixel differs by more than one
level. The logs of the processes are on_1_devices.log and on_4_devices.log in the workdir.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from infra import stop
from infra.files import read_npz

DEVICES = (1, 4)
BATCH = 256
LARGEST_SHARE = 1e-3
SAMPLER = ("method=dpm_solver", "order=2", "eta=1.0", "max_nfe=20", f"batch_size={BATCH}")
INTERRUPTED = {signal.SIGINT: stop.STOPPED, signal.SIGKILL: -signal.SIGKILL}
"""The exit status of a working process that received the signal."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/order1"), help="workdir of the trained model")
    parser.add_argument("--num-samples", type=int, default=10_000, help="images to draw")
    arguments = parser.parse_args()
    if arguments.num_samples <= 2 * BATCH:
        parser.error(f"--num-samples is {arguments.num_samples}; it must be over {2 * BATCH} for two interruptions")
    if not (arguments.workdir / "config.json").is_file():
        parser.error(f"--workdir={arguments.workdir} has no run; train one first")
    # Background jobs of a shell ignore SIGINT. The processes that are started here must not inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    images = {n: drawn_on(n, arguments.workdir, arguments.num_samples) for n in DEVICES}
    one, several = (images[n].astype(int) for n in DEVICES)
    off = np.abs(one - several)
    share = float(np.mean(off > 0))
    print(
        f"{len(one)} images on {DEVICES[0]} and {DEVICES[1]} devices, {off.size} pixels: {np.sum(off > 0)} differ "
        f"({100 * share:.4f} %), by up to {off.max()} levels"
    )
    return int(off.max() > 1 or share > LARGEST_SHARE)


def drawn_on(devices: int, workdir: Path, num_samples: int) -> np.ndarray:
    """Returns the images drawn by three processes in turn, two of which are interrupted.

    Raises:
        RuntimeError: if a process fails, or ends before it is interrupted. The message names its log.
    """
    folder = workdir / f"on_{devices}_devices"
    shutil.rmtree(folder, ignore_errors=True)
    rounds = -(-num_samples // BATCH)
    with (workdir / f"{folder.name}.log").open("w") as log:
        for stop_at, how in ((rounds // 3, signal.SIGINT), (2 * rounds // 3, signal.SIGKILL)):
            process = start(devices, workdir, folder.name, num_samples, log.fileno())
            while len(rounds_in(folder)) < stop_at and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(how)
            status, finished = process.wait(), len(rounds_in(folder))
            if status != INTERRUPTED[how] or finished == rounds:
                raise RuntimeError(
                    f"ended with status {status} before {how.name}, after {finished} of {rounds} rounds; see {log.name}"
                )
            print(f"{devices} devices: stopped by {how.name} after {finished} of {rounds} rounds", flush=True)
        status = start(devices, workdir, folder.name, num_samples, log.fileno()).wait()
        if status != 0 or len(rounds_in(folder)) != rounds:
            raise RuntimeError(
                f"ended with status {status} after {len(rounds_in(folder))} of {rounds} rounds; see {log.name}"
            )
    return np.concatenate([read_npz(path)["samples"] for path in rounds_in(folder)])[:num_samples]


def start(devices: int, workdir: Path, eval_folder: str, num_samples: int, log: int) -> subprocess.Popen[bytes]:
    """Starts an evaluation on the given number of CPU devices."""
    arguments = ["--config=configs/digits/ncsnpp.py", f"--workdir={workdir}", "--mode=eval"]
    arguments += [f"--eval_folder={eval_folder}", "--config.eval.enable_bpd=False"]
    arguments += [f"--config.eval.num_samples={num_samples}"]
    command = [sys.executable, "main.py", *arguments, *(f"--config.sampling.{setting}" for setting in SAMPLER)]
    forced = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, env=os.environ | forced, stderr=log)


def rounds_in(folder: Path) -> list[Path]:
    """Returns the files of the stored rounds, in order."""
    return sorted(folder.glob("samples-*/round*.npz"), key=lambda path: int(re.findall(r"\d+", path.stem)[0]))


if __name__ == "__main__":
    sys.exit(main())
