"""NCSN++ with skip pyramids on LSUN church_outdoor at 256x256 with the VE SDE.

    python main.py --config=configs/ve/church_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/church_ncsnpp_continuous

65.6M parameters. Bits/dim, FID, hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.cifar10_ncsnpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.data.dataset = "LSUN"
    config.data.category = "church_outdoor"
    config.data.image_size = 256

    config.model.sigma_max = 380.0
    config.model.num_scales = 2000
    config.model.ch_mult = (1, 1, 2, 2, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.progressive = "output_skip"
    config.model.progressive_input = "input_skip"
    config.model.dropout = 0.0

    config.training.batch_size = 50
    config.training.n_iters = 3_400_001
    config.training.snapshot_freq_for_preemption = 5000

    config.sampling.method = "pc"
    config.sampling.snr = 0.075
    config.eval.batch_size = 100
    config.eval.begin_ckpt = 52
    config.eval.end_ckpt = 52
    config.eval.enable_sampling = False
    return config
