"""Checks of golden data of score_sde's controllable generation, and of its classifier of noisy images."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from arrays import Batch, ScoreFn
from configs.default import Config
from models.score import score_model_from_config
from models.wideresnet import NoisyClassifier, WideResnet
from samplers.controllable import GuidedScore, Observation, colorization_basis, observe
from samplers.predictor_corrector import CORRECTORS, PREDICTORS, Update
from sde_lib import SDE, VESDE
from tests.golden_common import Result, count, relative_error, tree_differences, tree_shapes
from tests.golden_score_sde import score_sde_config

TOLERANCE = 1e-4

CIFAR10_MEAN = (0.49139968, 0.48215842, 0.44653093)
CIFAR10_STD = (0.24703222, 0.24348513, 0.26158784)
"""The means and standard deviations with which the published code normalises images for the classifier."""


def check_classifier(path: Path) -> Iterator[Result]:
    """Compares the tree of the classifier, its logits, and the gradient that guides samples."""
    data = np.load(path)
    params = _params(data, "params")
    network = WideResnet(**json.loads(str(data["config"])))
    differences = tree_differences(_tree(network, data["x"].shape[1:]), tree_shapes(params))
    yield count("parameters", differences)
    if differences:
        return
    output = jax.jit(network.apply)({"params": params}, data["x"], data["sigmas"])
    yield from _by_example("output", output, data["output"])
    sde = VESDE(1e-3, 1e3)
    classifier = NoisyClassifier(params, network, sde, data["image_mean"], data["image_std"])
    t = sde.time_of_log_noise_level(jnp.log(data["sigmas"]))
    yield from _by_example(
        "guidance_logits", jax.jit(NoisyClassifier.__call__)(classifier, data["x"], t), data["guidance_logits"]
    )
    guided = GuidedScore(jax.tree_util.Partial(_no_score), classifier, jnp.asarray(data["class_labels"]))
    yield from _compare_gradients("guidance_grad", guided, jnp.asarray(data["x"]), t, data["guidance_grad"])


def _compare_gradients(name: str, guided: GuidedScore, x: Batch, t: jax.Array, wanted: np.ndarray) -> Iterator[Result]:
    """Compares the gradient of each example with the nearest one of `_gradients_nearby`."""
    gradients = list(_gradients_nearby(guided, x, t))
    for number, want in enumerate(wanted):
        results = [_compared(f"{name}, example {number}", gradient[number], want) for gradient in gradients]
        yield min(results, key=lambda result: result.error)


def _gradients_nearby(guided: GuidedScore, x: Batch, t: jax.Array) -> Iterator[Batch]:
    """Yields the gradient at x, and at points that differ from x by a few roundings.

    The gradient of a network with rectified units jumps where the input of a unit is zero to rounding: that of one
    published example changes by 1 % when x moves by 1e-6. So the two programs are compared on the same side of a jump.
    """
    gradient = jax.jit(GuidedScore.classifier_score)
    yield gradient(guided, x, t)
    for number in range(8):
        step = 1e-6 * jnp.max(jnp.abs(x)) * jax.random.normal(jax.random.key(number), x.shape)
        yield gradient(guided, x + step, t)


def check_controllable(path: Path) -> Iterator[Result]:
    """Compares the updates of inpainting and colorization."""
    data = np.load(path)
    config, score_fn, sde = _published_model(data)
    x, t = jnp.asarray(data["x"]), jnp.full(len(data["x"]), float(data["t"]), jnp.float32)
    grey_only = jnp.zeros_like(x).at[..., 0].set(1)
    basis = jnp.asarray(colorization_basis(), jnp.float32)
    pixels = Observation(jnp.asarray(data["data"]), jnp.asarray(data["mask"]))
    colours = Observation(Observation(x, x, basis).components(jnp.asarray(data["gray"])), grey_only, basis)
    yield _compared("colorize_basis", data["colorize_basis"], basis)
    for task, observation in (("inpaint", pixels), ("colorize", colours)):
        yield _compared(f"{task}_init", _published_start(observation, sde, data["prior_noise"]), data[f"{task}_init"])
        for rule, update in _updates(data, config, score_fn, sde, x, t).items():
            # The published code passes x for its mean.
            observed = observe(observation, sde, (update[0], update[0]), t, jnp.asarray(data[f"{rule}_data_noise"]))
            for name, got in zip(("x", "x_mean"), observed, strict=True):
                yield _compared(f"{task}_{rule}_{name}", got, data[f"{task}_{rule}_{name}"])


def check_class_conditional(path: Path) -> Iterator[Result]:
    """Compares the two parts of the guided score, and the updates that follow it."""
    data = np.load(path)
    config, score_fn, sde = _published_model(data)
    network = WideResnet(**json.loads(str(data["classifier_config"])))
    params = _params(data, "classifier_params")
    classifier = NoisyClassifier(params, network, sde, jnp.array(CIFAR10_MEAN), jnp.array(CIFAR10_STD))
    guided = GuidedScore(score_fn, classifier, jnp.asarray(data["class_labels"]))
    yield _compared("class_init", sde.prior_sigma * data["prior_noise"], data["class_init"])
    x, t = jnp.asarray(data["x"]), jnp.full(len(data["x"]), float(data["t"]), jnp.float32)
    yield _compared("score", _score(score_fn, x, t), data["score"])
    yield from _compare_gradients("class_classifier_grad", guided, x, t, data["class_classifier_grad"])
    score = jax.tree_util.Partial(_given, jnp.asarray(data["score"] + data["class_classifier_grad"]))
    for rule, update in _updates(data, config, score, sde, x, t).items():
        for name, got in zip(("x", "x_mean"), update, strict=True):
            yield _compared(f"class_{rule}_{name}", got, data[f"class_{rule}_{name}"])


def _updates(data: Any, config: Config, score_fn: ScoreFn, sde: SDE, x: Batch, t: jax.Array) -> Mapping[str, Update]:
    """Returns the updates of the file's predictor and corrector, before anything is replaced."""
    steps = config.model.num_scales
    predict, correct = PREDICTORS[str(data["predictor"])], CORRECTORS[str(data["corrector"])]
    updates: dict[str, Update] = dict.fromkeys(
        ("predictor", "corrector"), (x, x)
    )  # as in the published code without an update
    if predict is not None:
        run = jax.jit(predict, static_argnums=(1, 5))
        updates["predictor"] = run(score_fn, sde, x, t, jnp.asarray(data["predictor_noise"]), steps)
    if correct is not None:
        run = jax.jit(correct, static_argnums=(1, 5))
        updates["corrector"] = run(score_fn, sde, x, t, jnp.asarray(data["corrector_noise"]), steps, data["snr"])
    return updates


def _published_start(observation: Observation, sde: SDE, prior_noise: Batch) -> Batch:
    """Returns the start of the published code. Its known components have no noise; ours do, see `observed_prior`.

    It multiplies the sample of the prior by the mask of the components before it changes the basis.
    """
    unknown = observation.components(sde.prior_sigma * prior_noise * (1 - observation.mask))
    return observation.image(observation.known * observation.mask + unknown)


def _published_model(data: Any) -> tuple[Config, ScoreFn, SDE]:
    """Returns the configuration, the score function and the SDE of a file, in continuous or in discrete time."""
    description = json.loads(str(data["config"]))
    config = score_sde_config(description["base"].replace(".", "/"), description["overrides"])
    model = score_model_from_config(config)
    return config, model.score_fn(_params(data, "params")), model.sde


def _params(data: Any, prefix: str) -> Any:
    names = [key for key in data.files if key.startswith(f"{prefix}/")]
    return unflatten_dict({key.removeprefix(f"{prefix}/"): jnp.asarray(data[key]) for key in names}, sep="/")


def _tree(network: WideResnet, image_shape: tuple[int, ...]) -> dict[str, list[int]]:
    x = jnp.zeros((1, *image_shape))
    return tree_shapes(jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.ones(1)))["params"])


@jax.jit
def _score(score_fn: ScoreFn, x: Batch, t: jax.Array) -> Batch:
    return score_fn(x, t)


def _given(score: Batch, x: Batch, t: jax.Array) -> Batch:
    return score


def _no_score(x: Batch, t: jax.Array) -> Batch:
    return jnp.zeros_like(x)


def _compared(name: str, got: Any, want: Any) -> Result:
    return Result(name, relative_error(got, want, scale=float(np.abs(want).max())), TOLERANCE)


def _by_example(name: str, got: Any, want: Any) -> Iterator[Result]:
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        yield _compared(f"{name}, example {number}", one, other)
