"""DDPM++ with twice the residual blocks on ImageNet 32x32 with the VP SDE.

    python main.py --config=configs/vp/imagenet32_ddpmpp_deep_continuous.py --workdir=WORKDIR --mode=train

106.6M parameters. The smallest time follows the weighting, as in imagenet32_ddpmpp_continuous. Bits/dim, FID, hardware
and training time are not published.
"""

from configs.default import Config
from configs.vp.imagenet32_ddpmpp_continuous import get_config as imagenet32


def get_config() -> Config:
    config = imagenet32()
    config.model.num_res_blocks = 8
    config.training.n_iters = 950_001
    config.eval.begin_ckpt = 19
    config.eval.end_ckpt = 19
    config.eval.ckpt_id = 19
    return config
