"""Warnings about fields of the configuration that were given on the command line, but have no effect in a mode."""

from pathlib import Path

from absl import logging

from build import build
from configs.default import Config
from configs.usage import unused_fields
from dequantization.noise import dequantizer_from_config
from evaluators import MODES
from evaluators.estimators import estimator_from_config, places_from_config
from evaluators.snapshots import Snapshots
from infra.training_loop import Callback
from infra.workdir import Workdir


def warn_unused(config: Config, mode: str) -> None:
    """Warns once about each field that was given on the command line but has not been read, and says why.

    Does nothing for a configuration whose reads are not recorded, see `configs.usage.record_reads`.
    """
    for field, setting in unused_fields(config, lambda changed: _build_settings(changed, mode)):
        logging.warning("--config.%s has no effect with %s", field, setting or f"the other settings of --mode={mode}")


def _build_settings(config: Config, mode: str) -> None:
    """Builds all objects of a mode, except data, networks of evaluators, and checkpoints."""
    run = build(config, for_training=mode not in ("eval", "diagnose", "export", *MODES))
    if mode == "train":
        _ = run.trainer, config.training.init_from and config.training.init_reset
        Snapshots(run, Workdir(Path()))
    elif mode == "eval":
        if config.eval.enable_loss:
            _ = run.trainer
        if config.eval.enable_sampling:
            run.sampler()
        if config.eval.enable_bpd:
            estimator_from_config(config)
            places_from_config(config)
            if run.density is None:
                dequantizer_from_config(config, run.sde)
        if config.eval.end_ckpt:
            _ = config.eval.begin_ckpt
    elif mode == "cost":
        _ = config.cost.num_devices if config.cost.device else config.cost.measure_steps


def warn_after_first_call(config: Config, mode: str) -> Callback:
    """Returns a callback that calls `warn_unused` after a training call, when all needed fields have been read."""
    return lambda call: warn_unused(config, mode)
