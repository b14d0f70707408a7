"""Chooses the checkpoints to evaluate, and describes their training for the results."""

from collections.abc import Iterator
from typing import Any

from absl import logging

from configs.default import Config
from infra.checkpoints import Checkpoints
from infra.metrics import trained_order
from infra.workdir import Workdir
from train_state import TrainState


def chosen_states(config: Config, checkpoints: Checkpoints, start: int = 0) -> Iterator[tuple[int, TrainState]]:
    """The steps and states of the checkpoints from `eval.begin_ckpt` to `eval.end_ckpt`, or the newest.

    A run that started from the checkpoint of another run has `start` > 0. If none of the chosen steps comes after it,
    the newest step is chosen with a warning, because published configurations name the step of the released checkpoint.

    Raises:
        FileNotFoundError: if a checkpoint is missing, before the first is read.
        ValueError: as `Checkpoints.restore`.
    """
    steps = checkpoints.steps()
    if config.eval.end_ckpt == 0:
        yield checkpoints.restore_newest()
        return
    begin, end, every = config.eval.begin_ckpt, config.eval.end_ckpt, config.training.snapshot_freq
    if end < begin:
        raise ValueError(f"eval.end_ckpt is {end}, but eval.begin_ckpt is {begin}; use 0 for the newest checkpoint")
    wanted = [number * every for number in range(begin, end + 1)]
    if max(wanted) <= start < steps[-1]:
        logging.warning(
            "eval.end_ckpt asks for step %d, but this run started at step %d; evaluating the newest checkpoint, "
            "step %d. To evaluate the start, set eval.checkpoint",
            wanted[-1],
            start,
            steps[-1],
        )
        yield checkpoints.restore_newest()
        return
    missing = sorted(set(wanted) - set(steps))
    if missing:
        raise FileNotFoundError(
            f"no checkpoint for step {missing[0]}; available steps: {', '.join(map(str, steps))}; "
            "for the newest, set eval.end_ckpt=0"
        )
    for step in wanted:
        yield step, checkpoints.restore(step)


def training_metadata(workdir: Workdir, step: int) -> dict[str, Any]:
    """Returns what a result says about the training of a checkpoint.

    This is the order and, if the run started from another checkpoint, the path and step of that checkpoint, and the
    steps since then.
    """
    order = trained_order(workdir.train, step)  # The configuration may have changed since the training.
    metadata: dict[str, Any] = {} if order is None else {"order": order}
    start = workdir.read_start()
    if start["init_from"]:
        metadata |= {"started_from": start["init_from"], "start_step": start["step"], "own_steps": step - start["step"]}
    return metadata
