"""The density of a model of points over the space they are in, for the report: in one or two dimensions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import parallel
from build import EVAL_KEY, Run
from files import write_npz
from models.score import Params
from passes.density import DensityPass
from sampling import image_keys

MARGIN = 1.2
"""How far beyond the test points the space goes that is shown."""

CELLS_OF_A_LINE = 8
"""In one dimension, for each of `eval.density_grid`."""


def draw_density(
    run: Run, density_pass: DensityPass, params: Params, cells: int, label: str, step: int, workdir: Path
) -> None:
    """density/<label>.npz: the densities of model and data at the cells of a grid, and how far the grid reaches.

    Args:
        cells: along each axis, in two dimensions; nothing is drawn in three or more, or with 0.
    """
    if run.density is None or run.density.dims > 2 or cells == 0:
        return
    source = density_pass.source
    limit = MARGIN * float(np.max(np.abs(source.images(np.arange(len(source))))))
    cells = cells if run.density.dims == 2 else CELLS_OF_A_LINE * cells
    x = grid_points(limit, cells, run.density.dims)
    shape = (cells,) * run.density.dims
    arrays = {"limit": np.asarray(limit), "step": np.asarray(step)}
    arrays["density"] = model_density(run, density_pass, params, x).reshape(shape)
    log_density = run.density.log_density_of_data
    if log_density is not None:
        arrays["data"] = np.exp(np.asarray(log_density(jnp.asarray(x)), np.float64)).reshape(shape)
    if jax.process_index() == 0:
        write_npz(workdir / "density" / f"{label}.npz", **arrays)


def grid_points(limit: float, cells: int, dims: int) -> Float[np.ndarray, "n d"]:
    """The centres of the cells of [-limit, limit]^d; of two dimensions the first varies fastest."""
    side = ((np.arange(cells) + 0.5) / cells * 2 - 1) * limit
    axes = np.meshgrid(*[side] * dims)
    return np.stack(axes, axis=-1).reshape(-1, dims).astype(np.float32)


def model_density(
    run: Run, density_pass: DensityPass, params: Params, x: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """The model's density by the estimator of the likelihood, in its batches, so that it compiles nothing of its own.

    Where the estimate is not finite, so is the density.
    """
    size = run.config.eval.batch_size
    densities = []
    for first in range(0, len(x), size):
        indices = np.minimum(np.arange(first, first + size), len(x) - 1)
        rows = indices[parallel.local_rows(size)]
        estimate = density_pass.estimator(
            run.score_fn(params),
            run.sde,
            parallel.global_array(run.mesh, x[rows]),
            image_keys(run.key(EVAL_KEY), parallel.global_array(run.mesh, rows)),
            run.config.training.smallest_time,
            density_pass.reference,
        )
        terms = parallel.fetch(estimate.terms)
        densities.append(np.exp(-np.sum([np.asarray(term, np.float64) for term in terms.values()], axis=0)))
    return np.concatenate(densities)[: len(x)]
