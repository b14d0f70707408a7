"""The page that shows a run: curves, tables, samples, settings.

The page is made from the files in the run's folder, as far as they exist. It is one file and opens without a network.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from infra.files import write_atomic
from infra.workdir import Workdir
from report import result_tables, sections
from report.content import Block, Gallery, Note, Plot
from report.fields import Result, bound_mark
from report.formatting import estimate, number
from report.run_files import RunFiles, read_runs


class Section(NamedTuple):
    """A section of the page. A section without blocks shows the text `if_empty`. Without this text, it is left out."""

    heading: str
    parts: Sequence[Callable[[Sequence[RunFiles]], list[Block]]]
    if_empty: str = ""


SECTIONS = (
    Section("Loss", [sections.loss_curves, result_tables.losses_over_test_set], "No training recorded yet."),
    Section("Likelihood", [result_tables.bits_per_dim, result_tables.nats], "No evaluation of the likelihood yet."),
    Section("Diagnostics", [sections.diagnostics]),
    Section("Sample quality", [result_tables.sample_quality], "No evaluation of samples yet."),
    Section("Samples", [sections.samples, sections.points, sections.snapshots], "No samples drawn yet."),
    Section(
        "Latent codes and conditional samples",
        [result_tables.latent_codes, result_tables.conditional_samples, sections.control_pictures],
    ),
    Section("Density", [sections.densities]),
    Section("Time", [sections.times], "No training recorded yet."),
    Section("Configuration", [sections.configurations], "No configuration stored."),
    Section("Environment", [sections.environments], "No environment stored."),
    Section("Unreadable files", [sections.unreadable_files]),
)
"""The page from top to bottom. A part is a function from the runs to blocks of content."""


def write_report(workdir: Path, *, others: Sequence[Path] = ()) -> list[RunFiles]:
    """Writes report.html into a run's folder, and copies of its pictures into figures/.

    Args:
        others: folders of runs to compare with: their curves, rows and pictures are shown with those of this run.

    Returns:
        The files of this run and of the others.

    Raises:
        FileNotFoundError: if a folder does not exist.
    """
    runs = read_runs([workdir, *others])
    content = {section.heading: _blocks(section, runs) for section in SECTIONS}
    _write_figures(Workdir(workdir).figures, [block for blocks in content.values() for block in blocks])
    title = " and ".join(run.name for run in runs)
    write_atomic(Workdir(workdir).report, render(title, [_summary(run) for run in runs], content))
    return runs


def _write_figures(folder: Path, blocks: Sequence[Block]) -> None:
    """Writes the pictures of these blocks, and deletes other pictures, which may show other runs."""
    pictures = {f"{block.name}.png": block.copy for block in blocks if isinstance(block, Plot | Gallery)}
    for name, picture in pictures.items():
        write_atomic(folder / name, picture)
    for path in folder.glob("*.png"):
        if path.name not in pictures:
            path.unlink(missing_ok=True)


def render(title: str, summaries: Sequence[str], sections: Mapping[str, Sequence[Block]]) -> str:
    """Returns the page as HTML. Sections are blocks by their headings; those without blocks are left out."""
    return _TEMPLATES.get_template("page.html").render(title=title, summaries=summaries, sections=sections)


def _load_templates() -> jinja2.Environment:
    """Loads all templates at once, so that a change of their files does not affect a training that is running."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        auto_reload=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    for name in templates.list_templates():
        templates.get_template(name)
    return templates


_TEMPLATES = _load_templates()


def _blocks(section: Section, runs: Sequence[RunFiles]) -> list[Block]:
    blocks = [block for part in section.parts for block in part(runs)]
    return blocks or ([Note(section.if_empty)] if section.if_empty else [])


def _summary(run: RunFiles) -> str:
    """The run in one line."""
    facts = [] if run.last_step is None else [f"{run.last_step:,} steps"]
    if run.environment and "num_parameters" in run.environment:
        facts.append(f"{number(run.environment['num_parameters'])} parameters")
    for part, describe in _SUMMARY.items():
        result, file = run.newest_result(part)
        if result is not None:
            facts.append(describe(result[part]) + file)
    return f"{run.title}: {', '.join(facts) or 'nothing recorded yet'}"


def _fid(samples: Result) -> str:
    return f"FID {number(samples.get('fid'))} ({samples.get('fid_features', 'unknown')} features)"


_SUMMARY: Mapping[str, Callable[[Result], str]] = {
    "bpd": lambda bpd: f"{estimate(bpd)} bits/dim{bound_mark(bpd)}",
    "bpd_tmin": lambda bpd: f"{estimate(bpd)} bits/dim at x_tmin{bound_mark(bpd)}",
    "nll": lambda nll: f"{estimate(nll)} nats{bound_mark(nll)}",
    "samples": _fid,
}
"""The results in the summary, by the parts of an evaluation."""
