"""Fields that were given on the command line but have no effect, and the setting that disables them."""

import json

import pytest

import run_lib
from build import build
from configs.digits.smoke import get_config
from configs.toy.smoke import get_config as toy_config
from configs.usage import alternatives, record_reads, recorder_of, unrecorded
from evaluators.unused_fields import _build_settings, warn_unused


def test_reads_are_recorded_but_conversions_and_checks_are_not():
    config = get_config()
    recorder = record_reads(config, ["sampling.eta", "seed", "data.levels"])
    assert recorder_of(config) is recorder
    json.loads(config.to_json_best_effort())
    assert config.to_dict()["seed"] == config.sampling.to_dict()["order"] + 40
    with unrecorded(config), unrecorded(config):
        _ = config.sampling.eta
    assert recorder.read == set()
    _ = config.seed, config["data"]["levels"], config.data.get("image_size")
    assert recorder.read == {"seed", "data.levels", "data.image_size"}
    assert recorder.unused() == ["sampling.eta"]
    assert config.copy_and_resolve_references().sampling.eta == 1.0
    assert recorder.unused() == []
    config.sampling.eta = 0.5
    assert config.sampling.eta == 0.5


def test_each_choice_is_known_and_leads_to_another_configuration():
    """A choice that nothing accepts could not tell which fields it enables."""
    config = get_config()
    for name, other, changed in alternatives(config):
        assert name in ("training.init_from",) or changed != config, (name, other)
    known = {name for name, _, _ in alternatives(config)}
    assert {"sampling.method", "eval.bound", "training.snapshot_sampling", "eval.end_ckpt"} <= known


UNUSED = {
    "heun has no noise": ("eval", {"sampling.eta": 1.0, "sampling.method": "heun"}, "sampling.eta", "sampling.method="),
    "adaptive solver": ("eval", {"eval.ode_solver": "dopri5"}, "eval.ode_steps", "eval.ode_solver='dopri5'"),
    "no bound": ("eval", {}, "eval.bound_times", "eval.bound=False"),
    "no filter": ("train", {}, "model.fir_kernel", "model.fir=False"),
    "no samples": ("eval", {"eval.enable_sampling": False}, "sampling.snr", "eval.enable_sampling=False"),
    "newest": ("eval", {}, "eval.begin_ckpt", "eval.end_ckpt=0"),
    "training only": ("eval", {}, "optim.lr", "eval.enable_loss=False"),
    "evaluation only": ("train", {}, "eval.rtol", "the other settings of --mode=train"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_the_setting_that_disables_a_field_is_named(name, caplog):
    mode, settings, field, reason = UNUSED[name]
    config = get_config()
    config.update_from_flattened_dict(settings)
    record_reads(config, [field, *settings])
    _build_settings(config, mode)
    with caplog.at_level("WARNING"):
        warn_unused(config, mode)
        warn_unused(config, mode)
    said = [record.getMessage() for record in caplog.records if f".{field} " in record.getMessage()]
    (message,) = said
    assert message.startswith(f"--config.{field} has no effect with {reason}")


def test_a_setting_that_disables_nothing_is_not_named(caplog):
    """--mode=stats has no network, so no value of another field gives those of the network an effect."""
    config = get_config()
    record_reads(config, ["model.nf", "training.sde"])
    with caplog.at_level("WARNING"):
        warn_unused(config, "stats")
    ends = {record.getMessage().partition(" has no effect with ")[2] for record in caplog.records}
    assert ends == {"the other settings of --mode=stats"}


DPM_POWER = {"sampling.method": "dpm_solver", "sampling.schedule": "power"}
WEIGHTED = {"training.likelihood_weighting": True, "training.importance_weighting": True}
SLICED = {"training.objective": "sliced", "training.score_matching_order": 1}
DISCRETE = SLICED | {"training.continuous": False, "model.embedding_type": "positional"}
BOUND_AT_X_TMIN = {"eval.bound": True, "eval.likelihood_at": "x_tmin"}
ORDERS = ("training.second_order_weight", "training.high_order_estimator", "training.high_order_fraction")
DECIDED = {
    # fields, settings with which they have an effect, and settings with which they have none
    "orders 2 and 3": (ORDERS, {"training.score_matching_order": 2}, {"training.score_matching_order": 1}),
    "order 3": (
        ("training.third_order_weight", "training.residual_first"),
        {"training.score_matching_order": 3},
        {"training.score_matching_order": 2},
    ),
    "one probe": (
        ("training.residual_first",),
        {"training.score_matching_order": 3},
        {"training.score_matching_order": 3, "training.high_order_estimator": "unbiased"},
    ),
    "importance": (("training.importance_density",), WEIGHTED, {"training.likelihood_weighting": True}),
    "all times": (("training.stratified_times", "training.smallest_time"), SLICED, {"training.noise_level": 0.5}),
    "continuous": (("training.smallest_time",), SLICED, DISCRETE),
    "predictor": (("sampling.probability_flow",), {}, {"sampling.predictor": "none"}),
    "corrector": (("sampling.snr", "sampling.n_steps_each"), {}, {"sampling.corrector": "none"}),
    "power": (("sampling.schedule_exponent",), DPM_POWER, {"sampling.method": "dpm_solver"}),
    "correction": (("eval.bound_starts",), {"eval.bound": True}, {"eval.bound": True, "eval.offset": False}),
    "decay": (("optim.decay_biases",), {"optim.weight_decay": 0.1}, {}),
}


@pytest.mark.parametrize("name", DECIDED)
def test_only_fields_with_an_effect_count_as_read(name):
    """A field with a name that a setting could hide must not count as read, or nothing warns of it."""
    fields, used, unused = DECIDED[name]
    mode = "train" if fields[0].startswith(("training.", "optim.")) else "eval"
    for settings, expected in ((used, []), (unused, list(fields))):
        config = get_config()
        config.update_from_flattened_dict(settings)
        recorder = record_reads(config, fields)
        _build_settings(config, mode)
        assert recorder.unused() == expected


def test_points_have_no_range_to_clip_to():
    config = toy_config()
    recorder = record_reads(config, ["sampling.clip_denoised", "sampling.schedule_exponent"])
    build(config).sampler()
    assert recorder.unused() == ["sampling.clip_denoised"]


def test_a_training_warns_once_of_what_it_will_never_read(tmp_path, caplog):
    """The warning comes after the first call. What is read until the end is the same."""
    config = toy_config()
    config.training.update(n_iters=40, score_matching_order=1)
    given = [
        f"{section}.{name}"
        for section, fields in config.to_dict().items()
        if isinstance(fields, dict)
        for name in fields
    ]
    recorder = record_reads(config, given)
    with caplog.at_level("WARNING"):
        run_lib.train(config, tmp_path)
    warned = {
        record.getMessage().split()[0].removeprefix("--config.")
        for record in caplog.records
        if "has no effect" in record.getMessage()
    }
    assert warned == set(given) - recorder.read
    assert {"training.n_iters", "training.eval_batches", "optim.lr", "data.num_points"} <= recorder.read
    assert {"eval.rtol", "model.nf", "sampling.eta"} <= warned


def test_results_carry_the_settings_of_the_sampler_only():
    config = get_config()
    config.sampling.update(method="heun", max_nfe=9, eta=1.0, num_steps=50)
    used = build(config).sampling_description()
    assert used["method"] == "heun"
    assert used["max_nfe"] == 9
    assert not used.keys() & {"eta", "num_steps", "order", "snr", "rtol"}
