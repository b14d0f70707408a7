"""From a network to a score function: what it is told of the time, and what its output means ([S21a] App. C)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from arrays import Batch, PerExample, per_example
from configs.default import Config
from models.mlp import mlp_from_config
from models.ncsnpp import ncsnpp_from_config
from sde_lib import SDE, SDES

Params: TypeAlias = Any
"""A network's parameters: nested dictionaries of arrays."""


class ScoreNetwork(Protocol):
    """A linen module called with (x, labels, train), labels being one number for each example; returns an array as x.

    - If `scale_by_sigma`, labels are sigma_t. The network divides its output by them, and that is the score.
    - Else labels are 999 t, and the output is -sigma_t times the score.
    """

    @property
    def scale_by_sigma(self) -> bool: ...

    def lazy_init(self, rngs: Array, *args: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


NETWORKS: dict[str, Callable[[Config], ScoreNetwork]] = {"ncsnpp": ncsnpp_from_config, "mlp": mlp_from_config}
"""The builders of networks, by config.model.name."""


@flax.struct.dataclass
class NetworkScore:
    """A `ScoreFn`. As a pytree it holds the parameters, so that compiled functions take them as an argument."""

    params: Params
    network: ScoreNetwork = flax.struct.field(pytree_node=False)
    sde: SDE = flax.struct.field(pytree_node=False)
    dropout_key: Array | None = None  # None: no dropout

    def __call__(self, x: Batch, t: PerExample) -> Batch:
        sigma = self.sde.alpha_sigma(t)[1]
        if self.network.scale_by_sigma:
            return self._output(x, sigma)
        return -self._output(x, 999 * t) / per_example(sigma, x)

    def _output(self, x: Batch, labels: PerExample) -> Batch:
        train = self.dropout_key is not None
        rngs = {"dropout": self.dropout_key} if train else None
        return self.network.apply({"params": self.params}, x, labels, train, rngs=rngs)


def build_network(config: Config) -> ScoreNetwork:
    """The network that config.model describes.

    Raises:
        ValueError: model.name is unknown, or one of its fields has a value that is not allowed.
    """
    if config.model.name not in NETWORKS:
        raise ValueError(f"model.name is {config.model.name!r}; known are {', '.join(NETWORKS)}")
    return NETWORKS[config.model.name](config)


def init_params(network: ScoreNetwork, key: Array, data_shape: tuple[int, ...]) -> Params:
    """First parameters of a network for images of [height, width, channels], or points of [d]."""
    images, labels = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return network.lazy_init(key, images, labels, False)["params"]


def sde_from_config(config: Config) -> SDE:
    """The SDE named by training.sde, with its constants from config.model.

    Raises:
        ValueError: training.sde is unknown, or the constants are not allowed.
    """
    if config.training.sde not in SDES:
        raise ValueError(f"training.sde is {config.training.sde!r}; known are {', '.join(SDES)}")
    sde = SDES[config.training.sde]
    return sde(**{field.name: config.model[field.name] for field in dataclasses.fields(sde)})
