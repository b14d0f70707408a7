"""Training and evaluation: what `main.py --mode=train` and `--mode=eval` do, from a configuration and a folder.

A run's folder (workdir) holds
    config.json, environment.json   what ran, and on what
    checkpoints/                    the training state
    train/                          metrics.jsonl, and TensorBoard files
    eval/                           results (.json), and the per-example values behind them (.npz)
    samples/                        images drawn, and real ones to hold them against
    report.html, figures/           for people
    log.txt                         log_1.txt, ... of further hosts
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

import datasets
import parallel
from build import TRAIN_KEY, Run, build
from checkpoints import Checkpoints
from comparison import comparison_table
from configs.default import Config
from datasets import Source
from deq_training import evaluation_dequantizer
from passes.density import DensityPass, PointSamples
from passes.density_grid import draw_density
from passes.extractors import Comparison, comparison_from_config
from passes.keep import params_digest
from passes.likelihood import LikelihoodPass
from passes.loss import LossPass
from passes.samples import sampling_pass, write_samples
from passes.snapshots import Snapshots
from passes.statistics import statistics_pass
from records import MetricsWriter, StopRequest, progress, stop_on_signal
from report import write_report
from results import Results
from run_files import read_run, trained_order
from sampling import sampler_from_config
from sources import prepare_from_config
from stored_states import initial_state, open_checkpoints, open_existing_checkpoints, starting_state, stored_state
from train_state import TrainState
from workdir import check_writable, describe_run, held

OTHER_FOLDERS = ((), ("checkpoints",), ("train",), ("samples",), ("density",), ("figures",))
"""Where a run has other things than results; the empty one is its folder itself."""


def train(config: Config, workdir: Path) -> None:
    """Trains to step `training.n_iters`, from the newest checkpoint if there is one.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the state is saved; the same call goes on from there.
        ValueError, OSError: for bad input, before anything is written.
        FloatingPointError: if the loss is not finite.
    """
    run = build(config)
    train_source, test_source = (datasets.source_from_config(config, split) for split in datasets.SPLITS)
    parallel.require_same(f"{train_source.description}; {test_source.description}", "data")
    new = not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    init_state = initial_state(run) if config.training.init_from and new else None
    snapshots = Snapshots(run, workdir)
    check_writable(workdir)
    with held(workdir), open_checkpoints(run, workdir) as checkpoints:
        state = starting_state(run, checkpoints, init_state)
        if checkpoints.newest() is None and init_state is not None:
            checkpoints.save(state)  # what was started from may be gone when this goes on
        describe_run(run, workdir, num_parameters=sum(p.size for p in jax.tree.leaves(state.params)))
        with MetricsWriter(workdir / "train") as metrics, stop_on_signal() as stop:
            training_loop(run, state, train_source, test_source, checkpoints, snapshots, metrics, stop)
    if stop.requested:
        raise KeyboardInterrupt
    if jax.process_index() == 0:
        write_report(workdir)
        logging.info("report: %s", workdir / "report.html")


def training_loop(
    run: Run,
    state: TrainState,
    train_source: Source,
    test_source: Source,
    checkpoints: Checkpoints,
    snapshots: Snapshots,
    metrics: MetricsWriter,
    stop: StopRequest,
) -> TrainState:
    """Steps until `training.n_iters` or until asked to stop, recording and saving when due; saves at the end."""
    training = run.config.training
    whole, along = parallel.replicated(run.mesh), parallel.along_batch(run.mesh, axis=1)
    train_steps = jax.jit(
        run.trainer.train_steps, in_shardings=(whole, along, whole), out_shardings=whole, donate_argnums=0
    )
    test_loss = LossPass(run, test_source)
    key = run.key(TRAIN_KEY)
    step = first_step = int(state.step)
    snapshots.draw(state, stop)  # unless it was drawn before an interruption
    if stop.now():
        return state
    with progress(training.n_iters, f"order {training.score_matching_order}", "step", initial=step) as bar:
        for images in step_batches(run, train_source, step):
            before, step = step, step + len(images)
            state, values = train_steps(state, parallel.global_array(run.mesh, images, axis=1), key)
            if before == first_step:
                bar.unpause()  # the rate is that of steps, not of their compilation
            metrics.collect(values, len(images))
            recording = due(step, before, training.log_freq)
            last = step >= training.n_iters or stop.now(may_wait=recording)
            saving = last or any(due(step, before, f) for f in _saving_steps(training))
            if saving or recording:
                means = metrics.record_train(step, training.score_matching_order)
                bar.set_postfix(loss=f"{means['total']:.4g}", refresh=False)
            if due(step, before, training.eval_freq):
                with metrics.aside():
                    means = test_loss.some(state.ema_params)
                metrics.write(step, "test", order=training.score_matching_order, **means)
            if saving:
                checkpoints.save(state)
                with metrics.aside():
                    snapshots.draw(state, stop)
            bar.update(step - before)
            if last or (saving and stop.now()):
                break
    return state


def due(step: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def _saving_steps(training: Config) -> tuple[int, int]:
    return training.snapshot_freq, training.snapshot_freq_for_preemption


def step_batches(run: Run, source: Source, first_step: int) -> Iterator[np.ndarray]:
    """This host's rows of the batches for each compiled call, [steps, rows, height, width, channels], to the last step.

    Calls begin at multiples of `training.n_jitted_steps`, so that a resumed run makes the same calls; and also at those
    of `training.snapshot_freq`, since checkpoints are kept for good of these very steps.
    """
    training = run.config.training
    batches = datasets.training_batches(source, training.batch_size, run.config.seed, first_step, training.n_iters)
    step = first_step
    while step < training.n_iters:
        ends = [(step // every + 1) * every for every in (training.n_jitted_steps, training.snapshot_freq)]
        last = min(*ends, training.n_iters)
        yield np.stack([next(batches) for _ in range(step, last)])
        step = last


def evaluate(config: Config, workdir: Path, eval_folder: str, deq_folder: str = "deq") -> None:
    """Evaluates checkpoints as `eval` asks: loss, bits/dim, samples; writes results and the report.

    They are those of the run in `workdir`, or else the one at `eval.checkpoint`. With `eval.dequantizer` the bits/dim
    are those with the dequantizer in the workdir's `deq_folder`.

    Interrupted and run again, it goes on with the batch it was at. Parts not asked for keep earlier results.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError, OSError: for bad input, before anything is written.
        RuntimeError: if an ODE solve fails.
    """
    run = build(config)
    _check_eval_folder(eval_folder)
    parts = parts_from_config(run, workdir / deq_folder)
    if config.eval.checkpoint:
        return evaluate_stored(run, parts, workdir, eval_folder)
    with open_existing_checkpoints(run, workdir) as checkpoints:
        check_writable(workdir)
        shapes = jax.eval_shape(run.fresh_state)
        for step in chosen_steps(config, checkpoints.steps()):
            state = checkpoints.restore(step, shapes, parallel.replicated(run.mesh))
            order = trained_order(workdir, step)  # it need not be that of this configuration
            stamp = {} if order is None else {"order": order}
            evaluate_checkpoint(run, parts, state, f"step_{step}", stamp, workdir, eval_folder)


def _check_eval_folder(name: str) -> None:
    """Raises ValueError unless it names a folder inside the workdir where nothing else of a run is."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] in OTHER_FOLDERS:
        raise ValueError(f"--eval_folder={name} must be a folder of its own inside the workdir, as eval_uniform")


class Parts(NamedTuple):
    """The parts of an evaluation, checked and ready; None for those not asked for."""

    likelihood: LikelihoodPass | None
    comparison: Comparison | None
    """What samples are compared with."""
    density: DensityPass | None = None
    """The likelihood of points."""
    points: PointSamples | None = None
    loss: LossPass | None = None


def parts_from_config(run: Run, deq_folder: Path) -> Parts:
    """Raises ValueError, OSError: for bad input."""
    settings = run.config.eval
    if not (settings.enable_loss or settings.enable_bpd or settings.enable_sampling):
        raise ValueError("eval.enable_loss, eval.enable_bpd and eval.enable_sampling are False: nothing to evaluate")
    loss = LossPass(run, datasets.source_from_config(run.config, "test")) if settings.enable_loss else None
    if run.density is not None:
        density = DensityPass(run) if settings.enable_bpd else None
        return Parts(None, None, density, PointSamples(run) if settings.enable_sampling else None, loss)
    if settings.enable_sampling:
        parallel.divisible(run.config.sampling.batch_size, "sampling.batch_size")
        sampler_from_config(run.config, run.sde)  # for its checks
    return Parts(
        LikelihoodPass(run, evaluation_dequantizer(run, deq_folder)) if settings.enable_bpd else None,
        comparison_from_config(run.config) if settings.enable_sampling else None,
        loss=loss,
    )


def evaluate_stored(run: Run, parts: Parts, workdir: Path, eval_folder: str) -> None:
    """Evaluates the state at `eval.checkpoint`, which may be of another run or a released file.

    Results go to a file named after the checkpoint and its parameters, so that those of two never mix.
    """
    path = Path(run.config.eval.checkpoint)
    state = stored_state(run, path)
    stamp = {"checkpoint": str(path)}
    if path.is_file():
        with path.open("rb") as file:
            stamp["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    check_writable(workdir)
    if not (workdir / "config.json").exists():
        describe_run(run, workdir, num_parameters=sum(p.size for p in jax.tree.leaves(state.params)))
    label = f"{path.absolute().name}_{params_digest(state.ema_params)}"
    evaluate_checkpoint(run, parts, state, label, stamp, workdir, eval_folder)


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


def evaluate_checkpoint(
    run: Run,
    parts: Parts,
    state: TrainState,
    label: str,
    stamp: dict[str, Any],
    workdir: Path,
    eval_folder: str,
) -> None:
    """Adds to eval/<label>.json what `eval` asks for, each part as soon as it is there, beside `stamp`."""
    folder, step = workdir / eval_folder, int(state.step)
    shown = label if eval_folder == "eval" else f"{label}_{eval_folder.replace('/', '_')}"
    stamp = {"checkpoint_step": step, "ema": True, "parameters": params_digest(state.ema_params)} | stamp
    results = Results(folder / f"{label}.json", stamp)

    def keep(name: str, part: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            results.add(name, part)
            write_report(workdir)

    if parts.loss is not None:
        keep("loss", parts.loss.whole(state.ema_params))
    if parts.likelihood is not None:
        keep("bpd", parts.likelihood(state.ema_params, folder))
    if parts.comparison is not None:
        samples, images = sampling_pass(run, parts.comparison, state.ema_params, folder)
        write_samples(run, images, shown, step, workdir)
        keep("samples", samples)
    if parts.density is not None:
        nll = parts.density(state.ema_params, folder)
        cells = run.config.eval.density_grid
        draw_density(run, parts.density, state.ema_params, cells, shown, step, workdir)
        keep("nll", nll)
    if parts.points is not None:
        points, drawn = parts.points(state.ema_params, folder)
        parts.points.write(drawn, shown, step, workdir)
        keep("points", points)
    logging.info("results: %s", results.path)


def prepare(config: Config) -> None:
    """Converts a published data set from the files at `data.archive`, once; see sources/published.py.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, not the published one, or damaged.
    """
    print(prepare_from_config(config))


def stats(config: Config) -> None:
    """Measures the images that samples are compared with, and prints what FIDs against them are worth.

    Raises:
        FileNotFoundError, ValueError: if the data, the network or the statistics are not there, before any work.
    """
    print(json.dumps(statistics_pass(config), indent=1))


def report(workdir: Path, others: Sequence[Path] = ()) -> None:
    """Writes the report again, from what is in the folder, beside other runs; prints their results as a table.

    Raises:
        FileNotFoundError: if a folder is not there, or holds no run.
    """
    for folder in (workdir, *others):
        if not (folder / "config.json").is_file():
            why = "it holds no config.json" if folder.is_dir() else "there is no such folder"
            raise FileNotFoundError(f"no run in {folder}: {why}")
    write_report(workdir, others=others)
    print(comparison_table([result for folder in (*others, workdir) for result in read_run(folder).results]))
    print(f"\nreport: {workdir / 'report.html'}")
