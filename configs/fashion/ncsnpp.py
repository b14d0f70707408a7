"""NCSN++ (VE) on FashionMNIST: 60,000 grey images of 28x28 pixels with 256 levels, without dequantization noise.

    python main.py --config=configs/fashion/ncsnpp.py --mode=prepare --config.data.archive=PATH
    python main.py --config=configs/fashion/ncsnpp.py --workdir=WORKDIR --mode=train

The experiment `make fashion-orders` continues from this model with each order of score matching. At this length of
training the model does not overfit. It is trained on levels without noise, like the published CIFAR-10 models.
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()

    config.data.dataset = "FashionMNIST"
    config.data.image_size = 28
    config.data.num_channels = 1
    config.data.random_flip = False

    config.model.dropout = 0.0
    config.model.nf = 16
    config.model.ch_mult = (1, 2, 2)
    config.model.num_res_blocks = 1
    config.model.attn_resolutions = (7,)
    config.model.ema_rate = 0.999

    config.optim.lr = 5e-4
    config.optim.warmup = 500

    config.training.batch_size = 32
    config.training.n_iters = 12_000
    config.training.eval_freq = 500
    config.training.eval_batches = 16
    config.training.snapshot_freq = 12_000
    config.training.snapshot_freq_for_preemption = 500
    config.training.snapshot_sampling = False

    config.sampling.method = "dpm_solver"
    config.sampling.eta = 1.0
    config.sampling.max_nfe = 50

    config.eval.batch_size = 64
    config.eval.max_examples = 256
    config.eval.num_samples = 2048
    config.eval.num_repeats = 1
    config.eval.ode_solver = "adams_log"
    config.eval.ode_steps = 98
    config.eval.num_probes = 2
    config.eval.bound_times = 100
    config.eval.features = "classifier"
    config.eval.inception_splits = 10
    return config
