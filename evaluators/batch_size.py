"""Replaces batch sizes of 0 in `eval` and `sampling` by the largest batch that fits the devices, by an estimate."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array

import datasets
from arrays import Batch
from build import Run
from configs.usage import unrecorded
from infra.cost import GIGA, device_memory, peak_bytes
from likelihood import TimeField
from models.score import Params

SHARE = 0.5
"""The share of a device's memory that the estimate may reach. The estimate counts the values of the program, but not
the copies that a compiler makes for convolutions."""

MOST = 1024
"""Images per device in the largest batch. Larger batches are not faster, and an interruption would lose more."""


class Memory(NamedTuple):
    """The memory in GB of a program on one device: `one` for one image, and `each` for each further image."""

    one: float
    each: float

    def fitting(self, limit: float) -> int:
        """The largest number of images whose memory is at most the limit; 0 if there is none."""
        return max(1 + math.floor((limit - self.one) / self.each), 0)


def choose_batch_sizes(run: Run) -> None:
    """Sets batch sizes of 0 in `eval` and `sampling` of the run's configuration to the largest ones that fit.

    The memory is estimated from the traced program, so nothing is compiled.

    Raises:
        ValueError: if one image per device does not fit.
    """
    settings, sampling = run.config.eval, run.config.sampling
    with unrecorded(run.config):  # reading a size to replace it does not give it an effect
        if settings.batch_size == 0:
            source = datasets.source_from_config(run.config, settings.bpd_dataset)
            images = min(len(source), settings.max_examples or len(source))
            settings.batch_size = largest_batch(likelihood_memory(run), run.mesh.size, images, "eval.batch_size")
        if sampling.batch_size == 0:
            images = settings.num_samples
            sampling.batch_size = largest_batch(score_memory(run), run.mesh.size, images, "sampling.batch_size")


def largest_batch(memory: Memory, devices: int, images: int, field: str) -> int:
    """Returns the number of images in the largest batch over all devices. It is at most what all images need.

    Raises:
        ValueError: if one image per device does not fit.
    """
    available = device_memory()
    fitting = memory.fitting(SHARE * available)
    if fitting < 1:
        raise ValueError(
            f"{field} is 0, but one image per device needs about {memory.one:.3g} GB, and {SHARE:g} of a device's "
            f"memory is {SHARE * available:.3g} GB: set {field} to the number of devices to try it"
        )
    each = min(fitting, MOST, math.ceil(images / devices))
    logging.info("%s is 0, and %d images fit: %d on each device", field, devices * each, each)
    return devices * each


def likelihood_memory(run: Run) -> Memory:
    """Estimates the memory of the right-hand side of the likelihood's ODE, with the parameters."""
    exact = run.config.eval.probe == "exact"
    num_estimates = 1 if exact else int(run.config.eval.num_probes)

    def right_hand_side(params: Params, x: Batch) -> tuple[Batch, Array]:
        probes = None if exact else jnp.ones((num_estimates, *x.shape))
        field = TimeField(run.score_fn(params), probes, run.sde)
        return field(jnp.asarray(0.5), (x, jnp.zeros((len(x), num_estimates))))

    return _memory(run, right_hand_side)


def score_memory(run: Run) -> Memory:
    """Estimates the memory of the score, with the parameters."""
    return _memory(run, lambda params, x: run.score_fn(params)(x, jnp.full(len(x), 0.5)))


def _memory(run: Run, function: Callable[[Params, Batch], object]) -> Memory:
    params = run.abstract_state().ema_params

    def gb(size: int) -> float:
        x = jax.ShapeDtypeStruct((size, *run.data_shape), jnp.float32)
        return peak_bytes(jax.make_jaxpr(function)(params, x).jaxpr) / GIGA

    # Other values may need the most memory in small batches than in large ones, so the sizes compared are large.
    half, whole = gb(MOST), gb(2 * MOST)
    each = (whole - half) / MOST
    return Memory(half - (MOST - 1) * each, each)
