"""Dequantization noise, which turns integer grey levels into points with a density: noise within each level's bin.

The probability of an image k is the model's density integrated over a box around it, one bin per entry. For noise u
from a density q(u | k) on that box, in units of one bin,

    -ln P(k) <= E_q[ ln q(u | k) - ln p(y_k + w u) ] - d ln w,      w: width of a bin in the network's data,

and from M draws, -ln P(k) <= E[-ln (1/M) sum_j p(y_k + w u_j) w^d / q(u_j | k)]. This bound gets tighter with M and
tends to -ln P(k) (Burda et al., 2016). Uniform noise has ln q = 0. Truncated normal noise has the shape of the SDE's
own noise at the time at which it just fills a bin. The solve starts at that time, so the noise suits models trained on
bare levels; docs/dequantization.md derives this. Normal noise is the SDE's own noise, and may leave the bin. A
dequantizer is a pytree; its leaves are the parameters of its network.

Sources: Theis et al., ICLR 2016 (uniform); [Z23] Zheng et al., "Improved Techniques for Maximum Likelihood Estimation
for Diffusion ODEs", ICML 2023 (truncated normal, normal); [K21] Kingma et al., NeurIPS 2021 (normal).
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Integer, Key

from arrays import Batch, PerExample, append_dims, inner, level_values, num_dims
from configs.default import Config
from sde_lib import SDE

Images: TypeAlias = Integer[Array, "batch height width channel"]
"""Integer levels, 0 .. levels-1."""

Keys: TypeAlias = Key[Array, " batch"]
"""One key for each image, so that its noise does not depend on its batch."""


class Dequantized(NamedTuple):
    """Images with noise in their bins."""

    x: Batch
    """The data that the score network sees at the dequantizer's `t_min`."""
    log_q: PerExample
    """ln q(u | image), in nats; u counts in bins, so that uniform noise has 0."""


@runtime_checkable
class Dequantizer(Protocol):
    """dequantizer(keys, images) -> Dequantized, with the properties that the computation of bits/dim needs.

    `likelihood.bits_per_dim(terms, levels=bins_per_unit, unit_scale=unit_scale, ...)`, with log_q among the terms of
    -ln p(x), gives the bound.
    """

    @property
    def t_min(self) -> float:
        """The time at which the model is evaluated."""
        ...

    @property
    def bins_per_unit(self) -> int:
        """Bins in the range [0, 1] of pixel values."""
        ...

    @property
    def unit_scale(self) -> float:
        """dy/dx from x to pixel values y."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """Everything that the noise depends on; "dequantization" is its name."""
        ...

    def __call__(self, keys: Keys, images: Images) -> Dequantized: ...


@dataclasses.dataclass(frozen=True)
class Bins:
    """The bins of `levels` grey levels, which tile [0, 1], or [-1, 1] if the network's data are `centered`."""

    levels: int
    centered: bool

    @property
    def unit_scale(self) -> float:
        """dy/dx from the network's data x to pixel values y."""
        return 0.5 if self.centered else 1.0

    def data_of(self, images: Images, noise: Batch) -> Batch:
        """(k + u) / levels for level k and noise u in [0, 1], scaled to the network's data."""
        return _scale((images.astype(noise.dtype) + noise) / self.levels, self.centered)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["levels", "centered", "t_min"])
@dataclasses.dataclass(frozen=True)
class UniformDequantizer:
    """(k + u) / levels for level k, u uniform on [0, 1): an image's bins tile [0, 1]^d.

    With `centered`, the network's data are in [-1, 1].
    """

    levels: int
    centered: bool
    t_min: float

    @property
    def bins(self) -> Bins:
        return Bins(self.levels, self.centered)

    @property
    def bins_per_unit(self) -> int:
        return self.levels

    @property
    def unit_scale(self) -> float:
        return self.bins.unit_scale

    @property
    def description(self) -> dict[str, Any]:
        return {"dequantization": "uniform", "t_min": self.t_min}

    def __call__(self, keys: Keys, images: Images) -> Dequantized:
        return self.with_noise(jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys), images)

    def with_noise(self, noise: Batch, images: Images) -> Dequantized:
        """Args: noise: uniform on [0, 1)."""
        return Dequantized(self.bins.data_of(images, noise), jnp.zeros(len(images), noise.dtype))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["levels", "centered", "bare_levels", "t_min", "alpha", "tau"],
)
@dataclasses.dataclass(frozen=True)
class TruncatedNormalDequantizer:
    """The SDE's own noise at `t_min`, truncated at the edges of the bin ([Z23] Sec. 4.1; see docs/dequantization.md).

    x = alpha (y_k + rho e), rho = sigma / alpha, with e normal and truncated to [-tau, tau]; tau rho is half a bin.

    With `centered`, the network's data are in [-1, 1]. With `bare_levels`, the network has been trained on levels
    without noise, k / (levels - 1). Otherwise it has been trained on the data of `UniformDequantizer`, and the bins are
    the same as there.
    """

    levels: int
    centered: bool
    bare_levels: bool
    t_min: float
    alpha: float
    tau: float

    @classmethod
    def of_sde(
        cls, sde: SDE, *, levels: int, centered: bool, bare_levels: bool, smallest_time: float, truncation: float = 3.0
    ) -> "TruncatedNormalDequantizer":
        """Chooses the time at which tau equals `truncation`, or `smallest_time` if that is later (tau is smaller then).

        Raises:
            ValueError: if the truncation is not positive, or so small that no time has such noise.
        """
        if not truncation > 0:
            raise ValueError(f"eval.truncation is {truncation}; it must be positive")
        half_bin = (1.0 if centered else 0.5) / (levels - 1 if bare_levels else levels)
        wanted = sde.time_of_log_noise_level(jnp.float32(math.log(half_bin / truncation)))
        t_min = min(max(float(wanted), smallest_time), sde.t_max)
        tau = half_bin / math.exp(float(sde.log_noise_level(jnp.float32(t_min))))
        if tau > 1.01 * truncation:
            raise ValueError(f"eval.truncation is {truncation}; it must be at least {tau:.3g}, the value at t = 1")
        return cls(levels, centered, bare_levels, t_min, float(sde.alpha_sigma(jnp.float32(t_min))[0]), tau)

    @property
    def bins_per_unit(self) -> int:
        return self.levels - 1 if self.bare_levels else self.levels

    @property
    def unit_scale(self) -> float:
        return (0.5 if self.centered else 1.0) / self.alpha

    @property
    def description(self) -> dict[str, Any]:
        return {"dequantization": "truncated normal", "t_min": self.t_min, "tau": self.tau}

    def __call__(self, keys: Keys, images: Images) -> Dequantized:
        tau, dims = self.tau, images.shape[1:]
        return self.with_noise(jax.vmap(lambda key: jax.random.truncated_normal(key, -tau, tau, dims))(keys), images)

    def with_noise(self, normal: Batch, images: Images) -> Dequantized:
        """Args: normal: standard normal noise, truncated to [-tau, tau]."""
        tau = self.tau
        middle = images.astype(normal.dtype) + (0.0 if self.bare_levels else 0.5)
        x = self.alpha * _scale((middle + normal / (2 * tau)) / self.bins_per_unit, self.centered)
        log_peak = math.log(2 * tau / math.sqrt(2 * math.pi)) - math.log(math.erf(tau / math.sqrt(2)))
        return Dequantized(x, jnp.sum(log_peak - 0.5 * jnp.square(normal), axis=range(1, images.ndim)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[],
    meta_fields=["sde", "levels", "centered", "bare_levels", "t_min"],
)
@dataclasses.dataclass(frozen=True)
class NormalDequantizer:
    """The SDE's own noise at `t_min` without truncation: the bound of a variational autoencoder ([K21], [Z23]).

    x = alpha y_k + sigma e with e normal, and -ln P(k) <= E[ln q(x | k) - ln p(x) - ln P(k | x)]. The SDE's
    `level_logp` computes ln P(k | x). `log_q` is ln q(u | k) - ln P(k | x), where u is in units of bins and may leave
    the bin of its level.

    With `bare_levels`, the network has been trained on k / (levels - 1), otherwise on the middles of the levels' bins.
    """

    sde: SDE
    levels: int
    centered: bool
    bare_levels: bool
    t_min: float

    @property
    def bins_per_unit(self) -> int:
        return self.levels - 1 if self.bare_levels else self.levels

    @property
    def unit_scale(self) -> float:
        return 0.5 if self.centered else 1.0

    @property
    def description(self) -> dict[str, Any]:
        return {"dequantization": "normal", "t_min": self.t_min}

    def __call__(self, keys: Keys, images: Images) -> Dequantized:
        return self.with_noise(jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys), images)

    def with_noise(self, normal: Batch, images: Images) -> Dequantized:
        """Args: normal: standard normal noise."""
        values = jnp.asarray(level_values(self.levels, self.centered, self.bare_levels))
        x0, t = values[images], jnp.full(len(images), self.t_min)
        mean, sigma = self.sde.marginal(x0, t)
        x = mean + append_dims(sigma, x0) * normal
        sigma_in_bins = sigma * self.bins_per_unit * self.unit_scale
        log_q = -0.5 * inner(normal, normal) - num_dims(x) * jnp.log(math.sqrt(2 * math.pi) * sigma_in_bins)
        return Dequantized(x, log_q - self.sde.level_logp(x, x0, t, values))


def _scale(unit: Batch, centered: bool) -> Batch:
    """Scales pixel values in [0, 1] to the network's data."""
    return 2 * unit - 1 if centered else unit


def log_mean_exp(log_weights: Float[np.ndarray, "draws batch"]) -> Float[np.ndarray, " batch"]:
    """ln of the mean over draws of exp(log_weights): the estimate of ln P from ln p - ln q of each draw, in nats."""
    return scipy.special.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def importance_weights(log_weights: Float[np.ndarray, "draws batch"]) -> Float[np.ndarray, "draws batch"]:
    """Returns the share of each draw in the mean of `log_mean_exp`: the weight of an error of its log weight."""
    return scipy.special.softmax(log_weights, axis=0)


def check_levels(images: np.ndarray, levels: int, description: str) -> None:
    """Checks that images are integer levels 0 .. levels-1, which everything here assumes.

    Raises:
        ValueError: if they are not integers, or one is out of range.
    """
    if not np.issubdtype(images.dtype, np.integer):
        raise ValueError(
            f"{description} has images of type {images.dtype}, but bits/dim need integer levels from 0 to {levels - 1} "
            f"(data.levels is {levels})"
        )
    lowest, highest = int(images.min()), int(images.max())
    if lowest < 0 or highest >= levels:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"{description} has a pixel of level {wrong}; data.levels={levels} allows 0 to {levels - 1}")


DEQUANTIZATIONS = ("uniform", "truncated_normal", "normal")
"""The choices of eval.dequantization."""


def dequantizer_from_config(
    config: Config, sde: SDE
) -> UniformDequantizer | TruncatedNormalDequantizer | NormalDequantizer:
    """Returns the dequantizer that `eval.dequantization` names, which has no parameters to train.

    Raises:
        ValueError: for an unknown name, a truncation that is not allowed, or noise that needs data without noise.
    """
    data, name = config.data, config.eval.dequantization
    t_min = config.eval.start_time or config.training.smallest_time
    in_bins = data.uniform_dequantization or data.bin_centers
    if name == "uniform":
        return UniformDequantizer(data.levels, data.centered, t_min)
    if name == "truncated_normal":
        return TruncatedNormalDequantizer.of_sde(
            sde,
            levels=data.levels,
            centered=data.centered,
            bare_levels=not in_bins,
            smallest_time=t_min,
            truncation=config.eval.truncation,
        )
    if name == "normal":
        if data.uniform_dequantization:
            raise ValueError(
                "eval.dequantization is 'normal', which needs a model of levels without noise, but "
                "data.uniform_dequantization is True: use uniform or truncated_normal"
            )
        return NormalDequantizer(sde, data.levels, data.centered, not in_bins, t_min)
    raise ValueError(f"eval.dequantization is {name!r}; known: {', '.join(DEQUANTIZATIONS)}")
