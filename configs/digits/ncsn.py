"""NCSN++ (VE) on scikit-learn's handwritten digits, sampled by annealed Langevin dynamics like NCSN.

    python main.py --config=configs/digits/ncsn.py --workdir=runs/ncsn --mode=train
    python main.py --config=configs/digits/ncsn.py --workdir=runs/ncsn --mode=eval

The network is conditioned on sigma, and is trained at all noise levels between the largest and the smallest. So one
model is enough for all ladders of levels. The largest is about the largest distance between two training images, and
the step size is 0.2 times the square of the smallest level of the ladder, as in [SE20] Sec. 3.1 and [SE19] Sec. 5.

`make ncsn` compares ladders of about 200 steps. The best ladder ends at sigma = 0.3, where the last step removes the
noise.
"""

import math

from configs.default import Config
from configs.digits.ncsnpp import get_config as digits


def get_config() -> Config:
    config = digits()

    config.model.sigma_max = 5.0

    config.sampling.method = "annealed_langevin"
    config.sampling.steps_per_level = 20
    last_level = 0.3
    config.sampling.step_size = 0.2 * last_level**2
    config.sampling.smallest_time = math.log(last_level / config.model.sigma_min) / math.log(
        config.model.sigma_max / config.model.sigma_min
    )
    return config
