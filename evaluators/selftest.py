"""--mode=selftest: checks the machine, the files that a configuration needs, and a training step, before a run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax

import datasets
from build import Run, build
from configs.default import Config
from evaluators.features import extractor_from_config
from evaluators.fid import published_statistics, statistics_path
from evaluators.step_cost import case_cost
from infra.cost import NOT_COMPILED, OUT_OF_MEMORY, device_memory
from infra.machine_checks import HEADER, check, checkpoint_bytes, collective, devices, disk, state_bytes
from infra.workdir import Workdir


def selftest(config: Config, path: Path) -> None:
    """Checks devices, disk, one training step, and the files that the configuration needs; prints a table.

    The step is the one that `--mode=cost` measures. Its compilation may take `cost.selftest_seconds`. If it takes
    longer, the memory of the step is not known.

    Raises:
        ValueError: for a configuration that is not allowed, or if a check fails, after the table.
        OSError: if nothing can be written to the workdir.
    """
    run, workdir = build(config), Workdir(path)
    workdir.prepare()
    shapes, training = run.abstract_state(), config.training
    needed = checkpoint_bytes(shapes, _num_steps(training), training.snapshot_freq)
    wanted = [
        ("devices", devices),
        ("collective", lambda: collective(path)),
        ("disk", lambda: disk(path, needed)),
        *assets(run),
        ("step", lambda: _step_in_words(run, state_bytes(shapes))),
    ]
    failed = []
    for number, (name, measure) in enumerate(wanted):
        if name == "step" and "collective" in failed:
            continue  # The step would wait for the processes that are missing.
        row = check(name, measure)
        failed += [] if row.passed else [name]
        if jax.process_index() == 0:
            print(row.line if number else f"{HEADER}\n{row.line}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(wanted)} checks failed: {', '.join(failed)}; see the table")


def _num_steps(training: Config) -> int:
    """The number of steps of a new run."""
    return training.n_iters_from_start or training.n_iters


def _step_in_words(run: Run, size: int) -> str:
    """Describes the cost of a training step of this configuration, and the time of the whole run at this rate."""
    fields, training = run.config.cost, run.config.training
    row = case_cost(
        run, lambda: jax.device_get(run.fresh_state()), min(fields.measure_steps, 3), fields.selftest_seconds
    )
    order = f"order {training.score_matching_order}, batch {training.batch_size}"
    parts = [order, f"{row['gflop']:.4g} GFLOP", f"state {size / 1e9:.3g} GB"] if "gflop" in row else [order]
    if "total_gb" in row:
        limit = fields.memory_gb or device_memory()
        parts.append(f"needs {row['total_gb']:.3g} of {limit:.3g} GB")
        if row["total_gb"] > limit:
            row["error"] = OUT_OF_MEMORY
    if "step_seconds" in row:
        seconds = row["step_seconds"]
        steps = _num_steps(training)
        parts.append(f"{seconds:.3g} s/step, {seconds * steps / 3600:.3g} h for {steps} steps")
    text = ", ".join(parts)
    if row.get("error") == NOT_COMPILED:
        flag = f"--config.cost.selftest_seconds={fields.selftest_seconds:g}"
        estimate = f"{row['estimated_gb']:.3g} of {fields.memory_gb or device_memory():.3g} GB by an estimate"
        return f"{text}, {estimate}; not compiled within {flag}: raise it to see the memory and time of a step"
    if "error" in row:
        raise RuntimeError(f"{text}: {row['error']}")
    return text


def assets(run: Run) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields the name of each asset, with a function that opens and describes it.

    The functions raise FileNotFoundError if the asset is missing, and ValueError if it is damaged or does not fit.
    """
    config = run.config
    for split in datasets.SPLITS:
        yield f"{split} data", lambda split=split: _data(run, split)
    for field, section in (("init_from", "training"), ("checkpoint", "eval")):
        if path := config[section][field]:
            yield f"{section}.{field}", lambda path=path: _checkpoint(run, Path(path))
    if config.eval.enable_sampling and run.density is None:
        yield f"features ({config.eval.features})", lambda: _features(run)


def _data(run: Run, split: str) -> str:
    source = datasets.source_from_config(run.config, split)
    return f"{len(source)} of {source.description}"


def _checkpoint(run: Run, path: Path) -> str:
    return f"{path}, step {int(run.load_state(path).step)}"


def _features(run: Run) -> str:
    """Opens the weights of the feature network, and says whether statistics of the data exist."""
    config = run.config
    find_extractor, published = extractor_from_config(config), published_statistics(config)
    if config.eval.features == "classifier":
        return f"a classifier and its statistics are found or made in {config.eval.statistics_dir}"
    extractor = find_extractor()
    if published is not None:
        return f"{extractor.name}; statistics in {config.eval.statistics}"
    path = statistics_path(config, extractor)
    there = f"statistics in {path}" if path.is_file() else f"{path} will be measured by the first evaluation"
    return f"{extractor.name}; {there}"
