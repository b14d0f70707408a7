"""A small MLP (VE) on a Swiss roll, with exact higher orders: about 46,000 parameters.

    python main.py --config=configs/toy/swissroll_ve.py --workdir=runs/swissroll1 --mode=train
    python main.py --config=configs/toy/swissroll_ve.py --workdir=runs/swissroll1 --mode=eval

Training takes as long as in configs/toy/checkerboard_ve.py. The density of the data is known, so the results include
the model's KL divergence from it.
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.dataset = "swissroll"
    return config
