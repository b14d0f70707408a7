"""The rule of the experiment on FashionMNIST, its settings, and its page from stored results."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from build import build
from configs.digits.smoke import get_config as get_digits_config
from configs.fashion.ncsnpp import get_config
from experiments import fashion_orders, fashion_orders_page, fashion_orders_plan, noise_levels
from experiments.fashion_orders_page import Values, best_branch, helps, page_parts, verdict
from experiments.fashion_orders_plan import (
    BRANCHES,
    LEVEL_BATCHES,
    Plan,
    branch_config,
    gflop_per_step,
    likelihoods,
    samples,
)
from experiments.main_calls import last_call
from experiments.noise_levels import SIGMAS, Levels, levels_file, terms_at_levels
from losses import objective_from_config
from tests.tiny_network import tiny_network

# ml_collections loads files in a way that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

IMAGES = 16


def values(tmin: float, gap: float, train_bound: float = 3.0) -> Values:
    """Returns bits/dim with these means, which vary alike over images."""
    image = np.linspace(-0.5, 0.5, IMAGES)
    wobble = 1e-3 * np.cos(np.arange(IMAGES)) * (1 + abs(tmin))  # differences between models have an error
    return Values(
        ode_x=image + tmin,
        ode_tmin=image + tmin + wobble,
        bound=image + tmin - gap,
        train_ode_tmin=image + tmin,
        train_bound=image + train_bound + wobble,
    )


FIRST, WEIGHTED = values(3.0, 0.1), values(2.99, 0.09)


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (values(2.95, 0.05), True),
        (values(2.995, 0.05), False),  # does not beat C
        (values(2.95, 0.2), False),  # its gap grows
        (values(2.95, 0.05, train_bound=3.1), False),  # its bound on training images is worse
    ],
)
def test_the_rule(branch: Values, expected: bool) -> None:
    assert helps(branch, FIRST, WEIGHTED) is expected


def test_the_verdict() -> None:
    branches = {"K": FIRST, "C": WEIGHTED, "2": values(3.0, 0.1), "V2": values(2.95, 0.05)}
    assert verdict(branches).endswith("By the rule, these help: V2.")
    assert verdict(branches | {"V2": values(3.0, 0.1)}).endswith("no branch helps.")
    assert "nothing to close" in verdict(branches | {"K": values(3.0, 0.01)})


def test_branches_are_objectives() -> None:
    for fields in BRANCHES.values():
        config = get_config()
        config.training.update(fields)
        objective_from_config(config)


def test_settings_of_all_calls_count_for_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of all calls overrides one of the branch, as on the command line of main.py."""
    monkeypatch.setattr(
        fashion_orders_plan, "traced_step", lambda run: ({"gflop": float(run.config.training.batch_size)}, None)
    )
    extra = ("--config.training.batch_size=16", "--config.training.high_order_weighting=constant")
    plan = Plan(Path("runs"), 3, 3, IMAGES, 8, extra)
    with tiny_network():
        assert gflop_per_step(plan, "V2") == 16.0
        assert gflop_per_step(dataclasses.replace(plan, extra=()), "V2") == get_config().training.batch_size
    fields = ("score_matching_order", "first_order_weighting", "high_order_weighting")
    found = {name: [branch_config(plan, name).training[field] for field in fields] for name in ("V2", "C_long", "base")}
    assert found == {
        "V2": [2, "residual", "constant"],
        "C_long": [1, "residual", "constant"],
        "base": [1, "constant", "constant"],
    }
    with pytest.raises(ValueError, match="batchsize"):
        branch_config(dataclasses.replace(plan, extra=("--config.training.batchsize=16",)), "K")


def write_run(plan: Plan, branch: str, seed: int, tmin: float) -> None:
    """Writes the files of a trained and evaluated branch that the page reads."""
    folder = plan.folder(branch, seed)
    (folder / "train").mkdir(parents=True)
    records = [
        {"step": step, "split": split, "first": 1 / step, "steps_per_second": 2.0, "seconds": float(step)}
        for step in (1, 2, 3)
        for split in ("train", "test")
    ]
    (folder / "train" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in likelihoods(plan) | samples(plan):
        result: dict[str, object] = {"checkpoint_step": 3, "samples": {"fid": 1.5}}
        for part, mean in (("bpd", tmin - 0.1), ("bpd_tmin", 2.85 if "bound" in name else tmin)):
            stored = folder / name / part
            stored.mkdir(parents=True)
            np.savez(stored / "repeat0_batch0.npz", bpd=values(mean, 0.0).ode_tmin)
            result[part] = {"values": part, "errors": {"solver_error": -0.001}}
        (folder / name / "step_3.json").write_text(json.dumps(result))
        last_call(folder / name).touch()
    one = np.ones((len(SIGMAS), IMAGES)) * (2.0 if branch == "base" else 1.5)
    np.savez(levels_file(folder), first=one, second=one**2, step=0, batches=LEVEL_BATCHES)


def test_the_page_and_the_order_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is trained once, controls and the best branch with two seeds; the page has a row for each.

    The long controls do as much arithmetic as the best branch.
    """
    plan, calls = Plan(tmp_path, 3, 3, IMAGES, 8), []
    tmin = {"V2": 2.9, "K": 3.1}

    def train(plan: Plan, branch: str, seed: int, steps: int) -> None:
        calls.append((branch, seed, steps))
        write_run(plan, branch, seed, tmin.get(branch, 3.0))

    monkeypatch.setattr(fashion_orders, "train", train)
    evaluated: list[Path] = []
    monkeypatch.setattr(fashion_orders, "evaluate_once", lambda run, folder, *_: evaluated.append(run / folder))
    for module in (fashion_orders, fashion_orders_page):
        monkeypatch.setattr(module, "gflop_per_step", lambda _, branch: 4.0 if branch == "V2" else 1.0)
    monkeypatch.setattr(fashion_orders_page, "measured_residuals", lambda *_: (np.ones(2), np.ones(2)))
    pages: list[str] = []

    def after_each() -> None:
        """Writes the first page and the one after V2, the fifth branch."""
        number = len(calls) - 1
        if number in (1, 5):
            pages.append(page_parts(plan, tmp_path / "images")["results"])

    fashion_orders.run_all(plan, after_each)
    pages.append(page_parts(plan, tmp_path / "images")["results"])
    assert best_branch(plan) == "V2"
    assert calls == [
        ("base", 1, 3),
        *((branch, 1, 3) for branch in BRANCHES),
        *((branch, 2, 3) for branch in ("K", "C", "V2")),
        ("K_long", 1, 12),
        ("C_long", 1, 12),
    ]
    folders = [*likelihoods(plan), *samples(plan)]
    models = [plan.folder(branch, seed) for branch, seed, _ in calls]
    assert sorted(evaluated) == sorted(model / folder for model in models for folder in folders), "each once"
    first, fifth, last = pages
    assert "Not finished: C, 2, W, V2, 3, V3, K_long, C_long" in first
    assert "Not finished: 3, V3, K_long, C_long" in fifth
    assert "Not finished" not in last
    assert "| 0.012 | 2 | -25.0% ± 0.0% |" in last
    assert "| 0.012 | 4 | -43.8% ± 0.0% |" in last
    assert [sum(line.startswith("| V2 |") for line in page.splitlines()) for page in pages] == [0, 1, 2]
    assert sum(line.startswith(("| V2 |", "| K |", "| K_long |", "| base |")) for line in last.splitlines()) == 6
    assert last.count("these help: V2") == 3  # equal steps with both seeds, and equal arithmetic
    assert (tmp_path / "images" / "orders.png").is_file()
    assert "diverged" not in last
    metrics = plan.folder("2", 1) / "train" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + json.dumps({"step": 4, "split": "test", "first": 0.4}) + "\n")
    last_call(plan.folder("V3", 1) / "eval").unlink()
    assert "Not drawn, because they diverged: 2." in page_parts(plan, tmp_path / "images")["results"]
    assert "Not finished: V3." in page_parts(plan, tmp_path / "images")["results"]


def test_the_terms_of_a_score_of_zero_at_each_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then u = z and M = I: the second-order term is |I - z z'|_F^2 / d^2."""
    monkeypatch.setattr(noise_levels, "SIGMAS", (0.1, 10.0))
    monkeypatch.setattr(noise_levels, "BATCH", 4)
    with tiny_network():
        run = build(get_digits_config())
        first, second = terms_at_levels(run, run.fresh_state().params, 2)
    assert first.shape == (2, 8)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-3)  # the same noise; a new network's score is only near zero
    assert len(np.unique(first[0])) == 8
    np.testing.assert_allclose(second, 1 / 64 - 2 * first / 64 + first**2, rtol=1e-3)


@pytest.mark.parametrize(("ratio", "paired"), [(0.01, 0.5), (0.8, 1.0), (1.0, 0.9), (5.0, 0.0)])
def test_errors_of_changes_are_their_spread_over_draws(ratio: float, paired: float) -> None:
    """Also of changes that are not small: their errors include that of the denominator, which `paired` values share."""
    draws, n = 2000, 100
    shared, own, others = np.random.default_rng(0).gamma(3.0, size=(3, draws, n))
    start, ours = shared, ratio * (paired * shared + (1 - paired) * own) + 0.001 * others
    changes = Levels(ours, start).change_from(Levels(start, start))
    first = np.array([(change.mean, change.se) for change in changes["first"]])
    error = 5 * first[:, 0].std() / math.sqrt(draws) + ratio / n  # A ratio of means has a bias of order 1 / n.
    assert first[:, 0].mean() == pytest.approx(ratio + 0.001 - 1, abs=error)
    # A standard deviation over 2000 draws has an error of 1.6 %, and the errors have a bias of order 1 / n.
    assert np.median(first[:, 1]) == pytest.approx(first[:, 0].std(), rel=0.1)
    assert changes["second"][0] == (0.0, 0.0, n)
