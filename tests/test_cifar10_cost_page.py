"""The tables of predicted and measured costs: which settings are on the front, and the rows of the tables."""

from experiments import cifar10_cost
from experiments.cifar10_cost import NETWORKS, merged, read_rows, write_rows
from experiments.cifar10_cost_page import PAGE, front_rows, measured_tables, network_table, on_front, tables
from experiments.pages import with_parts
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


def test_measured_rows_are_compared_with_predictions_for_the_same_device():
    timed = {"step_seconds": 0.05, "images_per_second": 2560.0, "peak_gb": 42.5}
    known, other = row("none", 50.0, 100.0), row("model.remat=conv", 41.0, 100.0, batch_size=48)
    rows = [
        row("none", 40.0, 100.0) | {"device": "A"},
        row("none", 45.0, 100.0) | {"device": "B"},
        known | timed | {"device": "B"},
        other | timed | {"device": "B", "waited": True, "peak_gb": None},
        known | timed | {"device": "C"},
    ]
    lines = measured_tables([row | {"network": "network"} for row in rows]).splitlines()
    assert lines[0] == "One B:"
    assert lines[4:7] == [
        f"| network | 48 | 3 | `model.remat=conv` | 41.00 | {MISSING} | {MISSING} | 0.0500 * | 2,560 | 2 |",
        "| network | 128 | 3 | `none` | 50.00 | 45.00 (-10.0%) | 42.50 | 0.0500 | 2,560 | 2 |",
        "",
    ]
    assert lines[7] == "One C:"
    assert lines[11] == f"| network | 128 | 3 | `none` | 50.00 | {MISSING} | 42.50 | 0.0500 | 2,560 | 2 |"


def test_new_rows_replace_those_of_the_same_case_and_device(tmp_path):
    def new(memory, temporary_gb, device="A", **costs):
        return row(memory, temporary_gb, 100.0) | {"program": {"device": device, "jax": "0.11"}} | costs

    timed = {"step_seconds": 0.05, "images_per_second": 2560.0, "peak_gb": None}
    rows = merged([], "ve", [new("none", 40.0), new("model.remat=conv", 41.0)], "first")
    rows = merged(rows, "ve", [new("none", 42.0), new("model.remat=conv", 41.0), new("none", 1.0, "B")], "second")
    rows = merged(rows, "ve", [new("none", 42.0, **timed), new("model.remat=block", 1.0, error="failed")], "third")
    rows = merged(rows, "vp", [new("none", 39.0)], "third")
    write_rows(rows, tmp_path / "rows.json")
    assert [tuple(row[name] for name in ("network", "device", "memory", "temporary_gb", "commit")) for row in rows] == [
        ("ve", "A", "none", 42.0, "second"),
        ("ve", "A", "model.remat=conv", 41.0, "first"),
        ("ve", "B", "none", 1.0, "second"),
        ("ve", "A", "none", 42.0, "third"),
        ("vp", "A", "none", 39.0, "third"),
    ]
    assert sorted(map(str, read_rows(tmp_path / "rows.json"))) == sorted(map(str, rows))


def test_the_page_shows_the_stored_rows():
    networks = {name: title for name, (title, _) in NETWORKS.items()}
    rows = [row | {"network": networks[row["network"]]} for row in read_rows(cifar10_cost.ROWS)]
    predicted = {title: [row for row in rows if row["network"] == title] for title in networks.values()}
    h100 = {title: [row for row in rows if "H100" in row["device"]] for title, rows in predicted.items()}
    page = PAGE.path.read_text()
    assert with_parts(page, {"predicted costs": tables(h100), "measured costs": measured_tables(rows)}) == page
