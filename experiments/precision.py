"""Measures how the losses, their gradients and bits/dim change with bfloat16, and writes docs/results/precision.md.

The model is the demo's first-order digits model, trained in float32. Both precisions use the same parameters, images,
noise and probes. If the script is interrupted, run the same command again to resume.

    python -m experiments.precision
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import configs.digits.ncsnpp
import run_lib
from arrays import Batch
from build import TRAIN_KEY, Run, build
from configs.default import Config
from datasets import source_from_config
from experiments.pages import Page, wrapped
from experiments.provenance import note_commit, noted_commits, origin
from infra.checkpoints import params_digest
from infra.commits import commit
from infra.console import one_line_errors
from infra.files import write_atomic
from infra.results import bits_per_dim_of_images
from losses import ORDERS, TERMS, Noise, Objective
from models.score import Params

PAGE = Page(Path("docs/results/precision.md"), ("results", "provenance"))

DTYPES = ("float32", "bfloat16")
BATCH, DRAWS, REPEATS = 64, 16, 2

Gradient = Callable[[Params, Batch, Noise, Float[Array, " orders"]], tuple[Params, dict[str, Array]]]


def config_with(dtype: str) -> Config:
    config = configs.digits.ncsnpp.get_config()
    config.model.dtype = dtype
    return config


def gradient_of(run: Run) -> Gradient:
    """Returns a compiled function: the gradient of a weighted sum of the losses of each order, and the mean losses."""
    objective = Objective(order=3)

    def loss(params: Params, x0: Batch, noise: Noise, weights: Float[Array, " orders"]) -> tuple[Array, dict]:
        terms = objective.losses(run.score_fn(params), run.sde, x0, noise)
        losses = {
            f"order {order}": sum(
                jnp.mean(terms[name]) for name in terms if name in TERMS and TERMS[name].order == order
            )
            for order in ORDERS
        }
        return weights @ jnp.stack([jnp.asarray(value) for value in losses.values()]), losses

    return jax.jit(jax.grad(loss, has_aux=True))


def draw_row(runs: Mapping[str, Run], gradients: Mapping[str, Gradient], params: Params, number: int) -> dict:
    """Returns the losses in both precisions for one draw of images, noise and probes, and compares their gradients."""
    run = runs["float32"]
    key = jax.random.fold_in(run.key(TRAIN_KEY), number)
    source = source_from_config(run.config, "test")
    rows = np.random.default_rng(number).choice(len(source), BATCH, replace=False)
    x0 = run.preprocess(key, jnp.asarray(source.images(rows)))
    noise = Objective(order=3).draw_noise(jax.random.fold_in(key, 1), run.sde, x0.shape)
    row: dict = {"draw": number}
    for place, order in enumerate(ORDERS):
        weights = jnp.zeros(len(ORDERS)).at[place].set(1.0)
        vectors, losses = {}, {}
        for dtype, gradient in gradients.items():
            tree, values = gradient(params, x0, noise, weights)
            vectors[dtype] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
            losses[dtype] = float(values[f"order {order}"])
        row[f"order {order}"] = losses | compared(vectors["float32"], vectors["bfloat16"])
    return row


def compared(true: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Compares a gradient with the true one: their distance and norms relative to the true norm, and their cosine."""
    norm, other_norm = np.linalg.norm(true), np.linalg.norm(other)
    return {
        "distance": float(np.linalg.norm(other - true) / norm),
        "norm_ratio": float(other_norm / norm),
        "cosine": float(true @ other / (norm * other_norm)),
    }


def measured_draws(runs: Mapping[str, Run], params: Params, digest: str, path: Path) -> list[dict]:
    """Returns the rows of all draws, and writes each to the file as soon as it is known.

    Rows of other parameters are measured again.

    Args:
        digest: of the parameters.
    """
    stored = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in stored if row.get("parameters") == digest]
    gradients = {dtype: gradient_of(run) for dtype, run in runs.items()}
    for number in range(len(rows), DRAWS):
        rows.append(draw_row(runs, gradients, params, number) | {"parameters": digest})
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        note_commit(path.parent)
    return rows


def bits_per_dim(config: Config, model: Path, digest: str, workdir: Path) -> np.ndarray:
    """Returns bits/dim of each test image for each repeat, [repeats, images].

    Args:
        digest: of the parameters of the model.
    """
    config.eval.checkpoint, config.eval.num_repeats = str(model), REPEATS
    config.eval.enable_bpd, config.eval.enable_sampling, config.eval.enable_loss = True, False, False
    run_lib.evaluate(config, workdir, "eval")
    files = [path for path in (workdir / "eval").glob("*.json") if not path.stem.endswith("_seconds")]
    results = [json.loads(path.read_text()) for path in files]
    (result,) = (each for each in results if each["parameters"] == digest)
    stored = workdir / "eval" / result["bpd"]["values"]
    return np.stack([bits_per_dim_of_images(stored, repeat) for repeat in range(REPEATS)])


def with_error(values: np.ndarray, digits: str = ".2g") -> str:
    """Formats the mean and its standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):{digits}} ± {error:.2g}"


def loss_rows(rows: list[dict]) -> str:
    lines = []
    for order in ORDERS:
        each = [row[f"order {order}"] for row in rows]
        true, other = (np.array([values[dtype] for values in each]) for dtype in DTYPES)
        cells = [
            f"{order}", with_error(true, ".4g"), with_error(other - true),
            f"{100 * np.mean(other - true) / np.mean(true):.2g} %",
            with_error(np.array([values["distance"] for values in each]), ".3g"),
            with_error(np.array([values["norm_ratio"] for values in each]), ".4f"),
            with_error(np.array([values["cosine"] for values in each]), ".5f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_parts(rows: list[dict], values: Mapping[str, np.ndarray], commits: Iterable[str]) -> dict[str, str]:
    true, other = (values[dtype].mean(0) for dtype in DTYPES)
    by_repeat = np.mean(values["bfloat16"] - values["float32"], axis=1)
    results = RESULTS.format(
        losses=loss_rows(rows), draws=len(rows), batch=BATCH, images=len(true), repeats=REPEATS,
        true=with_error(true, ".4f"), other=with_error(other, ".4f"), change=with_error(other - true, "+.5f"),
        absolute=f"{np.mean(np.abs(other - true)):.2g}",
        by_repeat=" and ".join(f"{value:+.5f}" for value in by_repeat),
    )  # fmt: skip
    return {"results": wrapped(results), "provenance": wrapped(origin("make precision", commits))}


RESULTS = """
These are the differences for the first-order digits model of the demo, trained in float32.
Both precisions have the same parameters, images, noise and probes.

## Losses and their gradients

{draws} draws of {batch} test images, times, noise and probes; ± is the standard error over draws. The loss of an order
is the sum of its terms. The gradient is the gradient of this loss alone. "Distance" is |g16 - g32| / |g32|, and "norm"
is |g16| / |g32|.

| order | loss, float32 | change | relative | distance | norm | cosine |
|---|---|---|---|---|---|---|
{losses}

## Bits/dim

{images} test images, the mean of {repeats} draws of dequantization noise and probes; ± is the standard error over
images.

| float32 | bfloat16 | change, paired by image | mean absolute change of an image |
|---|---|---|---|
| {true} | {other} | {change} | {absolute} |

The change with each draw of the noise: {by_repeat}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/order1"), help="a run of the demo's first order")
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="folder of the measurements")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    arguments = parser.parse_args()
    runs = {dtype: build(config_with(dtype)) for dtype in DTYPES}
    params = runs["float32"].load_state(arguments.model).ema_params
    digest = params_digest(params)
    rows = measured_draws(runs, params, digest, arguments.runs / "draws.jsonl")
    values = {
        dtype: bits_per_dim(run.config, arguments.model, digest, arguments.runs / dtype) for dtype, run in runs.items()
    }
    PAGE.write(page_parts(rows, values, {*noted_commits([arguments.runs]), commit()}), arguments.out)


if __name__ == "__main__":
    with one_line_errors():
        main()
