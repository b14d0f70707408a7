"""SMLD on the digits of configs/digits/ncsnpp.py: the VE SDE in discrete time, with 200 noise levels.

    python main.py --config=configs/digits/smld.py --workdir=runs/digits_smld --mode=train
    python main.py --config=configs/digits/smld.py --workdir=runs/digits_smld --mode=eval

The network is the same as in configs/digits/ncsnpp.py, but it is conditioned on the number of the noise level. Samples
are drawn by predictor-corrector. Bits/dim solve the ODE whose score at any time is the model's score at the nearest
level.
"""

from configs.default import Config
from configs.digits.ncsnpp import get_config as digits


def get_config() -> Config:
    config = digits()
    config.training.continuous = False

    config.model.num_scales = 200
    config.model.embedding_type = "positional"

    config.sampling.method = "pc"
    config.sampling.predictor = "reverse_diffusion"
    config.sampling.corrector = "langevin"
    return config
