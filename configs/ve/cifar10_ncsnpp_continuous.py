"""NCSN++ on CIFAR-10 with the VE SDE.

    python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=WORKDIR --mode=train

With the values of score_sde instead: --config=configs/score_sde.py:ve/cifar10_ncsnpp_continuous

[L22] continues a first-order model for 100,000 steps, with order 2 at batch size 128 or with order 3 at batch size 48:

    --config.training.score_matching_order=3 --config.training.init_from=FIRST_ORDER_CHECKPOINT \\
        --config.training.n_iters_from_start=100000

62.8M parameters. Published results of order 1: FID 2.38 by predictor-corrector ([S21a]), for which add
--config.sampling.method=pc. Order 2: 3.44 bits/dim and FID 2.37; order 3: 3.38 bits/dim and FID 2.95 ([L22]).
Published cost at batch size 48 on 8 RTX 2080 Ti ([L22]): a step of order 1, 2, 3 takes 0.28, 0.33, 0.44 s and 26, 29,
49 GiB of memory in total. At that rate, 100,000 steps of order 3 take 12 hours.
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()
    config.training.batch_size = 48
    config.sampling.method = "ode"
    config.eval.batch_size = 2000
    config.eval.begin_ckpt = 26
    config.eval.end_ckpt = 26
    config.eval.ckpt_id = 26
    config.eval.enable_sampling = True
    return config
