"""The report page, its figures and tables, from complete, damaged and missing files of a run."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import run_lib
from infra.console import text_table
from infra.files import write_npz
from infra.image_grid import image_grid, save_grid
from infra.metrics import MetricCurve, read_metrics
from losses import TERMS
from report.comparison import comparison_table
from report.content import Table
from report.diagnostics_figures import diagnostics_figure
from report.figures import TITLES, captioned, figure_png, loss_figure, seconds_figure
from report.formatting import duration, number, with_error
from report.page import render, write_report
from report.run_files import read_run

SECTIONS = ["Loss", "Likelihood", "Sample quality", "Samples", "Time", "Configuration", "Environment"]

BPD = {
    "mean": 2.0523, "se": 0.0214, "ci95": [2.0104, 2.0942], "n": 359, "repeats": 2, "nfe": 129.0, "seconds": 38.2,
    "solver": "rk4_log", "steps": 32, "t_min": 1e-5, "dequantization": "uniform", "probe": "rademacher",
    "num_probes": 1, "data": "digits, test", "terms": {"prior": 7.5648, "divergence": -9.6, "levels": 4.0875},
}  # fmt: skip
SAMPLES = {
    "fid": 1.2346, "fid_features": "classifier", "is_mean": 7.913, "is_std": 0.218, "kid_mean": 0.0412,
    "kid_se": 0.0113, "n": 1000, "sampler": "pc", "nfe": 401, "seconds": 51.0, "statistics_data": "digits, train",
    "warning": "few samples",
}  # fmt: skip


def record(step: int, split: str = "train", order: int = 3, **values: float) -> str:
    losses = {"total": 3.0 / step, "first": 1.0 / step}
    if order > 1:
        losses |= {"second_frob": 1.0 / step, "second_trace": 0.5 / step}
    if order > 2:
        losses |= {"third": 0.5 / step}
    times = {"steps_per_second": 10.0, "seconds": step / 10, "grad_norm": 0.3} if split == "train" else {}
    return json.dumps({"step": step, "split": split, "order": order, **losses, **times, **values}) + "\n"


def write_run(workdir: Path, order: int = 3) -> Path:
    """Writes all files of a run."""
    (workdir / "train").mkdir(parents=True)
    lines = [record(step, split, order) for step in range(100, 2001, 100) for split in ("train", "test")]
    (workdir / "train" / "metrics.jsonl").write_text("".join(lines))
    training = {"score_matching_order": order, "note": "<b>&amp;</b>"}
    write_json(workdir / "config.json", {"seed": 42, "training": training})
    environment = {"versions": {"jax": "0.10.2"}, "device": "cpu", "devices": 1, "hosts": 1, "num_parameters": 190321}
    environment["commits"] = ["1a2b3c4", "5d6e7f8"]
    write_json(workdir / "environment.json", environment)
    result = {"checkpoint_step": 2000, "order": order, "ema": True, "bpd": BPD, "samples": SAMPLES}
    write_json(workdir / "eval" / "step_2000.json", result)
    images = np.random.default_rng(order).integers(0, 17, (16, 8, 8, 1)).astype(np.uint8)
    for step in (1000, 2000):
        write_npz(workdir / "samples" / f"step_{step}.npz", samples=images, levels=17, step=step)
    write_npz(workdir / "samples" / "data.npz", samples=images[::-1], levels=17, step=0)
    return workdir


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


class Page(html.parser.HTMLParser):
    """The text of a page by section, and its images. Raises AssertionError if tags do not match."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {"": ""}
        self.links: list[str] = []
        self.images: list[Image.Image] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value or "")
        if tag == "img":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(self.links[-1].split(",")[1]))))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open and self.open[-1] == "h2":
            self.sections[data] = ""
        else:
            self.sections[list(self.sections)[-1]] += data + " "


def page_of(workdir: Path, **arguments: Any) -> Page:
    write_report(workdir, **arguments)
    return Page((workdir / "report.html").read_text())


def words(text: str) -> str:
    return " ".join(text.split())


# --- the page ---


def test_report_has_every_section_with_its_numbers(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert list(page.sections) == ["", *SECTIONS]
    assert "run, order 3: 2,000 steps, 190,321 parameters, 2.052 ± 0.021 bits/dim, FID 1.235" in words(
        page.sections[""]
    )
    likelihood = words(page.sections["Likelihood"])
    assert "2.052 ± 0.021 2.0104 to 2.0942 359 2 129 38.2 s" in likelihood
    assert "prior divergence levels 3 2,000 averaged 7.565 -9.600 4.088" in likelihood
    assert "rk4_log, 32 steps 1e-05 1 rademacher uniform digits, test" in likelihood
    quality = words(page.sections["Sample quality"])
    assert "1.235 classifier 7.91 ± 0.22 0.041 ± 0.011 1,000 pc 401 51.0 s digits, train" in quality
    assert "few samples." in quality
    assert "run, order 3, step 2,000 real images" in words(page.sections["Samples"])
    assert "2,000 3.3 min 0.1 0.1 0.1" in words(page.sections["Time"])
    assert "training.score_matching_order 3" in words(page.sections["Configuration"])
    assert "jax 0.10.2 device cpu" in words(page.sections["Environment"])
    assert "commits 1a2b3c4, 5d6e7f8" in words(page.sections["Environment"])


def test_report_needs_no_other_file(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert len(page.images) == 4  # losses, samples, real images, seconds
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "://" not in (tmp_path / "run" / "report.html").read_text()


def test_report_loads_no_solvers_or_networks():
    heavy = ("diffrax", "orbax", "flax", "optax", "grain", "models")
    program = f"import sys, report.page; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_report_leaves_png_copies_of_its_own_figures_only(tmp_path):
    names, figures = ("loss", "samples", "seconds"), write_run(tmp_path / "run") / "figures"
    figures.mkdir()
    (figures / "control.png").write_bytes(b"of a run that an earlier report was compared with")
    write_report(tmp_path / "run")
    assert {path.name for path in figures.iterdir()} == {f"{name}.png" for name in names}
    for name in names:
        with Image.open(tmp_path / "run" / "figures" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert image.width > 300


def test_text_is_escaped(tmp_path):
    page = page_of(write_run(tmp_path / "a<i>&b"))
    assert words(page.sections[""]).startswith("a<i>&b a<i>&b a<i>&b, order 3: ")
    assert "training.note <b>&amp;</b>" in words(page.sections["Configuration"])


def test_report_of_an_empty_folder_says_what_is_missing(tmp_path):
    page = page_of(tmp_path)
    assert list(page.sections) == ["", *SECTIONS]
    assert "nothing recorded yet" in page.sections[""]
    for section in SECTIONS[:5]:
        assert re.search(r"No .* yet\.", page.sections[section])
    assert "No configuration" in page.sections["Configuration"]
    assert not page.images
    with pytest.raises(FileNotFoundError, match=r"none .*does not exist"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    "missing", ["train/metrics.jsonl", "config.json", "environment.json", "eval/step_2000.json", "samples/data.npz"]
)
def test_report_does_without_any_one_file(tmp_path, missing):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    assert list(page_of(run).sections) == ["", *SECTIONS]


@pytest.mark.parametrize("part", ["bpd", "samples"])
def test_results_may_lack_a_part(tmp_path, part):
    run = write_run(tmp_path / "run")
    result = {"checkpoint_step": 2000, "order": 3, part: {"bpd": BPD, "samples": SAMPLES}[part]}
    write_json(run / "eval" / "step_2000.json", result)
    page = page_of(run)
    assert ("No evaluation" in page.sections["Likelihood"]) == (part == "samples")
    assert ("No evaluation" in page.sections["Sample quality"]) == (part == "bpd")


def test_results_may_be_nearly_empty(tmp_path):
    write_json(tmp_path / "eval" / "step_1.json", {"checkpoint_step": 1, "bpd": {"mean": 2.5}, "samples": {}})
    page = page_of(tmp_path)
    assert "2.500" in page.sections["Likelihood"]
    assert "nan" not in page.sections["Sample quality"]


def test_loss_over_all_test_images_is_shown(tmp_path):
    write_json(tmp_path / "eval" / "a.json", {"checkpoint_step": 1, "loss": {"total": {"mean": 0.5, "se": 0.012}}})
    assert "0.500 ± 0.012" in page_of(tmp_path).sections["Loss"]


def test_unreadable_files_are_named_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text('{"seed": ')
    (run / "samples" / "step_2000.npz").write_bytes(b"PK")
    page = page_of(run)
    assert "config.json" in page.sections["Unreadable files"]
    assert "step_2000.npz" in page.sections["Unreadable files"]
    assert "step 1,000" in page.sections["Samples"]


def test_evaluations_of_one_step_are_told_apart_by_their_files(tmp_path):
    run = write_run(tmp_path / "run")
    assert "step_2000.json" not in page_of(run).sections["Likelihood"]
    write_json(run / "eval_tight" / "step_2000.json", {"checkpoint_step": 2000, "order": 3, "bpd": BPD})
    likelihood = page_of(run).sections["Likelihood"]
    assert "eval/step_2000.json" in likelihood
    assert "eval_tight/step_2000.json" in likelihood
    write_json(run / "eval" / "deeper" / "step_2000.json", {"checkpoint_step": 2000, "order": 3, "bpd": BPD})
    assert "eval/deeper/step_2000.json" in page_of(run).sections["Likelihood"]


def test_the_summary_names_the_file_if_there_are_several_evaluations(tmp_path):
    """The summary prefers the evaluation in eval/, then the newest one of a file."""
    run = write_run(tmp_path / "run")
    result = {"checkpoint_step": 2000, "order": 3}
    for folder, fid in (("fast", 2.5), ("quick", 3.5)):
        write_json(run / folder / "step_2000.json", result | {"samples": SAMPLES | {"fid": fid}})
    write_json(run / "eval" / "step_1000.json", result | {"checkpoint_step": 1000, "samples": SAMPLES | {"fid": 9.5}})
    assert "FID 1.235 (classifier features) of eval/step_2000.json" in page_of(run).sections[""]
    earlier = [{"samples": SAMPLES | {"fid": 7.5, "n": 5}}]
    write_json(run / "eval" / "step_2000.json", result | {"bpd": BPD, "samples": SAMPLES, "earlier": earlier})
    assert "FID 1.235 (classifier features) of eval/step_2000.json" in page_of(run).sections[""]
    (run / "eval" / "step_2000.json").unlink()
    assert "FID 3.500 (classifier features) of quick/step_2000.json" in page_of(run).sections[""]


def test_the_gap_between_ode_and_bound_is_taken_at_the_same_point(tmp_path):
    """The ODE at x_tmin compares with the bound without start-time correction, of the same images, and no other."""
    part = {"se": 0.1, "n": 8, "data": "digits", "dequantization": "uniform", "terms": {}}
    ode, bound = part | {"solver": "dopri5"}, part | {"bound": "dsm", "num_times": 10}
    results = {
        "ode": {"bpd": ode | {"mean": 2.0}, "bpd_tmin": ode | {"mean": 2.125}},
        "bound": {"bpd_tmin": bound | {"mean": 2.1, "num_starts": 0}, "bpd": bound | {"mean": 2.1, "num_starts": 0}},
        "others": {"bpd_tmin": bound | {"mean": 2.3, "num_starts": 0, "n": 9}},
        "tighter": {"bpd_tmin": ode | {"mean": 1.9, "importance_samples": 20}},
        "later": {"bpd_tmin": bound | {"mean": 2.2, "num_starts": 0, "t_min": 0.1}},
    }
    for name, content in results.items():
        write_json(tmp_path / "eval" / f"{name}.json", {"checkpoint_step": 5} | content)
    text = words(" ".join(page_of(tmp_path).sections.values()))
    assert text.count("+0.0250") == 1
    assert "at x_tmin dopri5 +0.0250" in text
    gaps = text.split("Gap between the ODE and the bound")[1]
    assert gaps.count("dopri5") == 1


def test_the_error_of_the_gap_is_paired_by_image(tmp_path):
    """Values of images differ by 1 bit/dim, their gaps by 0.01; repeats of an image are averaged first."""
    values = np.array([[2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0]])
    gaps = np.array([[0.02, 0.01, 0.03, 0.02], [0.02, 0.03, 0.03, 0.02]])
    part = {"se": 0.5, "n": 4, "data": "digits", "dequantization": "uniform", "terms": {}, "repeats": 2}
    for name, each, kind in (
        ("ode", values + gaps, {}),
        ("bound", values, {"bound": "dsm", "num_times": 1, "num_starts": 0}),
    ):
        folder = tmp_path / "eval" / name
        for repeat in range(2):
            for batch in range(2):
                write_npz(folder / f"repeat{repeat}_batch{batch}.npz", bpd=each[repeat, 2 * batch : 2 * batch + 2])
        result = {"bpd_tmin": part | kind | {"mean": float(each.mean()), "values": name}}
        write_json(tmp_path / "eval" / f"{name}.json", {"checkpoint_step": 5} | result)
    error = np.std([0.02, 0.02, 0.03, 0.02], ddof=1) / 2
    assert f"+0.0225 ± {error:.4f}" in words(" ".join(page_of(tmp_path).sections.values()))


def test_samples_of_another_evaluation_say_so(tmp_path):
    run = write_run(tmp_path / "run")
    images = np.zeros((4, 8, 8, 1), np.uint8)
    write_npz(run / "samples" / "step_2000_fast.npz", samples=images, levels=17, step=2000)
    assert "step 2,000 real images" in words(page_of(run).sections["Samples"])
    (run / "samples" / "step_2000.npz").unlink()
    assert "step 2,000, step_2000_fast real images" in words(page_of(run).sections["Samples"])


def test_names_of_folders_are_not_parsed_as_formulas(tmp_path):
    run = write_run(tmp_path / "$^$")
    density = np.ones(16)
    write_npz(run / "density" / "step_2000.npz", density=density, data=density, limit=1.0, step=2000)
    assert "Density" in page_of(run).sections


def test_runs_side_by_side(tmp_path):
    first, third = write_run(tmp_path / "a" / "_$x^", order=1), write_run(tmp_path / "b" / "_$x^", order=3)
    page = page_of(third, others=[first])
    assert "_$x^, order 3: " in page.sections[""]
    assert "_$x^ (2), order 1: " in page.sections[""]
    assert words(page.sections["Likelihood"]).count("2.052 ± 0.021") == 2
    assert "training.score_matching_order 3 1" in words(page.sections["Configuration"].split("All ")[0])
    assert len(page.images) == 5  # two grids of samples
    assert not (first / "report.html").exists()


# --- files that the page is made from ---


def test_later_records_of_a_step_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        record(1, total=5.0),
        record(2, total=4.0),
        record(3, total=9.0),
        record(2, total=1.0),
        record(3, total=2.0),
    ]
    path.write_text("".join(lines) + '{"step": 4, "split": "tr\n' + "null\n" + record(5, "test", total=0.5))
    metrics = read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics["train"]["total"].steps, [1, 2, 3])
    np.testing.assert_array_equal(metrics["train"]["total"].values, [5, 1, 2])
    np.testing.assert_array_equal(metrics["test"]["total"].values, [0.5])


@pytest.mark.parametrize(
    ("splits_and_steps", "expected"),
    [
        ("train 20, test 20, train 40, test 40, train 60, test 60, start 5, train 15", {"train": [15], "start": [5]}),
        ("start 5, train 20, test 20, train 30, start 25, train 30, train 40, test 40", None),
    ],
)
def test_records_after_the_step_of_a_later_record_do_not_count(splits_and_steps, expected, tmp_path):
    """A run that starts again from an earlier checkpoint, or from none, overwrites its later steps."""
    records = [name.split() for name in splits_and_steps.split(", ")]
    (tmp_path / "metrics.jsonl").write_text("".join(record(int(step), split, total=1.0) for split, step in records))
    curves = read_metrics(tmp_path)
    steps = {split: curve["total"].steps.tolist() for split, curve in curves.items()}
    assert steps == (expected or {"start": [5, 25], "train": [20, 30, 40], "test": [20, 40]})


def test_terms_may_come_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(record(1, order=1) + record(2, order=3))
    train = read_metrics(tmp_path)["train"]
    np.testing.assert_array_equal(train["first"].steps, [1, 2])
    np.testing.assert_array_equal(train["third"].steps, [2])


def test_results_know_the_time_of_training(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.results[0]["train_seconds"] == 200.0
    assert run.order == 3
    assert run.samples is not None
    assert run.samples.step == 2000


def test_smoothing_keeps_constants_and_leaves_out_gaps():
    values = np.full(200, 3.0)
    values[50] = np.nan
    smooth = MetricCurve(np.arange(200), values).smoothed()
    assert np.isnan(smooth[50])
    np.testing.assert_allclose(np.delete(smooth, 50), 3.0)
    noisy = MetricCurve(np.arange(200), np.random.default_rng(0).normal(size=200))
    assert noisy.smoothed().std() < 0.5


def curves(**values: np.ndarray) -> dict[str, dict[str, MetricCurve]]:
    return {"train": {name: MetricCurve(np.arange(1, len(v) + 1), v) for name, v in values.items()}}


def test_loss_figure_has_a_panel_for_each_term():
    falling = 1 / np.arange(1.0, 30)
    first = curves(total=falling, first=falling)
    third = curves(total=falling, first=falling, second_frob=falling, second_trace=-falling, third=falling)
    figure = loss_figure({"a": first, "b": third})
    panels = {axes.get_title("left"): axes for axes in figure.axes if axes.axison}
    assert len(panels) == 5
    assert len(panels["first order: score"].lines) == 4  # raw and smoothed, of both runs
    assert len(panels["third order: gradient of the trace"].lines) == 2
    assert panels["total"].get_yscale() == "log"
    assert panels["second order: trace"].get_yscale() == "linear"  # not all positive
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in panels.values())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ["a", "b"]


def test_loss_figure_of_first_order_has_one_loss():
    figure = loss_figure({"a": curves(total=np.ones(5), first=np.ones(5), grad_norm=np.ones(5))})
    assert [axes.get_title("left") for axes in figure.axes] == ["first order: score", "gradient norm, before clipping"]


def test_a_new_term_of_the_loss_appears_by_itself(tmp_path, monkeypatch):
    """Titles come from `losses.TERMS` in order, for curves and tables."""
    assert [title for name, title in TITLES.items() if name in TERMS] == [term.title for term in TERMS.values()]
    monkeypatch.setitem(TITLES, "fourth", "fourth order")
    figure = loss_figure({"a": curves(first=np.ones(5), fourth=np.ones(5))})
    assert [axes.get_title("left") for axes in figure.axes] == ["first order: score", "fourth order"]
    write_json(tmp_path / "eval" / "a.json", {"checkpoint_step": 1, "loss": {"fourth": {"mean": 0.5, "se": 0.012}}})
    assert "fourth order 1 0.500 ± 0.012" in words(page_of(tmp_path).sections["Loss"])


def test_figures_survive_numbers_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "train" / "metrics.jsonl").open("a") as lines:
        lines.write(record(2100, total=float("nan"), first=float("inf")))
    assert len(page_of(run).images) == 4


def test_seconds_are_the_inverse_of_the_rate():
    figure = seconds_figure({"a": curves(steps_per_second=np.array([2.0, 4.0]))})
    np.testing.assert_allclose(np.asarray(figure.axes[0].lines[0].get_ydata()), [0.5, 0.25])


def test_compilation_does_not_flatten_the_seconds():
    figure = seconds_figure({"a": curves(steps_per_second=np.array([0.01, 10, 10, 10, 10.0]))})
    np.testing.assert_allclose(figure.axes[0].get_ylim(), (0, 0.3))


def test_grid_enlarges_pixels_to_squares(tmp_path):
    images = np.arange(5 * 8 * 8).reshape(5, 8, 8, 1).astype(np.uint8) % 17
    save_grid(tmp_path / "new" / "grid.png", images, levels=17)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 40 + 2, 3 * 40 + 4)  # 3 columns, 2 rows
    tile = pixels[42:82, 42:82]  # the last image
    np.testing.assert_array_equal(tile[::5, ::5], np.rint(images[4, ..., 0] / 16 * 255))
    np.testing.assert_array_equal(tile, tile[::5, ::5].repeat(5, 0).repeat(5, 1))
    assert len(np.unique(pixels[42:, 84:])) == 1  # no sixth image


def test_grid_keeps_large_colour_images():
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image_grid(images, 256)), images[0])


def test_images_of_other_numbers_of_channels_are_shown_in_grey():
    images = np.random.default_rng(0).integers(0, 17, (1, 64, 64, 4)).astype(np.uint8)
    expected = np.rint(np.rint(images[0].mean(axis=-1)) / 16 * 255)
    np.testing.assert_array_equal(np.asarray(image_grid(images, 17)), expected)
    with pytest.raises(ValueError, match="empty array of images"):
        image_grid(images[:0], 17)


def test_captioned_images_do_not_overlap():
    tiles = {"a long caption above it": Image.new("L", (30, 20), 10), "b": Image.new("RGB", (50, 40), (200, 0, 0))}
    pixels = np.asarray(captioned(tiles))
    assert (pixels == 10).all(axis=-1).sum() == 30 * 20
    assert (pixels == (200, 0, 0)).all(axis=-1).sum() == 50 * 40


# --- numbers and tables ---


def test_comparison_table_is_aligned_and_plain(tmp_path):
    results = [*read_run(write_run(tmp_path / "run")).results, {"checkpoint_step": 12000, "order": 1}]
    lines = comparison_table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "order"
    assert words(lines[2]) == "3 2,000 2.052 +- 0.021 1.235 7.91 +- 0.22 129 401 200 89"
    assert lines[3].split() == ["1", "12,000", *"-------"]
    assert comparison_table(results).isascii()
    assert comparison_table([]).startswith("order")


def test_a_bound_and_a_likelihood_at_x_tmin_are_told_apart(tmp_path):
    results = {
        "ode": {"bpd": BPD, "bpd_tmin": BPD | {"mean": 3.1}},
        "bound": {"bpd": BPD | {"bound": "dsm", "num_times": 10, "num_starts": 2}},
    }
    for name, result in results.items():
        write_json(tmp_path / "eval" / f"{name}.json", {"checkpoint_step": 5} | result)
    lines = comparison_table(read_run(tmp_path).results).splitlines()
    assert "bits/dim at x_tmin" in lines[0]
    assert "2.052 +- 0.021 (bound)" in lines[2]
    assert "2.052 +- 0.021 3.100 +- 0.021" in words(lines[3])
    assert "3.100 ± 0.021 bits/dim at x_tmin" in page_of(tmp_path).sections[""]


def test_the_result_of_another_checkpoint_is_not_that_of_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    other = {"checkpoint_step": 10**6, "checkpoint": "/published/checkpoint_26", "bpd": BPD | {"mean": 3.44}}
    write_json(run / "eval" / "checkpoint_26.json", other)
    assert "2.052 ± 0.021 bits/dim" in page_of(run).sections[""]
    *_, line = comparison_table(read_run(run).results).splitlines()
    assert line.startswith("eval/checkpoint_26.json")
    assert "train_seconds" not in read_run(run).results[-1]
    for path in (run / "eval").glob("step_*.json"):
        path.unlink()
    assert "3.440 ± 0.021 bits/dim of eval/checkpoint_26.json" in page_of(run).sections[""]


def test_losses_in_bits_per_dim_say_so(tmp_path):
    for name, config in (("a", {"training": {"bits_per_dim": True}}), ("b", {"training": {}})):
        run = write_run(tmp_path / name)
        write_json(run / "config.json", config)
    text = words(page_of(tmp_path / "a").sections["Loss"])
    assert "bits/dim are those of the bound" in text
    assert "have no unit" not in text
    assert "have no unit" in words(page_of(tmp_path / "a", others=[tmp_path / "b"]).sections["Loss"])
    figure = loss_figure({"a": curves(total=np.ones(5))}, "bits/dim")
    assert figure.axes[0].get_ylabel() == "loss (bits/dim)"


def test_one_diagnosed_image_has_no_band():
    estimates = [{"mean": 1.0, "se": None}, {"mean": 2.0, "se": None}]
    names = ("bpd", "difference", "first", "trace_bias")
    model = dict.fromkeys(names, estimates) | {"start_log_noise_level": [-2, 0], "log_noise_level": [-2, 0]}
    figure_png(diagnostics_figure({"model": model}))


def test_comparison_table_tells_runs_and_evaluations_apart(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    both = [*read_run(first).results, *read_run(second).results]
    assert [line.split()[0] for line in comparison_table(both).splitlines()[2:]] == ["a", "b"]
    write_json(first / "fast" / "step_2000.json", {"checkpoint_step": 2000, "order": 3, "bpd": BPD})
    lines = comparison_table(read_run(first).results).splitlines()
    assert [line.split()[0] for line in (lines[0], *lines[2:])] == [
        "file",
        "eval/step_2000.json",
        "fast/step_2000.json",
    ]


def test_results_of_one_of_two_compared_runs_are_named(tmp_path, capsys):
    """Without a name, they would look like results of the run of the report."""
    evaluated, trained = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for path in (trained / "eval").glob("step_*.json"):
        path.unlink()
    run_lib.report(trained, [evaluated])
    header, _, line, *_ = capsys.readouterr().out.splitlines()
    assert (header.split()[0], line.split()[0]) == ("run", "a")


NLL = {
    "mean": 3.6123, "se": 0.0123, "n": 10000, "unit": "nats", "kl": {"mean": 0.1466, "se": 0.0034}, "entropy": 3.4657,
    "solver_error": 2e-4, "nfe": 201.0, "seconds": 12.0, "solver": "rk4_log", "steps": 50, "probe": "exact",
    "data": "checkerboard, test", "t_min": 1e-5,
}  # fmt: skip


def test_evaluations_of_points(tmp_path):
    """The page and the table show nats and the divergence. The newest points and those of the data are shown."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    points = {"sampler": "ode", "nfe": 489, "seconds": 5.0}
    result = {"checkpoint_step": 300, "order": 2, "nll": NLL, "points": points}
    (run / "eval" / "step_300.json").write_text(json.dumps(result))
    for name, step in (("data", 0), ("step_100", 100), ("step_300", 300)):
        write_npz(run / "samples" / "points" / f"{name}.npz", points=np.full((5, 2), step, np.float32), step=step)
    write_report(run)
    assert (run / "figures" / "points.png").exists()
    page = (run / "report.html").read_text()
    assert all(text in page for text in ("3.612 ± 0.012", "0.1466 ± 0.0034", "3.466", "checkerboard, test", "2.0e-04"))
    read = read_run(run)
    assert read.points is not None
    assert read.data_points is not None
    assert (read.points.step, read.data_points.step) == (300, 0)
    np.testing.assert_array_equal(read.points.points, np.full((5, 2), 300))
    lines = comparison_table(read.results).splitlines()
    assert words(lines[0]) == "order steps NLL nats KL nats NFE likelihood NFE sample s training s evaluation"
    assert words(lines[2]) == "2 300 3.612 +- 0.012 0.1466 +- 0.0034 201 489 - 17"
    both = comparison_table([*read.results, {"checkpoint_step": 12000, "order": 1}])
    assert "bits/dim" in both
    assert "NLL nats" in both


def test_numbers():
    assert [number(v) for v in (None, True, 12345, 2.0, 0.12345, 1e-5, "x")] == [
        "\N{EN DASH}", "yes", "12,345", "2", "0.123", "1e-05", "x",
    ]  # fmt: skip
    assert number(float("nan")) == "not finite"
    assert with_error(2.05234, 0.0214) == "2.052 ± 0.021"
    assert with_error(2.05234, 1.3) == "2.05 ± 1.30"
    assert with_error(2.05234, float("nan")) == "2.052"
    assert [duration(s) for s in (3.21, 600, 7200)] == ["3.2 s", "10.0 min", "2.0 h"]


def test_tables_drop_empty_columns_and_escape():
    table = render("title", [], {"section": [Table(("<a>", "b", "c"), [("1", "\N{EN DASH}", "x&y")])]})
    assert "&lt;a&gt;" in table
    assert "x&amp;y" in table
    assert ">b<" not in table
    assert text_table(("a", "bb"), [("123", "4")]) == "  a  bb\n-------\n123   4"
