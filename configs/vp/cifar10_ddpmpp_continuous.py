"""DDPM++ on CIFAR-10 with the VP SDE.

    python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:vp/cifar10_ddpmpp_continuous

61.8M parameters. Published, order 1: 3.16 bits/dim, FID 3.93 by the ODE, FID 2.55 by predictor-corrector ([S21a] Tables
2 and 3). With likelihood weighting, importance sampling and variational dequantization, the best published value is
2.83 bits/dim, without flips ([S21b]):

    --config.training.likelihood_weighting=True --config.training.importance_weighting=True \\
    --config.data.random_flip=False --config.eval.dequantizer=True

Hardware and training time are not published.
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()
    config.training.sde = "vpsde"
    config.training.batch_size = 48
    config.data.centered = True

    config.model.embedding_type = "positional"
    config.model.fir = False
    config.model.progressive_input = "none"
    config.model.scale_by_sigma = False
    config.model.ema_rate = 0.9999

    config.sampling.method = "ode"
    config.sampling.smallest_time = 1e-3
    config.eval.batch_size = 2000
    config.eval.begin_ckpt = 26
    config.eval.end_ckpt = 26
    config.eval.ckpt_id = 26
    config.eval.enable_sampling = True
    return config
