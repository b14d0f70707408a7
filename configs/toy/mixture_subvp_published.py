"""The network, batches and steps of [L22] on the mixture in one dimension (sub-VP): 470,000 parameters, for a GPU.

    python main.py --config=configs/toy/mixture_subvp_published.py --workdir=runs/mixture1 --mode=train
    python main.py --config=configs/toy/mixture_subvp_published.py --workdir=runs/mixture1 --mode=eval

Each order is trained from scratch, as in the paper, with --config.training.score_matching_order=3 for the third.
docs/results/synthetic.md has results of this network with smaller widths and batches.
"""

from configs.default import Config
from configs.toy.checkerboard_ve_published import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.dataset = "mixture"

    config.training.sde = "subvpsde"
    config.sampling.smallest_time = 1e-3
    return config
