"""i-DODE on ImageNet 32x32, the new version of the data ([Z23]).

    python main.py --config=configs/idode/imagenet32_new.py --workdir=WORKDIR --mode=train

122.1M parameters. Published: 3.43 bits/dim with truncated normal noise, after 2M steps and 250,000 steps of fine-tuning
with batches of 128 on 8 NVIDIA A40 (README of the released code). Results on the old version are not comparable. The
training time is not published. Fine-tuning works as in the docstring of imagenet32, with
--config.training.n_iters_from_start=250000.
"""

from configs.default import Config
from configs.idode.imagenet32 import get_config as imagenet32


def get_config() -> Config:
    config = imagenet32()
    config.data.variant = "new"
    config.training.batch_size = 128
    return config
