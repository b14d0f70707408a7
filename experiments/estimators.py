"""Compares the noise of each estimator of orders 2 and 3 with its closed form, and writes docs/results/estimators.md.

The models have 64, 784 and 3072 dimensions. The first two are the demo's first-order digits model and the base model of
`make fashion-orders`, if they have been trained. Otherwise, and for 3072 dimensions, the networks have random weights
and see random images. For each term, theta scales an error that the term sees: theta I in M = sigma^2 J + I for the
second order, and theta (1, ..., 1) in sigma^3 grad tr J for the third. The noise is the standard deviation of the
term's derivative with respect to theta over data, noise and probes.

    python -m experiments.estimators
"""

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array

import configs.digits.ncsnpp
import configs.fashion.ncsnpp
import configs.ve.cifar10_ncsnpp_continuous
from arrays import Batch, PerExample, append_dims
from build import TRAIN_KEY, Run, build
from configs.default import Config
from datasets import source_from_config
from experiments.pages import Page, wrapped
from experiments.provenance import origin
from infra.commits import commit
from infra.workdir import Workdir
from losses import Noise, Objective
from models.score import Params

PAGE = Page(Path("docs/results/estimators.md"), ("noise", "fractions", "provenance"))

SIGMAS = (0.02, 0.2, 2.0, 20.0)
BATCH, BATCHES = 64, 16
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
TERMS = ("second_frob", "second_trace", "third")
ESTIMATORS = ("published", "unbiased")
"""The estimators that have all of these terms."""


class Model(NamedTuple):
    name: str
    run: Run
    params: Params
    images: np.ndarray | None
    """Levels of the training images; None: random images."""


def predicted_noise(d: int, r: float, estimator: str) -> dict[str, float]:
    """Computes the noise of each term for u ~ N(0, r I) given x_t and M = r I, as for a Gaussian's score.

    The published variances are 8 r^2 / d^2, 8 r^2 and 8 r^3 (d + 2) / d^4. The unbiased estimators have 1 / d of each.
    tests/test_unbiased_orders.py derives and checks them.
    """
    published = {
        "second_frob": math.sqrt(8) * r / d,
        "second_trace": math.sqrt(8) * r,
        "third": math.sqrt(8 * r**3 * (d + 2) / d**4),
    }
    return {name: noise / (math.sqrt(d) if estimator == "unbiased" else 1) for name, noise in published.items()}


def measured_noise(model: Model, estimator: str) -> dict[float, tuple[float, dict[str, float]]]:
    """Measures r = E|u|^2 / d, and the noise of each term, at each noise level."""
    run, objective = model.run, Objective(order=3, estimator=estimator)

    @jax.jit
    def derivatives(params: Params, x0: Batch, t: PerExample, key: Array) -> tuple[PerExample, dict[str, PerExample]]:
        noise = objective.draw_noise(key, run.sde, x0.shape)._replace(t=t)
        own_sigma = append_dims(run.sde.alpha_sigma(t)[1], x0)

        def terms(theta: Array) -> dict[str, PerExample]:
            def score_fn(x: Batch, t: PerExample) -> Batch:
                # At x_t the second error has no Jacobian, and the first error has no second derivative.
                slope, curvature = x / own_sigma**2, (x - stop_gradient(x)) ** 2 / (2 * own_sigma**3)
                return run.score_fn(params)(x, t) + theta * (slope + curvature)

            return objective.losses(score_fn, run.sde, x0, noise)

        values, slopes = jax.jvp(terms, (jnp.zeros(()),), (jnp.ones(()),))
        return values["first"], {name: slopes[name] for name in TERMS}

    measured = {}
    for sigma in SIGMAS:
        t = run.sde.time_of_log_noise_level(jnp.log(jnp.full(BATCH, sigma)))
        keys = jax.random.split(run.key(TRAIN_KEY), BATCHES)
        draws = [derivatives(model.params, images_of(model, n), t, key) for n, key in enumerate(keys)]
        each = {name: np.concatenate([values[name] for _, values in draws]).astype(np.float64) for name in TERMS}
        r = float(np.mean(np.concatenate([residual for residual, _ in draws])))
        measured[sigma] = r, {name: float(np.std(values, ddof=1)) for name, values in each.items()}
    return measured


def images_of(model: Model, number: int) -> Batch:
    """Returns a batch of data, as the network sees them."""
    key = jax.random.fold_in(jax.random.key(7), number)
    if model.images is None:
        return jax.random.uniform(key, (BATCH, *model.run.data_shape))
    rows = np.random.default_rng(number).integers(len(model.images), size=BATCH)
    return model.run.preprocess(key, jnp.asarray(model.images[rows]))


def models(digits: Path, fashion: Path) -> list[Model]:
    small = configs.ve.cifar10_ncsnpp_continuous.get_config()
    small.model.nf, small.model.num_res_blocks, small.model.ch_mult = 16, 1, (1, 2)
    return [
        model_of("digits", configs.digits.ncsnpp.get_config(), digits),
        model_of("FashionMNIST", configs.fashion.ncsnpp.get_config(), fashion),
        model_of("CIFAR-10", small, None),
    ]


def model_of(name: str, config: Config, workdir: Path | None) -> Model:
    """Loads the newest checkpoint of a run with its training images, or initialises a network if there is none."""
    run = build(config)
    if workdir is None or not Workdir(workdir).has_checkpoints():
        return Model(f"random network, {name}'s shape", run, jax.jit(run.fresh_state)().params, None)
    source = source_from_config(config, "train")
    images = source.images(np.arange(min(len(source), 4096)))
    return Model(f"{name}, first order", run, run.load_state(workdir).ema_params, images)


def noise_rows(model: Model) -> list[str]:
    """Returns the rows of the table for one model."""
    d, rows = math.prod(model.run.data_shape), []
    by_estimator = {name: measured_noise(model, name) for name in ESTIMATORS}
    for sigma, term in itertools.product(SIGMAS, TERMS):
        r = by_estimator["published"][sigma][0]
        cells = [f"{d}", model.name, f"{sigma:g}", f"{r:.3g}", term]
        noises = {name: measured[sigma][1][term] for name, measured in by_estimator.items()}
        for name, noise in noises.items():
            cells += [f"{predicted_noise(d, r, name)[term]:.3g}", f"{noise:.3g}"]
        cells += [f"{math.sqrt(d):.1f}", f"{noises['published'] / noises['unbiased']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def fraction_rows(model: Model, batches: int = 24) -> list[str]:
    """Returns the noise of the gradient of all terms, and the time of computing it, for parts of the batch."""
    rows = []
    for fraction in FRACTIONS:
        objective = Objective(order=3, estimator="unbiased", high_order_fraction=fraction)

        def loss(params: Params, x0: Batch, noise: Noise, objective: Objective = objective) -> Array:
            return jnp.mean(objective.losses(model.run.score_fn(params), model.run.sde, x0, noise)["total"])

        gradient, values, seconds = jax.jit(jax.grad(loss)), [], []
        for number in range(batches):
            x0 = images_of(model, number)
            noise = objective.draw_noise(jax.random.key(number), model.run.sde, x0.shape)
            started = time.monotonic()
            leaves = jax.block_until_ready(jax.tree.leaves(gradient(model.params, x0, noise)))
            seconds.append(time.monotonic() - started)
            values.append(np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64))
        spread = np.sqrt(np.sum(np.var(values, axis=0, ddof=1)))
        rows.append(f"| {fraction:g} | {spread:.4g} | {float(np.median(seconds[1:])):.3f} |")
    return rows


def page_parts(each: list[Model]) -> dict[str, str]:
    rows = "\n".join(row for model in each for row in noise_rows(model))
    fractions = FRACTIONS_OF_BATCH.format(rows="\n".join(fraction_rows(each[0])), batch=BATCH, model=each[0].name)
    return {
        "noise": wrapped(NOISE.format(rows=rows, draws=BATCH * BATCHES)),
        "fractions": wrapped(fractions),
        "provenance": wrapped(origin("make estimators", [commit()])),
    }


NOISE = """
The published estimators (`training.high_order_estimator=published`) use one probe v, and (u.v)^2 in place of |u|^2. The
unbiased ones use two probes and |u|^2. Each entry is the standard deviation of the derivative of a term with respect to
the size of an error that it sees: theta I in sigma^2 J + I for order 2, and theta (1, ..., 1) in sigma^3 grad tr J for
order 3. Predictions assume that u given x_t is N(0, r I), with the measured r = E|u|^2 / d, and a Gaussian's score.
Then the unbiased estimator has 1 / sqrt(d) of the published noise for all three terms. Each measurement has {draws}
draws. The ratio is the measured published noise divided by the measured unbiased noise; sqrt(d) is its prediction.

| d | model | sigma | r | term | published, predicted | published | unbiased, predicted | unbiased | sqrt(d) | ratio |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""

FRACTIONS_OF_BATCH = """
The gradient of order 3 on a batch of {batch}, unbiased, for {model}: the square root of the trace of its covariance,
and its time. `training.high_order_fraction` sets the part.

| part of the batch | noise of the gradient | seconds |
|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, default=Path("runs/order1"), help="a run of the demo's first order")
    parser.add_argument("--fashion", type=Path, default=Path("runs/fashion_orders/base"), help="a run on FashionMNIST")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    arguments = parser.parse_args()
    PAGE.write(page_parts(models(arguments.digits, arguments.fashion)), arguments.out)


if __name__ == "__main__":
    main()
