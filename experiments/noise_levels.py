"""How much of the noise a model leaves unexplained at single noise levels.

Models that are compared see the same test images with the same noise, so that differences are paired by image.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arrays import Batch, PerExample
from build import Run, build
from configs.default import Config
from datasets import source_from_config
from evaluation import MeanEstimate, mean_estimate
from experiments.main_calls import newest_step
from infra.files import read_npz, write_npz
from losses import Objective
from models.score import Params

SIGMAS = (0.012, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BATCH = 64


class Levels(NamedTuple):
    """The terms of test images, of shape [levels, images]."""

    first: np.ndarray
    """|u|^2 / d with u = z + sigma s: the first order."""
    second: np.ndarray
    """The second order, |M - u u^T|_F^2 / d^2, as the unbiased estimator has it."""

    def change_from(self, start: "Levels") -> dict[str, list[MeanEstimate]]:
        """Returns the relative change of each term from another model at each level, with errors paired by image."""
        pairs = {name: (getattr(self, name), getattr(start, name)) for name in self._fields}
        return {
            name: [relative_change(a, b) for a, b in zip(ours, others, strict=True)]
            for name, (ours, others) in pairs.items()
        }


def relative_change(values: Float[np.ndarray, " n"], start: Float[np.ndarray, " n"]) -> MeanEstimate:
    """Returns the ratio of the means minus 1, for paired values, with its standard error to first order."""
    ratio = values.mean() / start.mean()
    return mean_estimate((values - ratio * start) / start.mean())._replace(mean=float(ratio - 1))


def levels_file(workdir: Path) -> Path:
    return workdir / "levels.npz"


def read_levels(workdir: Path) -> Levels:
    stored = read_npz(levels_file(workdir))
    return Levels(*(stored[name] for name in Levels._fields))


def measure_levels(config: Config, workdir: Path, batches: int) -> None:
    """Writes the terms of a run's newest checkpoint to its folder, unless they are there.

    Args:
        batches: of `BATCH` test images each.
    """
    file, made_from = levels_file(workdir), {"step": newest_step(workdir), "batches": batches}
    stored = read_npz(file) if file.exists() else {}
    if any(stored.get(name) != number for name, number in made_from.items()):
        run = build(config)
        levels = terms_at_levels(run, run.load_state(workdir).ema_params, batches)
        write_npz(file, **levels._asdict(), **made_from)


def terms_at_levels(run: Run, params: Params, batches: int) -> Levels:
    """Computes the terms of the second-order objective at `SIGMAS`."""
    objective = Objective(order=2, estimator="unbiased")
    images = source_from_config(run.config, "test").images(np.arange(batches * BATCH))

    @jax.jit
    def terms(params: Params, x0: Batch, t: PerExample, key: Array) -> tuple[PerExample, PerExample]:
        noise = objective.draw_noise(key, run.sde, x0.shape)._replace(t=t)
        values = objective.losses(run.score_fn(params), run.sde, x0, noise)
        return values["first"], values["second_frob"]

    def at_level(sigma: float) -> tuple[np.ndarray, ...]:
        t = run.sde.time_of_log_noise_level(jnp.log(jnp.full(BATCH, sigma)))
        each = []
        for number, batch in enumerate(np.split(images, batches)):
            data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
            each.append(terms(params, run.preprocess(data_key, jnp.asarray(batch)), t, noise_key))
        return tuple(np.concatenate(term).astype(np.float64) for term in zip(*each, strict=True))

    return Levels(*map(np.stack, zip(*map(at_level, SIGMAS), strict=True)))
