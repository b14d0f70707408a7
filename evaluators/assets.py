"""Opens each file that a configuration needs in training and evaluation, for --mode=selftest."""

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
from build import Run
from evaluators.features import extractor_from_config
from evaluators.fid import published_statistics, statistics_path


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
