"""Training of the learned dequantization noise, --mode=train_deq, and the dequantizer it leaves for evaluation.

Its folder, inside the workdir of the score model's run, holds config.json, environment.json, checkpoints/, train/ and
log.txt, as the run's own does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

import datasets
import parallel
from build import EVAL_KEY, INIT_KEY, TRAIN_KEY, Run, build
from checkpoints import Checkpoints
from configs.default import Config
from datasets import Source, evaluation_batch, evaluation_batch_sizes, training_batches
from dequantization import Dequantizer, dequantizer_from_config
from models.score import NetworkScore, Params
from passes.keep import params_digest
from passes.likelihood import data_reference
from records import MetricsWriter, StopRequest, progress, stop_on_signal
from stored_states import open_existing_checkpoints, stored_state
from train_state import TrainState
from variational import DequantizerTrainer, VariationalDequantizer, dequantizer_trainer_from_config
from workdir import check_writable, describe_run, held


def train_deq(config: Config, workdir: Path, deq_folder: str) -> None:
    """Trains a dequantizer to step `deq.n_iters`, from its newest checkpoint if there is one.

    The score model is that of checkpoint `eval.ckpt_id` of the run in `workdir`, counted in units of snapshot_freq, or
    of its newest if that is 0; or else the one at `eval.checkpoint`. Batch size, optimizer, records and checkpoints
    are as for the score model.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the state is saved; the same call goes on from there.
        ValueError, OSError: for bad input, before anything is written.
        FloatingPointError: if the loss is not finite.
    """
    run, folder = build(config), workdir / deq_folder
    _images_only(run)
    _plain_steps_only(config.training)
    if folder == workdir:
        raise ValueError(f"--deq_folder={deq_folder} is the workdir, where the score model is; name a folder inside it")
    trainer = dequantizer_trainer_from_config(config, run.sde)
    train_source, test_source = (datasets.source_from_config(config, split) for split in datasets.SPLITS)
    score_fn = run.score_fn(score_params(run, workdir))
    description = _description(run) | {
        "parameters of the score model (eval.ckpt_id, else another --deq_folder)": params_digest(score_fn.params)
    }
    check_writable(folder)
    keep_every = config.training.snapshot_freq
    with held(folder), Checkpoints(folder / "checkpoints", description, keep_every) as checkpoints:
        training = DeqTraining(run, trainer, score_fn, train_source, test_source)
        state = training.starting_state(checkpoints)
        describe_run(run, folder, num_parameters=sum(p.size for p in jax.tree.leaves(state.params)))
        with MetricsWriter(folder / "train") as metrics, stop_on_signal() as stop:
            training.loop(state, checkpoints, metrics, stop)
    if stop.requested:
        raise KeyboardInterrupt


class DeqTraining:
    """The loop, and what it works on."""

    def __init__(
        self,
        run: Run,
        trainer: DequantizerTrainer,
        score_fn: NetworkScore,
        train_source: Source,
        test_source: Source,
    ):
        self.run, self.trainer, self.score_fn = run, trainer, score_fn
        self.train_source, self.test_source = train_source, test_source
        whole, along = parallel.replicated(run.mesh), parallel.along_batch(run.mesh)
        data = run.config.data
        # of the bound's control variate
        self.reference = jax.device_put(data_reference(train_source, data.levels, data.levels, data.centered), whole)
        self._first_state = jax.jit(trainer.first_state, in_shardings=(along, whole), out_shardings=whole)
        self._step = jax.jit(
            trainer.step,
            in_shardings=(whole, whole, whole, along, whole),
            out_shardings=whole,
            donate_argnums=0,
        )
        self._parts = jax.jit(trainer.bits_per_dim, static_argnames="train")

    def starting_state(self, checkpoints: Checkpoints) -> TrainState:
        """The newest checkpoint's state, or one initialised on the first batch."""
        newest = checkpoints.newest()
        if newest is not None:
            logging.info("going on from step %d", newest)
            shapes = _state_shapes(self.run, self.trainer)
            return checkpoints.restore(newest, shapes, parallel.replicated(self.run.mesh))
        return self._first_state(next(self._batches(0)), self.run.key(INIT_KEY))

    def loop(
        self, state: TrainState, checkpoints: Checkpoints, metrics: MetricsWriter, stop: StopRequest
    ) -> TrainState:
        """Steps until `deq.n_iters` or until asked to stop, recording and saving when due; saves at the end."""
        training, last_step = self.run.config.training, self.run.config.deq.n_iters
        saving_steps = (training.snapshot_freq, training.snapshot_freq_for_preemption)
        key, first = self.run.key(TRAIN_KEY), int(state.step)
        with progress(last_step, "dequantizer", "step", initial=first) as bar:
            for step, images in enumerate(self._batches(first), start=first + 1):
                state, values = self._step(state, self.score_fn, self.reference, images, key)
                if step == first + 1:
                    bar.unpause()  # the rate is that of steps, not of their compilation
                metrics.collect(values, 1)
                recording = step % training.log_freq == 0
                last = step >= last_step or stop.now(may_wait=recording)
                saving = last or any(step % every == 0 for every in saving_steps)
                if saving or recording:
                    means = metrics.record_train(step, training.score_matching_order)
                    bar.set_postfix(bpd=f"{means['total']:.4g}", refresh=False)
                if step % training.eval_freq == 0:
                    with metrics.aside():
                        means = self.test_bound(state.ema_params)
                    metrics.write(step, "test", order=training.score_matching_order, **means)
                if saving:
                    checkpoints.save(state)
                bar.update()
                if last:
                    break
        return state

    def test_bound(self, params: Params) -> dict[str, float]:
        """Means over the first `training.eval_batches` batches of test images; of the same noise every time."""
        training, key = self.run.config.training, self.run.key(EVAL_KEY)
        sizes = evaluation_batch_sizes(self.test_source, training.batch_size)[: training.eval_batches]
        values: list[dict[str, np.ndarray]] = []
        for number, size in enumerate(sizes):
            batch = evaluation_batch(self.test_source, training.batch_size, number)
            images = self._global(batch.images[parallel.local_rows(training.batch_size)])
            parts = self._parts(
                params, self.score_fn, self.reference, images, jax.random.fold_in(key, number), train=False
            )
            values.append({name: part[:size] for name, part in parallel.fetch(parts).items()})
        return {name: float(np.mean(np.concatenate([part[name] for part in values]))) for name in values[0]}

    def _batches(self, first_step: int) -> Iterator[jax.Array]:
        config = self.run.config
        batches = training_batches(
            self.train_source, config.training.batch_size, config.seed, first_step, config.deq.n_iters
        )
        return map(self._global, batches)

    def _global(self, rows: np.ndarray) -> jax.Array:
        return parallel.global_array(self.run.mesh, rows)


def score_params(run: Run, workdir: Path) -> Params:
    """Averaged parameters of the score model that a dequantizer is trained for.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is of another network, or damaged.
    """
    settings = run.config.eval
    if settings.checkpoint:
        return stored_state(run, Path(settings.checkpoint)).ema_params
    with open_existing_checkpoints(run, workdir) as checkpoints:
        steps = checkpoints.steps()
        step = settings.ckpt_id * run.config.training.snapshot_freq or steps[-1]
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise FileNotFoundError(f"no checkpoint of step {step}, which eval.ckpt_id asks for; there are {there}")
        shapes = jax.eval_shape(run.fresh_state)
        return checkpoints.restore(step, shapes, parallel.replicated(run.mesh)).ema_params


def evaluation_dequantizer(run: Run, folder: Path) -> Dequantizer:
    """The noise that `eval` asks for: with `eval.dequantizer` the learned one in `folder`, at its newest checkpoint.

    Raises:
        FileNotFoundError: if none has been trained there.
        ValueError: for fields whose values are not allowed, or a dequantizer of other images or another size.
    """
    config = run.config
    if not config.eval.dequantizer:
        return dequantizer_from_config(config, run.sde)
    _images_only(run)
    if config.eval.dequantization != "uniform":
        raise ValueError(
            f"eval.dequantization is {config.eval.dequantization!r} and eval.dequantizer is True; choose one of them"
        )
    trainer = dequantizer_trainer_from_config(config, run.sde)
    checkpoints_folder = folder / "checkpoints"
    missing = f"no dequantizer in {checkpoints_folder}; train one with --mode=train_deq, or set eval.dequantizer=False"
    if not checkpoints_folder.is_dir():
        raise FileNotFoundError(missing)
    with Checkpoints(checkpoints_folder, _description(run), read_only=True) as checkpoints:
        newest = checkpoints.newest()
        if newest is None:
            raise FileNotFoundError(missing)
        state = checkpoints.restore(newest, _state_shapes(run, trainer), parallel.replicated(run.mesh))
    origin = f"{config.deq.name}, step {newest}, {params_digest(state.ema_params)}"
    return VariationalDequantizer(state.ema_params, trainer.network, trainer.bins, trainer.t_min, origin)


def _images_only(run: Run) -> None:
    if run.density is not None:
        raise ValueError(f"data.dataset is {run.config.data.dataset!r}; only images have levels to dequantize")


def _plain_steps_only(training: Config) -> None:
    """Raises ValueError for what only steps of the score model can do."""
    for field in ("accumulation_steps", "n_jitted_steps"):
        if training[field] != 1:
            raise ValueError(
                f"training.{field} is {training[field]}, but --mode=train_deq takes its steps one by one, each on the "
                f"whole batch: set it to 1"
            )


def _description(run: Run) -> dict[str, Any]:
    """What a checkpoint must agree with to be of this dequantizer: its fields, and the kind of images."""
    deq = {f"deq.{field}": run.config.deq[field] for field in ("name", "filters", "components", "blocks", "attn_heads")}
    return deq | {f"data.{field}": run.config.data[field] for field in ("image_size", "num_channels", "levels")}


def _state_shapes(run: Run, trainer: DequantizerTrainer) -> TrainState:
    images = np.zeros((1, *run.data_shape), np.uint8)
    return jax.eval_shape(trainer.first_state, images, jax.random.key(0))
