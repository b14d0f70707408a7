"""The loops as their users run them, on a tiny network, and what they say to bad input."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import datasets
import main
import run_lib
from build import build
from configs.digits.smoke import get_config
from evaluators import export
from evaluators.bits_per_dim import BitsPerDimEvaluator
from infra import console, parallel, stop, training_loop
from infra.files import read_npz
from infra.startup import EarlyProgram, count_programs
from infra.workdir import Workdir
from report.run_files import read_run
from tests.forked_main import run_main
from tests.tiny_network import tiny_network

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def in_place_of_ncsnpp():
    """The loops are the same for every network."""
    with tiny_network():
        yield


def config_with(**fields):
    config = get_config()
    config.data.random_flip = True  # its random numbers must follow from the step, too
    config.training.n_iters = 12
    config.training.snapshot_freq = 6
    config.training.snapshot_freq_for_preemption = 4
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def state_of(config, workdir):
    run = build(config)
    with run.existing_checkpoints(Workdir(workdir)) as checkpoints:
        return jax.device_get(checkpoints.restore(checkpoints.steps()[-1]))


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps without interruption."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run_lib.train(config_with(), workdir)
    return workdir


def test_training_leaves_what_the_run_needs(trained):
    lines = [json.loads(line) for line in (trained / "train" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == sorted(steps)
    assert steps[-1] == 12
    start, first = lines[:2]
    assert start["split"] == "start", "how long it took to the first step"
    assert 0 < start["trace_seconds"] <= start["first_step_seconds"]
    assert start["compile_seconds"] > 0  # of all threads, so together with tracing it may exceed the time on the clock
    assert start["programs"] >= start["programs_from_cache"] > -1
    assert {"total", "first", "grad_norm", "seconds", "steps_per_second"} <= first.keys()
    kept = sorted(int(p.name) for p in (trained / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [6, 12], "every snapshot_freq steps, and the newest"
    assert json.loads((trained / "config.json").read_text())["training"]["n_iters"] == 12
    environment = json.loads((trained / "environment.json").read_text())
    parameters = jax.tree.leaves(build(config_with()).abstract_state().params)
    assert environment["num_parameters"] == sum(leaf.size for leaf in parameters) > 100
    assert environment["matmul_precision"] == "default"
    assert "<html" in (trained / "report.html").read_text()


def test_resumed_training_is_bit_for_bit_that_of_one_run(trained, tmp_path, monkeypatch):
    workdir, bars = tmp_path / "run", []

    def noted_progress(*arguments, **options):
        bar = console.progress(*arguments, **options)
        bars.append((bar, bar.start_t))
        return bar

    monkeypatch.setattr(training_loop, "progress", noted_progress)
    run_lib.train(config_with(training__n_iters=5), workdir)
    assert state_of(config_with(), workdir).step == 5
    run_lib.train(config_with(), workdir)
    assert [(bar.initial, bar.n) for bar, _ in bars] == [(0, 5), (5, 12)]
    assert all(bar.start_t > started for bar, started in bars), "the rate is not that of the compilation"
    assert same_bits(state_of(config_with(), workdir), state_of(config_with(), trained))


def test_nothing_is_compiled_after_the_first_of_each_kind_of_call(tmp_path, monkeypatch):
    """Steps, records, test losses, images and checkpoints, in a new and in a resumed run."""
    programs = {}

    def counted_loop(training, state, config, callbacks):
        def count(call):
            programs[call.step] = count_programs().prepared

        return training_loop.training_loop(training, state, config, [*callbacks, count])

    monkeypatch.setattr(run_lib, "training_loop", counted_loop)
    often = {"log_freq": 2, "eval_freq": 4, "snapshot_sampling": True}
    for n_iters in (12, 24):
        fields = {f"training__{name}": value for name, value in often.items()}
        run_lib.train(config_with(training__n_iters=n_iters, **fields), tmp_path / "run")
    assert programs[1] == programs[3] < programs[4] == programs[5] < programs[6] == programs[12]
    assert programs[13] == programs[15]
    assert programs[16] == programs[24]


def test_continuing_with_a_higher_order(trained, tmp_path):
    """Order 3 goes on from a first-order run: its step, parameters and optimizer, or those it is asked to reset."""
    config = config_with(
        training__score_matching_order=3, training__init_from=str(trained), training__n_iters=13, optim__lr=1e-4
    )
    run_lib.train(config, tmp_path / "kept")
    started = build(config).load_state(tmp_path / "kept" / "checkpoints" / "12")
    assert same_bits(started, state_of(config, trained)), "it starts from another state"
    config.training.init_from = str(tmp_path / "gone")  # a run that is under way does not need it
    run_lib.train(config, tmp_path / "kept")
    config.training.init_from = str(trained)
    config.training.n_iters = 12
    with pytest.raises(ValueError, match=r"training.n_iters is 12, but .* is at step 12: nothing would be trained"):
        run_lib.train(config, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    config.training.init_reset = "step,opt,ema"
    config.training.n_iters = 2
    run_lib.train(config, tmp_path / "reset")
    state = state_of(config, tmp_path / "reset")
    assert state.step == 2
    records = [json.loads(line) for line in (tmp_path / "reset" / "train" / "metrics.jsonl").read_text().splitlines()]
    record = next(record for record in records if record["split"] == "train")
    assert record["order"] == 3
    assert record["third"] > 0


def test_losses_that_are_not_finite_stop_the_run(tmp_path):
    config = config_with(optim__lr=1e30, optim__warmup=0, optim__grad_clip=-1.0, training__max_nonfinite=2)
    config.training.n_jitted_steps = 2
    message = (
        r"not finite in 2 steps in a row, the last of which is step 3; the largest losses of this step are at t = .*"
        rf"its batch is in {tmp_path}/failed_batch.npz"
    )
    with pytest.raises(FloatingPointError, match=message):
        run_lib.train(config, tmp_path)
    saved = read_npz(tmp_path / "failed_batch.npz")
    assert saved["step"] == 3
    assert saved["batches"].shape == (2, 16, 8, 8, 1)
    source = datasets.source_from_config(config, "train")
    expected = list(datasets.training_batches(source, 16, config.seed, 2, 4))
    np.testing.assert_array_equal(saved["batches"], expected)


def test_evaluation_is_complete_and_resumes_exactly(trained, tmp_path, monkeypatch):
    config = config_with(eval__num_repeats=2, eval__enable_loss=True, eval__statistics_dir=str(tmp_path / "stats"))
    run_lib.evaluate(config, trained, "whole")
    whole = json.loads((trained / "whole" / "step_12.json").read_text())
    assert whole["bpd"]["n"] == 48
    assert whole["bpd"]["repeats"] == 2
    assert sum(whole["bpd"]["terms"].values()) == pytest.approx(whole["bpd"]["mean"], abs=1e-5)
    assert whole["samples"]["n"] == 48
    assert whole["samples"]["fid_features"] == "classifier"
    assert whole["loss"]["total"]["n"] == 359

    solved, stops = [], [1, 3]
    solve = BitsPerDimEvaluator._batch

    def interrupted(*arguments):
        if stops and len(solved) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        solved.append(arguments)
        return solve(*arguments)

    monkeypatch.setattr(BitsPerDimEvaluator, "_batch", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_lib.evaluate(config, trained, "parts")
    run_lib.evaluate(config, trained, "parts")
    assert len(solved) == 4, "a batch was worked out twice"
    parts = (trained / "parts" / "step_12.json").read_bytes()
    assert parts == (trained / "whole" / "step_12.json").read_bytes(), "times are elsewhere"
    assert read_run(trained).results[-1]["bpd"]["seconds"] > 0
    assert "bits/dim" in (trained / "report.html").read_text()


def test_an_evaluation_killed_between_its_batches_ends_the_same(trained):
    fields = {"eval__num_repeats": 8, "eval__enable_sampling": False}
    fields["training__score_matching_order"] = 3  # unlike the run's
    settings = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    arguments = start_tiny("--mode=eval", f"--workdir={trained}", "--eval_folder=killed", *settings)
    killed = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and killed.poll() is None and not list((trained / "killed").glob("*/*.npz")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert 1 <= len(list((trained / "killed").glob("*/*.npz"))) < 16
    for folder in ("killed", "not_killed"):
        run_lib.evaluate(config_with(**fields), trained, folder)
    results = [(trained / folder / "step_12.json").read_bytes() for folder in ("killed", "not_killed")]
    assert results[0] == results[1]
    assert json.loads(results[0])["order"] == 1, "the order is the run's, not the evaluation's"


def test_missing_checkpoints_are_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        run_lib.evaluate(config_with(), tmp_path, "eval")
    config = config_with(eval__begin_ckpt=1, eval__end_ckpt=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint for step 18; available steps: 6, 12"):
        run_lib.evaluate(config, trained, "eval")
    config = config_with(eval__begin_ckpt=2, eval__end_ckpt=1)
    with pytest.raises(ValueError, match=r"eval.end_ckpt is 1, but eval.begin_ckpt is 2; use 0 for the newest"):
        run_lib.evaluate(config, trained, "eval")


def start_tiny(*arguments):
    """Returns the command that runs main.py on the tiny network."""
    return [sys.executable, "-m", "tests.tiny_network", "--config=configs/digits/smoke.py", *arguments]


BAD_INPUT = {
    "misspelled field": ("--config.training.btach_size=3", "batch_size"),
    "wrong type": ("--config.training.batch_size=many", "many"),
    "order 4": ("--config.training.score_matching_order=4", "score_matching_order is 4; it must lie in [1, 3]"),
    "unknown network": ("--config.model.name=unet", "model.name is 'unet'; known: "),
    "unknown data": ("--config.data.dataset=digitz", "data.dataset is 'digitz'"),
    "negative batch": ("--config.training.batch_size=-4", "training.batch_size is -4"),
    "no such init_from": ("--config.training.init_from=/nowhere", "no checkpoint in /nowhere"),
    "unknown mode": ("--mode=trian", "train|train_deq|train_classifier|eval"),
    "processes of nothing": ("--num_processes=2", "need --coordinator"),
    "no such config": ("--config=configs/digits/none.py", "none.py"),
}
BAD_WORKDIRS = {"no workdir": [], "unwritable": ["--workdir=/proc/nowhere/run"]}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The workdir of `BAD_INPUT`, and how the commands of all cases of bad input ended."""
    workdir, train = tmp_path_factory.mktemp("refused") / "run", ["--config=configs/digits/smoke.py", "--mode=train"]
    cases = {}
    for name, (argument, _) in BAD_INPUT.items():
        others = [other for other in train if other.split("=")[0] != argument.split("=")[0]]
        cases[name] = [*others, f"--workdir={workdir}", argument]
    return workdir, run_main(cases | {name: [*train, *arguments] for name, arguments in BAD_WORKDIRS.items()})


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(name, refused):
    workdir, ended = refused
    assert ended[name].code not in (0, 1)
    (line,) = ended[name].said
    assert BAD_INPUT[name][1] in line
    assert not workdir.exists()


@pytest.mark.parametrize("name", BAD_WORKDIRS)
def test_missing_and_unwritable_workdirs(name, refused):
    _, ended = refused
    assert ended[name].code == 2
    (line,) = ended[name].said
    assert "--workdir" in line


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, r"seed is -1; it must lie in \[0, 4294967295\]"),
        ("training__n_iters", 0, "training.n_iters is 0; it must be at least 1"),
        ("training__continuous", False, "with training.continuous=False it must be"),
        ("training__init_reset", "lr", "init_reset names 'lr'; it takes any of step,opt,ema"),
        ("training__init_reset", "opt", "init_reset is 'opt', but training.init_from is empty"),
        ("model__ema_rate", 1.0, "model.ema_rate is 1.0"),
        ("training__sde", "vp", "training.sde is 'vp'; known: vesde"),
        (
            "training__high_order_fraction",
            1e-310,
            r"high_order_fraction is 1e-310; it must lie in \[1e-6, 1\]",
        ),
    ],
)
def test_impossible_configurations_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        build(config_with(**{field: value}))


def test_times_without_noise_are_refused():
    """In 32 bits, the noise variance of this SDE at 1e-20, 20 t^2 / 2, is 0."""
    fields = {"training__sde": "vpsde", "model__scale_by_sigma": False, "model__beta_min": 0.0}
    assert build(config_with(training__smallest_time=1e-9, **fields)) is not None
    with pytest.raises(ValueError, match=r"training.smallest_time is 1e-20, where training.sde=vpsde has too little"):
        build(config_with(training__smallest_time=1e-20, **fields))


def test_the_score_without_a_class_must_be_trained():
    with pytest.raises(ValueError, match=r"training.label_dropout is 0 and data.num_classes is 10, but bits/dim"):
        build(config_with(data__num_classes=10, training__label_dropout=0.0))


def test_calls_of_several_steps_end_at_the_checkpoints_to_keep(monkeypatch):
    """Whatever they are cut to: each multiple of snapshot_freq, and where an interruption stopped."""
    run = build(config_with(training__n_jitted_steps=4, training__snapshot_freq=6, training__n_iters=21))
    source = datasets.source_from_config(run.config, "train")

    def ends(first):
        steps, lengths = zip(
            *((step, len(b)) for step, b in run_lib.score_training(run, source).calls(first)), strict=True
        )
        assert [first + n for n in np.cumsum(lengths)] == list(steps)
        return list(steps)

    assert ends(0) == [4, 6, 8, 12, 16, 18, 20, 21]
    assert ends(6) == ends(0)[2:]

    shapes = []

    class UncompiledProgram(EarlyProgram):
        def __init__(self, function, state, batches, key):
            shapes.append(batches.shape)

    monkeypatch.setattr(run_lib, "EarlyProgram", UncompiledProgram)
    starts = [list(run_lib.first_program(run, step, 21)) for step in (0, 4, 20)]
    assert starts == [[4], [2], [1]], "the program is that of the first call"
    assert shapes == [(steps, 16, 8, 8, 1) for (steps,) in starts]
    assert run_lib.first_program(run, 21, 21) == {}


def test_fewer_steps_than_were_trained_are_refused(trained):
    before = (trained / "config.json").read_bytes()
    message = rf"n_iters asks for training to step 5, but the newest checkpoint in {trained}/checkpoints is at step 12"
    with pytest.raises(ValueError, match=message):
        run_lib.train(config_with(training__n_iters=5), trained)
    assert (trained / "config.json").read_bytes() == before


def test_a_finished_training_keeps_the_settings_that_it_was_trained_with(trained):
    files = [trained / name for name in ("config.json", "environment.json", "train/metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    run_lib.train(config_with(optim__lr=0.5), trained)
    assert [path.read_bytes() for path in files] == before


def test_a_fresh_run_forgets_where_an_earlier_one_in_its_folder_started(trained, tmp_path):
    workdir = tmp_path / "run"
    run_lib.train(config_with(training__n_iters_from_start=1, training__init_from=str(trained)), workdir)
    assert Workdir(workdir).read_start()["step"] == 12
    for name in ("checkpoints", "train"):
        shutil.rmtree(workdir / name)
    (workdir / "config.json").write_text("")  # A damaged file only prevents the list of what has changed.
    run_lib.train(config_with(training__n_iters=2), workdir)
    assert Workdir(workdir).read_start() == {"init_from": "", "step": 0}
    assert json.loads((workdir / "config.json").read_text())["training"]["n_iters"] == 2


def test_a_full_device_is_answered_with_advice(tmp_path, monkeypatch, capsys):
    def train(config, workdir, started):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["main.py"])
    monkeypatch.setattr(run_lib, "train", train)
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)  # which would stay for other tests
    assert main._run_and_report("train", tmp_path) == main.FAILED == 1
    assert "training.accumulation_steps" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with Workdir(tmp_path).lock(), pytest.raises(OSError, match=f"another process is training in {tmp_path}"):
        run_lib.train(config_with(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with Workdir(tmp_path).lock():
        pass  # the one refused has left no lock


def test_an_evaluation_of_nothing_is_refused(trained):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        run_lib.evaluate(config_with(eval__enable_bpd=False, eval__enable_sampling=False), trained, "eval")


@pytest.mark.parametrize("name", ["", ".", "checkpoints", "samples/eval", "../eval", "/eval"])
def test_results_and_a_dequantizer_have_folders_of_their_own(trained, name):
    with pytest.raises(ValueError, match="must name a subfolder of the workdir for results only"):
        run_lib.evaluate(config_with(), trained, name)
    for call in (run_lib.train_deq, export.export, functools.partial(run_lib.evaluate, eval_folder="x")):
        with pytest.raises(ValueError, match="must name a subfolder of the workdir for a dequantizer only"):
            call(config_with(), trained, deq_folder=name)


@pytest.mark.parametrize(("eval_folder", "deq_folder"), [("deq", "deq"), ("d/eval", "d"), ("x", "eval")])
def test_results_and_a_dequantizer_do_not_mix(trained, eval_folder, deq_folder):
    with pytest.raises(ValueError, match=r"is in the dequantizer's folder|--deq_folder=eval must name"):
        run_lib.evaluate(config_with(), trained, eval_folder, deq_folder)
    if deq_folder == "deq":
        with pytest.raises(ValueError, match="is in the dequantizer's folder deq"):
            run_lib.control(config_with(), trained, "encode", eval_folder)


def test_a_folder_without_a_run_gets_no_report(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path}: it holds no config.json"):
        run_lib.report(trained, [tmp_path])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run_lib.report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused(trained, monkeypatch):
    monkeypatch.delattr(run_lib, "first_program")  # It is refused before anything is compiled.
    before = (trained / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"another network: model.nf is 8 there, but 16 in the configuration"):
        run_lib.train(config_with(model__nf=16), trained)
    assert (trained / "config.json").read_bytes() == before


def test_stopped_by_a_signal_it_saves_and_goes_on(tmp_path):
    """A signal in the middle, then the same command: the result is that of a run never interrupted.

    This is the only test of signals from another process. The other tests set the flag.
    """
    settings = {"n_iters": 3000, "snapshot_freq": 3000, "snapshot_freq_for_preemption": 3000}
    fields = [f"--config.training.{name}={value}" for name, value in settings.items()]
    fields.append("--config.data.random_flip=True")  # as in config_with
    workdir = tmp_path / "stopped"
    arguments = start_tiny("--mode=train", f"--workdir={workdir}", *fields)
    stopped = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and stopped.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    stopped.send_signal(signal.SIGUSR1)
    _, said = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, said
    assert said.endswith("Interrupted. Run the same command again to resume.\n")
    (step,) = (int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    assert 0 < step < 3000
    config = config_with(**{f"training__{name}": value for name, value in (settings | {"n_iters": step + 3}).items()})
    run_lib.train(config, workdir)
    run_lib.train(config, tmp_path / "whole")
    assert same_bits(state_of(config, workdir), state_of(config, tmp_path / "whole"))


def test_a_request_during_a_step_is_answered_after_it(trained, tmp_path, monkeypatch):
    update = run_lib.score_training

    def score_training(*arguments):
        training = update(*arguments)

        def update_and_request(state, batches):
            if int(state.step) == 6:
                stop.request()
            return training.update(state, batches)

        return dataclasses.replace(training, update=update_and_request)

    monkeypatch.setattr(run_lib, "score_training", score_training)
    with pytest.raises(KeyboardInterrupt):
        run_lib.train(config_with(), tmp_path)
    stop.clear()
    assert state_of(config_with(), tmp_path).step == 7
    monkeypatch.undo()
    run_lib.train(config_with(), tmp_path)
    assert same_bits(state_of(config_with(), tmp_path), state_of(config_with(), trained))


def test_a_request_before_the_first_step_starts_nothing(tmp_path, stop_requested):
    with pytest.raises(KeyboardInterrupt):
        run_lib.train(config_with(), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_request_during_a_solve_is_answered_within_it(trained, monkeypatch):
    monkeypatch.setattr("arrays.PART_SECONDS", 0.0)  # single steps
    reports = []

    def check():
        reports.append(None)
        if len(reports) == 4:  # before the batch, and after three of its eight steps
            raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "check_stop", check)
    with pytest.raises(KeyboardInterrupt):
        run_lib.evaluate(config_with(eval__enable_sampling=False), trained, "stopped")
    assert not list((trained / "stopped").glob("*/*.npz"))
