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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import datasets
import parallel
import passes
from build import TRAIN_KEY, Run, build
from checkpoints import Checkpoints, reset_parts
from configs.default import Config
from datasets import Source
from figures import save_grid
from files import write_atomic, write_npz
from records import MetricsWriter, StopRequest, log_to_file, progress, stop_on_signal
from report import write_report
from train_state import TrainState

SHOWN = 64
"""Samples in the report's grid."""


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


def evaluate(config: Config, workdir: Path, eval_folder: str) -> None:
    """Evaluates checkpoints as `eval` asks: loss, bits/dim, samples; writes results and the report.

    Interrupted and run again, it goes on with the batch it was at. Parts not asked for keep earlier results.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError, OSError: for bad input, before anything is written.
        RuntimeError: if an ODE solve fails.
    """
    run = build(config)
    parallel.divisible(config.eval.batch_size, "eval.batch_size")
    parallel.divisible(config.sampling.batch_size, "sampling.batch_size")
    with open_existing_checkpoints(run, workdir) as checkpoints:
        check_writable(workdir)
        shapes = jax.eval_shape(run.fresh_state)
        for step in chosen_steps(config, checkpoints.steps()):
            state = checkpoints.restore(step, shapes, parallel.replicated(run.mesh))
            evaluate_checkpoint(run, state, step, workdir, eval_folder)


def chosen_steps(config: Config, steps: Sequence[int]) -> Sequence[int]:
    """The checkpoints from `eval.begin_ckpt` to `eval.end_ckpt`, or else the newest.

    Raises:
        FileNotFoundError: if one is missing, naming those there are.
    """
    begin, end, every = config.eval.begin_ckpt, config.eval.end_ckpt, config.training.snapshot_freq
    if end < begin:
        return steps[-1:]
    wanted = [number * every for number in range(begin, end + 1)]
    missing = sorted(set(wanted) - set(steps))
    if missing:
        raise FileNotFoundError(f"no checkpoint of step {missing[0]}; there are those of {', '.join(map(str, steps))}")
    return wanted


def evaluate_checkpoint(run: Run, state: TrainState, step: int, workdir: Path, eval_folder: str) -> None:
    """Adds to eval/step_<step>.json what `eval` asks for, each part as soon as it is there."""
    folder, settings = workdir / eval_folder, run.config.eval
    path = folder / f"step_{step}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result |= {"checkpoint_step": step, "order": run.config.training.score_matching_order, "ema": True}

    def keep(**parts: Any) -> None:
        result.update(parts)
        if jax.process_index() == 0:
            write_atomic(path, json.dumps(result, indent=1))
            write_report(workdir)

    if settings.enable_loss:
        test_source = datasets.source_from_config(run.config, "test")
        keep(loss=passes.LossPass(run, test_source).whole(state.ema_params))
    if settings.enable_bpd:
        keep(bpd=passes.bits_per_dim_pass(run, state.ema_params, folder))
    if settings.enable_sampling:
        samples, images = passes.sampling_pass(run, state.ema_params, folder)
        keep(samples=samples)
        save_images(run, images, step, workdir)


def save_images(run: Run, images: np.ndarray, step: int, workdir: Path) -> None:
    """Some samples and as many real images, for the report."""
    if jax.process_index() != 0:
        return
    source = datasets.source_from_config(run.config, "test")
    real, shown, levels = source.images(np.arange(min(SHOWN, len(source)))), images[:SHOWN], run.config.data.levels
    write_npz(workdir / "samples" / "data.npz", samples=real, levels=levels, step=0)
    write_npz(workdir / "samples" / f"step_{step}.npz", samples=shown, levels=levels, step=step)
    save_grid(workdir / "samples" / f"step_{step}.png", shown, levels)
    write_report(workdir)


def report(workdir: Path) -> None:
    """Writes the report again, from what is in the folder."""
    if not workdir.is_dir():
        raise FileNotFoundError(f"no folder {workdir}")
    write_report(workdir)
