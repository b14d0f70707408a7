"""Training and evaluation: what `main.py --mode=train` and `--mode=eval` do, from a configuration and a folder.

A run's folder (workdir) holds
    config.json, environment.json   what ran, and on what
    checkpoints/                    the training state
    train/                          metrics.jsonl, and TensorBoard files
    eval/                           results (.json), and the per-example values behind them (.npz)
    samples/                        images drawn, and real ones to hold them against
    report.html, figures/           for people
    log.txt
"""

import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import datasets
import parallel
import passes
from build import SAMPLE_KEY, TRAIN_KEY, Run, build
from checkpoints import Checkpoints, reset_parts
from configs.default import Config
from datasets import Source
from files import write_atomic, write_npz
from records import MetricsWriter, StopRequest, log_to_file, progress, stop_on_signal
from report import write_report
from train_state import TrainState


def train(config: Config, workdir: Path) -> None:
    """Trains to step `training.n_iters`, from the newest checkpoint if there is one.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the state is saved; the same call goes on from there.
        ValueError, OSError: for bad input, before anything is written.
        FloatingPointError: if the loss is not finite.
    """
    run = build(config)
    train_source, test_source = (datasets.source_from_config(config, split) for split in datasets.SPLITS)
    init_state = initial_state(run) if config.training.init_from else None
    check_writable(workdir)
    with open_checkpoints(run, workdir) as checkpoints:
        state = starting_state(run, checkpoints, init_state)
        describe_run(run, workdir, num_parameters=sum(p.size for p in jax.tree.leaves(state.params)))
        with MetricsWriter(workdir / "train") as metrics, stop_on_signal() as stop:
            training_loop(run, state, train_source, test_source, checkpoints, metrics, stop)
    if stop.requested:
        raise KeyboardInterrupt
    if jax.process_index() == 0:
        write_report(workdir)


def training_loop(
    run: Run,
    state: TrainState,
    train_source: Source,
    test_source: Source,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    stop: StopRequest,
) -> TrainState:
    """Steps until `training.n_iters` or until asked to stop, recording and saving when due; saves at the end."""
    training = run.config.training
    whole, along = parallel.replicated(run.mesh), parallel.along_batch(run.mesh, axis=1)
    train_steps = jax.jit(
        run.trainer.train_steps, in_shardings=(whole, along, whole), out_shardings=whole, donate_argnums=0
    )
    test_loss = passes.LossPass(run, test_source)
    key = run.key(TRAIN_KEY)
    step = int(state.step)
    with progress(training.n_iters, f"order {training.score_matching_order}", "step", initial=step) as bar:
        for images in step_batches(run, train_source, step):
            before, step = step, step + len(images)
            state, values = train_steps(state, parallel.global_array(run.mesh, images, axis=1), key)
            metrics.collect(values)
            last = step >= training.n_iters or stop.requested
            saving = last or any(due(step, before, f) for f in _saving_steps(training))
            if saving or due(step, before, training.log_freq):
                means = metrics.record_train(step, training.score_matching_order, training.n_jitted_steps)
                bar.set_postfix(loss=f"{means['total']:.4g}", refresh=False)
            if due(step, before, training.eval_freq):
                metrics.write(
                    step, "test", order=training.score_matching_order, **test_loss.batch(state.ema_params, step)
                )
            if saving:
                checkpoints.save(state)
            bar.update(step - before)
            if last:
                break
    return state


def due(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def _saving_steps(training: Config) -> tuple[int, int]:
    return training.snapshot_freq, training.snapshot_freq_for_preemption


def step_batches(run: Run, source: Source, first_step: int) -> Iterator[np.ndarray]:
    """This host's rows of the batches for each compiled call, [steps, rows, height, width, channels], to the last step.

    Calls begin at multiples of `training.n_jitted_steps`, so that a resumed run makes the same calls.
    """
    training = run.config.training
    batches = datasets.training_batches(source, training.batch_size, run.config.seed, first_step, training.n_iters)
    step = first_step
    while step < training.n_iters:
        last = min((step // training.n_jitted_steps + 1) * training.n_jitted_steps, training.n_iters)
        yield np.stack([next(batches) for _ in range(step, last)])
        step = last


def open_checkpoints(run: Run, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    keep_every = run.config.training.snapshot_freq
    return Checkpoints(workdir / "checkpoints", run.network_description(), keep_every, read_only=read_only)


def starting_state(run: Run, checkpoints: Checkpoints, init_state: TrainState | None) -> TrainState:
    """The newest checkpoint's state; in a new run, the one to start from, or fresh parameters."""
    whole = parallel.replicated(run.mesh)
    newest = checkpoints.newest()
    if newest is not None:
        logging.info("going on from step %d", newest)
        return checkpoints.restore(newest, jax.eval_shape(run.fresh_state), whole)
    return jax.device_put(init_state if init_state is not None else run.fresh_state(), whole)


def initial_state(run: Run) -> TrainState:
    """The newest state in the workdir `training.init_from`, with the parts of `training.init_reset` as in a new run.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is of another network, or `init_reset` has an unknown part.
    """
    training = run.config.training
    with open_existing_checkpoints(run, Path(training.init_from)) as checkpoints:
        state = checkpoints.restore(
            checkpoints.steps()[-1], jax.eval_shape(run.fresh_state), parallel.replicated(run.mesh)
        )
    return reset_parts(state, run.fresh_state(), training.init_reset)


def open_existing_checkpoints(run: Run, workdir: Path) -> Checkpoints:
    """Raises FileNotFoundError if the folder holds no checkpoint."""
    folder = workdir / "checkpoints"
    if not folder.is_dir() or not (checkpoints := open_checkpoints(run, workdir, read_only=True)).steps():
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name the workdir of a run that has some")
    return checkpoints


def check_writable(workdir: Path) -> None:
    """Makes the folder. Raises OSError, in one line, if nothing can be written there."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise OSError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    log_to_file(workdir / "log.txt")


def describe_run(run: Run, workdir: Path, num_parameters: int) -> None:
    """Writes config.json and environment.json, and logs which fields changed since the run was last started."""
    if jax.process_index() != 0:
        return
    config = json.loads(run.config.to_json_best_effort())
    path = workdir / "config.json"
    if path.exists():
        _log_changes(json.loads(path.read_text()), config)
    write_atomic(path, json.dumps(config, indent=1))
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy", "scipy")
    environment = {
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "num_parameters": num_parameters,
    }
    write_atomic(workdir / "environment.json", json.dumps(environment, indent=1))


def _log_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> None:
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _log_changes(old, new, f"{prefix}{name}.")
        elif old != new:
            logging.info("changed since the last start: %s%s was %r, is %r", prefix, name, old, new)
