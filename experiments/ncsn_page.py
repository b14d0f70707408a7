"""The page docs/results/ncsn.md and its figures, from the samples that `make ncsn` has drawn."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from configs.digits.ncsn import get_config
from evaluation import mean_estimate
from evaluators.extractor import Features, extract_features
from evaluators.fid import Comparison, comparison_from_config
from experiments import fid_nfe
from experiments.ncsn_cases import (
    IMAGE_CASES,
    IMAGE_STEPS,
    IMAGES,
    LEVEL_CASES,
    LONG_CASES,
    PLAIN_CASES,
    POINT_CASES,
    POINT_STEPS,
    POINTS,
    SAMPLING_SEEDS,
    SMALLEST_CASES,
    TRAINING_SEEDS,
    Case,
)
from experiments.pages import Page, wrapped
from experiments.provenance import origin
from infra.commits import commit
from infra.files import read_npz, write_atomic
from infra.image_grid import image_grid, image_png
from report.figures import COLOURS, captioned, figure_png, style_panel
from report.formatting import MISSING
from sources.densities import far_modes

PAGE = Page(Path("docs/results/ncsn.md"), ("points", "digits", "provenance"))

SHOWN = 36
"""The number of images in a grid."""


def write_page(runs: Path, docs: Path) -> None:
    """Writes the page and its figures into the folder of the documentation.

    A dash stands for samples that have not been drawn. The digits are left out if one of their cases is missing.
    """
    pictures = docs / "images"
    write_atomic(pictures / "ncsn_points.png", figure_png(points_figure(runs)))
    points = POINTS_SECTION.format(
        points=POINTS,
        point_rows=table(point_row(runs, case) for case in (*POINT_CASES, *LONG_CASES)),
        sampling_seeds=len(SAMPLING_SEEDS),
        training_seeds=len(TRAINING_SEEDS),
    )
    if all(image_path(runs, case).exists() for case in IMAGE_CASES):
        for name, cases in GRIDS.items():
            write_atomic(pictures / f"ncsn_digits_{name}.png", grids(runs, cases))
        digits = digits_section(runs)
    else:
        digits = "The part with digits has not been run yet."
    commits = {commit(), *(str(each["commit"]) for each in archives(runs))}
    provenance = f"{origin('make ncsn', commits)} Training and sampling took {total_seconds(runs) / 60:.0f} minutes."
    texts = {"points": wrapped(points), "digits": wrapped(digits), "provenance": wrapped(provenance)}
    PAGE.write(texts, docs / "results" / PAGE.path.name)


def digits_section(runs: Path) -> str:
    comparison = comparison_from_config(get_config())
    measure = functools.partial(image_cells, runs, comparison)
    return DIGITS_SECTION.format(
        images=IMAGES,
        image_steps=IMAGE_STEPS,
        smallest_steps=ANNEALED.total_steps(IMAGE_STEPS),
        plain_rows=table([*(level_row(measure, c) for c in PLAIN_CASES), level_row(measure, ANNEALED)]),
        level_rows=table(level_row(measure, case) for case in LEVEL_CASES),
        smallest_rows=table(
            [f"{sigma:g}", *measure(denoised)[:2], *measure(noisy)[:1]]
            for sigma, (denoised, noisy) in SMALLEST_CASES.items()
        ),
    )


def table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- points ---


def weight_of_small_mode(points: Float[np.ndarray, "n 2"]) -> float:
    """Returns the fraction of the points that is nearer to the mode of weight 0.2."""
    return float(np.mean(points.sum(axis=1) < 0))


def point_row(runs: Path, case: Case) -> list[str]:
    cells = [ladder(case), f"{case.total_steps(POINT_STEPS):,}"]
    for kind, seeds in (("exact", SAMPLING_SEEDS), ("network", TRAINING_SEEDS)):
        paths = [points_path(runs, kind, case, seed) for seed in seeds]
        if not all(path.exists() for path in paths):
            cells.append(MISSING)
            continue
        estimate = mean_estimate(np.array([weight_of_small_mode(samples(path)) for path in paths]))
        cells.append(f"{estimate.mean:.4f} ± {estimate.se:.4f}")
    return cells


def points_figure(runs: Path) -> Figure:
    """Draws the data, and the existing samples of one seed without and with annealing."""
    cases = {"one level": POINT_CASES[0], "annealed": next(case for case in POINT_CASES if case.levels == 10)}
    clouds = {"data": np.asarray(far_modes().sample(jax.random.key(0), (POINTS, 2)))}
    for kind, title in (("exact", "exact score"), ("network", "network")):
        paths = {name: points_path(runs, kind, case, 0) for name, case in cases.items()}
        clouds |= {f"{title}, {name}": samples(path) for name, path in paths.items() if path.exists()}
    figure = Figure(figsize=(13.0, 3.1), layout="constrained")
    (panels,) = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)
    for panel, (label, points) in zip(panels, clouds.items(), strict=True):
        panel.plot(points[:, 0], points[:, 1], ".", color=COLOURS[0], markersize=2, alpha=0.3)
        panel.set(xlim=(-11, 11), ylim=(-11, 11))
        panel.text(-1.5, -6, f"{weight_of_small_mode(points):.2f}", fontsize=10)
        style_panel(panel, label, "$x_1$", "$x_2$" if panel is panels[0] else "")
    return figure


# --- digits ---

ANNEALED = next(case for case in LEVEL_CASES if case.levels == 10)
GRIDS = {
    "annealing": {f"one level, {case.smallest:g}": case for case in PLAIN_CASES} | {"annealed, 10 levels": ANNEALED},
    "levels": {f"{case.levels} levels": case for case in LEVEL_CASES},
    "smallest": {f"to {sigma:g}": denoised for sigma, (denoised, _) in SMALLEST_CASES.items()},
}
"""The cases in each picture of digits."""


def grids(runs: Path, cases: Mapping[str, Case]) -> bytes:
    """Returns grids of the first images of each case, side by side, as a PNG file."""
    levels = get_config().data.levels
    shown = {caption: image_grid(samples(image_path(runs, case))[:SHOWN], levels) for caption, case in cases.items()}
    return image_png(captioned(shown))


def image_cells(runs: Path, comparison: Comparison, case: Case) -> list[str]:
    """Returns FID with its error, and the error of the class frequencies."""
    features = extract_features(comparison.extractor, [samples(image_path(runs, case))])
    measured = fid_nfe.quality(features.pool, comparison)
    return [f"{measured.fid:.2f} ± {measured.fid_se:.2f}", f"{class_error(features):.3f}"]


def class_error(features: Features) -> float:
    """Returns half the sum over classes of the absolute differences from equal frequencies."""
    classes = features.logits.shape[1]
    frequencies = np.bincount(features.logits.argmax(axis=1), minlength=classes) / len(features.logits)
    return 0.5 * float(np.abs(frequencies - 1 / classes).sum())


def level_row(measure: Callable[[Case], list[str]], case: Case) -> list[str]:
    return [ladder(case), str(case.total_steps(IMAGE_STEPS)), *measure(case)]


# --- files ---


def ladder(case: Case) -> str:
    return f"{case.levels} levels to {case.smallest:g}" if case.levels > 1 else f"one level, {case.smallest:g}"


def points_path(runs: Path, kind: str, case: Case, seed: int) -> Path:
    """Returns the file of the points that were drawn with the score of this kind, "exact" or "network"."""
    return runs / kind / f"{case.name}_seed{seed}.npz"


def image_path(runs: Path, case: Case) -> Path:
    return runs / "images" / f"{case.name}.npz"


def samples(path: Path) -> np.ndarray:
    return read_npz(path)["samples"]


def archives(runs: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yields all results."""
    for path in sorted([*runs.glob("*/levels*.npz"), *runs.glob("*/time.npz")]):
        yield read_npz(path)


def total_seconds(runs: Path) -> float:
    return sum(float(archive["seconds"]) for archive in archives(runs))


POINTS_SECTION = """
The data are two Gaussians with standard deviation 1 at a distance of 14, with weights 0.2 and 0.8. The noise levels
lie between 20 and 0.5 (VE). The table has the fraction of {points} samples that is nearer to the mode of weight 0.2. ±
is the standard error over seeds: {sampling_seeds} seeds of the sampler for the exact score, and {training_seeds} seeds
of training and sampling for the network (configs/toy/far_modes_ve.py).

| noise levels | steps | exact score | network |
| --- | --- | --- | --- |
{point_rows}

![Samples of the two modes](../images/ncsn_points.png)

The numbers in the figure are the weights of the samples.
"""

DIGITS_SECTION = """
## Digits, without and with annealing

The model is configs/digits/ncsn.py, with noise levels from 5 to 0.01. {images} samples after about {image_steps} steps
and a last step that removes the noise of the smallest level are compared with the training images. FID uses the
features of the classifier trained on the digits, so it is only comparable within this page. ± is the jackknife error
over 16 parts of the samples. The last column is half the sum over the ten classes of the absolute difference between
the frequency of the class, as the classifier sees it, and one tenth. About 0.08 of it is the noise of {images} samples.

| noise levels | steps | FID | error of the classes |
| --- | --- | --- | --- |
{plain_rows}

![Digits without and with annealing](../images/ncsn_digits_annealing.png)

## The number of noise levels

| noise levels | steps | FID | error of the classes |
| --- | --- | --- | --- |
{level_rows}

![Digits by the number of noise levels](../images/ncsn_digits_levels.png)

## The smallest noise level

All ladders have 10 levels from 5 to the smallest level, and {smallest_steps} steps. The last column is without the last
step that removes the noise, as in [SE19]. [SE20] takes that step.

| smallest noise level | FID | error of the classes | FID of noisy samples |
| --- | --- | --- | --- |
{smallest_rows}

![Digits by the smallest noise level](../images/ncsn_digits_smallest.png)
"""
