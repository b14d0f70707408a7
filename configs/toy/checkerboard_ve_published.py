"""The network, batches and steps of [L22] on the 2-D checkerboard (VE): 470,000 parameters, for a GPU.

    python main.py --config=configs/toy/checkerboard_ve_published.py --workdir=runs/board1 --mode=train
    python main.py --config=configs/toy/checkerboard_ve_published.py --workdir=runs/board1 --mode=eval

Each order is trained from scratch, as in the paper:

    python main.py --config=configs/toy/checkerboard_ve_published.py --workdir=runs/board3 --mode=train \\
        --config.training.score_matching_order=3

docs/results/synthetic.md has results of this network with smaller widths and batches.
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as small


def get_config() -> Config:
    config = small()

    config.model.name = "mlp_published"
    config.model.scale_by_sigma = False
    config.model.mlp_time_widths = (128, 128, 128)
    config.model.mlp_data_widths = (128, 128, 128)
    config.model.mlp_widths = (512, 512)

    config.training.batch_size = 5000
    config.training.n_iters = 50_000
    return config
