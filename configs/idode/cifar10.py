"""i-DODE on CIFAR-10: the network of VDM, velocities, VP with linear gamma, importance sampling ([Z23]).

    python main.py --config=configs/idode/cifar10.py --workdir=WORKDIR --mode=train

30.6M parameters. Published: 2.56 bits/dim with truncated normal noise, without augmentation, after 6M steps and 200,000
steps of fine-tuning with batches of 128 on 8 NVIDIA A40 (README of the released code). Its configuration has one draw,
for which it averages five; from K > 1 draws it leaves out ln K / (d ln 2), which is 0.0014 bits/dim for K = 20. The
training time is not published. Without importance sampling:

    --config.training.importance_weighting=False

Fine-tuning with the second order, with one probe as published (high_order_estimator=unbiased_trace takes two):

    python main.py --config=configs/idode/cifar10.py --workdir=FINE_TUNED --mode=train \\
        --config.training.score_matching_order=2 --config.training.init_from=WORKDIR \\
        --config.training.n_iters_from_start=200000

To evaluate the fine-tuned model, use its workdir in place of WORKDIR below.

The first command computes bits/dim with uniform noise, starting at gamma = -11.8 from the noisy image itself. The
second one computes the variational bound:

    python main.py --config=configs/idode/cifar10.py --workdir=WORKDIR --mode=eval --eval_folder=eval_uniform \\
        --config.eval.dequantization=uniform --config.eval.start_time=0.0819672
    python main.py --config=configs/idode/cifar10.py --workdir=WORKDIR --mode=eval --eval_folder=eval_normal \\
        --config.eval.dequantization=normal
"""

from configs.default import Config
from configs.default import get_config as default


def get_config() -> Config:
    config = default()
    config.seed = 1

    config.data.centered = True
    config.data.random_flip = False
    config.data.bin_centers = True

    config.model.name = "vdm"
    config.model.nf = 128
    config.model.num_res_blocks = 32
    config.model.attn_resolutions = ()
    config.model.scale_by_sigma = False
    config.model.parameterization = "velocity"
    config.model.gamma_min = -13.3
    config.model.gamma_max = 5.0
    config.model.dropout = 0.1
    config.model.ema_rate = 0.9999

    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.01
    config.optim.decay_biases = False
    config.optim.warmup = 100
    config.optim.grad_clip = 0.0

    config.training.sde = "lineargammavpsde"
    config.training.smallest_time = 1e-9  # In float32, gamma at this time is gamma_min.
    config.training.batch_size = 128
    config.training.n_iters = 6_000_000
    config.training.likelihood_weighting = True
    config.training.importance_weighting = True
    config.training.importance_density = "velocity"
    config.training.stratified_times = True
    config.training.bits_per_dim = True
    config.training.second_order_weight = 0.1
    config.training.high_order_estimator = "squared_trace"
    config.training.high_order_weighting = "first_order"
    config.training.log_freq = 1000
    config.training.eval_freq = 10_000
    config.training.snapshot_freq_for_preemption = 10_000

    config.sampling.method = "ode"
    config.eval.batch_size = 256
    config.eval.dequantization = "truncated_normal"
    config.eval.truncation = 4.0  # At gamma_min, tau is only 3.02, so the noise starts at gamma_min.
    config.eval.enable_sampling = True
    return config
