"""The network of DDPM ([H20] App. B), as [S21a] trains it."""

from collections.abc import Callable

from configs.default import Config
from models.ladder import Ladder, ladder_from_config
from models.layers import NONLINEARITIES, AttnBlockpp, Embedding, Normalization, ResnetBlockDDPMpp, conv
from models.ncsnpp import NCSNpp, apply_with_remat, check_scale_by_sigma, u_net_fields
from models.normalization import NORMALIZATIONS, check_normalization
from models.resample import AnySize, FeatureMap, Projected, SameSize, Taps


class ResnetBlockDDPM(ResnetBlockDDPMpp):
    """The residual block, under the published name of its parameters."""


class AttnBlock(AttnBlockpp):
    """Self-attention between all pixels, under the published name of its parameters."""


class DDPM(NCSNpp):
    """The U-Net of `NCSNpp` with DDPM's blocks, under their published names, and a choice of normalisation.

    Labels are embedded by sines and cosines, and resampling has no filter.

    Raises:
        ValueError: a field is out of its range. Group normalisation has 32 groups, so `nf` must be a multiple of 32.
    """

    num_res_blocks: int = 2
    resblock_type: str = "ddpm"
    skip_rescale: bool = False
    normalization: str = "GroupNorm"

    def __post_init__(self) -> None:
        check_normalization(self.normalization, self.nf)
        if self.dtype != "float32" and self.normalization != "GroupNorm":
            raise ValueError(f"dtype is {self.dtype!r}, but normalization {self.normalization!r} needs 'float32'")
        super().__post_init__()

    @property
    def _normalize(self) -> Normalization:
        return NORMALIZATIONS[self.normalization]

    def _block(
        self,
        *maps: SameSize,
        embedding: Embedding | None,
        train: bool,
        features: int | None = None,
        resample: Callable[[FeatureMap, Taps | None], AnySize] | None = None,  # not used: blocks keep the resolution
    ) -> AnySize:
        block = ResnetBlockDDPM(
            nonlinearity=NONLINEARITIES[self.nonlinearity],
            dropout=self.dropout,
            init_scale=self.init_scale,
            skip_rescale=self.skip_rescale,
            features=features,
            normalize=self._normalize,
        )
        return apply_with_remat(self.remat, block, maps, embedding, train)

    def _attention(self, h: FeatureMap) -> FeatureMap:
        return apply_with_remat(self.remat, AttnBlock(self.init_scale, self.skip_rescale, self._normalize), (h,))

    def _head(self, h: FeatureMap, features: int, init_scale: float) -> Projected:
        return conv(features, init_scale=init_scale)(self._act(self._normalize()(h)))


def ddpm_from_fields(model: Config, centered: bool, ladder: Ladder | None = None) -> DDPM:
    """Builds the network with the fields of config.model. Labels number the levels of `ladder`.

    As in the published code, model.embedding_type has no effect.
    """
    return DDPM(**u_net_fields(model, centered, ladder), normalization=model.normalization)


def ddpm_from_config(config: Config) -> DDPM:
    """Builds the network that config.model describes, for the SDE of config.training.

    Raises:
        ValueError: a field of config.model has a value that is not allowed.
    """
    check_scale_by_sigma(config)
    if config.model.scale_by_sigma and config.training.continuous:
        raise ValueError(
            "model.name is 'ddpm' with model.scale_by_sigma=True, which divides by the sigma of a noise level: set "
            "training.continuous=False"
        )
    return ddpm_from_fields(config.model, config.data.centered, ladder_from_config(config))
