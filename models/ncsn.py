"""NCSN ([SE19] App. A): a RefineNet whose normalisation depends on the noise level."""

from arrays import PerExample
from configs.default import Config
from models.ncsnv2 import NCSNv2, check_smld, refine_net_from_fields
from models.normalization import ConditionalInstanceNorm2dPlus
from models.refinenet import ConditionalResidualBlock, CondRefineBlock, Normalize


class NCSN(NCSNv2):
    """Maps noisy images and the number of their noise level to an image of the same shape.

    It has the fields of `NCSNv2`, but all normalisations are InstanceNorm++ with factors for each noise level.

    Raises:
        ValueError: a field is out of its range, or the height or width of the images is odd.
    """

    scale_by_sigma: bool = False

    residual_block = ConditionalResidualBlock
    refine_block = CondRefineBlock

    def __post_init__(self) -> None:
        if self.normalization != "InstanceNorm++":
            raise ValueError(f"normalization is {self.normalization!r}; for NCSN it must be 'InstanceNorm++'")
        super().__post_init__()

    def _normalize(self, labels: PerExample) -> Normalize:
        return lambda x: ConditionalInstanceNorm2dPlus(self.ladder.levels)(x, labels)

    def _normalize_refined(self, labels: PerExample) -> Normalize:
        return self._normalize(labels)


def ncsn_from_fields(model: Config, centered: bool) -> NCSNv2:
    """Builds the network with the fields of config.model.

    Raises:
        ValueError: if a field has a value that is not allowed.
    """
    return refine_net_from_fields(NCSN, model, centered)


def ncsn_from_config(config: Config) -> NCSNv2:
    """Builds the network that config.model describes.

    Raises:
        ValueError: a field of config.model has a value that is not allowed, or training is not SMLD.
    """
    check_smld(config)
    return ncsn_from_fields(config.model, config.data.centered)
