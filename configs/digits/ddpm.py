"""DDPM on the digits of configs/digits/ncsnpp.py: the VP SDE in discrete time, with 200 noise levels.

    python main.py --config=configs/digits/ddpm.py --workdir=runs/digits_ddpm --mode=train
    python main.py --config=configs/digits/ddpm.py --workdir=runs/digits_ddpm --mode=eval

The network is a small DDPM++. Samples are drawn by ancestral sampling. Bits/dim solve the ODE with the model's score,
which is defined at all times. The solve starts at the time of the second level, because the model was not trained below
the noise of the first level.
"""

from configs.default import Config
from configs.digits.ncsnpp import get_config as digits


def get_config() -> Config:
    config = digits()
    config.training.sde = "vpsde"
    config.training.continuous = False
    config.training.smallest_time = 5e-3
    config.data.centered = True

    config.model.num_scales = 200
    config.model.embedding_type = "positional"
    config.model.scale_by_sigma = False
    config.model.fir = False
    config.model.progressive_input = "none"

    config.sampling.method = "pc"
    config.sampling.predictor = "ancestral_sampling"
    config.sampling.corrector = "none"
    config.sampling.smallest_time = 1e-3
    return config
