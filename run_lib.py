"""Training and evaluation, given a configuration and the folder of a run: the modes of main.py that the method needs.

infra/workdir.py describes the folder. The other modes are beside the code that they call: step_cost.py, selftest.py,
fid.py (stats) and export.py in evaluators/, and prepare in sources/.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

import datasets
from build import TRAIN_KEY, Run, build
from configs.default import Config
from datasets import Source
from dequantization.training import DequantizerTraining, evaluation_dequantizer, score_params
from evaluators import MODES, Evaluator, evaluators_from_config
from evaluators.batch_size import choose_batch_sizes
from evaluators.chosen import chosen_states, training_metadata
from evaluators.class_training import ClassifierTraining, classifier_folder
from evaluators.diagnostics import DiagnosticsEvaluator
from evaluators.loss import LossEvaluator
from evaluators.snapshots import Snapshots
from evaluators.unused_fields import warn_after_first_call
from infra import parallel
from infra.checkpoints import Checkpoints, params_digest
from infra.metrics import MetricsWriter
from infra.results import Results
from infra.startup import EarlyProgram, Startup
from infra.training_loop import (
    Call,
    Callback,
    Metrics,
    Training,
    record_first_step,
    record_metrics,
    record_test_loss,
    save_checkpoints,
    stop_after_failures,
    training_loop,
)
from infra.workdir import EvaluationFolder, Workdir, check_deq_folder, check_subfolder
from report.comparison import comparison_table
from report.run_files import RunFiles
from train_state import TrainingBatches, TrainState, reset_parts


def train(config: Config, path: Path, started: float | None = None) -> None:
    """Trains to the step that `Workdir.last_step` returns, from the newest checkpoint if there is one.

    Args:
        started: when the process started, as `time.monotonic` counts; None: now. The time from then to the first
            step is logged and recorded.

    Raises:
        KeyboardInterrupt: after a request to stop, once the state is saved. The same call resumes.
        ValueError, OSError: for bad input, before anything is written.
        FloatingPointError: after `training.max_nonfinite` steps in a row whose loss or gradient is not finite.
    """
    startup = Startup(started)
    run, workdir = build(config), Workdir(path)
    train_source, test_source = (datasets.source_from_config(config, split) for split in datasets.SPLITS)
    parallel.require_same(f"{train_source.description}; {test_source.description}", "data")
    if config.data.num_classes:
        datasets.check_classes(train_source, config.data.num_classes)
    new = not workdir.has_checkpoints()
    init_state = initial_state(run) if config.training.init_from and new else None
    snapshots, order = Snapshots(run, workdir), config.training.score_matching_order
    _ = workdir.last_step(config.training)  # Raises for a damaged file, before anything is written.
    workdir.prepare()
    with workdir.lock(), run.open_checkpoints(workdir) as checkpoints:
        start = int(init_state.step) if init_state else 0
        if new:
            workdir.write_start(config.training.init_from, start)
        end = parallel.agree(workdir.last_step(config.training))  # The first host has written the start.
        checkpoints.check_network()
        programs = first_program(run, checkpoints.newest() or start, end)
        state = resume_or_init(run, checkpoints, init_state)
        field = "n_iters_from_start" if config.training.n_iters_from_start else "n_iters"
        _check_not_beyond(int(state.step), end, f"training.{field}", workdir)
        if checkpoints.newest() is None and init_state is not None:
            checkpoints.save(state)  # The run may resume when the checkpoint that it started from no longer exists.
        _write_description(config, workdir, state, end)
        with MetricsWriter(workdir.train) as metrics:
            snapshots.draw(state)  # An interruption may have prevented the snapshot of this checkpoint.
            callbacks = [
                record_first_step(startup, metrics),
                record_metrics(metrics, order),
                stop_after_failures(config.training.max_nonfinite, workdir),
                record_test_loss(LossEvaluator(run, test_source).first_batches, metrics, order),
                save_checkpoints(checkpoints),
                draw_snapshots(snapshots, metrics),
                warn_after_first_call(config, "train"),
            ]
            if not parallel.stop_requested():
                training_loop(score_training(run, train_source, end, programs), state, config.training, callbacks)
    parallel.check_stop()
    if jax.process_index() == 0:
        _write_report(path)
        logging.info("Report: %s", workdir.report)


def _check_not_beyond(step: int, end: int, field: str, workdir: Workdir) -> None:
    """Raises ValueError if the newest checkpoint is past the step at which training would end."""
    if step > end:
        raise ValueError(
            f"{field} asks for training to step {end}, but the newest checkpoint in {workdir.checkpoints} is at step "
            f"{step}: nothing to train; raise {field}, or use another workdir"
        )


def _write_description(config: Config, folder: Workdir, state: TrainState, end: int) -> None:
    """Writes the settings and the environment. A finished run keeps the files of its training."""
    if int(state.step) < end or not folder.config.exists():
        folder.write_description(config, num_parameters(state))
    else:
        logging.info("Nothing to train: the newest checkpoint in %s is at the last step, %d", folder.checkpoints, end)


def resume_or_init(run: Run, checkpoints: Checkpoints, init_state: TrainState | None) -> TrainState:
    """Returns the state of the newest checkpoint; for a new run, `init_state` or a fresh state."""
    state = checkpoints.resume()
    if state is None:
        return parallel.place(init_state or run.fresh_state(), run.state_shardings())
    if run.config.training.init_from:
        logging.info("training.init_from is ignored, because this run has checkpoints of its own")
    return state


def initial_state(run: Run) -> TrainState:
    """Returns the state at `training.init_from`. The parts that `training.init_reset` names start as in a new run.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it belongs to another network, is damaged, or has reached `training.n_iters` already.
    """
    training = run.config.training
    state = reset_parts(run.load_state(Path(training.init_from)), run.fresh_state(), training.init_reset)
    if training.n_iters_from_start == 0 and (step := int(state.step)) >= training.n_iters:
        raise ValueError(
            f"training.n_iters is {training.n_iters}, but the checkpoint {training.init_from}, named by "
            f"training.init_from, is at step {step}: nothing would be trained; set training.n_iters_from_start to the "
            "number of further steps, raise n_iters, or reset the step with training.init_reset=step"
        )
    return state


def first_program(run: Run, step: int, last: int) -> dict[int, EarlyProgram]:
    """Starts to compile the first call of a training from `step` to step `last`.

    Returns the program by the number of steps of the call; nothing if no step is left.
    """
    if step >= last:
        return {}
    steps = datasets.end_of_call(step, last, _ends_of_calls(run.config.training)) - step
    return {steps: EarlyProgram(run.train_steps(), *run.step_shapes(steps))}


def _ends_of_calls(training: Config) -> tuple[int, int]:
    """Compiled calls end at the multiples of these. Checkpoints are kept permanently at multiples of snapshot_freq."""
    return training.n_jitted_steps, training.snapshot_freq


def score_training(
    run: Run, source: Source, end: int | None = None, programs: Mapping[int, EarlyProgram] | None = None
) -> Training:
    """Returns the training of the score model on this source, to step `end` (default: training.n_iters).

    Args:
        programs: from `first_program`. Calls with other numbers of steps are compiled when they are made.
    """
    training, early = run.config.training, programs or {}
    last = training.n_iters if end is None else end
    train_steps, key = run.train_steps(), run.key(TRAIN_KEY)

    def calls(first_step: int) -> Iterator[tuple[int, TrainingBatches]]:
        every, with_labels = _ends_of_calls(training), run.config.data.num_classes > 0
        for step, batches in datasets.training_calls(
            source, training.batch_size, run.config.seed, first_step, last, every, with_labels
        ):
            yield step, jax.tree.map(lambda rows: parallel.global_array(run.mesh, rows, axis=1), batches)

    def update(state: TrainState, batches: TrainingBatches) -> tuple[TrainState, Metrics]:
        steps = len(jax.tree.leaves(batches)[0])
        return early.get(steps, train_steps)(state, batches, key)

    return Training(f"order {training.score_matching_order}", last, calls, update)


def draw_snapshots(snapshots: Snapshots, metrics: MetricsWriter) -> Callback:
    """Draws a snapshot after each saved call, if one is due. Its time does not count as training time."""

    def draw(call: Call) -> None:
        if call.saving:
            with metrics.aside():
                snapshots.draw(call.state)

    return draw


def train_deq(config: Config, path: Path, deq_folder: str) -> None:
    """Trains a dequantizer for a score model to step `deq.n_iters`, from its newest checkpoint if there is one.

    `score_params` chooses the parameters of the score model. Batch size, optimizer, records and checkpoints are
    configured as for the score model.

    Raises:
        KeyboardInterrupt: after a request to stop, once the state is saved. The same call resumes.
        ValueError, OSError: for bad input, before anything is written.
        FloatingPointError: after `training.max_nonfinite` steps in a row whose loss or gradient is not finite.
    """
    check_deq_folder(deq_folder)
    run, folder = build(config), Workdir(path / deq_folder)
    training = DequantizerTraining(run)
    params = score_params(run, Workdir(path))
    score_fn = run.score_fn(params)
    folder.prepare()
    with folder.lock(), training.open_checkpoints(folder, params) as checkpoints:
        state = checkpoints.resume() or training.first_state()
        _check_not_beyond(int(state.step), config.deq.n_iters, "deq.n_iters", folder)
        test = functools.partial(training.test_bound, score_fn)
        _train_beside(config, "train_deq", folder, training.training(score_fn), state, checkpoints, test)
    parallel.check_stop()


def train_classifier(config: Config, path: Path) -> None:
    """Trains the classifier of noisy images that --mode=classes uses, to step `control.classifier_n_iters`.

    It is stored in the subfolder classifier/ of the workdir of a score model. The score model need not be trained yet.
    Batch size, optimizer, records and checkpoints are configured as for the score model.

    Raises:
        KeyboardInterrupt, ValueError, OSError, FloatingPointError: as in `train_deq`.
    """
    run, folder = build(config), classifier_folder(path)
    training = ClassifierTraining(run)
    folder.prepare()
    with folder.lock(), training.open_checkpoints(folder) as checkpoints:
        state = checkpoints.resume() or training.first_state()
        _check_not_beyond(int(state.step), training.last_step, "control.classifier_n_iters", folder)
        _train_beside(config, "train_classifier", folder, training.training(), state, checkpoints, training.test)
    parallel.check_stop()


def _train_beside(
    config: Config,
    mode: str,
    folder: Workdir,
    training: Training,
    state: TrainState,
    checkpoints: Checkpoints,
    test: Callable[[Any], Mapping[str, float] | None],
) -> None:
    """Trains a dequantizer or a classifier in its folder, from this state to the last step of `training`."""
    order = config.training.score_matching_order
    _write_description(config, folder, state, training.last_step)
    with MetricsWriter(folder.train) as metrics:
        callbacks = [
            record_metrics(metrics, order, shown="bpd" if mode == "train_deq" else "loss"),
            stop_after_failures(config.training.max_nonfinite, folder),
            record_test_loss(test, metrics, order),
            save_checkpoints(checkpoints),
            warn_after_first_call(config, mode),
        ]
        if not parallel.stop_requested():
            training_loop(training, state, config.training, callbacks)


def evaluate(config: Config, path: Path, eval_folder: str, deq_folder: str = "deq") -> None:
    """Evaluates checkpoints as the fields of `eval` describe, and writes the results and the report.

    The checkpoints are those of the run at `path`, or the one at `eval.checkpoint`. With `eval.dequantizer`, bits/dim
    are computed with the dequantizer in the run's `deq_folder`. An interrupted evaluation resumes with the batch that
    it was computing. Earlier results of evaluators that are not enabled now are kept.

    Raises:
        KeyboardInterrupt: after a request to stop.
        FileNotFoundError: if there is no such checkpoint.
        ValueError, OSError: for bad input, before anything is written.
        RuntimeError: if an ODE solve fails.
    """
    run = build(config, for_training=False)
    _check_eval_folder(eval_folder, deq_folder)
    choose_batch_sizes(run)
    evaluators = evaluators_from_config(run, lambda: evaluation_dequantizer(run, Workdir(path / deq_folder)))
    evaluate_with(run, evaluators, Workdir(path), eval_folder)


def diagnose(config: Config, path: Path, eval_folder: str = "eval", deq_folder: str = "deq") -> None:
    """Measures the errors of a model of images by noise level and start time; see `DiagnosticsEvaluator`.

    Checkpoints are chosen, results written and interruptions resumed as in `evaluate`.

    Raises:
        FileNotFoundError, ValueError, OSError, RuntimeError: as in `evaluate`.
    """
    run = build(config, for_training=False)
    _check_eval_folder(eval_folder, deq_folder)
    choose_batch_sizes(run)
    evaluator = DiagnosticsEvaluator(run, evaluation_dequantizer(run, Workdir(path / deq_folder)))
    evaluate_with(run, [evaluator], Workdir(path), eval_folder)


def control(config: Config, path: Path, mode: str, eval_folder: str = "eval") -> None:
    """Computes latent codes or conditional samples, with the evaluator that `evaluators.MODES` names.

    Checkpoints are chosen, results written and interruptions resumed as in `evaluate`.

    Raises:
        FileNotFoundError, ValueError, OSError, RuntimeError: as in `evaluate`.
    """
    run = build(config, for_training=False)
    _check_eval_folder(eval_folder)
    choose_batch_sizes(run)
    evaluate_with(run, [MODES[mode](run, Workdir(path))], Workdir(path), eval_folder)


def evaluate_with(run: Run, evaluators: Sequence[Evaluator], workdir: Workdir, eval_folder: str) -> None:
    """Runs evaluators on the checkpoints that `eval` names."""
    config = run.config
    if config.eval.checkpoint:
        return evaluate_other_checkpoint(run, evaluators, workdir, eval_folder)
    with run.existing_checkpoints(workdir) as checkpoints:
        workdir.prepare()
        for step, state in chosen_states(config, checkpoints, workdir.read_start()["step"]):
            metadata = training_metadata(workdir, step)
            folder = EvaluationFolder(workdir, eval_folder, f"step_{step}", step)
            evaluate_checkpoint(evaluators, state, folder, metadata)


def _check_eval_folder(name: str, deq_folder: str = "deq") -> None:
    """Raises ValueError unless this is a subfolder of the workdir that is free for results."""
    check_subfolder("--eval_folder", name, "results only, like eval_uniform")
    check_deq_folder(deq_folder)
    if Path(name).is_relative_to(deq_folder):
        raise ValueError(
            f"--eval_folder={name} is in the dequantizer's folder {deq_folder}; name another subfolder of the workdir "
            "for the results, like eval_uniform"
        )


def evaluate_other_checkpoint(run: Run, evaluators: Sequence[Evaluator], workdir: Workdir, eval_folder: str) -> None:
    """Evaluates the state at `eval.checkpoint`, which may belong to another run or be a published file.

    The results are labelled with the checkpoint and its parameters, so that those of two checkpoints never mix.
    """
    path = Path(run.config.eval.checkpoint)
    state = run.load_state(path)
    metadata = {"checkpoint": str(path)}
    if path.is_file():
        with path.open("rb") as file:
            metadata["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    workdir.prepare()
    if not workdir.config.exists():
        workdir.write_description(run.config, num_parameters(state))
    label = f"{path.absolute().name}_{params_digest(state.ema_params)}"
    evaluate_checkpoint(evaluators, state, EvaluationFolder(workdir, eval_folder, label, int(state.step)), metadata)


def evaluate_checkpoint(
    evaluators: Sequence[Evaluator], state: TrainState, folder: EvaluationFolder, metadata: dict[str, Any]
) -> None:
    """Runs the evaluators on the averaged parameters. Each result is written as soon as it is computed."""
    params, first_host = state.ema_params, jax.process_index() == 0
    metadata = {"checkpoint_step": folder.step, "ema": True, "parameters": params_digest(params)} | metadata
    results = Results(folder.results, metadata)
    for evaluator in evaluators:
        result = evaluator(params, folder)
        if first_host:
            results.add(evaluator.name, result)
            _write_report(folder.workdir.path)
    logging.info("Results: %s", results.path)


def num_parameters(state: TrainState) -> int:
    """Returns the number of parameters of the network."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def report(path: Path, others: Sequence[Path] = ()) -> None:
    """Writes the report of a run again, next to those of other runs, and prints their results as a table.

    Raises:
        FileNotFoundError: if a folder does not exist, or holds no run.
    """
    for folder in (path, *others):
        Workdir(folder).require_run()
    run, *compared = _write_report(path, others)
    print(comparison_table([result for each in (*compared, run) for result in each.results], several_runs=bool(others)))
    print(f"\nreport: {Workdir(path).report}")


def _write_report(path: Path, others: Sequence[Path] = ()) -> list[RunFiles]:
    """Writes the page of the run, and returns the files that it shows.

    Its module imports matplotlib, which training does not need before the first step.
    """
    from report.page import write_report

    return write_report(path, others=others)
