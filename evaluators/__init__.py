"""Evaluators of checkpoints: test loss, bits/dim, likelihoods of points, and samples.

`evaluators_from_config` lists them. Every evaluator counts each example once. It stores its values batch by batch in a
folder named after everything that they depend on, including the parameters. So an interrupted evaluation resumes, and
results of different settings never mix. The random numbers of an example depend on the seed, the repeat and the index
of the example, but not on its batch. The test loss is an exception: it stores nothing, and draws its noise by batches.
"""

import functools
from collections.abc import Callable

import datasets
from build import Run
from configs.usage import count_reads, unrecorded
from dequantization.noise import Dequantizer
from evaluators.bits_per_dim import BitsPerDimEvaluator
from evaluators.conditional import PROBLEMS, ClassesEvaluator, ConditionalEvaluator
from evaluators.estimators import places_from_config
from evaluators.evaluator import Evaluator as Evaluator
from evaluators.fid import comparison_from_config
from evaluators.latents import DecodeEvaluator, EncodeEvaluator, InterpolateEvaluator
from evaluators.loss import LossEvaluator
from evaluators.points import PointLikelihoodEvaluator, PointSamplesEvaluator
from evaluators.samples import SamplesEvaluator
from infra.workdir import Workdir


def _conditional(mode: str, run: Run, workdir: Workdir) -> Evaluator:
    del workdir
    return ConditionalEvaluator(run, mode)


MODES: dict[str, Callable[[Run, Workdir], Evaluator]] = {
    "encode": lambda run, workdir: EncodeEvaluator(run),
    "decode": lambda run, workdir: DecodeEvaluator(run),
    "interpolate": lambda run, workdir: InterpolateEvaluator(run),
    **{mode: functools.partial(_conditional, mode) for mode in PROBLEMS},
    "classes": ClassesEvaluator,
}
"""The evaluators with their own mode in main.py. Each is built from the run and the workdir of the score model."""


def evaluators_from_config(run: Run, dequantizer: Callable[[], Dequantizer]) -> list[Evaluator]:
    """Builds the evaluators that `eval` enables, in the order in which they run, and checks all of their settings.

    Args:
        dequantizer: loads the noise for the bits/dim of images.

    Raises:
        ValueError, OSError: for bad input.
    """
    settings, images = run.config.eval, run.density is None
    with unrecorded(run.config):  # It is checked, too, if it has no effect.
        places = places_from_config(run.config)
    if settings.enable_bpd:
        count_reads(settings, "likelihood_at")
    builders: list[tuple[bool, Callable[[], Evaluator]]] = [
        (settings.enable_loss, lambda: LossEvaluator(run, datasets.source_from_config(run.config, "test"))),
        (settings.enable_bpd and images and "x" in places, lambda: BitsPerDimEvaluator(run, dequantizer(), "x")),
        (
            settings.enable_bpd and images and "x_tmin" in places,
            lambda: BitsPerDimEvaluator(run, dequantizer(), "x_tmin"),
        ),
        (settings.enable_bpd and not images, lambda: PointLikelihoodEvaluator(run)),
        (settings.enable_sampling and images, lambda: SamplesEvaluator(run, comparison_from_config(run.config))),
        (settings.enable_sampling and not images, lambda: PointSamplesEvaluator(run)),
    ]
    evaluators = [build() for enabled, build in builders if enabled]
    if not evaluators:
        raise ValueError("eval.enable_loss, eval.enable_bpd and eval.enable_sampling are False: nothing to evaluate")
    return evaluators
