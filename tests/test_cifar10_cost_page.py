"""The tables of predicted and measured costs: which settings are on the front, and the rows of the tables."""

from experiments.cifar10_cost_page import front_rows, measured_table, network_table, on_front, tables
from report.formatting import MISSING


def row(memory, temporary_gb, gflop, order=3, batch_size=128):
    costs = {"temporary_gb": temporary_gb, "total_gb": temporary_gb + 1, "gflop": gflop}
    return {"order": order, "batch_size": batch_size, "memory": memory, **costs}


ROWS = [
    row("none", 40.0, 100.0),
    row("training.accumulation_steps=4", 10.0, 100.0),
    row("training.accumulation_steps=8", 5.0, 100.0),
    row("model.remat=conv", 41.0, 100.0),
    row("model.remat=block", 25.0, 130.0),
    row("training.residual_first=True", 30.0, 133.0),
    row("model.dtype=bfloat16", 20.0, 100.0),
    row("none", 4.0, 25.0, order=1),
    {"order": 3, "batch_size": 128, "memory": "training.accumulation_steps=2", "error": "failed"},
]


def test_the_front_has_what_nothing_beats_in_both():
    chosen = front_rows(ROWS)
    assert [row["temporary_gb"] for row in chosen] == [5, 10, 25, 30, 40, 41]
    front = [row["memory"] for row in on_front(chosen)]
    assert front == ["training.accumulation_steps=8", "model.remat=block", "none"]


def test_tables_have_the_rows():
    text = tables({"network": ROWS})
    assert "| `model.remat=block` | 25.00 | 26.00 | 130 | 1.300 | yes |" in text
    assert "| network | 128 | 3 | 100 | 40.00 | 41.00 | 20.00 |" in text


def test_rows_that_are_not_known_yet_are_left_out():
    assert network_table({"network": ROWS[:1], "other": []})[2:] == [
        f"| network | 128 | 3 | 100 | 40.00 | 41.00 | {MISSING} |"
    ]


def test_measured_rows_are_compared_with_predictions_of_the_same_case():
    timed = {"step_seconds": 0.05, "images_per_second": 2560.0, "peak_gb": 42.5}
    known, unknown = row("none", 50.0, 100.0) | timed, row("model.remat=conv", 41.0, 100.0, batch_size=48) | timed
    not_timed = ROWS[1] | {"error": "out of memory"}
    assert measured_table({"network": [known, not_timed, unknown]}, {"network": ROWS}).splitlines()[2:] == [
        f"| network | 48 | 3 | `model.remat=conv` | 41.00 | {MISSING} | 42.50 | 0.0500 | 2,560 | 2 |",
        "| network | 128 | 3 | `none` | 50.00 | 40.00 (-20.0%) | 42.50 | 0.0500 | 2,560 | 2 |",
    ]
