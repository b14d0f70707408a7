"""Trains and evaluates diffusion ODEs.

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train
    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=eval

Any field of the configuration can be changed: --config.training.score_matching_order=3. Both modes can be interrupted
and started again; they go on from where they were. --mode=report draws the report again and prints the results.
Data sets that are not the user's own are converted once, from the files in which they are published:

    python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py --config.data.archive=PATH --mode=prepare

--mode=train_deq trains learned dequantization noise for a trained score model, whose bits/dim are evaluated with it by
--config.eval.dequantizer=True. --mode=stats measures the real images that samples are compared with, and says what FIDs
against them are worth. Where an error of one line comes from, --verbosity=1 shows.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from infra import parallel

MODES = ("train", "train_deq", "eval", "report", "prepare", "stats")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes besides 0."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration, a file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results, report.")
_MODE = flags.DEFINE_enum(
    "mode", None, MODES, "What to do; prepare converts data once, stats measures them, report prints the results again."
)
_EVAL_FOLDER = flags.DEFINE_string("eval_folder", "eval", "Folder for results, inside the workdir.")
_DEQ_FOLDER = flags.DEFINE_string("deq_folder", "deq", "Folder of the learned dequantizer, inside the workdir.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: address:port of the first process, or auto where the cluster tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: which of them this is, from 0.")
_COMPARE = flags.DEFINE_list("compare", [], "Other workdirs that the report shows beside this one's run.")


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        return _complain(f"unexpected argument {argv[1]!r}; flags begin with --")
    required = (_MODE,) if _MODE.value in ("prepare", "stats") else (_MODE, _WORKDIR)
    missing = [flag.name for flag in required if not flag.value]
    if _MODE.value != "report" and _CONFIG.value is None:
        missing.append(_CONFIG.name)
    if missing:
        return _complain(f"--{missing[0]} is missing; see python main.py --help")
    if not _COORDINATOR.value and (_NUM_PROCESSES.present or _PROCESS_ID.present):
        return _complain("--num_processes and --process_id need --coordinator; without it each process is a run alone")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"))
    try:
        if _COORDINATOR.value:
            parallel.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request is as good as Ctrl-C
        _run(str(_MODE.value), Path(_WORKDIR.value or "").absolute())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        logging.debug("bad input", exc_info=True)
        return _complain(str(error))
    except (FloatingPointError, RuntimeError) as error:
        logging.exception("failed")
        sys.stderr.write(f"error: {error}\n{_advice(error)}")
        return FAILED
    return 0


def _run(mode: str, workdir: Path) -> None:
    import run_lib  # here, so that --help and mistyped flags are answered at once
    from infra import console

    console.quiet_libraries()
    if mode == "train":
        run_lib.train(_CONFIG.value, workdir)
    elif mode == "eval":
        run_lib.evaluate(_CONFIG.value, workdir, _EVAL_FOLDER.value, _DEQ_FOLDER.value)
    elif mode == "train_deq":
        run_lib.train_deq(_CONFIG.value, workdir, _DEQ_FOLDER.value)
    elif mode == "prepare":
        run_lib.prepare(_CONFIG.value)
    elif mode == "stats":
        run_lib.stats(_CONFIG.value)
    else:
        run_lib.report(workdir, [Path(other) for other in _COMPARE.value or []])


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _advice(error: Exception) -> str:
    """What to do about a device whose memory is full."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        "out of memory: training takes less with a larger training.accumulation_steps, with model.remat=True or a "
        "smaller training.batch_size; evaluation with a smaller eval.batch_size or sampling.batch_size\n"
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """Flags as absl parses them; what is wrong with them is one line, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:
        said = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "'").split())
        said = said.replace("' Did", "; did").strip("'\"")
        sys.exit(_complain(f"the configuration has no such field: {said}"))
    except SyntaxError as error:
        sys.exit(_complain(f"the configuration is no Python: {error}"))
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        sys.exit(_complain(str(error)))
    if flags.FLAGS["config"].present:
        path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        if not Path(path).is_file():
            sys.exit(_complain(f"--config={path}: there is no such file"))
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
