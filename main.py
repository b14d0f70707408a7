r"""Trains and evaluates diffusion ODEs.

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train
    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=eval

Any field of the configuration can be changed, e.g. --config.training.score_matching_order=3. An interrupted command
resumes when it is run again. The other modes:

    report      writes the report of a run again and prints its results; --compare adds other runs
    prepare     converts a published data set, once:
                python main.py --config=configs/vp/cifar10_ddpmpp_continuous.py --mode=prepare \
                    --config.data.archive=PATH
    stats       measures the real images that samples are compared with, and prints the FIDs of real images
    cost        measures memory and time of a training step before a run starts, as --config.cost.* ask
    diagnose    shows where a model of images is bad: bits/dim by start time, errors by noise level
    export      writes a checkpoint as the published code stores it, to exported/ in the workdir
    train_deq   trains a dequantizer for a trained score model; --mode=eval uses it with --config.eval.dequantizer=True

Errors are one line. Use --verbosity=1 to print the full traceback. docs/ describes everything else.
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

MODES = ("train", "train_deq", "eval", "diagnose", "export", "report", "prepare", "stats", "cost")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes other than 0."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration: a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results, report.")
_MODE = flags.DEFINE_enum("mode", None, MODES, "What to do; see above.")
_EVAL_FOLDER = flags.DEFINE_string("eval_folder", "eval", "Subfolder of the workdir for results.")
_DEQ_FOLDER = flags.DEFINE_string("deq_folder", "deq", "Subfolder of the workdir for the dequantizer.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: address:port of the first process, or auto if the cluster provides it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: the number of processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: the number of this process, from 0.")
_COMPARE = flags.DEFINE_list("compare", [], "Other workdirs that the report shows next to this one.")


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
        return _complain("--num_processes and --process_id need --coordinator; without it, each process runs alone")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    if _MODE.value != "cost":  # which measures how long a program takes to compile
        jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"))
    try:
        if _COORDINATOR.value:
            parallel.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send SIGTERM; treat it like Ctrl-C
        _run(str(_MODE.value), Path(_WORKDIR.value or "").absolute())
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Run the same command again to resume.\n")
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
    import run_lib  # imported late, so that --help and mistyped flags are answered at once
    from infra import console

    console.quiet_libraries()
    if mode == "train":
        run_lib.train(_CONFIG.value, workdir)
    elif mode == "eval":
        run_lib.evaluate(_CONFIG.value, workdir, _EVAL_FOLDER.value, _DEQ_FOLDER.value)
    elif mode == "train_deq":
        run_lib.train_deq(_CONFIG.value, workdir, _DEQ_FOLDER.value)
    elif mode == "diagnose":
        run_lib.diagnose(_CONFIG.value, workdir, _EVAL_FOLDER.value, _DEQ_FOLDER.value)
    elif mode == "export":
        run_lib.export(_CONFIG.value, workdir, _DEQ_FOLDER.value)
    elif mode == "prepare":
        run_lib.prepare(_CONFIG.value)
    elif mode == "stats":
        run_lib.stats(_CONFIG.value)
    elif mode == "cost":
        run_lib.cost(_CONFIG.value, workdir)
    else:
        run_lib.report(workdir, [Path(other) for other in _COMPARE.value or []])


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _advice(error: Exception) -> str:
    """Advice for a device that is out of memory; empty for other errors."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        "out of memory: for training, raise training.accumulation_steps, set model.remat=block, or lower "
        "training.batch_size; for evaluation, lower eval.batch_size or sampling.batch_size\n"
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a wrong flag ends the program with one line instead of a traceback."""
    try:
        rest = flags.FLAGS(argv)
    except (KeyError, AttributeError) as error:
        said = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "'").split())
        said = said.replace("' Did", "; did").strip("'\"")
        sys.exit(_complain(f"the configuration has no such field: {said}"))
    except SyntaxError as error:
        sys.exit(_complain(f"cannot parse the configuration: {error}"))
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        sys.exit(_complain(str(error)))
    if flags.FLAGS["config"].present:
        path = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        if not Path(path).is_file():
            sys.exit(_complain(f"--config={path}: there is no such file"))
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
