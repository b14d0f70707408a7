"""NCSN++ with skip pyramids on FFHQ at 1024x1024 with the VE SDE, from score_sde ([S21a]).

    python main.py --config=configs/ve/ffhq_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/ffhq_ncsnpp_continuous

data.path must name its .tfrecords file of this size, ffhq-r10.tfrecords, or a folder of its images.
105.8M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.ffhq_256_ncsnpp_continuous import get_config as ffhq_256


def get_config() -> Config:
    config = ffhq_256()
    config.data.image_size = 1024

    config.model.sigma_max = 1348.0
    config.model.nf = 16
    config.model.ch_mult = (1, 2, 4, 8, 16, 32, 32, 32)
    config.model.num_res_blocks = 1
    config.model.ema_rate = 0.9999

    config.training.batch_size = 8
    config.training.reduce_mean = True

    config.sampling.snr = 0.15
    config.sampling.batch_size = 8
    config.eval.batch_size = 8
    return config
