"""i-DODE on ImageNet 32x32, the new version of the data ([Z23]).

    python main.py --config=configs/idode/imagenet32_new.py --workdir=WORKDIR --mode=train

122.1M parameters. Published: 3.43 bits/dim with truncated normal noise. Results on the old version are not
comparable. Steps, draws, hardware and training time behind the number were not checked.
"""

from configs.default import Config
from configs.idode.imagenet32 import get_config as imagenet32


def get_config() -> Config:
    config = imagenet32()
    config.data.variant = "new"
    config.training.batch_size = 128
    return config
