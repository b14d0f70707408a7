"""DDPM++ on ImageNet 32x32 with the VP SDE.

    python main.py --config=configs/vp/imagenet32_ddpmpp_continuous.py --workdir=WORKDIR --mode=train

With likelihood weighting and importance sampling, the smallest time is 5e-5 unless training.smallest_time is set:

    --config.training.likelihood_weighting=True --config.training.importance_weighting=True

61.8M parameters. Published on the old version of the data: 3.76 bits/dim at best, with variational dequantization
([S21b]). Results on the new version are not comparable. Hardware and training time are not published.
"""

from configs.default import Config
from configs.vp.cifar10_ddpmpp_continuous import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.data.dataset = "ImageNet"
    config.data.variant = "old"
    config.data.random_flip = False
    config.model.dropout = 0.0
    config.training.n_iters = 1_400_001
    # A lazy reference follows flags on the command line, and can still be set there.
    training = config.training
    both = training.get_ref("likelihood_weighting") & training.get_ref("importance_weighting")
    training.smallest_time = 1e-5 + 4e-5 * both.to_float()
    config.eval.batch_size = 1024
    config.eval.num_repeats = 1
    config.eval.enable_sampling = False
    config.deq.name = "flowpp_imagenet32"
    config.eval.statistics_split = "test"  # as [S21b]
    return config
