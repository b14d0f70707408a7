"""NCSN++ with skip pyramids on LSUN bedroom at 256x256 with the VE SDE, from score_sde ([S21a]).

    python main.py --config=configs/ve/bedroom_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/bedroom_ncsnpp_continuous

data.path must name a folder of its exported images, with folders train and test.
65.6M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.church_ncsnpp_continuous import get_config as church


def get_config() -> Config:
    config = church()
    config.data.category = "bedroom"
    config.model.sigma_max = 378.0

    config.training.batch_size = 64
    config.training.n_iters = 2_400_001
    config.training.reduce_mean = False

    config.eval.begin_ckpt = 1
    config.eval.end_ckpt = 0
    return config
