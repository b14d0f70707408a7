"""Records which fields of a configuration are read, to find fields that were given but have no effect."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.default import Config

CHOICES = {
    "training.sde": ("vesde", "linearvesde", "vpsde", "subvpsde", "lineargammavpsde", "straightpathsde"),
    "training.objective": ("denoising", "sliced", "meng", "ode_likelihood"),
    "training.score_matching_order": (1, 2, 3),
    "training.noise_level": (0.0, 1.0),
    "training.init_from": ("", "PATH"),
    "training.snapshot_sampler": ("few_step", "configured"),
    "training.high_order_estimator": ("published", "unbiased", "squared_trace", "unbiased_trace"),
    "training.first_order_weighting": ("constant", "residual"),
    "training.high_order_weighting": ("constant", "residual", "first_order"),
    "training.importance_density": ("noise", "velocity"),
    "model.name": ("ncsnpp", "ddpm", "ncsn", "ncsnv2_64", "vdm", "mlp", "mlp_published"),
    "model.parameterization": ("noise", "velocity", "preconditioned"),
    "model.embedding_type": ("fourier", "positional"),
    "sampling.method": ("pc", "ode", "dpm_solver", "heun", "langevin", "annealed_langevin"),
    "sampling.predictor": ("reverse_diffusion", "none"),
    "sampling.corrector": ("langevin", "none"),
    "sampling.schedule": ("auto", "log_snr", "power", "time"),
    "sampling.num_steps": (0, 10),
    "eval.ode_solver": ("dopri5", "adams_log"),
    "eval.probe": ("rademacher", "exact"),
    "eval.likelihood_at": ("x", "x_tmin", "both"),
    "eval.end_ckpt": (0, 1),
    "cost.device": ("", "h100"),
    "eval.dequantization": ("uniform", "truncated_normal", "normal"),
}
"""Fields that decide which other fields have an effect, besides those that are True or False, with values to try."""


class Recorder:
    """The fields that were read, by their names such as `training.batch_size`."""

    def __init__(self, given: Iterable[str] = ()):
        self.given = tuple(dict.fromkeys(given))
        """The fields given on the command line."""
        self.read: set[str] = set()
        self.paused = False

    def unused(self) -> list[str]:
        """The given fields that were not read."""
        return [field for field in self.given if field not in self.read]


class RecordedConfig(ConfigDict):
    """A ConfigDict that tells its recorder which fields are read. Conversions of the whole do not count."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        recorder = recorder_of(self)  # This is None while a copy is made.
        if recorder and not recorder.paused and not isinstance(value, ConfigDict):
            recorder.read.add(f"{self.__dict__['_prefix']}{key}")
        return value

    def copy_and_resolve_references(self, *arguments: Any, **options: Any) -> ConfigDict:
        """Returns a copy, whose reads count for the same recorder."""
        with unrecorded(self):
            copy = super().copy_and_resolve_references(*arguments, **options)
            if (recorder := recorder_of(self)) and self.__dict__["_prefix"] == "":
                _attach(copy, recorder)
        return copy

    def to_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        with unrecorded(self):
            return super().to_dict(*arguments, **options)

    def to_json_best_effort(self, *arguments: Any, **options: Any) -> str:
        with unrecorded(self):
            return super().to_json_best_effort(*arguments, **options)


def record_reads(config: Config, given: Iterable[str] = ()) -> Recorder:
    """Records the reads of the fields of this configuration from now on."""
    recorder = Recorder(given)
    _attach(config, recorder)
    return recorder


def _attach(config: Config, recorder: Recorder) -> None:
    sections = [(name, value) for name, value in config.items() if isinstance(value, ConfigDict)]
    for prefix, section in [("", config), *((f"{name}.", section) for name, section in sections)]:
        object.__setattr__(section, "_recorder", recorder)
        object.__setattr__(section, "_prefix", prefix)
        object.__setattr__(section, "__class__", RecordedConfig)


def recorder_of(config: Config) -> Recorder | None:
    """The recorder of the configuration; None if it has none."""
    return config.__dict__.get("_recorder")


@contextlib.contextmanager
def unrecorded(config: Config) -> Iterator[None]:
    """A context in which reads do not count, for checks of fields that may have no other effect."""
    recorder = recorder_of(config)
    before = recorder.paused if recorder else False
    if recorder:
        recorder.paused = True
    try:
        yield
    finally:
        if recorder:
            recorder.paused = before


def count_reads(section: Config, *names: str) -> None:
    """Counts these fields as read. All fields of an object are checked under `unrecorded`, but some have no effect."""
    for name in names:
        _ = section[name]


def fields_of_orders(training: Config) -> Iterator[str]:
    """Yields the fields of config.training about orders 2 and 3 that denoising score matching depends on."""
    with unrecorded(training):
        order, exact, estimator = (
            training[name] for name in ("score_matching_order", "exact_derivatives", "high_order_estimator")
        )
        weighting = training.high_order_weighting
    if order > 1 or weighting == "residual":  # The residual is measured for order 1, too.
        yield "high_order_weighting"
    if order > 1:
        yield from ("second_order_weight", "exact_derivatives", "high_order_fraction")
        yield from () if exact else ("high_order_estimator",)
    if order == 3:
        yield "third_order_weight"
        yield from () if exact or estimator != "published" else ("residual_first",)


def alternatives(config: Config) -> Iterator[tuple[str, Any, Config]]:
    """Yields copies of the configuration with another value of one field that decides whether others have an effect.

    Each item is the name of the field, the other value, and the copy.
    """
    with unrecorded(config):
        values = {
            f"{section}.{name}": v
            for section, fields in config.to_dict().items()
            if isinstance(fields, dict)
            for name, v in fields.items()
        }
    for field, value in values.items():
        others = (not value,) if isinstance(value, bool) else CHOICES.get(field, ())
        for other in others:
            if other != value:
                changed = ConfigDict(config.to_dict())
                changed.update_from_flattened_dict({field: other})
                yield field, other, changed


def unused_fields(config: Config, build_settings: Callable[[Config], None]) -> list[tuple[str, str | None]]:
    """Returns the given fields that have not been read, each with the setting that disables it, if one is known.

    The fields are returned once: a second call returns none. Without a recorder, there are none.

    Args:
        build_settings: reads all fields that have an effect with a configuration. It may raise ValueError or OSError.
    """
    if (recorder := recorder_of(config)) is None:
        return []
    unused, recorder.given = recorder.unused(), ()
    read_with = _reads_of_alternatives(config, build_settings) if unused else []
    return [(field, _disabling_setting(field, read_with)) for field in unused]


def _reads_of_alternatives(config: Config, build_settings: Callable[[Config], None]) -> list[tuple[str, set[str]]]:
    """Returns, for each setting that decides about others, the fields that are read only with another value of it."""
    unchanged = _reads(ConfigDict(config.to_dict()), build_settings)
    reads = []
    for name, _, changed in alternatives(config):
        more = _reads(changed, build_settings) - unchanged
        with unrecorded(config):
            reads.append((f"{name}={functools.reduce(getattr, name.split('.'), config)!r}", more))
    return reads


def _reads(config: Config, build_settings: Callable[[Config], None]) -> set[str]:
    """Returns the fields that `build_settings` reads until it raises, if it does."""
    recorder = record_reads(config)
    with contextlib.suppress(ValueError, OSError):
        build_settings(config)
    return recorder.read


def _disabling_setting(field: str, read_with: list[tuple[str, set[str]]]) -> str | None:
    """The first setting without which the field would be read. Settings of the field's own section come first."""
    in_order = sorted(read_with, key=lambda each: each[0].split(".")[0] != field.split(".")[0])
    return next((setting for setting, read in in_order if field in read), None)
