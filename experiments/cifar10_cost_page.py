"""The tables and the picture of docs/results/cost.md with costs of the CIFAR-10 networks, predicted and measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.pages import Page
from infra.cost import UNCHANGED, Row
from report.figures import COLOURS
from report.formatting import MISSING

PAGE = Page(Path("docs/results/cost.md"), ("predicted costs", "measured costs"))

NONE, BFLOAT16 = UNCHANGED, "model.dtype=bfloat16"


class Bound(NamedTuple):
    """A limit for order 3: temporary memory in GB, and arithmetic as a multiple of that without a memory setting."""

    temporary_gb: float
    gflop_ratio: float
    title: str
    in_parts: bool
    """Whether the limit applies to settings that compute the batch in parts, or to the others."""


BOUNDS = (Bound(11, 1.05, "with accumulation", True), Bound(20, 1.35, "without accumulation", False))
"""The goals for order 3 of NCSN++ with batch 128."""


def tables(networks: Mapping[str, Sequence[Row]]) -> str:
    """Returns the tables, and the line that shows the picture.

    Args:
        networks: the rows of each network, by its title. The first network is that of the picture.
    """
    rows = next(iter(networks.values()))
    picture = ["![Memory against arithmetic](../images/cost_pareto.png)", ""] if has_front(rows) else []
    return "\n".join([*picture, *front_table(rows), "", *network_table(networks)])


def front_rows(rows: Sequence[Row], batch_size: int = 128) -> list[Row]:
    """Returns the rows of order 3 with 32-bit floats whose memory is known, those with the least memory first."""
    chosen = [row for row in rows if (row["order"], row["batch_size"]) == (3, batch_size) and "temporary_gb" in row]
    return sorted((row for row in chosen if "bfloat16" not in row["memory"]), key=lambda row: row["temporary_gb"])


def has_front(rows: Sequence[Row]) -> bool:
    """Returns whether there are settings to compare, also without a setting."""
    chosen = front_rows(rows)
    return len(chosen) > 1 and bool(ratios(chosen))


def in_parts(row: Row) -> bool:
    """Returns whether the batch is computed in parts."""
    return "accumulation" in row["memory"]


def on_front(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that no other row beats in both memory and arithmetic, those with the least memory first.

    Computing the batch in parts always needs less memory for the same arithmetic. So rows with parts are compared only
    with rows with parts, and rows without parts only with rows without.
    """

    def beats(other: Row, row: Row) -> bool:
        less = other["temporary_gb"] < row["temporary_gb"]
        return less and other["gflop"] <= row["gflop"] * 1.001 and in_parts(other) == in_parts(row)

    ordered = sorted(rows, key=lambda row: row["temporary_gb"])
    return [row for row in ordered if not any(beats(other, row) for other in rows)]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the arithmetic of each setting, relative to no setting. It is empty if the latter is not known."""
    plain = next((row["gflop"] for row in rows if row["memory"] == NONE), None)
    return {row["memory"]: row["gflop"] / plain for row in rows} if plain else {}


def front_table(rows: Sequence[Row]) -> list[str]:
    """Returns the table of order 3 with batch 128: each memory setting, and which of the goals it meets."""
    chosen = front_rows(rows)
    relative, best = ratios(chosen), [row["memory"] for row in on_front(chosen)]
    lines = [
        "| memory setting | temporary GB | total GB | GFLOP | times the GFLOP of none | Pareto optimal |",
        "|---|---|---|---|---|---|",
    ]
    for row in chosen:
        ratio = f"{relative[row['memory']]:.3f}" if relative else MISSING
        cells = [f"`{row['memory']}`", *(f"{row[name]:.2f}" for name in ("temporary_gb", "total_gb"))]
        cells += [f"{row['gflop']:,.0f}", ratio, "yes" if row["memory"] in best else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def network_table(networks: Mapping[str, Sequence[Row]]) -> list[str]:
    """Returns the table of all networks and orders without memory settings, with 32-bit and with 16-bit floats."""
    lines = [
        "| network | batch | order | GFLOP | temporary GB, float32 | total GB, float32 | temporary GB, bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, rows in networks.items():
        known = {row_case(row): row for row in rows if "temporary_gb" in row}
        for size, order in sorted({(size, order) for size, order, _ in known}):
            full, half = (known.get((size, order, memory)) for memory in (NONE, BFLOAT16))
            if not full and not half:
                continue
            gflop = f"{(full or half or {})['gflop']:,.0f}"
            numbers = [_gb(full, "temporary_gb"), _gb(full, "total_gb"), _gb(half, "temporary_gb")]
            lines.append(f"| {' | '.join([title, str(size), str(order), gflop, *numbers])} |")
    return lines


def measured_tables(rows: Sequence[Row]) -> str:
    """Returns a table for each device on which steps were timed, with the memory that was predicted for this device.

    Seconds of rows with `waited` are marked: each of their steps was timed alone, with the time to issue it.

    Args:
        rows: timed and predicted rows, whose `network` is a title.
    """
    predicted = {(row["network"], row["device"], *row_case(row)): row for row in rows if not is_measured(row)}
    titles = list(dict.fromkeys(row["network"] for row in rows))
    timed = sorted(filter(is_measured, rows), key=lambda row: (titles.index(row["network"]), *row_case(row)))
    lines = []
    for device in sorted({row["device"] for row in timed}):
        lines += [
            f"One {device}:",
            "",
            "| network | batch | order | memory | temporary GB | predicted | peak GB | s/step | images/s | TFLOP/s |",
            f"|{'---|' * 10}",
        ]
        for row in (row for row in timed if row["device"] == device):
            guess = predicted.get((row["network"], device, *row_case(row)))
            lines.append(f"| {' | '.join(_measured_cells(row, guess))} |")
        lines.append("")
    return "\n".join(lines)


def _measured_cells(row: Row, guess: Row | None) -> list[str]:
    seconds, temporary = row["step_seconds"], row["temporary_gb"]
    cells = [row["network"], str(row["batch_size"]), str(row["order"]), f"`{row['memory']}`", f"{temporary:.2f}"]
    cells.append(f"{guess['temporary_gb']:.2f} ({guess['temporary_gb'] / temporary - 1:+.1%})" if guess else MISSING)
    cells.append(f"{row['peak_gb']:.2f}" if row["peak_gb"] else MISSING)
    cells += [f"{seconds:.4f}{' *' if row.get('waited') else ''}", f"{row['images_per_second']:,.0f}"]
    return [*cells, f"{row['gflop'] / seconds / 1000:.0f}"]


def row_case(row: Row) -> tuple[int, int, str]:
    """Returns the batch size, the order and the memory setting."""
    return row["batch_size"], row["order"], row["memory"]


def is_measured(row: Row) -> bool:
    """Returns whether a step was timed on a device, or the memory predicted without it."""
    return "step_seconds" in row


def _gb(row: Row | None, name: str) -> str:
    return f"{row[name]:.2f}" if row else MISSING


def front_figure(rows: Sequence[Row]) -> Figure:
    """Draws memory against arithmetic of order 3 with batch 128, the settings that no other beats, and the goals."""
    chosen = front_rows(rows)
    relative, best = ratios(chosen), on_front(chosen)
    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    panel = figure.subplots()
    for bound, colour in zip(BOUNDS, (COLOURS[2], COLOURS[3]), strict=True):
        label = f"goal {bound.title}"
        panel.fill_between(
            [0, bound.gflop_ratio], 0, bound.temporary_gb, color=colour, alpha=0.12, linewidth=0, label=label
        )
    for parts, marker, colour in ((True, "s", COLOURS[2]), (False, "o", COLOURS[3])):
        for kind, style in ((chosen, marker), (best, "--")):
            points = sorted((relative[row["memory"]], row["temporary_gb"]) for row in kind if in_parts(row) == parts)
            label = f"{'front ' if style == '--' else ''}with{'' if parts else 'out'} accumulation"
            panel.plot(*np.array(points).reshape(-1, 2).T, style, color=colour, linewidth=1, label=label)
    for place, names in _labels(chosen, relative).items():
        panel.annotate(", ".join(names), place, (6, 3), textcoords="offset points", fontsize=8)
    panel.set_xlim(0.95, max([1.5, *relative.values()]) * 1.12)
    panel.set_ylim(0, None)
    panel.set_xlabel("arithmetic of a step, as a multiple of that without a memory setting")
    panel.set_ylabel("temporary memory (GB)")
    panel.set_title("NCSN++ (VE), order 3, batch 128, float32, compiled for an H100", fontsize=10)
    panel.legend(fontsize=8, frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _short(memory: str) -> str:
    """Returns a memory setting without the names of the sections."""
    names = {
        "training.accumulation_steps=": "parts: ",
        "model.remat=": "remat: ",
        "training.residual_first=True": "residual first",
    }
    for name, short in names.items():
        memory = memory.replace(name, short)
    return memory.replace(" remat", ", remat")


def _labels(rows: Sequence[Row], relative: Mapping[str, float]) -> dict[tuple[float, float], list[str]]:
    """The names of the settings by their place in the picture. Settings that are less than 1 GB apart share one."""
    labels: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        at = relative[row["memory"]], row["temporary_gb"]
        same = next((place for place in labels if abs(place[0] - at[0]) < 0.02 and abs(place[1] - at[1]) < 1), at)
        labels.setdefault(same, []).append(_short(row["memory"]))
    return labels
