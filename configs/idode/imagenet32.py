"""i-DODE on ImageNet 32x32, the old version of the data ([Z23]).

    python main.py --config=configs/idode/imagenet32.py --workdir=WORKDIR --mode=train

122.1M parameters. Published: 3.69 bits/dim with truncated normal noise (VDM [K21]: 3.72), after 2M steps with batches
of 512 and 500,000 steps of fine-tuning on 8 NVIDIA A100 (README of the released code). Each of the latter steps
computes a quarter of a batch of 512, so here they are 125,000 steps. Results on the new version are not comparable. The
training time is not published. Fine-tuning with the second order:

    python main.py --config=configs/idode/imagenet32.py --workdir=FINE_TUNED --mode=train \\
        --config.training.score_matching_order=2 --config.training.init_from=WORKDIR \\
        --config.training.n_iters_from_start=125000 --config.training.accumulation_steps=4
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
