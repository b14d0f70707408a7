r"""The cost of training steps of the CIFAR-10 networks, for docs/results/cost.md.

    python -m experiments.cifar10_cost

compiles them for an H100 without having one, and writes the tables of predicted costs and the picture.

    python -m experiments.cifar10_cost --measure

compiles and times them on a GPU of this machine, and writes the table of measured costs. Each network has a
folder in runs/predicted or runs/measured, with the rows that `--mode=cost` writes, as by

    python main.py --config=configs/ve/cifar10_ncsnpp_continuous.py --workdir=runs/predicted/ve --mode=cost \
        --config.cost.device=h100 --config.cost.orders="(3,)" --config.cost.batch_sizes="(128,)" \
        --config.cost.memory="('none', 'model.remat=conv')"

Each takes hours. If it is interrupted, run the same command again to resume. With --table-only, it writes its part of
the page from the rows that exist, without compiling.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from configs.default import Config
from configs.ve import cifar10_ncsnpp_continuous, cifar10_ncsnpp_deep_continuous
from configs.vp import cifar10_ddpmpp_continuous, cifar10_ddpmpp_deep_continuous
from evaluators.step_cost import cost
from experiments.cifar10_cost_page import BFLOAT16, NONE, PAGE, front_figure, has_front, measured_table, tables
from infra import stop, waiting
from infra.files import write_atomic
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure on a GPU of this machine")
    parser.add_argument("--predicted", type=Path, default=Path("runs/predicted"), help="folder for predicted rows")
    parser.add_argument("--measured", type=Path, default=Path("runs/measured"), help="folder for measured rows")
    parser.add_argument("--out", type=Path, default=PAGE.path, help="page with the tables")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/cost_pareto.png"), help="picture of the front")
    parser.add_argument("--table-only", action="store_true", help="write the tables from the rows that exist")
    arguments = parser.parse_args()
    if arguments.measure and jax.device_count() > 1:
        parser.error("--measure compares with predictions for one GPU; set CUDA_VISIBLE_DEVICES=0")
    folder = arguments.measured if arguments.measure else arguments.predicted
    if not arguments.table_only:
        try:
            with stop.on_signals():
                compute(folder, "" if arguments.measure else "h100")
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted. Run the same command again to resume.\n")
            sys.exit(waiting.leave(stop.STOPPED))
    predicted = _rows(arguments.predicted)
    if arguments.measure:
        texts = {"measured costs": measured_table(_rows(folder), predicted)}
        PAGE.only(*texts).write(texts, arguments.out)
        return
    if has_front(predicted["NCSN++ (VE)"]):
        write_atomic(arguments.plot, figure_png(front_figure(predicted["NCSN++ (VE)"])))
    PAGE.only("predicted costs").write({"predicted costs": tables(predicted)}, arguments.out)


def compute(folder: Path, device: str) -> None:
    """Computes the rows that are missing, for this GPU, or on the devices of this machine if it is empty."""
    for group in GROUPS:
        config = NETWORKS[group.network][1]()
        config.cost.device = device
        config.cost.orders, config.cost.batch_sizes, config.cost.memory = group[1:]
        cost(config, folder / group.network)


def _rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each network, by its title."""
    return {title: Workdir(folder / name).read_costs() for name, (title, _) in NETWORKS.items()}


if __name__ == "__main__":
    main()
