"""NCSN++ with twice the residual blocks on CIFAR-10 with the sub-VP SDE, from score_sde ([S21a]).

    python main.py --config=configs/subvp/cifar10_ncsnpp_deep_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:subvp/cifar10_ncsnpp_deep_continuous

107.5M parameters. Samples are drawn by predictor-corrector with the Euler-Maruyama predictor and no corrector, as
published. Hardware and training time are not published.
"""

from configs.default import Config
from configs.subvp.cifar10_ncsnpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.model.num_res_blocks = 8
    config.training.n_iters = 950_001
    config.eval.begin_ckpt = 19
    config.eval.end_ckpt = 19
    config.eval.ckpt_id = 19
    return config
