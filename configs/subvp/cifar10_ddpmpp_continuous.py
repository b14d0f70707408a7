"""DDPM++ on CIFAR-10 with the sub-VP SDE.

    python main.py --config=configs/subvp/cifar10_ddpmpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:subvp/cifar10_ddpmpp_continuous

61.8M parameters. Published, order 1: 3.02 bits/dim, FID 3.16 by the ODE, FID 2.61 by predictor-corrector ([S21a] Tables
2 and 3). The 3.02 bits/dim need a smallest time of 1e-5 (--config.training.smallest_time=1e-5). Hardware and
training time are not published.
"""

from configs.default import Config
from configs.vp.cifar10_ddpmpp_continuous import get_config as vp


def get_config() -> Config:
    config = vp()
    config.training.sde = "subvpsde"
    config.training.smallest_time = 1e-2
    config.sampling.smallest_time = 1e-2
    return config
