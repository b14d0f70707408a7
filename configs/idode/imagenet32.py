"""i-DODE on ImageNet 32x32, the old version of the data ([Z23]).

    python main.py --config=configs/idode/imagenet32.py --workdir=WORKDIR --mode=train

122.1M parameters. Published: 3.69 bits/dim with truncated normal noise (VDM [K21]: 3.72). Results on the new version
are not comparable. Steps, draws, hardware and training time behind the number were not checked.
"""

from configs.default import Config
from configs.idode.cifar10 import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.data.dataset = "ImageNet"
    config.data.variant = "old"
    config.model.nf = 256
    config.training.batch_size = 512
    config.training.n_iters = 2_000_000
    config.eval.batch_size = 512
    config.eval.enable_sampling = False
    return config
