"""i-DODE on CIFAR-10 with straight paths from data to noise, alpha = 1 - sigma ([Z23]).

    python main.py --config=configs/idode/cifar10_sp.py --workdir=WORKDIR --mode=train

30.6M parameters. Published: FID 11.2, with importance sampling. Steps and hardware are published only for VP, and are
in the docstring of cifar10. Its variations apply here, too.
"""

from configs.default import Config
from configs.idode.cifar10 import get_config as cifar10


def get_config() -> Config:
    config = cifar10()
    config.training.sde = "straightpathsde"
    return config
