"""A small MLP (VE) on the mixture in one dimension, with exact higher orders: about 46,000 parameters.

    python main.py --config=configs/toy/mixture_ve.py --workdir=runs/mixture1 --mode=train
    python main.py --config=configs/toy/mixture_ve.py --workdir=runs/mixture1 --mode=eval

On one CPU core a step of order 1, 2, 3 takes about 3, 5 and 10 ms, so 20,000 steps take 1 to 3 minutes. A perfect model
has an NLL of -0.129 nats.
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.dataset = "mixture"
    return config
