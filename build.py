"""From a configuration to the objects of a run. Configurations are read here, and checked by being built."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

import parallel
from checkpoints import parts_to_reset
from configs.default import Config
from datasets import training_preprocess
from densities import DENSITIES, Density
from losses import Objective
from models.score import NETWORKS, NetworkScore, Params, build_network, init_params, sde_from_config
from sde_lib import SDE
from train_state import Trainer, TrainState, create_state, optimizer_from_config

INIT_KEY, TRAIN_KEY, EVAL_KEY, SAMPLE_KEY = range(4)
"""What the seed is folded with for each purpose, so that no two share random numbers."""

AT_LEAST_ONE = (
    "n_iters",
    "n_jitted_steps",
    "accumulation_steps",
    "log_freq",
    "eval_freq",
    "eval_batches",
    "snapshot_freq",
    "snapshot_freq_for_preemption",
)
"""Fields of `training` that count something there must be one of."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What training and evaluation share."""

    config: Config
    mesh: Mesh
    trainer: Trainer

    @property
    def sde(self) -> SDE:
        return self.trainer.score_fn.sde

    @property
    def density(self) -> Density | None:
        """What the data are points of; None for images."""
        return DENSITIES.get(self.config.data.dataset)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """(height, width, channels), or (d,) of points."""
        if self.density is not None:
            return (self.density.dims,)
        return self.config.data.image_size, self.config.data.image_size, self.config.data.num_channels

    def key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def fresh_state(self) -> TrainState:
        params = init_params(self.trainer.score_fn.network, self.key(INIT_KEY), self.data_shape)
        return create_state(params, self.trainer.optimizer)

    def score_fn(self, params: Params) -> NetworkScore:
        """The score network with these parameters, without dropout."""
        return dataclasses.replace(self.trainer.score_fn, params=params)

    def network_description(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be of this network: its fields, the SDE, and the kind of data."""
        free = ("ema_rate", "dropout", "num_scales", "remat")
        model = {f"model.{k}": v for k, v in self.config.model.to_dict().items() if k not in free}
        if self.density is not None:
            data = {"data dimensions": self.density.dims}
        else:
            data = {f"data.{k}": self.config.data[k] for k in ("image_size", "num_channels", "levels", "centered")}
        return {"training.sde": self.config.training.sde, **model, **data}


def build(config: Config) -> Run:
    """Builds what the configuration says.

    Raises:
        ValueError: for a field whose value is not allowed, naming the field, the value and what is allowed.
    """
    training = config.training
    _check_numbers(config)
    _check_start(training)
    parallel.divisible(training.batch_size, "training.batch_size", training.accumulation_steps)
    _check_kind_of_data(config)
    sde = sde_from_config(config)  # before the network, which must suit it
    trainer = Trainer(
        score_fn=NetworkScore(None, build_network(config), sde),
        objective=objective_from_config(training),
        optimizer=optimizer_from_config(config.optim),
        preprocess=training_preprocess(config),
        ema_rate=config.model.ema_rate,
        accumulation_steps=training.accumulation_steps,
    )
    return Run(config, parallel.device_mesh(), trainer)


def _check_numbers(config: Config) -> None:
    training = config.training
    for field in AT_LEAST_ONE:
        if training[field] < 1:
            raise ValueError(f"training.{field} is {training[field]}; it must be at least 1")
    if not 0 <= config.model.ema_rate < 1:
        raise ValueError(f"model.ema_rate is {config.model.ema_rate}; it must lie in [0, 1)")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is {config.seed}; it must lie in [0, 2^32)")
    if not training.continuous:
        raise ValueError("training.continuous is False; there is no training in discrete time: set it to True")


def _check_start(training: Config) -> None:
    """Raises ValueError for parts to reset that nobody knows, or of nothing."""
    if parts_to_reset(training.init_reset) and not training.init_from:
        raise ValueError(
            f"training.init_reset is {training.init_reset!r}, but training.init_from names nothing to start from; "
            "parts are reset when a new run starts from another's checkpoint"
        )


def _check_kind_of_data(config: Config) -> None:
    """Raises ValueError for points with what is for images, or the other way round."""
    points, training, name = config.data.dataset in DENSITIES, config.training, config.model.name
    kind, fitting = ("points", "mlp") if points else ("images", "ncsnpp")
    if name in NETWORKS and points != (name == "mlp"):
        raise ValueError(f"model.name is {name!r}, but {config.data.dataset} has {kind}: set it to {fitting!r}")
    if training.exact_derivatives and not points:
        raise ValueError("training.exact_derivatives is True, but images have too many dimensions: set it to False")
    if training.snapshot_sampling and points:
        raise ValueError("training.snapshot_sampling is True, but points make no grid of images: set it to False")


def objective_from_config(training: Config) -> Objective:
    return Objective(
        order=training.score_matching_order,
        t_min=training.smallest_time,
        likelihood_weighting=training.likelihood_weighting,
        importance_weighting=training.importance_weighting,
        reduce_mean=training.reduce_mean,
        second_weight=training.second_order_weight,
        third_weight=training.third_order_weight,
        exact=training.exact_derivatives,
    )
