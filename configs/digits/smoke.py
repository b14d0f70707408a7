"""The smallest network on digits: trains in seconds, to check that everything works.

python main.py --config=configs/digits/smoke.py --workdir=runs/smoke --mode=train
python main.py --config=configs/digits/smoke.py --workdir=runs/smoke --mode=eval
"""

from configs.default import Config
from configs.digits.ncsnpp import get_config as digits


def get_config() -> Config:
    config = digits()

    config.model.nf = 8
    config.model.ch_mult = (1,)
    config.model.attn_resolutions = ()
    config.model.fir = False
    config.model.progressive_input = "none"

    config.optim.warmup = 10

    config.training.batch_size = 16
    config.training.n_iters = 60
    config.training.n_jitted_steps = 1  # as for networks for which a call takes long
    config.training.log_freq = 10
    config.training.eval_freq = 20
    config.training.snapshot_freq = 40
    config.training.snapshot_freq_for_preemption = 20

    config.sampling.method = "pc"
    config.sampling.num_steps = 10
    config.sampling.batch_size = 32

    config.eval.batch_size = 32
    config.eval.max_examples = 48
    config.eval.num_samples = 48
    config.eval.ode_steps = 8

    config.deq.filters = 8
    config.deq.components = 2
    config.deq.blocks = 1
    config.deq.n_iters = 12
    return config
