"""The score network for points: perceptrons for the time and for the point, and one on both ([L22] App. I)."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from arrays import Batch, PerExample, append_dims
from configs.default import Config
from models.layers import NONLINEARITIES, positional_embedding

MLPS = ("mlp", "mlp_published")
"""The values of config.model.name for the networks in this file: ours, and the network of the paper."""

TIMES_PER_UNIT = 999
"""Labels are times multiplied by this number."""


class MLP(nn.Module):
    """Maps noisy points to the noise in them; fields as in configs/default.py.

    Labels are 999 t, and points enter the network unscaled. With `scale_by_sigma`, labels are noise levels sigma, and
    the output is minus the noise divided by sigma. Points are divided by sqrt(1 + sigma^2), so that inputs and
    derivatives have the same scale at all noise levels.

    `published` gives the network of the paper's experiments. It has three differences. It embeds the time t itself. No
    nonlinearity acts on the joined features of time and point. Weights and biases start uniform in +-1/sqrt(fan in),
    the default of PyTorch's linear layers.

    Raises:
        ValueError: if inputs are not points, [batch, d].
    """

    embedding_size: int = 64
    time_widths: tuple[int, ...] = (128, 128, 128)
    data_widths: tuple[int, ...] = (128, 128, 128)
    widths: tuple[int, ...] = (512, 512)
    nonlinearity: str = "swish"
    scale_by_sigma: bool = False
    published: bool = False

    @nn.compact
    def __call__(self, x: Batch, labels: PerExample, train: bool = False) -> Batch:
        del train  # Without dropout, training and evaluation are the same.
        if x.ndim != 2:
            raise ValueError(f"model.name is an MLP, which is for points, but the data are shaped {x.shape[1:]}")
        times, seen = labels / TIMES_PER_UNIT if self.published else labels, x
        if self.scale_by_sigma:
            # With this factor, the embedding resolves the noise levels of VE as finely as 999 t does.
            times, seen = 100 * jnp.log(labels), x * append_dims(jax.lax.rsqrt(1 + labels**2), x)
        time = self._layers("time", positional_embedding(times, self.embedding_size), self.time_widths)
        data = self._layers("data", seen, self.data_widths)
        joined = jnp.concatenate([time, data], axis=1)
        if not self.published:
            joined = NONLINEARITIES[self.nonlinearity](joined)
        output = self._layers("trunk", joined, (*self.widths, x.shape[1]))
        return output / append_dims(labels, output) if self.scale_by_sigma else output

    def _layers(self, name: str, h: Array, widths: Sequence[int]) -> Array:
        """Affine maps with nonlinearities between them."""
        for number, width in enumerate(widths):
            kernel, bias = nn.initializers.lecun_normal(), nn.initializers.zeros_init()  # flax's default
            if self.published:
                kernel = bias = uniform_initializer(h.shape[1])
            layer = nn.Dense(width, name=f"{name}_{number}", kernel_init=kernel, bias_init=bias)
            h = layer(NONLINEARITIES[self.nonlinearity](h) if number else h)
        return h


def uniform_initializer(fan_in: int) -> nn.initializers.Initializer:
    """Initializer for weights and biases of a layer, uniform in +-1/sqrt(fan_in)."""

    def uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        limit = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return uniform


def mlp_from_config(config: Config) -> MLP:
    """The network that config.model describes.

    Raises:
        ValueError: a field of config.model has a value that is not allowed.
    """
    if config.model.dtype != "float32":
        raise ValueError(f"model.dtype is {config.model.dtype!r}, but points need 'float32'")
    model = config.model
    if model.nonlinearity not in NONLINEARITIES:
        raise ValueError(f"model.nonlinearity is {model.nonlinearity!r}; known: {', '.join(NONLINEARITIES)}")
    if model.mlp_embedding < 4 or model.mlp_embedding % 2:
        raise ValueError(f"model.mlp_embedding is {model.mlp_embedding}; it must be even and at least 4")
    for field in ("mlp_time_widths", "mlp_data_widths", "mlp_widths"):
        if not model[field] or min(model[field]) < 1:
            raise ValueError(f"model.{field} is {model[field]}; it must name at least one width, each at least 1")
    if model.scale_by_sigma and not config.training.continuous:
        raise ValueError(
            "model.scale_by_sigma is True, but with training.continuous=False the mlp sees numbers of noise levels, "
            "not sigma: set it to False"
        )
    published = model.name == "mlp_published"
    if published and model.scale_by_sigma:
        raise ValueError("model.scale_by_sigma is True, but mlp_published sees unscaled points: set it to False")
    return MLP(
        embedding_size=model.mlp_embedding,
        nonlinearity=model.nonlinearity,
        scale_by_sigma=model.scale_by_sigma,
        published=published,
        time_widths=tuple(model.mlp_time_widths),
        data_widths=tuple(model.mlp_data_widths),
        widths=tuple(model.mlp_widths),
    )
