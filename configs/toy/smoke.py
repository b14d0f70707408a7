"""The smallest network on the checkerboard: trains in seconds, to check that everything works.

python main.py --config=configs/toy/smoke.py --workdir=runs/toy-smoke --mode=train
python main.py --config=configs/toy/smoke.py --workdir=runs/toy-smoke --mode=eval
"""

from configs.default import Config
from configs.toy.checkerboard_ve import get_config as checkerboard


def get_config() -> Config:
    config = checkerboard()

    config.data.num_points = 1000
    config.data.num_test_points = 100

    config.model.mlp_embedding = 8
    config.model.mlp_time_widths = (8,)
    config.model.mlp_data_widths = (8,)
    config.model.mlp_widths = (16,)
    config.model.ema_rate = 0.9

    config.optim.warmup = 10

    config.training.batch_size = 64
    config.training.n_iters = 60
    config.training.n_jitted_steps = 10
    config.training.log_freq = 20
    config.training.eval_freq = 20
    config.training.eval_batches = 1
    config.training.snapshot_freq = 40
    config.training.snapshot_freq_for_preemption = 20

    config.sampling.method = "heun"
    config.sampling.max_nfe = 9
    config.sampling.batch_size = 64

    config.eval.batch_size = 64
    config.eval.ode_steps = 8
    config.eval.density_grid = 8
    config.eval.num_samples = 100
    return config
