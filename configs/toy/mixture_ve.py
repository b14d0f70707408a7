"""A small MLP (VE) on the mixture in one dimension, with exact higher orders: about 46,000 parameters.

    python main.py --config=configs/toy/mixture_ve.py --workdir=runs/mixture1 --mode=train
    python main.py --config=configs/toy/mixture_ve.py --workdir=runs/mixture1 --mode=eval

A perfect model has an NLL of -0.129 nats.
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.dataset = "mixture"
    return config
