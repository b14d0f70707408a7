"""Trains and evaluates diffusion ODEs.

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train
    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=eval

Any field of the configuration can be changed: --config.training.score_matching_order=3. Both modes can be interrupted
and started again; they go on from where they were.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "eval", "report")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes besides 0."""

_CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration, a file under configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results, report.")
_MODE = flags.DEFINE_enum("mode", None, MODES, "What to do.")
_EVAL_FOLDER = flags.DEFINE_string("eval_folder", "eval", "Folder for results, inside the workdir.")


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        return _complain(f"unexpected argument {argv[1]!r}; flags begin with --")
    for flag in (_CONFIG, _WORKDIR, _MODE):
        if not flag.value:
            return _complain(f"--{flag.name} is missing; see python main.py --help")
    import run_lib  # here, so that --help and a mistyped flag are answered at once

    logging.set_verbosity(logging.INFO)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", ".cache/jax"))
    config, workdir = _CONFIG.value, Path(str(_WORKDIR.value)).absolute()
    try:
        if _MODE.value == "train":
            run_lib.train(config, workdir)
        elif _MODE.value == "eval":
            run_lib.evaluate(config, workdir, _EVAL_FOLDER.value)
        else:
            run_lib.report(workdir)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        logging.debug("bad input", exc_info=True)
        return _complain(str(error))
    except (FloatingPointError, RuntimeError) as error:
        logging.exception("failed")
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    return 0


def _complain(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return BAD_INPUT


def _parse_flags(argv: list[str]) -> list[str]:
    """Flags as absl parses them; a field that the configuration does not have is one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_complain(str(error.args[0] if error.args else error)))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
