"""From a network to a score function: how it is told the time, and what its output means ([S21a] App. C)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array

from arrays import Batch, PerExample, append_dims
from configs.default import Config
from models.mlp import POINT_NETWORKS, TIMES_PER_UNIT, mlp_from_config
from models.ncsnpp import ncsnpp_from_config
from models.vdm import vdm_from_config
from sde_lib import SDE, LinearGammaSDE, sde_from_config

Params: TypeAlias = Any
"""A network's parameters: nested dictionaries of arrays."""


@runtime_checkable
class ScoreNetwork(Protocol):
    """A linen module called with (x, labels, train), with one label for each example; its output is shaped as x.

    - With `scale_by_sigma`, labels are sigma_t. The network divides its output by them, and the result is the score.
    - Without it, labels are 999 t, and one of `PARAMETERIZATIONS` says what the output is.
    """

    @property
    def scale_by_sigma(self) -> bool: ...

    def lazy_init(self, rngs: Array, *args: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


NETWORKS: dict[str, Callable[[Config], ScoreNetwork]] = {
    "ncsnpp": ncsnpp_from_config,
    "vdm": vdm_from_config,
    **dict.fromkeys(POINT_NETWORKS, mlp_from_config),
}
"""The builders of networks, by config.model.name."""


class Parameterization(NamedTuple):
    """What the output of a network without `scale_by_sigma` stands for."""

    noise: Callable[[Any, Batch, Batch, PerExample], Batch]
    """The noise in x_t, which is -sigma_t times the score, as a function of (sde, output, x_t, t)."""
    sdes: type[SDE] = SDE
    """The SDEs for which it is defined."""


PARAMETERIZATIONS = {
    "noise": Parameterization(lambda sde, output, x, t: output),
    "velocity": Parameterization(lambda sde, output, x, t: sde.noise_of_velocity(x, output, t), LinearGammaSDE),
}
"""What a network predicts, by model.parameterization."""


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """A network and the SDE that it is trained under: turns parameters into a score function."""

    network: ScoreNetwork
    sde: SDE
    parameterization: str = "noise"

    def init(self, key: Array, data_shape: tuple[int, ...]) -> Params:
        """Initial parameters for images of shape [height, width, channels], or points of shape [d]."""
        x, labels = jax.ShapeDtypeStruct((1, *data_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
        return self.network.lazy_init(key, x, labels, False)["params"]

    def score_fn(self, params: Params, dropout_key: Array | None = None) -> "NetworkScore":
        """The score function with these parameters; without dropout unless there is a key for it."""
        return NetworkScore(params, dropout_key, self)


@flax.struct.dataclass
class NetworkScore:
    """A `ScoreFn`. As a pytree it holds the parameters, so that compiled functions take them as an argument."""

    params: Params
    dropout_key: Array | None
    model: ScoreModel = flax.struct.field(pytree_node=False)

    def __call__(self, x: Batch, t: PerExample) -> Batch:
        sigma = self.model.sde.alpha_sigma(t)[1]
        if self.model.network.scale_by_sigma:
            return self._output(x, sigma)
        parameterization = PARAMETERIZATIONS[self.model.parameterization]
        noise = parameterization.noise(self.model.sde, self._output(x, TIMES_PER_UNIT * t), x, t)
        return -noise / append_dims(sigma, x)

    def _output(self, x: Batch, labels: PerExample) -> Batch:
        train = self.dropout_key is not None
        rngs = {"dropout": self.dropout_key} if train else None
        return self.model.network.apply({"params": self.params}, x, labels, train, rngs=rngs)


def score_model_from_config(config: Config) -> ScoreModel:
    """The SDE that config.training names, with the network that config.model describes.

    Raises:
        ValueError: if a name is unknown, or a field has a value that is not allowed.
    """
    sde = sde_from_config(config)  # first: the network must suit it
    network, parameterization = build_network(config), config.model.parameterization
    if parameterization not in PARAMETERIZATIONS:
        known = ", ".join(PARAMETERIZATIONS)
        raise ValueError(f"model.parameterization is {parameterization!r}; known: {known}")
    if parameterization != "noise" and network.scale_by_sigma:
        raise ValueError(
            f"model.parameterization is {parameterization!r}, but with model.scale_by_sigma=True the network's output "
            "is the score: set it to 'noise'"
        )
    if not isinstance(sde, PARAMETERIZATIONS[parameterization].sdes):
        raise ValueError(
            f"model.parameterization is {parameterization!r}, which training.sde={config.training.sde} does not "
            "define: set it to 'noise'"
        )
    return ScoreModel(network, sde, parameterization)


def build_network(config: Config) -> ScoreNetwork:
    """The network that config.model describes.

    Raises:
        ValueError: if model.name is unknown, or a field has a value that is not allowed.
    """
    if config.model.name not in NETWORKS:
        raise ValueError(f"model.name is {config.model.name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[config.model.name](config)
