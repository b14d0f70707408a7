"""NCSNv2 ([SE20]): a RefineNet for the scores of all noise levels, whose output is divided by sigma."""

from typing import ClassVar, NamedTuple

import flax.linen as nn

from arrays import PerExample, append_dims
from configs.default import Config
from models.ladder import Ladder, ladder_from_fields
from models.layers import NONLINEARITIES
from models.normalization import NORMALIZATIONS, check_normalization
from models.refinenet import INTERPOLATIONS, Normalize, RefineBlock, ResidualBlock, conv, keep
from models.resample import AnySize, FeatureMap


class Plan(NamedTuple):
    """The stages of a network, from the image inwards. Channels are multiples of `nf`."""

    channels: tuple[int, ...]  # channels of the residual blocks
    dilations: tuple[int, ...]  # dilations of the residual blocks; stages with 1 halve the resolution, except the first
    refined: tuple[int, ...]  # channels of the RefineNet block that joins the stage with the stages further inwards

    @property
    def halvings(self) -> int:
        """How often the resolution is halved."""
        return self.dilations.count(1) - 1


class NCSNv2(nn.Module):
    """Maps noisy images and the number of their noise level to an image of the same shape.

    `labels` number the levels of the ladder, 0 for the largest noise. NCSNv2 uses them only with `scale_by_sigma`, to
    divide its output by sigma.

    Raises:
        ValueError: a field is out of its range, or the image cannot be halved as often as the network needs.
    """

    ladder: Ladder
    nf: int = 128
    nonlinearity: str = "elu"
    normalization: str = "InstanceNorm++"
    interpolation: str = "bilinear"  # how feature maps are upsampled
    scale_by_sigma: bool = True
    centered: bool = False  # images are in [-1, 1]; else in [0, 1], and mapped to [-1, 1] here

    plan: ClassVar[Plan] = Plan(channels=(1, 2, 2, 2), dilations=(1, 1, 2, 4), refined=(1, 2, 2, 2))
    residual_block: ClassVar[type[ResidualBlock]] = ResidualBlock
    refine_block: ClassVar[type[RefineBlock]] = RefineBlock

    def __post_init__(self) -> None:
        check_normalization(self.normalization, self.nf)
        for field, known in {"nonlinearity": NONLINEARITIES, "interpolation": INTERPOLATIONS}.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; known: {', '.join(known)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: FeatureMap, labels: PerExample, train: bool) -> FeatureMap:
        self._check_size(x)
        normalize = self._normalize(labels)
        h = conv(self.nf)(x if self.centered else 2 * x - 1)
        h = self._refine(self._down_path(h, normalize), labels)
        h = conv(x.shape[-1])(NONLINEARITIES[self.nonlinearity](normalize(h)))
        return h / append_dims(self.ladder.sigma(labels), h) if self.scale_by_sigma else h

    def _normalize(self, labels: PerExample) -> Normalize:
        return lambda x: NORMALIZATIONS[self.normalization]()(x)

    def _normalize_refined(self, labels: PerExample) -> Normalize:
        """Returns the normalisation inside RefineNet blocks: none."""
        return keep

    def _down_path(self, h: FeatureMap, normalize: Normalize) -> list[AnySize]:
        """Computes the feature maps of all stages, from the image inwards."""
        stages = []
        for number, (multiplier, dilation) in enumerate(zip(self.plan.channels, self.plan.dilations, strict=True)):
            for down in (number > 0, False):
                h = self.residual_block(
                    features=self.nf * multiplier,
                    nonlinearity=NONLINEARITIES[self.nonlinearity],
                    normalize=normalize,
                    dilation=dilation,
                    down=down,
                )(h)
            stages.append(h)
        return stages

    def _refine(self, stages: list[AnySize], labels: PerExample) -> AnySize:
        """Joins the stages, from the innermost to the image."""
        refined: list[AnySize] = []
        for number in reversed(range(len(stages))):
            block = self.refine_block(
                features=self.nf * self.plan.refined[number],
                nonlinearity=NONLINEARITIES[self.nonlinearity],
                normalize=self._normalize_refined(labels),
                interpolation=self.interpolation,
                last=number == 0,
            )
            refined = [block([stages[number], *refined])]
        return refined[0]

    def _check_size(self, x: FeatureMap) -> None:
        height, width, multiple = x.shape[1], x.shape[2], 2**self.plan.halvings
        if height % multiple or width % multiple:
            raise ValueError(f"images of {height}x{width} pixels: height and width must be multiples of {multiple}")


class NCSNv2_128(NCSNv2):
    """NCSNv2 for images of 128 pixels."""

    plan = Plan(channels=(1, 2, 2, 4, 4), dilations=(1, 1, 1, 2, 4), refined=(1, 1, 2, 2, 4))


class NCSNv2_256(NCSNv2):
    """NCSNv2 for images of 256 pixels."""

    plan = Plan(channels=(1, 2, 2, 2, 4, 4), dilations=(1, 1, 1, 1, 2, 4), refined=(1, 1, 2, 2, 2, 4))


NETWORKS: dict[str, type[NCSNv2]] = {"ncsnv2_64": NCSNv2, "ncsnv2_128": NCSNv2_128, "ncsnv2_256": NCSNv2_256}
"""The networks by config.model.name."""


def ncsnv2_from_fields(model: Config, centered: bool) -> NCSNv2:
    """Builds the network with the fields of config.model.

    Raises:
        ValueError: if a field has a value that is not allowed.
    """
    return refine_net_from_fields(NETWORKS[model.name], model, centered)


def refine_net_from_fields(network: type[NCSNv2], model: Config, centered: bool) -> NCSNv2:
    """Builds a network of this class with the fields of config.model. Raises ValueError for a dtype of 16 bits."""
    if model.dtype != "float32":
        raise ValueError(f"model.dtype is {model.dtype!r}; with model.name={model.name} it must be 'float32'")
    return network(
        ladder=ladder_from_fields(model),
        nf=model.nf,
        nonlinearity=model.nonlinearity,
        normalization=model.normalization,
        interpolation=model.interpolation,
        scale_by_sigma=model.scale_by_sigma,
        centered=centered,
    )


def ncsnv2_from_config(config: Config) -> NCSNv2:
    """Builds the network that config.model describes.

    Raises:
        ValueError: a field of config.model has a value that is not allowed, or training is not SMLD.
    """
    check_smld(config)
    return ncsnv2_from_fields(config.model, config.data.centered)


def check_smld(config: Config) -> None:
    """Raises ValueError unless training is in discrete time with the VE SDE, whose noise levels the labels number."""
    training, name = config.training, config.model.name
    if training.sde != "vesde" or training.continuous:
        raise ValueError(
            f"model.name is {name!r}, whose labels number noise levels of the VE SDE: set training.sde=vesde and "
            "training.continuous=False"
        )
