"""The paper's network with smaller widths on the 2-D checkerboard (VE), for `make demo`: each order in minutes.

    python main.py --config=configs/toy/checkerboard_demo.py --workdir=runs/board1 --mode=train
    python main.py --config=configs/toy/checkerboard_demo.py --workdir=runs/board3 --mode=train \\
        --config.training.score_matching_order=3
    python main.py --config=configs/toy/checkerboard_demo.py --workdir=runs/board3 --mode=eval

A perfect model has an NLL of ln 32 = 3.466 nats.
"""

from configs.default import Config
from configs.toy.checkerboard_ve_published import get_config as published


def get_config() -> Config:
    config = published()

    config.model.mlp_time_widths = (64, 64, 64)
    config.model.mlp_data_widths = (64, 64, 64)
    config.model.mlp_widths = (128, 128)

    config.training.batch_size = 256
    config.training.n_iters = 4000
    config.training.snapshot_freq = 4000
    config.training.log_freq = 200

    config.data.num_test_points = 2000
    config.eval.batch_size = 2000
    config.eval.enable_sampling = False
    return config
