"""The 39 configurations of score_sde ([S21a]) with its own values, by name.

    python main.py --config=configs/score_sde.py:vp/ddpm/cifar10 --workdir=WORKDIR --mode=train

The name follows the colon. It is the path of the published file, without configs/ and .py. 16 of the names are also
files in configs/ve, configs/vp and configs/subvp: configs/ve/cifar10_ncsnpp_continuous.py has the values of the paper
[L22], and configs/score_sde.py:ve/cifar10_ncsnpp_continuous has score_sde's own values. The networks are the same. The
length and batch size of training, the sampler, and the results of an evaluation differ.

Two published files cannot run, and are corrected here: ve/ncsn/celeba names no SDE, and ve/ncsnv2/bedroom misspells
training.continuous, so that it would train in continuous time. The samples and FIDs that are published for these
configurations are in [S21a], [SE19] and [SE20]. Hardware and training times are not published.
"""

from typing import Any

from configs.default import Config
from configs.default import get_config as default

Differences = dict[str, Any]
"""Values of fields, by their full names."""

COMMON: Differences = {
    "training.log_freq": 50,
    "training.n_iters": 1_300_001,
    "training.n_jitted_steps": 5,
    "eval.begin_ckpt": 9,
    "eval.end_ckpt": 26,
    "eval.enable_bpd": False,
    "eval.enable_loss": True,
    "eval.inception_centre": 127.5,  # as in TF-GAN
}
"""Differences of every configuration from configs/default.py."""

DEEP: Differences = {"model.num_res_blocks": 8, "training.n_iters": 950_001}

DDPM: Differences = {"model.name": "ddpm", "model.num_res_blocks": 2, "model.embedding_type": "fourier"}

CELEBA: Differences = {
    "data.dataset": "CelebA",
    "data.image_size": 64,
    "eval.begin_ckpt": 1,
    "eval.enable_sampling": True,
}

LARGE: Differences = {
    "data.image_size": 256,
    "model.dropout": 0.0,
    "training.batch_size": 64,
    "training.n_iters": 2_400_001,
    "training.snapshot_freq_for_preemption": 5000,
    "sampling.snr": 0.075,
    "eval.batch_size": 512,
    "eval.begin_ckpt": 50,
    "eval.end_ckpt": 96,
    "eval.enable_sampling": True,
}
"""Training on images of 128 pixels and more."""

BEDROOM: Differences = {"data.dataset": "LSUN", "data.category": "bedroom"}

CHURCH: Differences = {"data.dataset": "LSUN", "data.category": "church_outdoor"}

SKIP_PYRAMIDS: Differences = {
    "model.sigma_max": 378.0,
    "model.num_scales": 2000,
    "model.ch_mult": (1, 1, 2, 2, 2, 2, 2),
    "model.num_res_blocks": 2,
    "model.progressive": "output_skip",
    "model.progressive_input": "input_skip",
}

PIXELS_1024: Differences = {
    "data.image_size": 1024,
    "model.sigma_max": 1348.0,
    "model.nf": 16,
    "model.ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
    "model.num_res_blocks": 1,
    "model.ema_rate": 0.9999,
    "training.batch_size": 8,
    "sampling.snr": 0.15,
    "eval.batch_size": 1024,
    "eval.begin_ckpt": 1,
}

NCSN: Differences = {
    "model.name": "ncsn",
    "model.sigma_max": 1.0,
    "model.num_scales": 10,
    "model.scale_by_sigma": False,
    "model.nonlinearity": "elu",
    "model.normalization": "InstanceNorm++",
    "model.ema_rate": 0.0,
    "optim.lr": 1e-3,
    "optim.warmup": 0,
    "optim.grad_clip": -1.0,
    "training.continuous": False,
    "training.reduce_mean": False,
    "sampling.predictor": "none",
    "sampling.corrector": "ald",
    "sampling.n_steps_each": 100,
    "sampling.snr": 0.316,
}

EMA: Differences = {"model.ema_rate": 0.999}

CIFAR10_LADDER: Differences = {
    "model.sigma_max": 50.0,
    "model.num_scales": 232,
    "sampling.n_steps_each": 5,
    "sampling.snr": 0.176,
}
"""The ladder and the sampler of [SE20] for CIFAR-10."""

CELEBA_LADDER: Differences = {
    "model.sigma_max": 90.0,
    "model.num_scales": 500,
    "sampling.n_steps_each": 5,
    "sampling.snr": 0.128,
}

NCSNV2: Differences = {"model.name": "ncsnv2_64", "model.scale_by_sigma": True, "optim.lr": 1e-4}

VP: Differences = {
    "data.centered": True,
    "model.embedding_type": "positional",
    "model.fir": False,
    "model.progressive_input": "none",
    "model.scale_by_sigma": False,
    "model.ema_rate": 0.9999,
    "training.sde": "vpsde",
    "sampling.predictor": "euler_maruyama",
    "sampling.corrector": "none",
    "sampling.smallest_time": 1e-3,
}

NCSNPP_OF_VP: Differences = {"model.fir": True, "model.progressive_input": "residual"}

SUBVP: Differences = {"training.sde": "subvpsde"}

DDPM_256: Differences = LARGE | {
    "model.sigma_max": 378.0,
    "model.ch_mult": (1, 1, 2, 2, 4, 4),
    "optim.lr": 2e-5,
}

ANCESTRAL: Differences = {"training.continuous": False, "sampling.predictor": "ancestral_sampling"}

CONFIGURATIONS: dict[str, tuple[str, Differences]] = {
    "ve/cifar10_ncsnpp_continuous": ("", {"training.reduce_mean": False}),
    "ve/cifar10_ncsnpp_deep_continuous": ("ve/cifar10_ncsnpp_continuous", DEEP),
    "ve/church_ncsnpp_continuous": (
        "ve/cifar10_ncsnpp_continuous",
        CHURCH | LARGE | SKIP_PYRAMIDS | {"model.sigma_max": 380.0},
    ),
    "ve/bedroom_ncsnpp_continuous": ("ve/cifar10_ncsnpp_continuous", BEDROOM | LARGE | SKIP_PYRAMIDS),
    "ve/celebahq_256_ncsnpp_continuous": (
        "ve/cifar10_ncsnpp_continuous",
        LARGE | SKIP_PYRAMIDS | {"data.dataset": "CelebAHQ", "model.sigma_max": 348.0},
    ),
    "ve/celebahq_ncsnpp_continuous": ("ve/celebahq_256_ncsnpp_continuous", PIXELS_1024),
    "ve/ffhq_256_ncsnpp_continuous": ("ve/celebahq_256_ncsnpp_continuous", {"data.dataset": "FFHQ"}),
    "ve/ffhq_ncsnpp_continuous": ("ve/ffhq_256_ncsnpp_continuous", PIXELS_1024 | {"training.reduce_mean": True}),
    "ve/cifar10_ncsnpp": (
        "ve/cifar10_ncsnpp_continuous",
        {"training.continuous": False, "model.embedding_type": "positional"},
    ),
    "ve/celeba_ncsnpp": ("ve/cifar10_ncsnpp", CELEBA | {"model.sigma_max": 90.0, "sampling.snr": 0.17}),
    "ve/cifar10_ddpm": ("ve/cifar10_ncsnpp", DDPM),
    # [SE19]; the numbers in a name say which techniques of [SE20] the configuration has
    "ve/ncsn/cifar10": ("", NCSN),
    "ve/ncsn/cifar10_5": ("ve/ncsn/cifar10", EMA),
    "ve/ncsn/cifar10_124": ("ve/ncsn/cifar10", CIFAR10_LADDER),
    "ve/ncsn/cifar10_1245": ("ve/ncsn/cifar10_124", EMA),
    "ve/ncsn/celeba": ("ve/ncsn/cifar10", CELEBA),
    "ve/ncsn/celeba_5": ("ve/ncsn/celeba", EMA),
    "ve/ncsn/celeba_124": ("ve/ncsn/celeba", CELEBA_LADDER),
    "ve/ncsn/celeba_1245": ("ve/ncsn/celeba_124", EMA),
    "ve/ncsnv2/cifar10": ("ve/ncsn/cifar10_1245", NCSNV2),
    "ve/ncsnv2/celeba": ("ve/ncsn/celeba_1245", NCSNV2),
    "ve/ncsnv2/bedroom": (
        "ve/ncsnv2/cifar10",
        BEDROOM
        | LARGE
        | {
            "data.image_size": 128,
            "training.batch_size": 128,
            "model.name": "ncsnv2_128",
            "model.sigma_max": 190.0,
            "model.num_scales": 1086,
            "model.ema_rate": 0.9999,
            "sampling.n_steps_each": 3,
            "sampling.snr": 0.095,
        },
    ),
    "vp/cifar10_ddpmpp_continuous": ("", VP),
    "vp/cifar10_ddpmpp_deep_continuous": ("vp/cifar10_ddpmpp_continuous", DEEP),
    "vp/cifar10_ncsnpp_continuous": ("vp/cifar10_ddpmpp_continuous", NCSNPP_OF_VP),
    "vp/cifar10_ncsnpp_deep_continuous": ("vp/cifar10_ncsnpp_continuous", DEEP),
    "vp/cifar10_ddpmpp": ("vp/cifar10_ddpmpp_continuous", ANCESTRAL),
    "vp/cifar10_ncsnpp": (
        "vp/cifar10_ncsnpp_continuous",
        {"training.continuous": False, "sampling.predictor": "reverse_diffusion"},
    ),
    "vp/ddpm/cifar10_continuous": ("vp/cifar10_ddpmpp_continuous", DDPM),
    "vp/ddpm/cifar10": ("vp/ddpm/cifar10_continuous", ANCESTRAL),
    "vp/ddpm/cifar10_unconditional": ("vp/ddpm/cifar10", {"model.conditional": False}),
    "vp/ddpm/bedroom": ("vp/ddpm/cifar10", BEDROOM | DDPM_256),
    "vp/ddpm/church": ("vp/ddpm/cifar10", CHURCH | DDPM_256),
    "vp/ddpm/celebahq": ("vp/ddpm/cifar10", {"data.dataset": "CelebAHQ"} | DDPM_256),
    "subvp/cifar10_ddpm_continuous": ("vp/ddpm/cifar10_continuous", SUBVP),
    "subvp/cifar10_ddpmpp_continuous": ("vp/cifar10_ddpmpp_continuous", SUBVP),
    "subvp/cifar10_ddpmpp_deep_continuous": ("vp/cifar10_ddpmpp_deep_continuous", SUBVP),
    "subvp/cifar10_ncsnpp_continuous": ("vp/cifar10_ncsnpp_continuous", SUBVP),
    "subvp/cifar10_ncsnpp_deep_continuous": ("vp/cifar10_ncsnpp_deep_continuous", SUBVP),
}
"""For each name, the configuration that it is derived from, and the differences from it. "" stands for `COMMON`."""


def get_config(name: str = "") -> Config:
    """Returns the configuration of this name.

    Raises:
        ValueError: if the name is empty or unknown.
    """
    if name not in CONFIGURATIONS:
        problem = f"has no configuration {name!r}: it " if name else ""
        raise ValueError(
            f"configs/score_sde.py {problem}needs a name after the colon; known: {', '.join(CONFIGURATIONS)}"
        )
    config = default()
    config.update_from_flattened_dict(_differences(name))
    return config


def _differences(name: str) -> Differences:
    """Returns the differences of the configuration from configs/default.py."""
    if not name:
        return COMMON
    parent, differences = CONFIGURATIONS[name]
    return _differences(parent) | differences
