r"""The cost of training steps of the CIFAR-10 networks, for docs/results/cost.md.

    python -m experiments.cifar10_cost

compiles them for an H100 without having one, and writes the tables of predicted costs and the picture.

    python -m experiments.cifar10_cost --measure

compiles and times them on a GPU of this machine, and writes the tables of measured costs. Each network has a
folder in runs/predicted_h100 or runs/measured, with the rows that `--mode=cost` writes, as by

    python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=runs/predicted_h100/ve --mode=cost \
        --config.cost.device=h100 --config.cost.orders="(3,)" --config.cost.batch_sizes="(128,)" \
        --config.cost.memory="('none', 'model.remat=conv')"

Each takes hours. If it is interrupted, run the same command again to resume. The command adds its rows to
docs/results/cost_rows.json, which has the rows of all machines, and writes the tables from this file. With
--table-only, it compiles nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from configs.default import Config
from configs.ve import cifar10_ncsnpp_continuous, cifar10_ncsnpp_deep_continuous
from configs.vp import cifar10_ddpmpp_continuous, cifar10_ddpmpp_deep_continuous
from evaluators.step_cost import cost
from experiments.cifar10_cost_page import (
    BFLOAT16,
    NONE,
    PAGE,
    front_figure,
    has_front,
    is_measured,
    measured_tables,
    row_case,
    tables,
)
from infra import stop, waiting
from infra.commits import commit
from infra.cost import Case, Row
from infra.files import write_atomic
from infra.gpus import GPUS
from infra.workdir import Workdir
from report.figures import figure_png

NETWORKS: dict[str, tuple[str, Callable[[], Config]]] = {
    "ve": ("NCSN++ (VE)", cifar10_ncsnpp_continuous.get_config),
    "ve_deep": ("NCSN++ deep (VE)", cifar10_ncsnpp_deep_continuous.get_config),
    "vp": ("DDPM++ (VP)", cifar10_ddpmpp_continuous.get_config),
    "vp_deep": ("DDPM++ deep (VP)", cifar10_ddpmpp_deep_continuous.get_config),
}
"""The title and the configuration of each network, by the name of its folder."""

FRONT = (
    NONE,
    "training.accumulation_steps=4",
    "model.remat=block",
    "model.remat=conv",
    "training.accumulation_steps=8",
    "training.accumulation_steps=2",
    "training.residual_first=True model.remat=conv",
    "training.residual_first=True model.remat=block",
    "training.residual_first=True",
)
"""The memory settings whose cost is compared. The last three have the largest programs, which compile slowest."""


class Group(NamedTuple):
    """Cases of one network: each order with each batch size and memory setting."""

    network: str
    orders: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    memory: tuple[str, ...]


GROUPS = (
    Group("ve", (3,), (128,), FRONT),
    Group("ve", (3, 1, 2), (128,), (NONE, BFLOAT16)),
    Group("ve", (3, 1, 2), (48,), (NONE,)),
    Group("vp", (3, 1, 2), (128,), (NONE,)),
    Group("ve_deep", (3, 1, 2), (128,), (NONE,)),
    Group("vp_deep", (3, 1, 2), (128,), (NONE,)),
    Group("ve", (3,), (48,), FRONT),
    *(Group(network, (3, 1, 2), (48,), (NONE,)) for network in ("vp", "ve_deep", "vp_deep")),
    *(Group(network, (3, 1, 2), (48, 128), (BFLOAT16,)) for network in NETWORKS),
    Group("ve_deep", (3,), (128, 48), FRONT),
)
"""All cases, the most important first."""

ROWS = Path("docs/results/cost_rows.json")
"""The rows of the page. Besides a case and its `NUMBERS`, each names its network, device, version of JAX and commit."""

NUMBERS = ("gflop", "temporary_gb", "total_gb", "peak_gb", "step_seconds", "images_per_second")
"""The values of a row of `--mode=cost` that the file keeps. infra/cost.py describes them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure on a GPU of this machine")
    parser.add_argument("--device", default="h100", choices=GPUS, help="the GPU for which costs are predicted")
    parser.add_argument("--folder", type=Path, help="folder for the new rows of each network")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file with all rows")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page with the tables")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/cost_pareto.png"), help="picture of the front")
    parser.add_argument("--table-only", action="store_true", help="write the tables without compiling")
    arguments = parser.parse_args()
    if arguments.measure and jax.device_count() > 1:
        parser.error("--measure compares with predictions for one GPU; set CUDA_VISIBLE_DEVICES=0")
    kind = "measured" if arguments.measure else f"predicted_{arguments.device}"
    folder = arguments.folder or Path("runs") / kind
    if not arguments.table_only:
        try:
            with stop.on_signals():
                compute(folder, "" if arguments.measure else arguments.device)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted. Run the same command again to resume.\n")
            sys.exit(waiting.leave(stop.STOPPED))
    rows = read_rows(arguments.rows)
    for network in NETWORKS:
        rows = merged(rows, network, Workdir(folder / network).read_costs(), commit())
    write_rows(rows, arguments.rows)
    predicted = by_title(row for row in rows if not is_measured(row) and row["device"] == GPUS["h100"].name)
    if has_front(predicted["NCSN++ (VE)"]):
        write_atomic(arguments.plot, figure_png(front_figure(predicted["NCSN++ (VE)"])))
    measured = measured_tables([row | {"network": NETWORKS[row["network"]][0]} for row in rows])
    PAGE.write({"predicted costs": tables(predicted), "measured costs": measured}, arguments.out)


def compute(folder: Path, device: str) -> None:
    """Computes the rows that are missing, for this GPU, or on the devices of this machine if it is empty."""
    for group in GROUPS:
        config = NETWORKS[group.network][1]()
        config.cost.device = device
        config.cost.orders, config.cost.batch_sizes, config.cost.memory = group[1:]
        cost(config, folder / group.network)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows in this file; none if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Writes the rows in the order of networks and cases, one in a line, so that versions are easy to compare."""

    def place(row: Row) -> tuple[Any, ...]:
        return list(NETWORKS).index(row["network"]), row["device"], is_measured(row), *row_case(row)

    lines = [json.dumps(row) for row in sorted(rows, key=place)]
    write_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n")


def merged(rows: Sequence[Row], network: str, new: Iterable[Row], code: str) -> list[dict[str, Any]]:
    """Adds new rows of a network. A new row replaces the row of the same case on the same device.

    Args:
        rows: as in the file.
        new: as `--mode=cost` writes them. Rows with an error are left out.
        code: the commit of the new rows. A new row with the same numbers as before keeps its commit.
    """
    known = {_identity(row): dict(row) for row in rows}
    for row in new:
        if "error" in row:
            continue
        device = {name: row["program"][name] for name in ("device", "jax")}
        numbers = {name: row[name] if row[name] is None else round(row[name], 5) for name in NUMBERS if name in row}
        fields = {name: row[name] for name in Case._fields}
        entry = {"network": network, **fields, **device, "commit": code, **numbers}
        before = known.get(_identity(entry), {})
        if any(before.get(name) != value for name, value in numbers.items()):
            known[_identity(entry)] = entry
    return list(known.values())


def _identity(row: Row) -> tuple[Any, ...]:
    return row["network"], row["device"], is_measured(row), *row_case(row)


def by_title(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the rows of each network, by its title."""
    networks: dict[str, list[Row]] = {title: [] for title, _ in NETWORKS.values()}
    for row in rows:
        networks[NETWORKS[row["network"]][0]].append(row)
    return networks


if __name__ == "__main__":
    main()
