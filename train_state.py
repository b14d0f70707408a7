"""The training state, and one step of training as a pure function of (state, images, key)."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from arrays import Batch, LabelledBatch, PerExample
from configs.default import Config
from models.score import Params, ScoreModel
from objectives.objective import Draws, TrainingObjective
from objectives.residuals import ResidualTable

Metrics = dict[str, Array]
TrainingBatch: TypeAlias = UInt8[Array, "batch height width channel"] | Float[Array, "batch d"] | LabelledBatch
"""Images as integer levels, alone or with their classes, or points."""
TrainingBatches: TypeAlias = (
    UInt8[Array, "steps batch height width channel"] | Float[Array, "steps batch d"] | LabelledBatch
)


NUM_LARGEST = 3
"""The number of examples with the largest losses whose times a step reports."""


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes. Step and seed determine the order of the data, noise and learning rate."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    residuals: ResidualTable | None = None
    """For weights that follow the residual; None otherwise."""

    def updated(
        self, gradient: Params, optimizer: optax.GradientTransformation, ema_rate: float | Array
    ) -> "TrainState":
        """The state after one step of the optimizer."""
        updates, opt_state = optimizer.update(gradient, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = optax.incremental_update(params, self.ema_params, 1 - ema_rate)
        return TrainState(self.step + 1, params, ema_params, opt_state, self.residuals)

    def unless(self, failed: Bool[Array, ""], before: "TrainState") -> "TrainState":
        """Returns this state or, if the step to it failed, the state `before` with this state's step number.

        The learning rate follows the step number.
        """
        skipped = before.replace(step=self.step, opt_state=schedules_at(before.opt_state, self.step))
        return jax.tree.map(lambda new, old: jnp.where(failed, old, new), self, skipped)


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_residuals: bool = False
) -> TrainState:
    """The state at step 0. Copies the parameters, because the parts of a donated state must not share memory."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        residuals=ResidualTable.start() if with_residuals else None,
    )


SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 + 0.5 * jnp.cos(jnp.pi * done),
}
"""Factors of the learning rate as functions of the part of the steps that is done, by optim.schedule."""


def optimizer_from_config(optim: Config, n_iters: int) -> optax.GradientTransformation:
    """Adam with linear warm-up, a schedule and decoupled weight decay, after clipping the global norm of the gradient.

    Its state has the same structure for all values of the fields, so that they may change when a run is resumed.

    Args:
        n_iters: the last step, at which schedules reach 0.

    Raises:
        ValueError: for an optimizer other than Adam, an unknown schedule, or a number out of range.
    """
    if optim.optimizer != "Adam":
        raise ValueError(f"optim.optimizer is {optim.optimizer!r}; the only choice is Adam")
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {optim.schedule!r}; known: {', '.join(SCHEDULES)}")
    if not optim.lr > 0:
        raise ValueError(f"optim.lr is {optim.lr}; it must be positive")
    for field in ("beta1", "beta2"):
        if not 0 <= optim[field] < 1:
            raise ValueError(f"optim.{field} is {optim[field]}; it must lie in [0, 1)")
    for field in ("warmup", "weight_decay"):
        if optim[field] < 0:
            raise ValueError(f"optim.{field} is {optim[field]}; it must not be negative")
    clip = optax.clip_by_global_norm(optim.grad_clip) if optim.grad_clip > 0 else optax.identity()
    adam = optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)
    warm_up = optax.linear_schedule(0.0, optim.lr, optim.warmup) if optim.warmup else optax.constant_schedule(optim.lr)
    factor = SCHEDULES[optim.schedule]

    def rate(step: Any) -> Any:
        return warm_up(step) * factor(jnp.minimum(step / n_iters, 1.0))

    scheduled = warm_up if optim.schedule == "constant" else rate
    return optax.chain(clip, _with_decay(adam, optim), optax.scale_by_learning_rate(scheduled))


def _with_decay(adam: optax.GradientTransformation, optim: Config) -> optax.GradientTransformation:
    """Adds a multiple of the parameters to Adam's updates.

    Frequencies of Fourier features are left out, because they are not trained. So are biases, unless `decay_biases`.
    """
    rate: float = optim.weight_decay
    if not rate:
        return adam
    decay_biases: bool = optim.decay_biases

    def decay(path: Any, leaf: Array) -> Array:
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        name = place.rpartition("/")[2]
        is_fixed = name == "W" and "GaussianFourierProjection" in place
        is_bias = name in ("bias", "b") or name.endswith("_b")
        return jnp.zeros_like(leaf) if is_fixed or (is_bias and not decay_biases) else rate * leaf

    def update(updates: Params, state: optax.OptState, params: Params = None) -> tuple[Params, optax.OptState]:
        updates, state = adam.update(updates, state, params)
        return jax.tree.map(jnp.add, updates, jax.tree_util.tree_map_with_path(decay, params)), state

    return optax.GradientTransformation(adam.init, update)


def schedules_at(opt_state: optax.OptState, step: Array) -> optax.OptState:
    """The optimizer's state with its learning-rate schedule at `step`, because the warm-up follows the state's step."""

    def is_schedule(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def move(node: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.copy(step)) if is_schedule(node) else node

    return jax.tree.map(move, opt_state, is_leaf=is_schedule)


PRECISIONS = ("default", "high", "highest")
"""The choices of training.matmul_precision."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything that a training step needs besides the state and the batch; fixed for the run."""

    model: ScoreModel
    objective: TrainingObjective
    optimizer: optax.GradientTransformation
    preprocess: Callable[[Array, Array], Batch]
    """Maps images as integer levels, or points, to the data that the network sees."""
    ema_rate: float
    accumulation_steps: int = 1
    gradient_sharding: Sharding | None = None
    """Placement of the gradient. It keeps the placement of a divided optimizer state away from the network's arrays."""
    ema_warmup: bool = False
    matmul_precision: str = "default"
    """The precision of matrix products and convolutions of 32-bit numbers, one of `PRECISIONS`."""
    num_classes: int = 0
    label_dropout: float = 0.0
    """The fraction of examples whose class is hidden from the network."""

    def train_steps(self, state: TrainState, images: TrainingBatches, key: Array) -> tuple[TrainState, Metrics]:
        """One step for each batch along the first axis of `images`.

        Metrics are means over the steps that did not fail. `failed` and `largest_times` have a row for each step.

        Raises:
            ValueError: naming another metric that is not a scalar.
        """

        def step(state: TrainState, batch: TrainingBatch) -> tuple[TrainState, Metrics]:
            state, metrics = self.train_step(state, batch, key)
            require_scalars(metrics)
            return state, metrics

        if len(jax.tree.leaves(images)[0]) == 1:
            # A single step needs no loop.
            return step(state, jax.tree.map(lambda a: a[0], images))
        state, metrics = jax.lax.scan(step, state, images)
        kept, weights = {}, 1 - metrics["failed"]
        for name in ("failed", "largest_times"):
            kept[name] = metrics.pop(name)
        succeeded = jnp.sum(weights)  # 0 / 0 is the mean over no step
        return state, kept | {k: jnp.sum(jnp.where(weights > 0, v, 0)) / succeeded for k, v in metrics.items()}

    def train_step(self, state: TrainState, images: TrainingBatch, key: Array) -> tuple[TrainState, Metrics]:
        """One step of the optimizer on a batch of images, as integer levels, or of points.

        Args:
            key: of the run. The random numbers of a step follow from the key and the number of the step.

        Returns:
            The next state; the batch means of the loss and its terms; `grad_norm`, the global norm of the gradient;
            `failed`, 1 if the loss or the gradient is not finite, so that only the step number changes, and the
            learning rate that follows it, otherwise 0;
            and `largest_times`, the times of the examples with the largest losses.
        """
        gradient, losses, table = self.gradient_and_residuals(
            state.params, images, jax.random.fold_in(key, state.step), state.residuals
        )
        if self.gradient_sharding is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, self.gradient_sharding)
        del losses["largest_losses"]
        metrics = losses | {"grad_norm": optax.tree.norm(gradient)}
        failed = not_finite(metrics)
        metrics["failed"] = failed.astype(jnp.int32)
        after = state.updated(gradient, self.optimizer, self.ema_rate_at(state.step))
        if state.residuals is not None and table is not None:
            after = after.replace(residuals=state.residuals.updated(table))
        return after.unless(failed, state), metrics

    def ema_rate_at(self, step: Array) -> float | Array:
        """The decay of the averaged parameters in the step after `step`."""
        return jnp.minimum(self.ema_rate, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_rate

    def gradient(self, params: Params, images: TrainingBatch, key: Array) -> tuple[Params, Metrics]:
        """`gradient_and_residuals` for an objective whose weights do not follow the residual."""
        return self.gradient_and_residuals(params, images, key, None)[:2]

    def gradient_and_residuals(
        self, params: Params, images: TrainingBatch, key: Array, residuals: ResidualTable | None
    ) -> tuple[Params, Metrics, ResidualTable | None]:
        """Gradient of the mean loss, and the rest of `loss_gradient`, accumulated over equal parts of the batch.

        Data and noise are drawn for the whole batch. So the number of parts changes the memory needed, but not the
        result, except for the choice of the units that dropout leaves out.
        """
        data_key, noise_key, dropout_key = jax.random.split(key, 3)
        if isinstance(images, LabelledBatch):
            x0 = self.preprocess(data_key, images.images)
            # preprocess uses the keys that fold_in derives with 0 and 1, because split derives the same ones.
            classes = self._hide_classes(jax.random.fold_in(data_key, 2), images.labels)
        else:
            x0, classes = self.preprocess(data_key, images), None
        density = residuals.density() if residuals is not None and self.objective.draws_own_times else None
        noise = self.objective.draw_noise(noise_key, self.model.sde, x0.shape, density)
        if self.accumulation_steps == 1:
            return self.loss_gradient(params, x0, noise, dropout_key, residuals, classes)

        def accumulate(
            total: Params, part: tuple[Batch, Draws, Array | None, Array]
        ) -> tuple[Params, tuple[Metrics, ResidualTable | None]]:
            x0, noise, classes, key = part
            gradient, metrics, table = self.loss_gradient(params, x0, noise, key, residuals, classes)
            return jax.tree.map(jnp.add, total, gradient), (metrics, table)

        batches = jax.tree.map(self.split, (x0, noise, classes))
        parts = (*batches, jax.random.split(dropout_key, self.accumulation_steps))
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, (metrics, table) = jax.lax.scan(accumulate, zeros, parts)
        worst = largest(metrics.pop("largest_losses").ravel(), metrics.pop("largest_times").ravel())
        metrics, table = jax.tree.map(lambda a: jnp.mean(a, axis=0), (metrics, table))
        return jax.tree.map(lambda g: g / self.accumulation_steps, total), metrics | worst, table

    def _hide_classes(self, key: Array, labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Replaces the classes of random examples by `num_classes`, the number that stands for any class."""
        hidden = jax.random.bernoulli(key, self.label_dropout, labels.shape)
        return jnp.where(hidden, self.num_classes, labels)

    def loss_gradient(
        self,
        params: Params,
        x0: Batch,
        noise: Draws,
        dropout_key: Array,
        residuals: ResidualTable | None,
        classes: Int[Array, " batch"] | None = None,
    ) -> tuple[Params, Metrics, ResidualTable | None]:
        """Differentiates the mean total loss over x0.

        Args:
            classes: inputs of a network with `data.num_classes`; None for other networks.

        Returns:
            The gradient; the mean of each term, and the `largest` losses with their times; the residuals of this batch.
        """
        residual = quantiles = None
        if residuals is not None and self.objective.needs_residual:
            quantiles = self.objective.quantiles(self.model.sde, noise.t)
            residual = residuals.at(quantiles)

        def mean_loss(params: Params) -> tuple[Array, tuple[Metrics, ResidualTable | None]]:
            score_fn = self.model.score_fn(params, dropout_key).with_classes(classes)
            losses = self.objective.losses(score_fn, self.model.sde, x0, noise, residual)
            metrics = {name: jnp.mean(value) for name, value in losses.items()}
            metrics |= largest(jax.lax.stop_gradient(losses["total"]), noise.t)
            table = None if quantiles is None else ResidualTable.of_batch(quantiles, losses["residual"])
            return metrics["total"], (metrics, table)

        with self.arithmetic():
            gradient, (metrics, table) = jax.grad(mean_loss, has_aux=True)(params)
        return gradient, metrics, table

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """A context whose matrix products and convolutions have `matmul_precision`, if traced in it."""
        if self.matmul_precision == "default":
            return contextlib.nullcontext()  # JAX_DEFAULT_MATMUL_PRECISION applies, if it is set.
        return jax.default_matmul_precision(self.matmul_precision)

    def split(self, a: Array) -> Array:
        """[batch, ...] to [parts, batch / parts, ...], in `accumulation_steps` parts with rows from every device.

        Groups of examples of which one has orders 2 and 3 stay together.
        """
        groups = a.reshape(-1, self.accumulation_steps, self.objective.every, *a.shape[1:])
        return groups.swapaxes(0, 1).reshape(self.accumulation_steps, -1, *a.shape[1:])

    def join(self, a: Array) -> Array:
        """[parts, batch / parts, ...] to [batch, ...], with the rows in the order that they had before `split`."""
        parts = a.reshape(self.accumulation_steps, -1, self.objective.every, *a.shape[2:])
        return parts.swapaxes(0, 1).reshape(-1, *a.shape[2:])


def not_finite(metrics: Metrics) -> Bool[Array, ""]:
    """Whether the loss or the norm of the gradient of a step is not finite."""
    return ~(jnp.isfinite(metrics["total"]) & jnp.isfinite(metrics["grad_norm"]))


def require_scalars(metrics: Metrics) -> None:
    """Raises ValueError for a metric of one step that is not a scalar, which could be neither averaged nor plotted."""
    for name, value in metrics.items():
        if name != "largest_times" and jnp.ndim(value):
            raise ValueError(f"the metric {name!r} has shape {jnp.shape(value)}; it must be a scalar, such as a mean")


def largest(losses: PerExample, times: PerExample) -> Metrics:
    """The largest losses in a batch, up to `NUM_LARGEST`, and their times. Losses that are not finite come first."""
    order = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    _, where = jax.lax.top_k(order, min(NUM_LARGEST, len(losses)))
    return {"largest_losses": losses[where], "largest_times": times[where]}


RESETTABLE = ("step", "opt", "ema")
"""The parts of a state that `training.init_reset` may name."""


def reset_parts(state: TrainState, fresh: TrainState, parts: str) -> TrainState:
    """Returns the state with these parts taken from `fresh`, to start a new run from an old one.

    The warm-up of the learning rate follows the step: it starts again when the step is reset, and only then. A reset
    EMA starts from the parameters.

    Args:
        parts: as in `parts_to_reset`.
    """
    names = parts_to_reset(parts)
    if "step" in names:
        state = state.replace(step=fresh.step)
    if "opt" in names:
        state = state.replace(opt_state=fresh.opt_state)
    if "ema" in names:
        state = state.replace(ema_params=jax.tree.map(lambda a: a.copy(), state.params))
    return state.replace(opt_state=schedules_at(state.opt_state, state.step))


def parts_to_reset(parts: str) -> list[str]:
    """The parts that `training.init_reset` names: any of step, opt, ema, separated by commas.

    Raises:
        ValueError: for any other part.
    """
    names = [name for name in parts.split(",") if name]
    for name in names:
        if name not in RESETTABLE:
            raise ValueError(f"training.init_reset names {name!r}; it takes any of {','.join(RESETTABLE)}")
    return names
