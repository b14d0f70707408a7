"""NCSN++ with skip pyramids on FFHQ at 256x256 with the VE SDE, from score_sde ([S21a]).

    python main.py --config=configs/ve/ffhq_256_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/ffhq_256_ncsnpp_continuous

data.path must name its .tfrecords file of this size, ffhq-r08.tfrecords, or a folder of its images.
65.6M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.celebahq_256_ncsnpp_continuous import get_config as celebahq_256


def get_config() -> Config:
    config = celebahq_256()
    config.data.dataset = "FFHQ"
    return config
