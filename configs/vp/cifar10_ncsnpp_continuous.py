"""NCSN++ on CIFAR-10 with the VP SDE, from score_sde ([S21a]).

    python main.py --config=configs/vp/cifar10_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:vp/cifar10_ncsnpp_continuous

62.7M parameters. Samples are drawn by predictor-corrector with the Euler-Maruyama predictor and no corrector, as
published. Hardware and training time are not published.
"""

from configs.default import Config
from configs.vp.cifar10_ddpmpp_continuous import get_config as ddpmpp


def get_config() -> Config:
    config = ddpmpp()
    config.training.batch_size = 128
    config.training.n_iters = 1_300_001

    config.model.fir = True
    config.model.progressive_input = "residual"

    config.sampling.method = "pc"
    config.sampling.predictor = "euler_maruyama"
    config.sampling.corrector = "none"
    return config
