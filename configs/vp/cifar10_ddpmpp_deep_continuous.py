"""DDPM++ with twice the residual blocks on CIFAR-10 with the VP SDE.

    python main.py --config=configs/vp/cifar10_ddpmpp_deep_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:vp/cifar10_ddpmpp_deep_continuous

106.6M parameters. Published, order 1: 3.13 bits/dim, FID 3.08 by the ODE, FID 2.41 by predictor-corrector ([S21a]
Tables 2 and 3). Hardware and training time are not published.
"""

from configs.default import Config
from configs.vp.cifar10_ddpmpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.model.num_res_blocks = 8
    config.training.n_iters = 2_050_001
    config.eval.begin_ckpt = 19
    config.eval.end_ckpt = 19
    config.eval.ckpt_id = 19
    return config
