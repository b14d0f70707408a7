"""NCSN++ on CIFAR-10 with the sub-VP SDE, from score_sde ([S21a]).

    python main.py --config=configs/subvp/cifar10_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:subvp/cifar10_ncsnpp_continuous

62.7M parameters. Samples are drawn by predictor-corrector with the Euler-Maruyama predictor and no corrector, as
published. Hardware and training time are not published.
"""

from configs.default import Config
from configs.vp.cifar10_ncsnpp_continuous import get_config as vp


def get_config() -> Config:
    config = vp()
    config.training.sde = "subvpsde"
    return config
