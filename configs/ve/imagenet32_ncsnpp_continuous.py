"""NCSN++ on ImageNet 32x32 with the VE SDE.

    python main.py --config=configs/ve/imagenet32_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

62.8M parameters. Published on the old version of the data: 4.06 bits/dim for order 2, 4.04 for order 3 ([L22]). Results
on the new version are not comparable. Hardware and training time are not published.
"""

from configs.default import Config
from configs.ve.cifar10_ncsnpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.data.dataset = "ImageNet"
    config.data.variant = "old"
    config.data.random_flip = False
    config.model.dropout = 0.0
    config.training.n_iters = 1_400_001
    config.eval.batch_size = 1024
    config.eval.num_repeats = 1
    config.eval.enable_sampling = False
    config.deq.name = "flowpp_imagenet32"
    config.eval.statistics_split = "test"  # as [S21b]
    return config
