"""DDPM++ with twice the residual blocks on ImageNet 32x32 with the sub-VP SDE.

    python main.py --config=configs/subvp/imagenet32_ddpmpp_deep_continuous.py --workdir=WORKDIR --mode=train

106.6M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.vp.imagenet32_ddpmpp_deep_continuous import get_config as vp


def get_config() -> Config:
    config = vp()
    config.training.sde = "subvpsde"
    config.training.smallest_time = 1e-2
    config.sampling.smallest_time = 1e-2
    return config
