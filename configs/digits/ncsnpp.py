"""NCSN++ (VE) on scikit-learn's handwritten digits: 1797 real 8x8 images with 17 grey levels, no download.

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train
    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=eval

With learned dequantization instead of uniform dequantization:

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train_deq
    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=eval --eval_folder=eval_deq \
        --config.eval.dequantizer=True

189,969 parameters. Order 1 after 4000 steps: 2.058 +- 0.013 bits/dim on the 359 test images, with uniform
dequantization (commit ea1a279). `make demo` trains and evaluates this model and a third-order model that continues from
it; see docs/results/demo.md.
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()

    config.data.dataset = "digits"
    config.data.image_size = 8
    config.data.num_channels = 1
    config.data.levels = 17
    config.data.random_flip = False
    config.data.uniform_dequantization = True

    config.model.sigma_max = 50.0
    config.model.dropout = 0.0
    config.model.nf = 16
    config.model.ch_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attn_resolutions = (4,)

    config.optim.lr = 1e-3
    config.optim.warmup = 200

    config.training.batch_size = 64
    config.training.n_iters = 4000
    config.training.n_jitted_steps = 5  # on a CPU, a call spends 6 to 15 % of a step on memory and on the host
    config.training.eval_freq = 200
    config.training.eval_batches = 6
    config.training.snapshot_freq = 2000
    config.training.snapshot_freq_for_preemption = 2000  # a checkpoint takes as long as 20 steps
    config.training.snapshot_sampling = False

    config.sampling.method = "dpm_solver"
    config.sampling.eta = 1.0
    config.sampling.max_nfe = 20

    config.eval.batch_size = 120
    config.eval.enable_sampling = True
    config.eval.num_samples = 512
    config.eval.num_repeats = 1
    config.eval.ode_solver = "adams_log"
    config.eval.ode_steps = 48
    config.eval.num_probes = 2
    config.eval.features = "classifier"
    config.eval.inception_splits = 10
    config.eval.rounding = "nearest"

    config.deq.filters = 32
    config.deq.components = 8
    config.deq.blocks = 1
    config.deq.attn_heads = 2
    config.deq.n_iters = 2000
    return config
