"""A small MLP (VP) on the mixture in one dimension, with exact higher orders: about 46,000 parameters.

    python main.py --config=configs/toy/mixture_vp.py --workdir=runs/mixture1 --mode=train
    python main.py --config=configs/toy/mixture_vp.py --workdir=runs/mixture1 --mode=eval

The network receives the noisy points without scaling. A perfect model has an NLL of -0.129 nats.
"""

from configs.default import Config
from configs.toy.mixture_ve import get_config as mixture_ve


def get_config() -> Config:
    config = mixture_ve()

    config.training.sde = "vpsde"
    config.model.scale_by_sigma = False
    config.sampling.smallest_time = 1e-3
    return config
