"""NCSN++ with twice the residual blocks on ImageNet 32x32 with the VE SDE.

    python main.py --config=configs/ve/imagenet32_ncsnpp_deep_continuous.py --workdir=WORKDIR --mode=train

107.6M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.imagenet32_ncsnpp_continuous import get_config as imagenet32


def get_config() -> Config:
    config = imagenet32()
    config.model.num_res_blocks = 8
    return config
