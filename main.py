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
    cost        measures memory and time of a training step before a run starts; see --config.cost.*
    selftest    checks the devices, the connection between processes, the disk, the memory and time of a training step,
                and whether the files that the configuration needs are there; prints a table
    diagnose    finds the noise levels at which a model of images is inaccurate: bits/dim by start time, errors by level
    encode      computes the latent codes of images, and the error of their reconstruction
    decode      turns latent codes into images
    interpolate draws strips of pictures between pairs of images
    inpaint     fills in the unknown part of images; see --config.control.mask
    colorize    draws the colours of images from their grey component
    restore     draws images with given linear observations; see --config.control.matrix
    classes     draws images of given classes, guided by the classifier of --mode=train_classifier or by the network
    export      writes a checkpoint as the published code stores it, to exported/ in the workdir
    train_deq   trains a dequantizer for a trained score model; --mode=eval uses it with --config.eval.dequantizer=True
    train_classifier  trains a classifier of noisy images, which guides --mode=classes

Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are requests to stop, in every mode: the program finishes the current step, saves
its state and ends with exit code 75. The same command then resumes. A second Ctrl-C stops at once, with code 130. Other
exit codes: 0 after success, 2 for bad input, 1 for a failure of the computation. Schedulers may requeue on 75; see
docs/cluster.md.

Errors are one line. Use --verbosity=1 to print the full traceback. The folder docs/ describes the rest.
"""

import gc
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.checks import flat
from configs.default import Config, get_config
from configs.usage import record_reads
from infra import stop  # Modules with JAX are imported later, so that --help and signals need not wait.

CONTROL = ("encode", "decode", "interpolate", "inpaint", "colorize", "restore", "classes")
"""The modes for latent codes and conditional samples."""

TRAINING = ("train", "train_deq", "train_classifier")

MODES = (
    *TRAINING,
    *("eval", "diagnose", *CONTROL, "export", "report", "prepare", "stats", "cost", "selftest"),
)
BAD_INPUT, FAILED = 2, 1
"""Exit codes other than 0, stop.STOPPED and stop.KILLED."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration: a file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results, report.")
_MODE = flags.DEFINE_enum("mode", None, MODES, "What to do; see above.")
_EVAL_FOLDER = flags.DEFINE_string("eval_folder", "eval", "Subfolder of the workdir for results.")
_DEQ_FOLDER = flags.DEFINE_string("deq_folder", "deq", "Subfolder of the workdir for the dequantizer.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: address:port of the first, or auto if the cluster provides it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")
_COMPARE = flags.DEFINE_multi_string(
    "compare", [], "Other workdirs that the report shows next to this one, separated by commas or in several flags."
)


_OF_SEVERAL_HOSTS = tuple(mode for mode in MODES if mode not in ("report", "prepare"))

EFFECT = {
    "config": tuple(mode for mode in MODES if mode != "report"),
    "workdir": tuple(mode for mode in MODES if mode not in ("prepare", "stats")),
    "eval_folder": ("eval", "diagnose", *CONTROL),
    "deq_folder": ("train_deq", "eval", "diagnose", "export"),
    "coordinator": _OF_SEVERAL_HOSTS,
    "num_processes": _OF_SEVERAL_HOSTS,
    "process_id": _OF_SEVERAL_HOSTS,
    "compare": ("report",),
}
"""The modes in which each flag has an effect."""

GIVEN_ONCE = ("config", "workdir", "mode", "eval_folder", "deq_folder")
"""Flags of which absl would silently use the last one."""

HELP = {"help", "?", "helpshort", "helpfull", "helpxml"}
"""The flags of absl that print text and end the program."""


def main(argv: Sequence[str]) -> int:
    """Runs the mode of the command line, and returns the exit code."""
    if len(argv) > 1:
        return _complain(f"unexpected argument {argv[1]!r}; flags begin with --")
    required = (_MODE,) if _MODE.value in ("prepare", "stats") else (_MODE, _WORKDIR)
    missing = [flag.name for flag in required if not flag.value]
    if _MODE.value != "report" and _CONFIG.value is None:
        missing.append(_CONFIG.name)
    if missing:
        return _complain(f"--{missing[0]} is missing; see python main.py --help")
    if _CONFIG.value is not None and not isinstance(_CONFIG.value, ConfigDict):
        kind = type(_CONFIG.value).__name__
        return _complain(f"--config={_config_file()}: get_config returns {kind}; it must return a ConfigDict")
    for name, modes in EFFECT.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            return _complain(
                f"--{name} has no effect with --mode={_MODE.value}, only with {', '.join(modes)}; leave it out"
            )
    if not _COORDINATOR.value and (_NUM_PROCESSES.present or _PROCESS_ID.present):
        return _complain("--num_processes and --process_id need --coordinator; without it, each process runs alone")
    if not all(_compared()):
        return _complain("--compare has an empty name; name workdirs, separated by commas")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    with stop.on_signals():
        return _leave(_run_and_report(str(_MODE.value), Path(_WORKDIR.value or "").expanduser().absolute()))


def _compared() -> list[str]:
    """Returns the names of all workdirs in --compare."""
    return [name for each in _COMPARE.value for name in each.split(",")]


def _leave(code: int) -> int:
    """Returns the exit code, or ends the process with it if a blocked call or another process would delay the exit."""
    from infra import parallel, waiting

    return parallel.leave_processes(code) if code in (BAD_INPUT, FAILED) else waiting.leave(code)


def _run_and_report(mode: str, workdir: Path) -> int:
    """Runs a mode, and turns its exceptions into messages and exit codes."""
    try:
        _run(mode, workdir)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Run the same command again to resume.\n")
        return stop.STOPPED
    except (ValueError, OSError) as error:
        logging.debug("bad input", exc_info=True)
        return _complain(str(error))
    except FloatingPointError as error:
        logging.debug("not finite", exc_info=True)
        _complain(str(error))
        return FAILED
    except RuntimeError as error:
        logging.exception("failed")
        sys.stderr.write(f"error: {error}\n{_advice(error)}")
        return FAILED
    return 0


def _run(mode: str, workdir: Path) -> None:
    from infra import console, parallel, startup

    gc.set_threshold(50_000)  # Tracing makes many objects that stay in use, so collecting garbage often is a waste.
    console.quiet_libraries()
    startup.set_up_compiler(cache=mode != "cost")  # That mode measures how long a program takes to compile.
    if _COORDINATOR.value:
        seconds = parallel.JOIN_SECONDS if mode != "selftest" else parallel.JOIN_SECONDS / 5
        parallel.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, seconds)
    parallel.check_devices()
    import run_lib
    import sources
    from evaluators import export, fid, selftest, step_cost, unused_fields

    parallel.check_stop()
    if _CONFIG.value is not None:
        _expand_home(_CONFIG.value)
        record_reads(_CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))

    if mode == "train":
        run_lib.train(_CONFIG.value, workdir, startup.process_start())
    elif mode == "eval":
        run_lib.evaluate(_CONFIG.value, workdir, _EVAL_FOLDER.value, _DEQ_FOLDER.value)
    elif mode == "train_deq":
        run_lib.train_deq(_CONFIG.value, workdir, _DEQ_FOLDER.value)
    elif mode == "train_classifier":
        run_lib.train_classifier(_CONFIG.value, workdir)
    elif mode in CONTROL:
        run_lib.control(_CONFIG.value, workdir, mode, _EVAL_FOLDER.value)
    elif mode == "diagnose":
        run_lib.diagnose(_CONFIG.value, workdir, _EVAL_FOLDER.value, _DEQ_FOLDER.value)
    elif mode == "export":
        export.export(_CONFIG.value, workdir, _DEQ_FOLDER.value)
    elif mode == "prepare":
        sources.prepare(_CONFIG.value)
    elif mode == "stats":
        fid.stats(_CONFIG.value)
    elif mode == "cost":
        step_cost.cost(_CONFIG.value, workdir)
    elif mode == "selftest":
        selftest.selftest(_CONFIG.value, workdir)
    else:
        run_lib.report(workdir, [Path(other).expanduser() for other in _compared()])
    if _CONFIG.value is not None and mode not in TRAINING:  # Trainings warn after their first call.
        unused_fields.warn_unused(_CONFIG.value, mode)


def _expand_home(config: Config) -> None:
    """Replaces a leading ~ in the text of any field, which can only be a path, as a shell does before an argument."""
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            _expand_home(config[name])
        elif isinstance(value, str) and value.startswith("~"):
            config[name] = str(Path(value).expanduser())


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _advice(error: Exception) -> str:
    """Advice for a device that is out of memory; empty for other errors."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    return (
        "out of memory: for training, raise training.accumulation_steps, set model.remat=block (at order 3 rather "
        "training.residual_first=True and model.remat=conv), or lower training.batch_size; for evaluation, lower "
        "eval.batch_size or sampling.batch_size\n"
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a wrong flag ends the program with one line instead of a traceback."""
    for name in GIVEN_ONCE:
        if sum(argument.lstrip("-").split("=")[0] == name for argument in argv[1:] if argument.startswith("-")) > 1:
            sys.exit(_complain(f"--{name} is given twice; give one"))
    try:
        rest = flags.FLAGS(argv)
    except SystemExit as end:  # The flags for help end the program with absl's code 1.
        sys.exit(0 if {argument.lstrip("-") for argument in argv} & HELP else end.code)
    except (KeyError, AttributeError) as error:
        if "no attribute 'get_config'" in str(error):
            sys.exit(_complain(f"{_config_argument(argv)} has no function get_config"))
        said = " ".join(str(error.args[0]).replace("\\n", " ").replace("\\'", "'").split())
        said = said.replace("' Did", "; did").strip("'\"").rpartition("Attempting to lookup: ")[2]
        sys.exit(_complain(f"the configuration has no such field: {said}"))
    except SyntaxError as error:
        sys.exit(_complain(f"cannot parse the configuration {_config_argument(argv)}: {error}"))
    except Exception as error:  # absl's own errors, and any error that the configuration file raises
        sys.exit(_complain(_flag_error(error, argv)))
    if flags.FLAGS["config"].present:
        path = _config_file()
        if not Path(path).is_file():
            sys.exit(_complain(f"--config={path}: there is no such file"))
    return rest


def _flag_error(error: Exception, argv: Sequence[str]) -> str:
    """Returns the message for an error of absl, or for one that the configuration file raises."""
    said, known = str(error), flat(get_config())
    unknown = _unknown_field(argv, known) if isinstance(error, TypeError) else None
    if unknown:
        return f"the configuration has no such field: {unknown}"
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname in known:
        return f"{said}; did you mean --config.{error.flagname}?"
    if "get_config() takes 0 positional arguments" in said:
        return f"{_config_argument(argv)}: this file takes no name after the colon"
    if "Non-boolean argument" in said:
        return f"{said.split(': (')[0]}: it must be True or False"
    inside = "Traceback" in said or not isinstance(error, flags.Error | TypeError | ValueError | OSError)
    last = (said.strip().splitlines() or [type(error).__name__])[-1]
    return f"cannot load {_config_argument(argv)}: {last}" if inside else said


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]


def _config_argument(argv: Sequence[str]) -> str:
    """Returns the argument --config=PATH."""
    return next((argument for argument in argv if argument.startswith(("--config=", "-config="))), "--config")


def _unknown_field(argv: Sequence[str], known: Collection[str]) -> str | None:
    """Returns the first field among the arguments that no configuration has, for errors that do not name it."""
    given = (argument.split("=")[0].lstrip("-") for argument in argv if argument.lstrip("-").startswith("config."))
    return next((field for field in given if field.removeprefix("config.") not in known), None)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
