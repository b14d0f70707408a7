"""A small MLP (VE) on two modes far from each other, for Langevin dynamics: about 46,000 parameters.

    python main.py --config=configs/toy/far_modes_ve.py --workdir=runs/far_modes --mode=train
    python main.py --config=configs/toy/far_modes_ve.py --workdir=runs/far_modes --mode=eval

The largest noise level exceeds the distance between the modes. The step size is 0.2 times the square of the smallest
noise level, as in [SE19] Sec. 5. `make ncsn` compares samples with and without annealing.
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.dataset = "far_modes"
    config.data.num_points = 100_000

    config.model.sigma_min = 0.5
    config.model.sigma_max = 20.0

    config.training.n_iters = 4000
    config.training.snapshot_freq = 4000

    config.sampling.method = "annealed_langevin"
    config.sampling.step_size = 0.05
    return config
