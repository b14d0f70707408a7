"""Batch sizes of 0: the largest batch whose estimated memory fits."""

import jax
import jax.numpy as jnp
import pytest

import run_lib
from build import Run, build
from configs.digits.smoke import get_config
from configs.usage import record_reads
from evaluators import batch_size
from evaluators.batch_size import MOST, SHARE, Memory, choose_batch_sizes, largest_batch, likelihood_memory
from likelihood import TimeField

DEVICES = 4


@pytest.fixture(scope="module")
def run() -> Run:
    return build(get_config(), for_training=False)


def test_the_estimate_is_close_enough(run):
    """The compiled program fits where the estimate says so, and needs at least a tenth of the estimate."""
    size, memory = 64, likelihood_memory(run)

    def right_hand_side(params, x, probes):
        field = TimeField(run.score_fn(params), probes, run.sde)
        return field(jnp.asarray(0.5), (x, jnp.zeros((size, len(probes)))))

    x = jax.ShapeDtypeStruct((size, *run.data_shape), jnp.float32)
    probes = jax.ShapeDtypeStruct((run.config.eval.num_probes, *x.shape), jnp.float32)
    compiled = jax.jit(right_hand_side).lower(run.abstract_state().ema_params, x, probes).compile().memory_analysis()
    assert compiled is not None
    used = (compiled.argument_size_in_bytes + compiled.output_size_in_bytes + compiled.temp_size_in_bytes) / 1e9
    estimate = memory.one + (size - 1) * memory.each
    assert SHARE * used < estimate < 10 * used


def test_exact_divergences_need_memory_for_every_dimension(run):
    """Their probes are the unit vectors."""
    config, dims = get_config(), 64
    config.eval.probe = "exact"
    exact = likelihood_memory(build(config, for_training=False))
    assert dims / 4 < exact.each / likelihood_memory(run).each < dims


@pytest.mark.parametrize(
    ("gb", "images", "expected"),
    [
        (2 * (1.0 + 0.1 * 6 + 0.05), 1000, DEVICES * 7),  # 1 GB for the first image, and 0.1 GB for each of 6 more
        (2 * 1.05, 1000, DEVICES),
        (1e6, 10, DEVICES * 3),  # covers the images
        (1e6, 1_000_000, DEVICES * MOST),
    ],
)
def test_the_largest_batch_that_fits(gb, images, expected, monkeypatch):
    monkeypatch.setattr(batch_size, "device_memory", lambda: gb)
    assert largest_batch(Memory(1.0, 0.1), DEVICES, images, "eval.batch_size") == expected


def test_too_little_memory_is_named(monkeypatch):
    monkeypatch.setattr(batch_size, "device_memory", lambda: 1.9)
    with pytest.raises(ValueError, match=r"eval\.batch_size is 0, but one image per device needs about 1 GB"):
        largest_batch(Memory(1.0, 0.1), DEVICES, 10, "eval.batch_size")


def test_only_sizes_of_zero_are_replaced():
    config = get_config()
    config.eval.batch_size, config.eval.max_examples, given = 0, 6, config.sampling.batch_size
    choose_batch_sizes(build(config, for_training=False))
    assert config.eval.batch_size == 8  # 6 images on 4 devices
    assert config.sampling.batch_size == given


def test_looking_at_a_size_does_not_count_as_using_it():
    """Otherwise an evaluation without samples would not warn that sampling.batch_size has no effect."""
    config = get_config()
    recorder = record_reads(config, ["sampling.batch_size"])
    choose_batch_sizes(build(config, for_training=False))
    assert not recorder.read & {"sampling.batch_size", "eval.batch_size"}


def test_an_evaluation_chooses(monkeypatch, tmp_path):
    """Evaluations replace the sizes before they build their evaluators, which would refuse 0."""

    def chosen(run: Run) -> None:
        raise InterruptedError

    monkeypatch.setattr(run_lib, "choose_batch_sizes", chosen)
    for mode in (
        lambda: run_lib.evaluate(get_config(), tmp_path, "eval"),
        lambda: run_lib.diagnose(get_config(), tmp_path),
        lambda: run_lib.control(get_config(), tmp_path, "encode"),
    ):
        with pytest.raises(InterruptedError):
            mode()
