"""A small MLP (VE) on the checkerboard: 50,000 parameters, minutes on one CPU core.

    python main.py --config=configs/toy/checkerboard_ve.py --workdir=runs/board --mode=train
    python main.py --config=configs/toy/checkerboard_ve.py --workdir=runs/board --mode=eval

The higher orders go on from the first, TIMES, with the weights of [L22]:

    --config.training.score_matching_order=3 --config.training.init_from=runs/board --config.training.n_iters=40000

For the network and the batches of [L22], on a GPU, see `published_size`.
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
    config.eval.ode_solver = "rk4_log"
    config.eval.ode_steps = 50
    config.eval.probe = "exact"
    config.eval.enable_sampling = True
    config.eval.num_samples = 10_000
    return config
