"""--mode=export: a checkpoint in the format of the published code."""

from pathlib import Path

import jax
from absl import logging

from build import build
from configs.default import Config
from dequantization.training import dequantizer_state
from infra.published_checkpoints import write_published_checkpoint
from infra.workdir import Workdir, check_deq_folder


def export(config: Config, path: Path, deq_folder: str = "deq") -> Path:
    """Writes a checkpoint in the published format, from which the published code can resume, and returns its path.

    The state is that at `eval.checkpoint`, or the run's newest. With `eval.dequantizer`, the state of the dequantizer
    that evaluation would use is written instead.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError, OSError: for bad input, before anything is written.
    """
    check_deq_folder(deq_folder)
    run, workdir = build(config, for_training=False), Workdir(path)
    if config.eval.dequantizer:
        state = dequantizer_state(run, Workdir(path / deq_folder))
        name, ema_rate = "dequantizer", config.deq.ema_rate
    else:
        state = run.load_state(Path(config.eval.checkpoint or path))
        name, ema_rate = "checkpoint", config.model.ema_rate
    workdir.prepare()
    file = workdir.exported / f"{name}_{int(state.step)}"
    if jax.process_index() == 0:
        write_published_checkpoint(file, state, lr=config.optim.lr, ema_rate=ema_rate)
    logging.info("Exported step %d to %s", int(state.step), file)
    return file
