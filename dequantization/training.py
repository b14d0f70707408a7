"""Training of the learned dequantization noise (--mode=train_deq), and the trained dequantizer for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import datasets
from arrays import ScoreFn
from build import EVAL_KEY, INIT_KEY, TRAIN_KEY, Run
from configs.default import Config
from datasets import evaluation_batch, evaluation_batch_sizes
from dequantization.noise import Dequantizer, dequantizer_from_config
from dequantization.variational import DequantizerTrainer, VariationalDequantizer, dequantizer_trainer_from_config
from infra import parallel
from infra.checkpoints import Checkpoints, abstract_state, load_state, params_digest
from infra.training_loop import Metrics, Training
from infra.workdir import Workdir
from models.score import Params
from train_state import TrainState


class DequantizerTraining:
    """Everything that training a dequantizer needs: the fixed score model, the data, and the compiled functions.

    Raises:
        ValueError, OSError: from the constructor, for settings that are not allowed and for missing data.
    """

    def __init__(self, run: Run):
        _check_images(run)
        _check_whole_batches(run.config.training)
        self.run = run
        self.trainer = dequantizer_trainer_from_config(run.config, run.sde)
        self.train_source, self.test_source = (
            datasets.source_from_config(run.config, split) for split in datasets.SPLITS
        )
        self.eval_batches: int = run.config.training.eval_batches
        data = run.config.data
        reference = datasets.data_reference(self.train_source, data.levels, data.levels, data.centered)
        replicated, along = parallel.replicated(run.mesh), parallel.along_batch(run.mesh)
        self.reference = jax.device_put(reference, replicated)  # for the control variate of the bound
        self._first_state = jax.jit(
            self.trainer.first_state, in_shardings=(along, replicated), out_shardings=replicated
        )
        self._step = jax.jit(
            self.trainer.step,
            in_shardings=(replicated, replicated, replicated, along, replicated),
            out_shardings=replicated,
            donate_argnums=0,
        )
        self._bits_per_dim = jax.jit(self.trainer.bits_per_dim, static_argnames="train")

    def open_checkpoints(self, folder: Workdir, score_params: Params) -> Checkpoints:
        """The dequantizer's checkpoints, which belong to this score model."""
        description = _description(self.run) | {
            "parameters of the score model (eval.ckpt_id, else another --deq_folder)": params_digest(score_params)
        }
        keep_every = self.run.config.training.snapshot_freq
        return Checkpoints(folder.checkpoints, description, _abstract_state(self.run, self.trainer), keep_every)

    def first_state(self) -> TrainState:
        """The state at step 0, initialised on the first batch."""
        _, images = next(self._calls(0))
        return self._first_state(images, self.run.key(INIT_KEY))

    def training(self, score_fn: ScoreFn) -> Training:
        """The training of a dequantizer for this score function."""
        key = self.run.key(TRAIN_KEY)

        def update(state: TrainState, images: jax.Array) -> tuple[TrainState, Metrics]:
            return self._step(state, score_fn, self.reference, images, key)

        return Training("dequantizer", self.run.config.deq.n_iters, self._calls, update)

    def test_bound(self, score_fn: ScoreFn, params: Params) -> dict[str, float] | None:
        """Computes mean bits/dim over the first `training.eval_batches` batches of test images, with fixed noise.

        Returns None after a request to stop.
        """
        training, key = self.run.config.training, self.run.key(EVAL_KEY)
        sizes = evaluation_batch_sizes(self.test_source, training.batch_size)[: self.eval_batches]
        values: list[dict[str, np.ndarray]] = []
        for number, size in enumerate(sizes):
            if parallel.stop_requested():
                return None
            batch = evaluation_batch(self.test_source, training.batch_size, number)
            rows = batch.images[parallel.local_rows(training.batch_size)]
            images, batch_key = parallel.global_array(self.run.mesh, rows), jax.random.fold_in(key, number)
            parts = self._bits_per_dim(params, score_fn, self.reference, images, batch_key, train=False)
            values.append({name: part[:size] for name, part in parallel.fetch(parts).items()})
        return {name: float(np.mean(np.concatenate([part[name] for part in values]))) for name in values[0]}

    def _calls(self, first_step: int) -> Iterator[tuple[int, jax.Array]]:
        config = self.run.config
        batches = datasets.training_batches(
            self.train_source, config.training.batch_size, config.seed, first_step, config.deq.n_iters
        )
        for step, rows in enumerate(batches, start=first_step + 1):
            yield step, parallel.global_array(self.run.mesh, rows)


def score_params(run: Run, workdir: Workdir) -> Params:
    """Averaged parameters of the score model that a dequantizer is trained for.

    They come from `eval.checkpoint`, or from checkpoint `eval.ckpt_id` of the run, counted in units of
    training.snapshot_freq; 0 means the newest.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it belongs to another network, or is damaged.
    """
    settings = run.config.eval
    if settings.checkpoint:
        return run.load_state(Path(settings.checkpoint)).ema_params
    with run.existing_checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        step = settings.ckpt_id * run.config.training.snapshot_freq
        if step == 0:
            return checkpoints.restore_newest()[1].ema_params
        if step not in steps:
            available = ", ".join(map(str, steps))
            raise FileNotFoundError(
                f"eval.ckpt_id is {settings.ckpt_id}, but there is no checkpoint for step {step}; "
                f"available steps: {available}"
            )
        return checkpoints.restore(step).ema_params


def evaluation_dequantizer(run: Run, folder: Workdir) -> Dequantizer:
    """Returns the dequantizer that `eval` names: the newest learned one in `folder`, or noise without parameters.

    With `eval.dequantizer`, `eval.dequantizer_checkpoint` may name another learned one, such as a published file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for fields whose values are not allowed, or a dequantizer of other images or another size.
    """
    config = run.config
    if not config.eval.dequantizer:
        if config.eval.dequantizer_checkpoint:
            raise ValueError(
                f"eval.dequantizer_checkpoint is {config.eval.dequantizer_checkpoint!r}, but eval.dequantizer is "
                "False; set it to True to use this dequantizer"
            )
        return dequantizer_from_config(config, run.sde)
    _check_images(run)
    if config.eval.dequantization != "uniform":
        raise ValueError(
            f"eval.dequantization is {config.eval.dequantization!r} and eval.dequantizer is True; choose one of them"
        )
    trainer = dequantizer_trainer_from_config(config, run.sde)
    state = dequantizer_state(run, folder)
    origin = f"{config.deq.name}, step {int(state.step)}, {params_digest(state.ema_params)}"
    return VariationalDequantizer(state.ema_params, trainer.network, trainer.bins, trainer.t_min, origin)


def dequantizer_state(run: Run, folder: Workdir) -> TrainState:
    """The state of the dequantizer at `eval.dequantizer_checkpoint`, or of the newest one in `folder`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of other images or another size, or is damaged.
    """
    like = _abstract_state(run, dequantizer_trainer_from_config(run.config, run.sde))
    if run.config.eval.dequantizer_checkpoint:
        return load_state(Path(run.config.eval.dequantizer_checkpoint), _description(run), like)
    try:
        opened = Checkpoints.existing(folder.checkpoints, _description(run), like)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no dequantizer in {folder.checkpoints}; train one with --mode=train_deq, or set eval.dequantizer=False"
        ) from error
    with opened as checkpoints:
        return checkpoints.restore_newest()[1]


def _check_images(run: Run) -> None:
    if run.density is not None:
        raise ValueError(f"data.dataset is {run.config.data.dataset!r}, but only images have levels to dequantize")


def _check_whole_batches(training: Config) -> None:
    """Raises ValueError if the batch would be computed in parts, which only the training of score models supports."""
    if training.accumulation_steps != 1:
        raise ValueError(
            f"training.accumulation_steps is {training.accumulation_steps}, but --mode=train_deq computes the whole "
            "batch at once: set it to 1"
        )


def _description(run: Run) -> dict[str, Any]:
    """The fields that a checkpoint must agree with: of the dequantizer, and the kind of images."""
    deq = {f"deq.{field}": run.config.deq[field] for field in ("name", "filters", "components", "blocks", "attn_heads")}
    return deq | {f"data.{field}": run.config.data[field] for field in ("image_size", "num_channels", "levels")}


def _abstract_state(run: Run, trainer: DequantizerTrainer) -> TrainState:
    images = np.zeros((1, *run.data_shape), np.uint8)
    state = jax.eval_shape(trainer.first_state, images, jax.random.key(0))
    return abstract_state(state, parallel.replicated(run.mesh))
