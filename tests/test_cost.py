"""The cost of a training step, as --mode=cost measures it on the smallest networks."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from build import build
from configs.digits.smoke import get_config as images_config
from configs.toy.smoke import get_config as points_config
from evaluators import selftest, step_cost
from infra.cost import (
    Case,
    all_cases,
    contraction_flop,
    error_text,
    fitting_text,
    peak_bytes,
    program_identity,
    step_seconds,
)
from infra.workdir import Workdir


def config_with(**fields):
    config = points_config()
    config.training.n_jitted_steps = 1
    config.training.exact_derivatives = False
    config.cost.measure_steps = 1
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """The rows of a measurement of points, and its workdir. The device states these peaks before and after each row."""
    workdir, peaks = tmp_path_factory.mktemp("cost"), iter((1.0, 2.0, 2.0, 2.0, 2.0, 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_cost, "peak_memory", lambda: next(peaks))
        step_cost.cost(config_with(cost__memory=("none",)), workdir)
    return Workdir(workdir).read_costs(), workdir


def test_every_case_has_a_row(costs):
    rows, _ = costs
    assert [(row["order"], row["memory"]) for row in rows] == [(order, "none") for order in (1, 2, 3)]
    for row in rows:
        assert row["total_gb"] > row["temporary_gb"] > 0
        assert 0.7 < row["estimated_gb"] / row["total_gb"] < 1.5
        assert row["compile_seconds"] > 0
        assert row["gb_accessed"] > 0
        assert row["images_per_second"] == pytest.approx(64 / row["step_seconds"])


def test_arithmetic_grows_with_the_order(costs):
    """A forward derivative costs as much as the network, and the gradient of order 3 doubles both."""
    gflop = [row["gflop"] for row in costs[0]]
    assert 1.8 < gflop[1] / gflop[0] < 2.3
    assert 3.2 < gflop[2] / gflop[0] < 5


def test_the_peak_of_an_earlier_row_is_not_that_of_a_later_one(costs):
    assert [row["peak_gb"] for row in costs[0]] == [2.0, None, 3.0]


def traced_flop(order, memory):
    run = build(Case(order, 64, memory).applied_to(config_with()))
    return contraction_flop(run.train_steps().trace(*run.step_shapes(1)).jaxpr)


def test_arithmetic_does_not_grow_with_parts(costs):
    gflop = costs[0][0]["gflop"]
    assert traced_flop(1, "training.accumulation_steps=4") == pytest.approx(1e9 * gflop)


def test_the_fraction_divides_the_arithmetic_of_the_higher_orders(costs):
    first, _, third = (1e9 * row["gflop"] for row in costs[0])
    assert (traced_flop(3, "training.high_order_fraction=0.25") - first) / (third - first) == pytest.approx(
        0.25, rel=0.1
    )


def test_a_request_to_stop_is_answered(tmp_path, stop_requested):
    with pytest.raises(KeyboardInterrupt):
        step_cost.cost(config_with(), tmp_path)
    assert Workdir(tmp_path).read_costs() == []
    with pytest.raises(KeyboardInterrupt):
        step_seconds(lambda state: (state, state), 0, 3, 1)


def test_calls_are_timed_as_training_makes_them():
    """A call is issued while the one before is running. A device that waits for the next call would look slower."""
    events = []

    class Result:
        def __init__(self, number):
            self.number = number
            events.append(f"issue {number}")

        def block_until_ready(self):
            time.sleep(0.01)
            events.append(f"wait {self.number}")
            return self

    row = step_seconds(lambda number: (number + 1, Result(number)), 0, 3, 2)
    assert events == ["issue 0", "issue 1", "wait 0", "issue 2", "wait 1", "issue 3", "wait 2", "wait 3"]
    assert row["most_step_seconds"] >= row["step_seconds"] >= row["least_step_seconds"] >= 0.01 / 2


def test_known_rows_are_not_measured_again(costs, monkeypatch, capsys):
    rows, workdir = costs
    measured = []

    def case_cost(run, state, measure_steps):
        measured.append(run.config.training.score_matching_order)
        return {"error": "out of memory"}

    monkeypatch.setattr(step_cost, "case_cost", case_cost)
    step_cost.cost(config_with(cost__memory=("none",), cost__orders=(2, 3), cost__memory_gb=1e-9), workdir)
    assert measured == []
    table = capsys.readouterr().out
    assert f"{rows[1]['temporary_gb']:.4g}" in table
    assert "order 2: no batch without an error fits 1e-09 GB" in table
    step_cost.cost(config_with(cost__memory=("none",), cost__orders=(2, 3), training__batch_size=128), workdir)
    assert measured == [2, 3]
    assert "out of memory" in capsys.readouterr().out
    assert len(Workdir(workdir).read_costs()) == 5


def test_rows_with_errors_that_may_pass_are_measured_again(tmp_path, monkeypatch):
    """A program that needs more than the device has is not tried again, unless the limit is raised."""
    results = {
        "a": {"error": "failed: INTERNAL"},
        "b": {"error": "out of memory", "total_gb": 70.0},
        "c": {"error": "out of memory", "total_gb": 50.0},
    }
    monkeypatch.setattr(step_cost, "device_memory", lambda: 60.0)
    assert [step_cost._is_final(row) for row in results.values()] == [False, True, False]
    monkeypatch.setattr(step_cost, "device_memory", lambda: 76.0)
    assert not step_cost._is_final(results["b"])
    assert step_cost._is_final({"total_gb": 90.0})


def test_memory_settings_without_effect_are_left_out(tmp_path, monkeypatch, caplog):
    """The network of points has no model.remat, and order 1 has no residual of order 3."""
    measured = []
    monkeypatch.setattr(step_cost, "case_cost", lambda run, *_: measured.append(run.config.training) or {"error": "x"})
    settings = ("none", "model.remat=block", "training.residual_first=True")
    with caplog.at_level("INFO"):
        step_cost.cost(config_with(cost__memory=settings, cost__orders=(1, 3)), tmp_path)
    tried = [(training.score_matching_order, training.residual_first) for training in measured]
    assert tried == [(1, False), (3, False), (3, True)]
    assert "Leaving out memory setting model.remat=block for order 1: model.remat has no effect" in caplog.text
    with pytest.raises(ValueError, match=r"cost.memory is .*model.remat=block.*; add 'none'"):
        step_cost.cost(config_with(cost__memory=settings[1:2]), tmp_path)


def test_an_error_names_the_case_that_cannot_be_built(tmp_path):
    config = config_with(cost__batch_sizes=(60,), cost__memory=("training.accumulation_steps=7",))
    message = "ask for order 1, batch size 60 and memory setting training.accumulation_steps=7, .* built: .*batch_size"
    with pytest.raises(ValueError, match=message):
        step_cost.cost(config, tmp_path / "run")


def test_rows_of_another_precision_or_more_processes_are_others(monkeypatch):
    run = build(config_with())
    identities = [program_identity(run.config, run.mesh, 1)]
    with jax.default_matmul_precision("highest"):
        identities.append(program_identity(run.config, run.mesh, 1))
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=multi_output_fusion")
    identities.append(program_identity(run.config, run.mesh, 1))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    identities.append(program_identity(run.config, run.mesh, 1))
    assert len({json.dumps(identity) for identity in identities}) == 4


def test_a_selftest_fails_if_the_step_does_not_fit(monkeypatch):
    config = images_config()
    config.cost.memory_gb = 24.0
    monkeypatch.setattr(selftest, "case_cost", lambda *_: {"total_gb": 30.0, "step_seconds": 1.0})
    with pytest.raises(RuntimeError, match=r"needs 30 of 24 GB.*out of memory"):
        selftest._step_in_words(build(config), 0)


def test_a_selftest_expects_the_steps_of_a_continued_run(monkeypatch):
    config = images_config()
    config.training.n_iters_from_start = 5
    monkeypatch.setattr(selftest, "case_cost", lambda *_: {"step_seconds": 3600.0})
    assert "5 h for 5 steps" in selftest._step_in_words(build(config), 0)


def test_random_batches_are_as_training_makes_them():
    config = images_config()
    config.data.num_classes = 5
    run = build(config)
    _, shapes, _ = run.step_shapes(2)
    batches = step_cost.random_batches(run, shapes)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), batches) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert set(np.unique(batches.labels)) == set(range(5))
    assert int(batches.images.min()) == 0
    assert int(batches.images.max()) == config.data.levels - 1
    points = build(config_with())
    _, shapes, _ = points.step_shapes(1)
    assert step_cost.random_batches(points, shapes).shape == shapes.shape


def test_a_full_device_is_a_row(tmp_path, monkeypatch):
    def step_seconds(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(step_cost, "step_seconds", step_seconds)
    step_cost.cost(config_with(cost__memory=("none", "training.accumulation_steps=1"), cost__orders=(1,)), tmp_path)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    (row,) = rows  # both settings lead to the same program
    assert row["error"] == "out of memory"
    assert row["total_gb"] > 0
    assert error_text(RuntimeError("INTERNAL: no such algorithm\nand more")) == "failed: INTERNAL: no such algorithm"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost__orders": (1, 4)}, "cost.orders is .1, 4.; each entry must lie in"),
        ({"cost__orders": ()}, "cost.orders is .*at least one"),
        ({"cost__batch_sizes": (64, 64)}, "cost.batch_sizes is .*none twice"),
        ({"cost__batch_sizes": (63,)}, "training.batch_size is 63.*use 60 or 64"),
        ({"cost__memory": ("none", "remat")}, "cost.memory has the setting 'remat'"),
        ({"cost__memory": ("model.nf=2",)}, "cost.memory has the setting 'model.nf=2'"),
        ({"cost__memory": ("training.accumulation_steps=x",)}, "cost.memory has the setting .*=x'"),
        ({"cost__measure_steps": -1}, "cost.measure_steps is -1"),
        ({"cost__device": "h10"}, "cost.device is 'h10'; known: h100, h200, a100"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        step_cost.cost(config_with(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_operations_of_loops_and_convolutions_are_counted():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(x):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loop(a):
        return jax.lax.scan(lambda a, _: (a @ a, None), a, length=7)[0]

    assert contraction_flop(jax.make_jaxpr(convolve)(x).jaxpr) == 2 * (2 * 4 * 4) * 5 * (3 * 3 * 3)
    program = jax.make_jaxpr(jax.jit(loop))(jnp.zeros((4, 4))).jaxpr
    assert contraction_flop(program) == 7 * 2 * 4**3
    assert contraction_flop(program, repeat_loops=False) == 2 * 4**3


def test_memory_is_that_of_results_until_their_last_use():
    x = jnp.zeros(1000)

    def chain(x):
        return jnp.sum(jnp.cos(jnp.sin(x)))

    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) + c, None), x, length=5)[0]

    assert peak_bytes(jax.make_jaxpr(chain)(x).jaxpr) == 3 * 4000  # x, and two results at a time
    assert peak_bytes(jax.make_jaxpr(loop)(x).jaxpr) == 3 * 4000  # whatever the length


def test_the_fastest_setting_of_the_largest_batch_is_named():
    rows = [
        {"order": 3, "batch_size": 48, "memory": "none", "total_gb": 8.0, "gflop": 1.0, "step_seconds": 1.0},
        {"order": 3, "batch_size": 128, "memory": "none", "total_gb": 20.0, "gflop": 3.0, "step_seconds": 2.0},
        {
            "order": 3,
            "batch_size": 128,
            "memory": "model.remat=conv",
            "total_gb": 7.0,
            "gflop": 4.0,
            "step_seconds": 3.0,
        },
        {"order": 3, "batch_size": 128, "memory": "model.dtype=x", "total_gb": 9.0, "gflop": 5.0, "step_seconds": 2.5},
        {"order": 3, "batch_size": 256, "memory": "none", "error": "out of memory"},
    ]
    flags = "--config.training.score_matching_order=3 --config.training.batch_size=128"
    assert fitting_text(3, rows, 10) == (
        f"order 3: batch 128 fits with model.dtype=x and needs 9 of 10 GB: {flags} --config.model.dtype=x"
    )
    assert fitting_text(3, rows, 30).endswith(f"with no memory setting and needs 20 of 30 GB: {flags}")


def test_settings_may_be_joined():
    (case,) = all_cases((3,), (8,), ("training.accumulation_steps=2 model.remat=block",))
    assert case == Case(3, 8, "training.accumulation_steps=2 model.remat=block")
    assert case.changes()["model.remat"] == "block"
    assert case.changes()["training.accumulation_steps"] == 2
