"""A small MLP (VE) on the 2-D checkerboard, with exact higher orders: about 46,000 parameters.

    python main.py --config=configs/toy/checkerboard_ve.py --workdir=runs/board1 --mode=train
    python main.py --config=configs/toy/checkerboard_ve.py --workdir=runs/board1 --mode=eval

Orders 2 and 3 need one more flag:

    python main.py --config=configs/toy/checkerboard_ve.py --workdir=runs/board3 --mode=train \
        --config.training.score_matching_order=3

docs/data.md has the time of a step of each order. To continue from a first-order run, add
--config.training.init_from=runs/board1 and increase training.n_iters. configs/toy/checkerboard_ve_published.py has the
network and the batch size of [L22]. A perfect model has an NLL of ln 32 = 3.466 nats.
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()

    config.data.dataset = "checkerboard"
    config.data.random_flip = False

    config.model.name = "mlp"
    config.model.mlp_time_widths = (64, 64)
    config.model.mlp_data_widths = (64, 64)
    config.model.mlp_widths = (128, 128)

    config.optim.lr = 1e-3
    config.optim.warmup = 200

    config.training.batch_size = 512
    config.training.n_iters = 20_000
    config.training.n_jitted_steps = 100
    config.training.exact_derivatives = True
    config.training.second_order_weight = 0.5
    config.training.third_order_weight = 0.1
    config.training.log_freq = 500
    config.training.eval_freq = 1000
    config.training.eval_batches = 10
    config.training.snapshot_freq = 10_000
    config.training.snapshot_freq_for_preemption = 2000
    config.training.snapshot_sampling = False

    config.sampling.method = "ode"
    config.sampling.batch_size = 10_000

    config.eval.batch_size = 2500
    config.eval.ode_solver = "adams_log"
    config.eval.ode_steps = 198
    config.eval.probe = "exact"
    config.eval.enable_sampling = True
    config.eval.num_samples = 10_000
    return config
