"""i-DODE's training of the demo's network on scikit-learn's digits: velocities, VP with linear gamma ([Z23]).

    python main.py --config=configs/idode/digits.py --workdir=runs/idode --mode=train
    python main.py --config=configs/idode/digits.py --workdir=runs/idode --mode=eval

The network is the same as in configs/digits/ncsnpp.py. The SDE, the quantity that the network predicts, and the loss
differ. After 4000 steps in 351 s on two shared CPU cores (commit 6df5907, 359 test images): 2.079 +- 0.015 bits/dim
with truncated normal noise, and 1.862 +- 0.013 if it starts later, with --config.eval.start_time=0.118. See
docs/results/idode.md.
"""

from configs.default import Config
from configs.digits.ncsnpp import get_config as digits


def get_config() -> Config:
    config = digits()

    config.data.centered = True
    config.data.uniform_dequantization = False
    config.data.bin_centers = True

    config.model.embedding_type = "positional"
    config.model.scale_by_sigma = False
    config.model.parameterization = "velocity"
    config.model.gamma_min = -7.9  # The noise is a third of half a bin wide, as for 256 levels.
    config.model.gamma_max = 5.0

    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.01
    config.optim.decay_biases = False

    config.training.sde = "lineargammavpsde"
    config.training.smallest_time = 1e-9  # In float32, gamma at this time is gamma_min.
    config.training.likelihood_weighting = True
    config.training.importance_weighting = True
    config.training.importance_density = "velocity"
    config.training.stratified_times = True
    config.training.bits_per_dim = True
    config.training.second_order_weight = 0.1
    config.training.high_order_estimator = "unbiased_trace"
    config.training.high_order_weighting = "first_order"

    config.eval.dequantization = "truncated_normal"
    config.eval.truncation = 4.0  # At gamma_min, tau is smaller, so the noise starts at gamma_min.
    return config
