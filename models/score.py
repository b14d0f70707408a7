"""Turns a network into a score function. models/conditioning.py defines the network's labels and output."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from arrays import Batch, PerExample
from configs.default import Config
from configs.usage import unrecorded
from models.conditioning import Conditioning, conditioning
from models.ddpm import ddpm_from_config
from models.mlp import MLPS, mlp_from_config
from models.ncsn import ncsn_from_config
from models.ncsnpp import ncsnpp_from_config
from models.ncsnv2 import NETWORKS as NCSNV2_NETWORKS
from models.ncsnv2 import ncsnv2_from_config
from models.vdm import vdm_from_config
from sde_lib import SDE, sde_from_config

Params: TypeAlias = Any
"""A network's parameters: nested dictionaries of arrays."""


@runtime_checkable
class ScoreNetwork(Protocol):
    """A linen module called with (x, labels, train), with one label for each example; its output is shaped as x.

    With `scale_by_sigma`, the network divides its output by sigma, and the result is the score. The classes of
    models/conditioning.py say what the labels are, and what the output is without `scale_by_sigma`.

    A network with `data.num_classes` also takes `classes`, one for each example, and has this number as its attribute
    `num_classes`.
    """

    @property
    def scale_by_sigma(self) -> bool: ...

    def lazy_init(self, rngs: Array, *args: Any) -> Any: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


IMAGE_NETWORKS: dict[str, Callable[[Config], ScoreNetwork]] = {
    "ncsnpp": ncsnpp_from_config,
    "ddpm": ddpm_from_config,
    "ncsn": ncsn_from_config,
    **dict.fromkeys(NCSNV2_NETWORKS, ncsnv2_from_config),
    "vdm": vdm_from_config,
}
"""The builders of networks for images, by config.model.name."""

POINT_NETWORKS: dict[str, Callable[[Config], ScoreNetwork]] = dict.fromkeys(MLPS, mlp_from_config)
"""The builders of networks for points, by config.model.name."""


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """A network and the SDE that it is trained under: turns parameters into a score function."""

    network: ScoreNetwork
    sde: SDE
    levels: int | None = None
    """The number of noise levels that the network was trained at; None for continuous time."""
    parameterization: str = "noise"
    """The quantity that the network predicts, one of `conditioning.PARAMETERIZATIONS`."""

    @property
    def conditioning(self) -> Conditioning:
        """The label by which the network receives the time, and the meaning of its output.

        Raises:
            ValueError: if the SDE has no discrete chain with this number of levels.
        """
        return conditioning(self.sde, self.network.scale_by_sigma, self.levels, self.parameterization)

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
    classes: Int[Array, " batch"] | None = None
    """The class of each example, for networks with `data.num_classes`; None: the score of all classes together."""

    def __call__(self, x: Batch, t: PerExample) -> Batch:
        conditioning = self.model.conditioning
        output = self._output(conditioning.network_input(x, t), conditioning.labels(t))
        return conditioning.score(output, x, t)

    def with_classes(self, classes: Int[Array, " batch"] | None) -> "NetworkScore":
        """Returns the score function of examples of these classes."""
        return dataclasses.replace(self, classes=classes)

    def _output(self, x: Batch, labels: PerExample) -> Batch:
        train = self.dropout_key is not None
        rngs = {"dropout": self.dropout_key} if train else None
        classes = {} if self.classes is None else {"classes": self.classes}
        return self.model.network.apply({"params": self.params}, x, labels, train, **classes, rngs=rngs)


def score_model_from_config(config: Config) -> ScoreModel:
    """The SDE that config.training names, with the network that config.model describes.

    Raises:
        ValueError: if a name is unknown, or a field has a value that is not allowed.
    """
    sde = sde_from_config(config)  # An unknown SDE is reported before a network that does not fit the SDE.
    levels = None if config.training.continuous else config.model.num_scales
    network = build_network(config)
    _check_scale_by_sigma(network, config.model)
    model = ScoreModel(network, sde, levels, config.model.parameterization)
    _ = model.conditioning  # raises ValueError
    return model


def _check_scale_by_sigma(network: ScoreNetwork, model: Config) -> None:
    """Raises ValueError if the network does not say whether it divides by sigma, or says other than the configuration.

    The labels and the meaning of the output follow from the network, but `training.sde` and checkpoints are checked
    against the configuration.
    """
    if not hasattr(network, "scale_by_sigma"):
        raise ValueError(
            f"{type(network).__name__}, the network of model.name={model.name!r}, has no attribute scale_by_sigma: add "
            "it, True if the network receives sigma and divides its output by it, otherwise False"
        )
    with unrecorded(model):  # the network decides whether the field has an effect
        wanted = model.scale_by_sigma
    if network.scale_by_sigma != wanted:
        raise ValueError(
            f"model.scale_by_sigma is {wanted}, but the network of model.name={model.name!r} has scale_by_sigma="
            f"{network.scale_by_sigma}: set the field to {network.scale_by_sigma}"
        )


def build_network(config: Config) -> ScoreNetwork:
    """The network that config.model describes.

    Raises:
        ValueError: if model.name is unknown, or a field has a value that is not allowed.
    """
    networks = IMAGE_NETWORKS | POINT_NETWORKS
    if config.model.name not in networks:
        raise ValueError(f"model.name is {config.model.name!r}; known: {', '.join(networks)}")
    return networks[config.model.name](config)
