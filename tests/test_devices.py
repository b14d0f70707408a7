"""Runs on 1 and 4 devices: the same parameters, and checkpoints that move between them.

experiments/devices.py compares images, bits/dim, samples, 8 devices and several processes, too.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import datasets
import run_lib
from build import Run, build
from configs.digits.smoke import get_config as digits
from configs.toy.smoke import get_config as toy
from evaluators.export import export
from evaluators.loss import LossEvaluator
from experiments import devices as experiment
from infra import parallel
from infra.files import write_atomic
from infra.workdir import Workdir
from train_state import TrainState

STEPS = 20


def config_of(order: int):
    config = toy()
    config.training.score_matching_order = order
    config.training.n_iters = 2 * STEPS
    return config


def run_on(order: int, devices: int) -> Run:
    return dataclasses.replace(build(config_of(order)), mesh=Mesh(np.array(jax.devices()[:devices]), ("data",)))


def trained(run: Run, state: TrainState, end: int) -> TrainState:
    training = run_lib.score_training(run, datasets.source_from_config(run.config, "train"), end)
    for _, batches in training.calls(int(state.step)):
        state, _ = training.update(state, batches)
    return state


def difference(one: TrainState, other: TrainState) -> float:
    """Returns the relative norm of the difference of parameters and averages."""
    vectors = [
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.device_get((state.params, state.ema_params)))])
        for state in (one, other)
    ]
    return float(np.linalg.norm(vectors[1] - vectors[0]) / np.linalg.norm(vectors[0]))


def test_devices_change_only_the_order_of_sums(tmp_path):
    """Trains at order 3, which has the terms of all orders: 20 steps, and 20 more from four devices' checkpoint."""
    four, one, workdir = run_on(3, 4), run_on(3, 1), Workdir(tmp_path)
    whole = trained(four, jax.device_put(four.fresh_state(), parallel.replicated(four.mesh)), STEPS)
    with four.open_checkpoints(workdir) as checkpoints:
        checkpoints.save(whole)
    alone = trained(one, jax.device_put(one.fresh_state(), parallel.replicated(one.mesh)), STEPS)
    assert difference(alone, whole) < 1e-4
    moved = one.load_state(tmp_path)
    assert difference(moved, whole) == 0
    resumed = trained(one, moved, 2 * STEPS)
    assert difference(resumed, alone) > 1e-2, "training does not move the parameters, so agreement means nothing"
    assert difference(trained(four, whole, 2 * STEPS), resumed) < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"training.batch_size": 6, "training.accumulation_steps": 3},
        {"training.init_reset": "opt", "training.n_iters_from_start": 7, "optim.schedule": "cosine"},
    ],
)
def test_an_evaluation_is_not_refused_because_of_fields_of_training(fields, tmp_path):
    """The evaluation gets as far as looking for a checkpoint. Training is refused."""
    config = digits()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match="|".join(fields)):
        run_lib.train(config, tmp_path)
    config.eval.enable_sampling = False
    for evaluate in (lambda: run_lib.evaluate(config, tmp_path, "eval"), lambda: export(config, tmp_path)):
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            evaluate()


def test_the_loss_needs_a_batch_that_fits_the_devices():
    config = digits()
    config.training.batch_size = 6
    with pytest.raises(ValueError, match=r"training\.batch_size is 6, which is not divisible by 4 devices"):
        LossEvaluator(build(config, for_training=False), datasets.source_from_config(config, "test"))


def test_layouts_of_another_commit_run_again(tmp_path, monkeypatch, capsys):
    started = []

    class Process:
        """Writes what a layout leaves in its folder."""

        def __init__(self, command, env):
            folder, (processes, devices) = command[3].removeprefix("--folder="), command[6:8]
            started.append(folder)
            for order in experiment.ORDERS:
                workdir = Path(folder, f"{processes}x{devices}_order{order}")
                write_atomic(workdir.with_suffix(".npz"), "")
                write_atomic(Workdir(workdir).environment, json.dumps({"commits": [experiment.commit()]}))

        def wait(self):
            return 0

    monkeypatch.setattr(experiment.subprocess, "Popen", Process)
    monkeypatch.setattr(experiment, "compare", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["devices", f"--folder={tmp_path}"])
    starts = sum(layout.processes for layout in experiment.LAYOUTS)
    for commit, total in (("abc", starts), ("abc", starts), ("def", 2 * starts)):
        monkeypatch.setattr(experiment, "commit", lambda commit=commit: commit)
        assert experiment.main() == 0
        assert len(started) == total
        assert f"Commits of the runs: {commit}." in capsys.readouterr().out
