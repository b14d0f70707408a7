"""Training of the classifier of noisy images that guides samples (--mode=train_classifier; [S21a] App. I.1)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import datasets
from arrays import Batch, LabelledBatch, append_dims
from build import EVAL_KEY, INIT_KEY, TRAIN_KEY, Run
from datasets import Source
from evaluators.control_inputs import require_images
from infra import parallel
from infra.checkpoints import Checkpoints, abstract_state, params_digest
from infra.training_loop import Metrics, Training
from infra.workdir import Workdir
from models.score import Params
from models.wideresnet import NoisyClassifier, WideResnet
from train_state import TrainState, create_state, optimizer_from_config

FOLDER = "classifier"
"""The subfolder of the workdir for the classifier."""


class ClassifierTraining:
    """Minimises the cross-entropy of classes given x_t, for times drawn uniformly.

    Batch size, optimizer, records and checkpoints are configured as for the score model.

    Raises:
        ValueError, OSError: from the constructor, for data without classes, and for missing data.
    """

    def __init__(self, run: Run):
        self.run, self.preprocess, control = run, require_images(run, "train_classifier"), run.config.control
        self.train_source, self.test_source = (
            datasets.source_from_config(run.config, split) for split in datasets.SPLITS
        )
        self.test_labels = datasets.labels_of(self.test_source)
        self.num_classes = number_of_classes(self.train_source)
        if self.num_classes <= self.test_labels.max():
            raise ValueError(
                f"{self.test_source.description} has class {self.test_labels.max()}, but the largest class of the "
                f"training images is {self.num_classes - 1}"
            )
        self.network = WideResnet(self.num_classes, control.classifier_blocks, control.classifier_width)
        self.optimizer = optimizer_from_config(run.config.optim, control.classifier_n_iters)
        self.last_step: int = control.classifier_n_iters
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._test = jax.jit(self._test_values)

    def first_state(self) -> TrainState:
        """The state at step 0, with initial parameters."""
        x = jnp.zeros((1, *self.run.data_shape))
        params = jax.jit(self.network.init)(self.run.key(INIT_KEY), x, jnp.ones(1))["params"]
        return parallel.place(create_state(params, self.optimizer), parallel.replicated(self.run.mesh))

    def open_checkpoints(self, folder: Workdir) -> Checkpoints:
        """The classifier's checkpoints, to save and restore."""
        keep_every = self.run.config.training.snapshot_freq
        return Checkpoints(folder.checkpoints, self._description(), self._abstract_state(), keep_every)

    def newest(self, workdir: Workdir) -> tuple[NoisyClassifier, str]:
        """Loads the newest classifier in the workdir of a score model, with averaged parameters, and describes it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it was trained for other images or another SDE, has another size, or is damaged.
        """
        folder = Workdir(workdir.path / FOLDER)
        try:
            opened = Checkpoints.existing(folder.checkpoints, self._description(), self._abstract_state())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no classifier in {folder.checkpoints}; train one with --mode=train_classifier"
            ) from error
        with opened as checkpoints:
            step, state = checkpoints.restore_newest()
        return self.classifier(state.ema_params), f"step {step}, {params_digest(state.ema_params)}"

    def classifier(self, params: Params) -> NoisyClassifier:
        """Returns the classifier with these parameters."""
        channels = self.run.data_shape[-1]
        # The network normalises each image, so no mean and standard deviation of the data are needed.
        return NoisyClassifier(params, self.network, self.run.sde, jnp.zeros(channels), jnp.ones(channels))

    def training(self) -> Training:
        """Returns the training of the classifier, for the training loop."""
        key = self.run.key(TRAIN_KEY)

        def update(state: TrainState, batch: LabelledBatch) -> tuple[TrainState, Metrics]:
            return self._step(state, batch, key)

        return Training("classifier", self.last_step, self._calls, update)

    def test(self, params: Params) -> dict[str, float]:
        """Computes mean cross-entropy and accuracy on all test images, with the same times and noise in each call."""
        size, values, counts = self.run.config.training.batch_size, [], []
        for number in range(-(-len(self.test_source) // size)):
            batch = datasets.evaluation_batch(self.test_source, size, number)
            on_devices = self._on_devices(batch.images, self.test_labels[batch.indices])
            key = jax.random.fold_in(self.run.key(EVAL_KEY), number)
            values.append(parallel.fetch(self._test(params, on_devices, key)))
            counts.append(batch.counts)
        kept = np.concatenate(counts)
        return {name: float(np.concatenate([v[name] for v in values])[kept].mean()) for name in values[0]}

    def _calls(self, first_step: int) -> Iterator[tuple[int, LabelledBatch]]:
        size, seed = self.run.config.training.batch_size, self.run.config.seed
        batches = datasets.training_batches(self.train_source, size, seed, first_step, self.last_step, with_labels=True)
        for step, rows in enumerate(batches, start=first_step + 1):
            yield step, LabelledBatch(*(parallel.global_array(self.run.mesh, array) for array in rows))

    def _on_devices(self, images: np.ndarray, labels: np.ndarray) -> LabelledBatch:
        rows = parallel.local_rows(len(images))
        return LabelledBatch(*(parallel.global_array(self.run.mesh, a[rows]) for a in (images, labels)))

    def _train_step(self, state: TrainState, batch: LabelledBatch, key: Array) -> tuple[TrainState, Metrics]:
        """One step of the optimizer. A step whose loss or gradient is not finite changes no parameters."""

        def mean_loss(params: Params) -> tuple[Array, dict[str, Array]]:
            values = self._values(params, batch, jax.random.fold_in(key, state.step))
            means = {name: jnp.mean(value) for name, value in values.items()}
            return means["total"], means

        gradient, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
        metrics |= {"grad_norm": optax.tree.norm(gradient)}
        failed = ~jnp.isfinite(metrics["total"] + metrics["grad_norm"])
        after = state.updated(gradient, self.optimizer, self.run.config.model.ema_rate)
        return after.unless(failed, state), metrics | {"failed": failed.astype(jnp.int32)}

    def _test_values(self, params: Params, batch: LabelledBatch, key: Array) -> dict[str, Array]:
        return self._values(params, batch, key)

    def _values(self, params: Params, batch: LabelledBatch, key: Array) -> dict[str, Float[Array, " batch"]]:
        """Computes the cross-entropy of each image in nats, and whether its most probable class is right."""
        data_key, time_key, noise_key = jax.random.split(key, 3)
        x0, sde = self.preprocess(data_key, batch.images), self.run.sde
        t_min = self.run.config.training.smallest_time
        t = jax.random.uniform(time_key, batch.labels.shape, minval=t_min, maxval=sde.t_max)
        x = noisy(sde, x0, t, noise_key)
        logits = self.classifier(params)(x, t)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return {"total": losses, "accuracy": (logits.argmax(-1) == batch.labels).astype(jnp.float32)}

    def _description(self) -> dict[str, Any]:
        """Returns the fields that a checkpoint must match: the classifier, the SDE, and the kind of images."""
        config = self.run.config
        size = {f"control.{name}": config.control[name] for name in ("classifier_blocks", "classifier_width")}
        data = {f"data.{name}": config.data[name] for name in ("image_size", "num_channels", "levels", "centered")}
        return {"SDE": repr(self.run.sde), "classes": self.num_classes, **size, **data}

    def _abstract_state(self) -> TrainState:
        return abstract_state(jax.eval_shape(self.first_state), parallel.replicated(self.run.mesh))


def noisy(sde: Any, x0: Batch, t: Float[Array, " batch"], key: Array) -> Batch:
    """Draws x_t given x_0."""
    mean, sigma = sde.marginal(x0, t)
    return mean + append_dims(sigma, x0) * jax.random.normal(key, x0.shape)


def number_of_classes(source: Source) -> int:
    """Returns the number of classes of labelled images. Raises ValueError if the images have no classes."""
    return int(datasets.labels_of(source).max()) + 1


def classifier_folder(workdir: Path) -> Workdir:
    """Returns the folder of the classifier for the score model in a workdir."""
    return Workdir(workdir / FOLDER)
