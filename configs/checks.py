"""Checks of single fields of a configuration: their types, and the ranges of their numbers.

The objects that are built from a configuration check whether its fields are compatible.
"""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

from configs.default import Config, get_config

RANGES = {
    "seed": "[0, 4294967295]",
    "training.smallest_time": "[1e-30, 0.999999]",
    "training.batch_size": "[1, inf)",
    "training.accumulation_steps": "[1, inf)",
    "training.n_iters": "[1, inf)",
    "training.n_iters_from_start": "[0, inf)",
    "training.n_jitted_steps": "[1, inf)",
    "training.max_nonfinite": "[1, inf)",
    "training.score_matching_order": "[1, 3]",
    "training.num_projections": "[1, inf)",
    "training.likelihood_steps": "[1, inf)",
    "training.noise_level": "[0, inf)",
    "training.second_order_weight": "[0, inf)",
    "training.third_order_weight": "[0, inf)",
    "training.high_order_fraction": "[1e-6, 1]",
    "training.label_dropout": "[0, 1)",
    "training.log_freq": "[1, inf)",
    "training.eval_freq": "[1, inf)",
    "training.eval_batches": "[1, inf)",
    "training.snapshot_freq": "[1, inf)",
    "training.snapshot_freq_for_preemption": "[1, inf)",
    "data.num_points": "[1, inf)",
    "data.num_test_points": "[1, inf)",
    "data.image_size": "[1, inf)",
    "data.num_channels": "[1, inf)",
    "data.levels": "[2, 256]",
    "data.num_classes": "[0, inf)",
    "model.sigma_min": "(0, inf)",
    "model.sigma_max": "(0, inf)",
    "model.beta_min": "[0, inf)",
    "model.beta_max": "(0, inf)",
    "model.gamma_min": "[-80, 80]",
    "model.gamma_max": "[-80, 80]",
    "model.num_scales": "[1, inf)",
    "model.ema_rate": "[0, 1)",
    "model.dropout": "[0, 1)",
    "model.fourier_scale": "(0, inf)",
    "model.nf": "[4, inf)",
    "model.ch_mult": "[1, inf)",
    "model.num_res_blocks": "[1, inf)",
    "model.attn_resolutions": "[1, inf)",
    "model.fir_kernel": "(-inf, inf)",
    "model.init_scale": "[0, inf)",
    "model.conv_size": "[3, 3]",
    "model.mlp_embedding": "[4, inf)",
    "model.mlp_time_widths": "[1, inf)",
    "model.mlp_data_widths": "[1, inf)",
    "model.mlp_widths": "[1, inf)",
    "optim.lr": "(0, inf)",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.eps": "[0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.warmup": "[0, inf)",
    "optim.grad_clip": "(-inf, inf)",
    "sampling.num_steps": "[0, inf)",
    "sampling.n_steps_each": "[1, inf)",
    "sampling.snr": "(0, inf)",
    "sampling.smallest_time": "[1e-30, 0.999999]",
    "sampling.temperature": "[0, inf)",
    "sampling.rtol": "(0, inf)",
    "sampling.atol": "(0, inf)",
    "sampling.max_nfe": "[3, inf)",
    "sampling.order": "[1, 3]",
    "sampling.eta": "[0, 1000]",
    "sampling.schedule_exponent": "(0, inf)",
    "sampling.num_levels": "[1, inf)",
    "sampling.steps_per_level": "[1, inf)",
    "sampling.step_size": "(0, inf)",
    "sampling.batch_size": "[0, inf)",
    "eval.begin_ckpt": "[1, inf)",
    "eval.end_ckpt": "[0, inf)",
    "eval.ckpt_id": "[0, inf)",
    "eval.batch_size": "[0, inf)",
    "eval.num_repeats": "[1, inf)",
    "eval.max_examples": "[0, inf)",
    "eval.density_grid": "[0, inf)",
    "eval.ode_steps": "(0, inf)",
    "eval.rtol": "(0, inf)",
    "eval.atol": "(0, inf)",
    "eval.num_probes": "(0, inf)",
    "eval.bound_times": "[2, inf)",
    "eval.bound_starts": "[1, inf)",
    "eval.start_time": "[0, 1)",
    "eval.truncation": "(0, inf)",
    "eval.num_importance_samples": "[1, inf)",
    "eval.num_samples": "[1, inf)",
    "eval.inception_splits": "[1, inf)",
    "eval.inception_centre": "(0, inf)",
    "eval.diagnose_images": "[1, inf)",
    "eval.diagnose_times": "[1, inf)",
    "eval.diagnose_starts": "[1, inf)",
    "deq.filters": "[0, inf)",
    "deq.components": "[0, inf)",
    "deq.blocks": "[0, inf)",
    "deq.attn_heads": "[0, inf)",
    "deq.n_iters": "[1, inf)",
    "deq.dropout": "[0, 1)",
    "deq.ema_rate": "[0, 1)",
    "control.num_images": "[1, inf)",
    "control.num_draws": "[1, inf)",
    "control.num_steps": "[2, inf)",
    "control.labels": "[0, inf)",
    "control.guidance": "[0, inf)",
    "control.classifier_blocks": "[1, inf)",
    "control.classifier_width": "[1, inf)",
    "control.classifier_n_iters": "[1, inf)",
    "cost.orders": "[1, 3]",
    "cost.batch_sizes": "[1, inf)",
    "cost.measure_steps": "[0, inf)",
    "cost.memory_gb": "[0, inf)",
    "cost.num_devices": "[1, inf)",
    "cost.selftest_seconds": "(0, inf)",
}
"""The interval of every field that is a number or a tuple of numbers, in mathematical notation."""

KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
"""Types in words."""


def check_config(config: Config) -> None:
    """Checks that the configuration has exactly the fields of the default, their types, and the ranges of numbers.

    Raises:
        ValueError: for the first field that does not pass, naming the field, its value and what is allowed.
    """
    defaults = flat(get_config())
    values = config.to_dict()
    _check_names(_flattened(values), defaults)
    for field, default in defaults.items():
        section, _, name = field.rpartition(".")
        value = (values[section] if section else values)[name]
        if isinstance(default, tuple):
            if not isinstance(value, tuple | list):
                raise ValueError(f"{field} is {value!r}; it must be a tuple such as {default}")
            for entry in value:
                _check_value(field, value, entry, type(default[0]) if default else int)
        else:
            _check_value(field, value, value, type(default))


def _check_names(found: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError if a field does not exist, for example because a file misspells it, or if one is missing.

    A section in place of a value is left to the check of the value.
    """
    found = {next((name for name in known if field.startswith(f"{name}.")), field) for field in found}
    for field in sorted(found):
        if field not in known:
            raise ValueError(no_field(field, known))
    for field in known:
        if field not in found:
            raise ValueError(f"the configuration lacks the field {field}; begin with configs.default.get_config()")


def no_field(field: str, known: Collection[str]) -> str:
    """The message for a field that does not exist, with the most similar field that does."""
    near = difflib.get_close_matches(field, known, 1)
    return f"the configuration has no field {field}" + (f"; did you mean {near[0]}?" if near else "")


def _check_value(field: str, whole: Any, value: Any, kind: type) -> None:
    """Checks one value, or one entry of a tuple."""
    entries = "; each entry must be" if whole is not value else "; it must be"
    numeric = kind is float and type(value) is int
    if type(value) is not kind and not numeric:
        raise ValueError(f"{field} is {whole!r}{entries} {KINDS[kind]}")
    if kind not in (int, float):
        return
    if not math.isfinite(value):
        raise ValueError(f"{field} is {whole!r}{entries} finite")
    if field not in RANGES:
        raise ValueError(f"{field} is a number without a range: add its interval to configs/checks.py:RANGES")
    low, high = (float(bound) for bound in RANGES[field][1:-1].split(","))
    above = value > low if RANGES[field][0] == "(" else value >= low
    below = value < high if RANGES[field][-1] == ")" else value <= high
    if not (above and below):
        raise ValueError(f"{field} is {whole!r}{_in_words(RANGES[field], entries)}")


def _in_words(interval: str, entries: str) -> str:
    """Returns the end of an error message, which says what values the range allows."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"{entries.removesuffix(' be')} lie in {interval}"
    if low == "0":
        return f"{entries} positive" if interval[0] == "(" else f"{entries.removesuffix(' be')} not be negative"
    return f"{entries} at least {low}"


def flat(config: Config) -> dict[str, Any]:
    """The values of all fields by their names, such as `training.batch_size`."""
    return _flattened(config.to_dict())


def _flattened(sections: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in sections.items():
        values |= {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {name: value}
    return values
