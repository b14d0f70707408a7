"""NCSN++ with twice the residual blocks on CIFAR-10 with the VE SDE.

    python main.py --config=configs/ve/cifar10_ncsnpp_deep_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/cifar10_ncsnpp_deep_continuous

107.6M parameters. Published, order 1: FID 2.20 and Inception Score 9.89 by predictor-corrector ([S21a] Table 3).
Bits/dim, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.cifar10_ncsnpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.model.num_res_blocks = 8
    config.sampling.method = "pc"
    return config
