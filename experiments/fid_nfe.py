r"""Compares samplers by FID and network evaluations on a trained digits model, and writes docs/results/samples.md.

    python -m experiments.fid_nfe --workdir=runs/order1

Each sampler has its own evaluation folder in the workdir. For example, runs/order1/pc2000 has the results of

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/order1 --mode=eval --eval_folder=pc2000 \
        --config.sampling.method=pc --config.sampling.num_steps=1000 --config.eval.num_samples=10000 \
        --config.eval.enable_bpd=False

If the script is interrupted, run the same command again to resume. With --table-only, it writes the page from the
samples that exist.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import run_lib
from build import build
from configs.default import Config
from configs.digits.ncsnpp import get_config
from evaluation import frechet_distance, kernel_distance
from evaluators.cache import params_digest
from evaluators.extractor import Features, Images, extract_features
from evaluators.fid import Comparison, comparison_from_config
from experiments.pages import Page, wrapped
from experiments.provenance import noted_commits, origin
from infra.commits import commit
from infra.console import one_line_errors
from infra.files import read_npz, write_atomic
from infra.startup import set_up_compiler
from report.figures import COLOURS, figure_png
from report.formatting import MISSING

PAGE = Page(Path("docs/results/samples.md"), ("results", "provenance"))

BUDGETS = (10, 20, 50)
FAST: dict[str, dict[str, Any]] = {
    "DPM-Solver++ 2, SDE": {"method": "dpm_solver", "order": 2, "eta": 1.0},
    "DPM-Solver++ 3, SDE": {"method": "dpm_solver", "order": 3, "eta": 1.0},
    "DPM-Solver++ 2, ODE": {"method": "dpm_solver", "order": 2, "eta": 0.0},
    "DPM-Solver++ 3, ODE": {"method": "dpm_solver", "order": 3, "eta": 0.0},
    "Heun, ODE": {"method": "heun"},
}
"""Families of samplers. Each is evaluated with every budget in BUDGETS."""

SLOW: dict[str, dict[str, Any]] = {
    "adaptive, ODE": {"method": "ode"},
    "predictor-corrector, SDE": {"method": "pc", "num_steps": 1000},
}
ABLATION: dict[str, dict[str, Any]] = {
    "DPM-Solver++ 2, SDE, not clipped": FAST["DPM-Solver++ 2, SDE"] | {"max_nfe": 20, "clip_denoised": False},
    "DPM-Solver++ 2, ODE, not clipped": FAST["DPM-Solver++ 2, ODE"] | {"max_nfe": 20, "clip_denoised": False},
}
FOLDERS = {"adaptive, ODE": "ode", "predictor-corrector, SDE": "pc2000"}

GROUPS = 16
"""The number of parts of the samples. The jackknife leaves out one part at a time."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The features of the samples that a sampler has drawn, and the cost of drawing them."""

    label: str
    nfe: int
    seconds: float
    features: Features

    @property
    def n(self) -> int:
        return len(self.features.pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/order1"), help="workdir of the trained model")
    parser.add_argument("--num-samples", type=int, default=10_000, help="samples to draw with each sampler")
    parser.add_argument("--only", help="draw only with samplers whose name contains this text")
    parser.add_argument("--table-only", action="store_true", help="write the page without drawing samples")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[10_000], metavar="N", help="compare the first N samples of each sampler"
    )
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page to write")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/fid_nfe.png"), help="figure to write")
    arguments = parser.parse_args()
    set_up_compiler()
    samplers = all_samplers()
    if not arguments.table_only:
        for label, settings in samplers.items():
            if not arguments.only or arguments.only in label:
                draw(arguments.workdir, label, settings, arguments.num_samples)
    comparison = comparison_from_config(get_config())
    step, digest = newest_model(arguments.workdir)
    drawn = {label: measured(arguments.workdir, label, s, digest, comparison) for label, s in samplers.items()}
    found = {label: each for label, each in drawn.items() if each is not None}
    write_atomic(arguments.plot, figure_png(plot(found, comparison, min(arguments.at))))
    commits = {*noted_commits(arguments.workdir / folder_of(label) for label in found), commit()}
    results = results_part(found, comparison, arguments.at, step)
    PAGE.write({"results": results, "provenance": wrapped(origin("make fid-nfe", commits))}, arguments.out)


def all_samplers() -> dict[str, dict[str, Any]]:
    """Returns the fields of `sampling` for each sampler by name. The cheap samplers come first."""
    fast = {f"{label}, {n}": settings | {"max_nfe": n} for n in BUDGETS for label, settings in FAST.items()}
    return fast | ABLATION | SLOW


def folder_of(label: str) -> str:
    """Returns the name of a sampler's evaluation folder in the workdir."""
    return FOLDERS.get(label, label.replace("DPM-Solver++ ", "dpm").replace(", ", "_").replace(" ", "_").lower())


def draw(workdir: Path, label: str, settings: Mapping[str, Any], num_samples: int) -> None:
    """Runs the evaluation of one sampler. Samples that exist are not drawn again."""
    print(f"{label}: {folder_of(label)}", flush=True)
    config: Config = get_config()
    config.sampling.update(settings)
    config.eval.update(enable_bpd=False, enable_sampling=True, num_samples=num_samples)
    run_lib.evaluate(config, workdir.absolute(), folder_of(label))


def newest_model(workdir: Path) -> tuple[int, str]:
    """Returns the step of the newest checkpoint of a run, and the digest of its averaged parameters."""
    state = build(get_config()).load_state(workdir)
    return int(state.step), params_digest(state.ema_params)


def measured(
    workdir: Path, label: str, settings: Mapping[str, Any], digest: str, comparison: Comparison
) -> Drawn | None:
    """Returns the stored samples of a sampler, or None if there are none.

    If several sets of rounds were drawn with these settings and parameters, the longest set is read.
    """
    longest: list[Path] = []
    for path in (workdir / folder_of(label)).glob("samples-*/settings.json"):
        stored = json.loads(path.read_text())
        if stored["parameters"] != digest or any(stored["sampling"].get(k, v) != v for k, v in settings.items()):
            continue
        numbered = (path.parent / f"round{number}.npz" for number in itertools.count())
        longest = max(longest, list(itertools.takewhile(Path.exists, numbered)), key=len)
    if not longest:
        return None
    rounds = [read_npz(path) for path in longest]
    images: Images = np.concatenate([each["samples"] for each in rounds])
    seconds = float(sum(each["seconds"] for each in rounds))
    return Drawn(
        label,
        round(np.mean([each["nfe"] for each in rounds])),
        seconds,
        extract_features(comparison.extractor, [images]),
    )


class Quality(NamedTuple):
    """FID and KID of samples, with standard errors."""

    fid: float
    fid_se: float
    kid: float
    kid_se: float


def quality(pool: np.ndarray, comparison: Comparison) -> Quality:
    """Returns FID with its jackknife error over GROUPS parts of the samples, and KID with its standard error."""
    part = np.arange(len(pool)) * GROUPS // len(pool)
    left_out = [fid(pool[part != k], comparison) for k in range(GROUPS)]
    assert comparison.statistics.pool is not None
    kid = kernel_distance(pool, comparison.statistics.pool)
    return Quality(fid(pool, comparison), float(np.std(left_out) * np.sqrt(GROUPS - 1)), kid.mean, kid.se)


def fid(pool: np.ndarray, comparison: Comparison) -> float:
    pool = np.asarray(pool, np.float64)
    real = comparison.statistics
    return frechet_distance(pool.mean(axis=0), np.cov(pool, rowvar=False), real.mu, real.sigma)


def results_part(found: Mapping[str, Drawn], comparison: Comparison, at: Sequence[int], step: int) -> str:
    headers = ["sampler", "NFE", *(f"FID of {n:,}" for n in at), "KID of all", "drawn", "ms for each"]
    rows = [row(each, comparison, at) for each in found.values()]
    text = RESULTS.format(
        table="\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ["---"] * len(headers), *rows)),
        best="; ".join(best_of(found, comparison, n) for n in at if sum(d.n >= n for d in found.values()) > 1),
        step=step,
        real=comparison.statistics.n,
        groups=GROUPS,
    )
    return wrapped(text)


def best_of(found: Mapping[str, Drawn], comparison: Comparison, n: int) -> str:
    fids = {label: fid(each.features.pool[:n], comparison) for label, each in found.items() if each.n >= n}
    best = min(fids, key=lambda label: fids[label])
    return f"{fids[best]:.3f} for {n:,} samples ({best})"


def row(drawn: Drawn, comparison: Comparison, at: Sequence[int]) -> list[str]:
    measured_at = {n: quality(drawn.features.pool[:n], comparison) for n in at if n <= drawn.n}
    fids = [f"{measured_at[n].fid:.3f} ± {measured_at[n].fid_se:.3f}" if n in measured_at else MISSING for n in at]
    everything = quality(drawn.features.pool, comparison)
    if not measured_at:
        fids[0] = f"({everything.fid:.1f} ± {everything.fid_se:.1f} of {drawn.n:,})"
    kid = f"{everything.kid:.3f} ± {everything.kid_se:.3f}"
    return [drawn.label, f"{drawn.nfe:,}", *fids, kid, f"{drawn.n:,}", f"{1000 * drawn.seconds / drawn.n:.0f}"]


def plot(found: Mapping[str, Drawn], comparison: Comparison, n: int) -> Figure:
    """Plots FID against network evaluations, for the first n samples of each sampler, or for all if there are fewer."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    panel = figure.subplots()
    lines = {label: [f"{label}, {budget}" for budget in BUDGETS] for label in FAST}
    lines |= {label: [label] for label in SLOW}
    for colour, marker, (label, names) in zip((*COLOURS, "#30363d"), "osD^v*P", lines.items(), strict=True):
        points = [found[name] for name in names if name in found]
        qualities = [quality(each.features.pool[:n], comparison) for each in points]
        fewest = min((each.n for each in points), default=n)
        panel.errorbar(
            [each.nfe for each in points],
            [q.fid for q in qualities],
            yerr=[q.fid_se for q in qualities],
            label=label if fewest >= n else f"{label} ({fewest:,} samples)",
            color=colour,
            marker=marker,
            linestyle="--" if "ODE" in label else "-",
            markersize=8 if len(names) == 1 else 5,
        )
    _style(panel, n)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _style(panel: Axes, n: int) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("network evaluations for each image")
    panel.set_ylabel(f"FID of {n:,} samples, classifier features")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(color="#e3e6ea", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


RESULTS = """
This page has FID and KID of samples from the first-order digits model of the demo (VE, configs/digits/ncsnpp.py, {step}
steps, averaged parameters), compared with the {real} training images. A classifier trained on the digits computes the
features, so the values are only comparable with each other. FID falls with the number of samples, so each column
compares equal numbers of samples. ± is the jackknife error over {groups} parts of the samples for FID, and the error of
`evaluation.kernel_distance` for KID. The number after a sampler's name is its budget of network evaluations. SDE means
`sampling.eta=1`. The fast samplers clip denoised images to the data's range, except where the name says "not clipped".
The adaptive solver and predictor-corrector sampling (1000 steps, reverse diffusion and Langevin, snr 0.16) follow the
published code.

{table}

The best FID is {best}.

![FID against evaluations](../images/fid_nfe.png)
"""


if __name__ == "__main__":
    with one_line_errors():
        main()
