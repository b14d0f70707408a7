"""Variational dequantization: learned noise q(u | image) within the bins of an image's levels, and its training.

The bound of dequantization/noise.py holds for any q. It is tightest if q(u | k) is the model's own density in the bin
of k, normalised. So with the score model fixed, q is trained to minimise E_q[ bound(x) + ln q(u | k) ]. The bound on
-ln p(x) comes from bound_likelihood.py, with one importance-sampled time for each image ([S21b] Sec. 5.2).
"""

import dataclasses
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from arrays import Batch, PerExample, ScoreFn
from bound_likelihood import GaussianReference, bound_draw
from configs.default import Config
from datasets import random_mirror
from dequantization.noise import Bins, Dequantized, Images, Keys
from likelihood import bits_per_dim
from models.flowpp import Flowpp, flowpp_from_config
from models.score import Params
from sde_lib import SDE
from train_state import TrainState, create_state, not_finite, optimizer_from_config

Parts: TypeAlias = dict[str, PerExample]
"""Numbers for each image in bits/dim, by name."""


@flax.struct.dataclass
class VariationalDequantizer:
    """A `Dequantizer` whose noise comes from a network. As a pytree it holds the network's parameters.

    `origin` is a text that identifies the parameters in results.
    """

    params: Params
    network: Flowpp = flax.struct.field(pytree_node=False)
    bins: Bins = flax.struct.field(pytree_node=False)
    t_min: float = flax.struct.field(pytree_node=False)
    origin: str = flax.struct.field(pytree_node=False)

    @property
    def bins_per_unit(self) -> int:
        return self.bins.levels

    @property
    def unit_scale(self) -> float:
        return self.bins.unit_scale

    @property
    def description(self) -> dict[str, Any]:
        return {"dequantization": "variational", "dequantizer": self.origin, "t_min": self.t_min}

    def __call__(self, keys: Keys, images: Images) -> Dequantized:
        gaussian = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        with jax.default_matmul_precision("highest"):
            noise, log_q = _noise(self.network, self.params, gaussian, _unit(images, self.bins))
        return Dequantized(self.bins.data_of(images, noise), log_q)


def _unit(images: Images, bins: Bins) -> Batch:
    """Levels scaled to [0, 1], as the network sees an image."""
    return images.astype(jnp.float32) / (bins.levels - 1)


def _noise(
    network: Flowpp, params: Params, gaussian: Batch, unit: Batch, dropout_key: Array | None = None
) -> tuple[Batch, PerExample]:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    noise: Any = network.apply({"params": params}, gaussian, unit, dropout_key is not None, rngs=rngs)
    return noise


@dataclasses.dataclass(frozen=True)
class DequantizerTrainer:
    """Everything that training a dequantizer needs besides the state and the data; fixed for the run."""

    network: Flowpp
    sde: SDE
    optimizer: optax.GradientTransformation
    bins: Bins
    t_min: float
    start_correction: bool
    ema_rate: float
    random_flip: bool

    def first_state(self, images: Images, key: Array) -> TrainState:
        """The state at step 0, initialised on a batch of images."""
        noise_key, init_key = jax.random.split(key)
        gaussian = jax.random.normal(noise_key, images.shape)
        params = self.network.init(init_key, gaussian, _unit(images, self.bins), False)["params"]
        return create_state(params, self.optimizer)

    def step(
        self, state: TrainState, score_fn: ScoreFn, reference: GaussianReference, images: Images, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step of the optimizer on a batch of integer levels.

        Args:
            score_fn: of the score model, which is not changed. A pytree that holds the parameters.
            reference: for the control variate of the bound.
            key: of the run. The random numbers of a step follow from the key and the number of the step.

        Returns:
            The next state; the batch means of the bits/dim and their parts, the global norm of the gradient, and
            `failed`, as for score models.
        """
        flip_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        if self.random_flip:
            images = random_mirror(flip_key, images)

        def mean_loss(params: Params) -> tuple[Array, dict[str, Array]]:
            parts = self.bits_per_dim(params, score_fn, reference, images, loss_key, train=True)
            means = {name: jnp.mean(part) for name, part in parts.items()}
            return means["total"], means

        gradient, means = jax.grad(mean_loss, has_aux=True)(state.params)
        metrics = means | {"grad_norm": optax.tree.norm(gradient)}
        failed = not_finite(metrics)
        metrics["failed"] = failed.astype(jnp.int32)
        return state.updated(gradient, self.optimizer, self.ema_rate).unless(failed, state), metrics

    def bits_per_dim(
        self,
        params: Params,
        score_fn: ScoreFn,
        reference: GaussianReference,
        images: Images,
        key: Array,
        *,
        train: bool,
    ) -> Parts:
        """One draw of the bound on each image's bits/dim as `total`, and its part ln q as `dequantization`.

        Times are equidistant over the batch with a common random shift: they are uniform for each image, and the mean
        over the batch has less variance.
        """
        noise_key, shift_key, z_key, start_key, dropout_key = jax.random.split(key, 5)
        gaussian, z, start_z = (jax.random.normal(k, images.shape) for k in (noise_key, z_key, start_key))
        unit, dropout = _unit(images, self.bins), dropout_key if train and self.network.dropout else None
        noise, log_q = _noise(self.network, params, gaussian, unit, dropout)
        quantile = (jnp.arange(len(images)) / len(images) + jax.random.uniform(shift_key)) % 1.0
        if not train:  # The first rows of a batch that is not full must not have the smallest times.
            quantile = jax.random.permutation(jax.random.fold_in(shift_key, 1), quantile)
        bound = bound_draw(
            score_fn,
            self.sde,
            self.bins.data_of(images, noise),
            quantile,
            z,
            start_z if self.start_correction else None,
            self.t_min,
            reference,
        )
        nats = {"bound": bound, "dequantization": log_q}
        bits = bits_per_dim(nats, num_dims=images[0].size, levels=self.bins.levels, unit_scale=self.bins.unit_scale)
        return {"total": bits["bpd"], "dequantization": bits["dequantization"]}


def dequantizer_trainer_from_config(config: Config, sde: SDE) -> DequantizerTrainer:
    """Raises ValueError for a field whose value is not allowed."""
    deq, data = config.deq, config.data
    if not 0 <= deq.ema_rate < 1:
        raise ValueError(f"deq.ema_rate is {deq.ema_rate}; it must lie in [0, 1)")
    if deq.n_iters < 1:
        raise ValueError(f"deq.n_iters is {deq.n_iters}; it must be at least 1")
    if data.image_size % 2:
        raise ValueError(f"data.image_size is {data.image_size}; the dequantizer needs an even number of columns")
    return DequantizerTrainer(
        network=flowpp_from_config(deq),
        sde=sde,
        optimizer=optimizer_from_config(config.optim, config.deq.n_iters),
        bins=Bins(data.levels, data.centered),
        t_min=config.training.smallest_time,
        start_correction=deq.offset,
        ema_rate=deq.ema_rate,
        random_flip=data.random_flip,
    )
