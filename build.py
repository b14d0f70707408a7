"""Builds the objects of a run from its configuration. Building them also checks the configuration."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.checks import check_config
from configs.default import Config
from configs.usage import record_reads, unrecorded
from datasets import PointPreprocess, Preprocess, batch_shapes, has_points, training_preprocess
from infra import parallel
from infra.checkpoints import Checkpoints, abstract_state, load_state
from infra.workdir import Workdir
from losses import objective_from_config
from models.score import (
    IMAGE_NETWORKS,
    POINT_NETWORKS,
    NetworkScore,
    Params,
    ScoreModel,
    ScoreNetwork,
    score_model_from_config,
)
from samplers.sampler import Sampler
from sampling import PredictorCorrector, pc_from_config, sampler_from_config
from sde_lib import SDE
from sources.densities import DENSITIES, Density
from train_state import PRECISIONS, Trainer, TrainState, create_state, optimizer_from_config, parts_to_reset

INIT_KEY, TRAIN_KEY, EVAL_KEY, SAMPLE_KEY = range(4)
"""The seed is folded with one of these for each purpose, so that no two purposes share random numbers."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects that training and evaluation share."""

    config: Config
    mesh: Mesh
    model: ScoreModel
    preprocess: Preprocess | PointPreprocess
    """Converts training data from the form that sources hold to the data that the score network sees."""

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer. It is built on first use, so the fields of `optim` count as used only then."""
        return _trainer(self.config, self.mesh, self.model, self.preprocess)

    @property
    def sde(self) -> SDE:
        """The forward SDE of the model."""
        return self.model.sde

    @property
    def density(self) -> Density | None:
        """The density that the data are points of; None for images."""
        return DENSITIES.get(self.config.data.dataset)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """[height, width, channels] of images, [d] of points."""
        if self.density is not None:
            return (self.density.dims,)
        return self.config.data.image_size, self.config.data.image_size, self.config.data.num_channels

    def key(self, purpose: int) -> jax.Array:
        """Derives the random key for one purpose from the seed of the run."""
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def score_fn(self, params: Params) -> NetworkScore:
        """The score function with these parameters, without dropout."""
        return self.model.score_fn(params)

    def sampler(self) -> Sampler:
        """The sampler that the configuration describes.

        Raises:
            ValueError: for a field of `sampling` whose value is not allowed.
        """
        return sampler_from_config(self.config, self.sde, self.preprocess.data_range)

    def predictor_corrector(self) -> PredictorCorrector:
        """The predictor-corrector sampler with the fields of `sampling`, for every sampling.method.

        Raises:
            ValueError: for a field of `sampling` whose value is not allowed.
        """
        return pc_from_config(self.config, self.sde)

    def sampling_description(self) -> dict[str, Any]:
        """The fields of `sampling` that the sampler reads, with their values."""
        copy = ConfigDict(self.config.to_dict())
        recorder = record_reads(copy)
        sampler_from_config(copy, self.sde, self.preprocess.data_range)
        used = {field.removeprefix("sampling.") for field in recorder.read if field.startswith("sampling.")}
        return {name: self.config.sampling[name] for name in sorted(used | {"batch_size"})}

    def sample_settings(self) -> dict[str, Any]:
        """Everything that samples depend on, besides the network and its parameters."""
        config = self.config
        return {"sampling": self.sampling_description(), "num_scales": config.model.num_scales, "seed": config.seed}

    @functools.cached_property
    def _init(self) -> jax.stages.Wrapped:
        """Makes the state at step 0 from the key of the initial parameters.

        It is one program, traced once for the state and its shapes: op by op, XLA would compile hundreds of programs.
        """

        def init(key: jax.Array) -> TrainState:
            params = self.model.init(key, self.data_shape)
            with unrecorded(self.config):  # an evaluation reads these fields for the state only, not for its results
                trainer = _trainer(self.config, self.mesh, self.model, self.preprocess)
            return create_state(params, trainer.optimizer, with_residuals=trainer.objective.needs_residual)

        return jax.jit(init)

    @functools.cached_property
    def _state_shapes(self) -> TrainState:
        """The shapes and dtypes of the training state."""
        return jax.eval_shape(self._init, self.key(INIT_KEY))

    def fresh_state(self) -> TrainState:
        """The state at step 0, with initial parameters."""
        return self._init(self.key(INIT_KEY))

    def abstract_state(self) -> TrainState:
        """The shapes of the training state, replicated over all devices."""
        return abstract_state(self._state_shapes, parallel.replicated(self.mesh))

    def state_shardings(self) -> TrainState:
        """The placement of the training state: on all devices, or as `training.shard_state` says."""
        whole, state = parallel.replicated(self.mesh), self._state_shapes
        shardings: TrainState = jax.tree.map(lambda _: whole, state)
        if not self.config.training.shard_state:
            return shardings
        divided = jax.tree.map(lambda a: parallel.along_largest_axis(self.mesh, a.shape), state)
        return shardings.replace(ema_params=divided.ema_params, opt_state=divided.opt_state)

    def training_state(self) -> TrainState:
        """The shapes of the training state, placed as `state_shardings` says."""
        return abstract_state(self._state_shapes, self.state_shardings())

    def train_steps(self) -> jax.stages.Wrapped:
        """The compiled call of training: from a state, `training.n_jitted_steps` batches and the run's key to the next
        state and the mean metrics. It donates the state."""
        replicated, along = parallel.replicated(self.mesh), parallel.along_batch(self.mesh, axis=1)
        shardings = self.state_shardings()
        return jax.jit(
            self.trainer.train_steps,
            in_shardings=(shardings, along, replicated),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )

    def step_shapes(self, steps: int) -> tuple[TrainState, Any, jax.ShapeDtypeStruct]:
        """The shapes, dtypes and placement of the arguments of `train_steps` for this many steps."""
        batches = batch_shapes(self.config, self.data_shape, steps, parallel.along_batch(self.mesh, axis=1))
        key = self.key(TRAIN_KEY)
        placed_key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=parallel.replicated(self.mesh))
        return self.training_state(), batches, placed_key

    def load_state(self, path: Path) -> TrainState:
        """Loads the state from a published checkpoint file, one step's folder, or the newest checkpoint of a run.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it belongs to another network, or is damaged.
        """
        return load_state(path, self.network_description(), self.abstract_state())

    def open_checkpoints(self, workdir: Workdir) -> Checkpoints:
        """The checkpoints of a run, to save and restore."""
        keep_every = self.config.training.snapshot_freq
        return Checkpoints(workdir.checkpoints, self.network_description(), self.training_state(), keep_every)

    def existing_checkpoints(self, workdir: Workdir) -> Checkpoints:
        """The checkpoints of a run, to restore only.

        Raises:
            FileNotFoundError: if there are none.
        """
        return Checkpoints.existing(workdir.checkpoints, self.network_description(), self.abstract_state())

    def network_description(self) -> dict[str, Any]:
        """The fields of network, SDE and kind of data on which a checkpoint and the configuration must agree."""
        free = {"ema_rate", "ema_warmup", "dropout", "remat", "dtype"}
        training: dict[str, Any] = {"training.sde": self.config.training.sde}
        if self.model.levels is None:
            free |= {"num_scales", "interpolation"}  # Checkpoints of older versions do not have these fields.
        else:
            training["training.continuous"] = False
        model = {f"model.{k}": v for k, v in self.config.model.to_dict().items() if k not in free}
        if self.density is not None:
            data = {"data dimensions": self.density.dims}
        else:
            data = {f"data.{k}": self.config.data[k] for k in ("image_size", "num_channels", "levels", "centered")}
        # Checkpoints of older versions do not have the number of classes.
        classes = {"data.num_classes": self.config.data.num_classes} if self.config.data.num_classes else {}
        return {**training, **model, **data, **classes}

    def evaluated_network(self) -> dict[str, Any]:
        """`network_description`, and the precision of feature maps, which results of evaluations depend on."""
        dtype = self.config.model.dtype  # Results of older versions lack the dtype; all were in float32.
        return self.network_description() | ({} if dtype == "float32" else {"model.dtype": dtype})


def build(config: Config, mesh: Mesh | None = None, *, for_training: bool = True) -> Run:
    """Builds the objects that the configuration describes.

    Args:
        mesh: the devices to compile for; None: all devices of all hosts.
        for_training: also check that the fields for training are compatible, and that the batch can be divided among
            the devices. An evaluation does not depend on this, and may run on other devices.

    Raises:
        ValueError: for a field whose value is not allowed, naming the field, the value and what is allowed.
    """
    mesh = mesh or parallel.device_mesh()
    with unrecorded(config):  # reading a field to check it does not give it an effect
        check_config(config)
        _check_kind_of_data(config)
        model = score_model_from_config(config)
        _check_classes(config, model.network)
        _check_smallest_times(config, model.sde)
        objective = _trainer(config, mesh, model, training_preprocess(config)).objective
        _check_derivatives(config, objective.needs_jacobian)
        if for_training:
            _check_largest_noise(config.training, model.sde)
            _check_noise_level(config.training, model.sde)
            _check_training(config, objective.every, mesh.size)
    return Run(config, mesh, score_model_from_config(config), training_preprocess(config))


def _trainer(config: Config, mesh: Mesh, model: ScoreModel, preprocess: Preprocess | PointPreprocess) -> Trainer:
    precision = config.training.matmul_precision
    if precision not in PRECISIONS:
        raise ValueError(f"training.matmul_precision is {precision!r}; known: {', '.join(PRECISIONS)}")
    return Trainer(
        model=model,
        objective=objective_from_config(config),
        optimizer=optimizer_from_config(config.optim, config.training.n_iters),
        preprocess=preprocess,
        ema_rate=config.model.ema_rate,
        accumulation_steps=config.training.accumulation_steps,
        gradient_sharding=parallel.replicated(mesh) if config.training.shard_state else None,
        ema_warmup=config.model.ema_warmup,
        matmul_precision=precision,
        num_classes=config.data.num_classes,
        label_dropout=config.training.label_dropout if config.data.num_classes else 0.0,
    )


def _check_smallest_times(config: Config, sde: SDE) -> None:
    """Raises ValueError for a time so small that 32-bit numbers do not hold its noise."""
    training, sampling, evaluation = config.training, config.sampling, config.eval
    times = {
        "training.smallest_time": training.smallest_time,
        "sampling.smallest_time": sampling.smallest_time,
        "eval.start_time": evaluation.start_time,
    }
    for field, time in times.items():
        if not 0 < time < 1e-10:  # The check would compile small programs.
            continue
        t = jnp.asarray(time)
        if not (sde.diffusion(t) > 0 and jnp.isfinite(sde.log_noise_level(t))):
            raise ValueError(
                f"{field} is {time}, where training.sde={training.sde} has too little noise: raise {field}"
            )


def _check_largest_noise(training: Config, sde: SDE) -> None:
    """Raises ValueError if the noise level of the SDE is not finite at t_max, where samples and likelihoods start."""
    log_rho = _log_largest_noise(sde)
    if not math.isfinite(log_rho):
        raise ValueError(
            f"training.sde is {training.sde!r}, whose ln(sigma / alpha) is {log_rho} at t = {sde.t_max}; it must be "
            "finite: change the SDE so that alpha stays above 0"
        )


@functools.cache  # The program compiles in a tenth of a second, and a process builds many runs.
def _log_largest_noise(sde: SDE) -> float:
    return float(jax.jit(sde.log_noise_level)(jnp.asarray(sde.t_max)))


def _check_noise_level(training: Config, sde: SDE) -> None:
    """Raises ValueError if the SDE does not have the noise level that training uses."""
    if not training.noise_level:
        return  # The check would compile five small programs.
    ends = jnp.asarray([training.smallest_time, sde.t_max])
    first, last = (float(rho) for rho in jnp.exp(sde.log_noise_level(ends)))
    rounding = 1e-4  # The levels are 32-bit numbers, so this relative error is allowed.
    if not first * (1 - rounding) <= training.noise_level <= last * (1 + rounding):
        raise ValueError(
            f"training.noise_level is {training.noise_level}; it must be 0 (all levels) or lie between {first:.3g} and "
            f"{last:.3g}, the levels of the SDE"
        )


def _check_training(config: Config, every: int, devices: int) -> None:
    """Raises ValueError if fields that only training uses contradict each other or do not fit the devices.

    Args:
        every: the size of the groups of examples that must stay together when a batch is divided.
        devices: the number of devices that share a batch.
    """
    training = config.training
    _check_init(training)
    if training.n_iters_from_start and config.optim.schedule != "constant":
        raise ValueError(
            f"optim.schedule is {config.optim.schedule!r} and training.n_iters_from_start is "
            f"{training.n_iters_from_start}; schedules end at training.n_iters: set that instead"
        )
    if training.snapshot_sampling and has_points(config):
        raise ValueError("training.snapshot_sampling is True, but it draws images, not points: set it to False")
    if every > 1 and config.data.num_classes:
        raise ValueError(
            "training.high_order_fraction is not 1, but with data.num_classes all examples need all terms: set it to 1"
        )
    parallel.divisible(training.batch_size, "training.batch_size", training.accumulation_steps * every, devices)


def _check_init(training: Config) -> None:
    """Raises ValueError for unknown parts to reset, or if there is no checkpoint whose parts could be reset."""
    if parts_to_reset(training.init_reset) and not training.init_from:
        raise ValueError(
            f"training.init_reset is {training.init_reset!r}, but training.init_from is empty, so there is nothing to "
            "reset: set training.init_from, or leave training.init_reset empty"
        )


def _check_classes(config: Config, network: ScoreNetwork) -> None:
    """Raises ValueError if `data.num_classes` is set, but the network does not take classes."""
    if not config.data.num_classes:
        return
    takes_classes = getattr(network, "num_classes", 0) == config.data.num_classes
    if not (takes_classes and config.model.conditional):
        raise ValueError(
            f"data.num_classes is {config.data.num_classes}, but model.name={config.model.name!r} with "
            f"model.conditional={config.model.conditional} is not told the classes; here, only ncsnpp with "
            "model.conditional=True is: use it, or set data.num_classes=0"
        )
    if not config.training.label_dropout:
        raise ValueError(
            f"training.label_dropout is 0 and data.num_classes is {config.data.num_classes}, but bits/dim and samples "
            "use the score without a class, which would not be trained: set training.label_dropout above 0"
        )


def _check_kind_of_data(config: Config) -> None:
    """Raises ValueError for points with settings that are for images, or the reverse."""
    points, name = has_points(config), config.model.name
    kind, fitting, others = ("points", "mlp", IMAGE_NETWORKS) if points else ("images", "ncsnpp", POINT_NETWORKS)
    if name in others:
        raise ValueError(f"model.name is {name!r}, but {config.data.dataset} has {kind}: set it to {fitting!r}")
    if config.training.exact_derivatives and not points:
        raise ValueError("training.exact_derivatives is True, but images have too many dimensions: set it to False")
    if config.training.bits_per_dim and points:
        raise ValueError("training.bits_per_dim is True, but points have no levels: set it to False")


def _check_derivatives(config: Config, needs_jacobian: bool) -> None:
    """Raises ValueError if the objective needs the whole Jacobian, but the data are images."""
    if needs_jacobian and not has_points(config):
        raise ValueError(
            f"training.objective is {config.training.objective!r}, which needs the whole Jacobian, but images have too "
            "many dimensions: set it to 'denoising', 'sliced' or 'sliced_vr'"
        )
