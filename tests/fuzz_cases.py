"""The kinds of bad input for tests/fuzz.py. Each draws a command line with one error, and what the answer must name."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from configs.checks import RANGES, flat
from configs.default import get_config

Chance: TypeAlias = random.Random

IMAGES = ("configs/digits/smoke.py", "configs/digits/ncsnpp.py", "configs/vp/cifar10_ddpmpp_continuous.py")
POINTS = ("configs/toy/smoke.py", "configs/toy/mixture_vp.py")
MODES = ("train", "eval", "train_deq", "diagnose", "export", "cost", "selftest")
DEFAULTS = flat(get_config())
DERIVED = "from configs.default import get_config as default\n\n\ndef get_config():\n    c = default()\n"
"""The beginning of a user's own configuration."""


class Case(NamedTuple):
    """Arguments of main.py, and texts. The answer must contain at least one of the texts."""

    arguments: list[str]
    culprits: tuple[str, ...]


def command(folder: Path, mode: str, config: str, **fields: Any) -> list[str]:
    flags = [f"--config={config}", f"--mode={mode}"]
    if mode not in ("stats", "prepare"):
        flags.append(f"--workdir={folder / 'run'}")
    return flags + [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]


def number_out_of_range(chance: Chance, folder: Path) -> Case:
    """A number that is not finite, or outside the range of its field."""
    field = chance.choice(list(RANGES))
    low, high = (float(bound) for bound in RANGES[field][1:-1].split(","))
    default = DEFAULTS[field]
    whole = isinstance(default, int) or (isinstance(default, tuple) and all(isinstance(v, int) for v in default))
    values: list[Any] = [] if whole else [float("nan"), float("inf"), -float("inf")]
    values += [low - chance.choice((1, 7, 1e6))] * (low > -1e300) + [high + chance.choice((1, 9, 1e5))] * (high < 1e300)
    value = chance.choice(values) if values else "x"
    value = int(value) if whole and isinstance(value, float) else value
    if isinstance(default, tuple):
        value = f"({value},)" if isinstance(value, int) else f"(1, {value!r})"
    mode, config = chance.choice(MODES), chance.choice(IMAGES + POINTS)
    return Case([*command(folder, mode, config), f"--config.{field}={value}"], (field, field.split(".")[-1]))


def value_of_another_type(chance: Chance, folder: Path) -> Case:
    """Text for a number, a fraction for an integer, something else for a tuple."""
    field = chance.choice([name for name, default in DEFAULTS.items() if not isinstance(default, str)])
    default = DEFAULTS[field]
    texts = {
        bool: ("2", "maybe", "None", ""),
        int: ("1.5", "many", "None", "(1, 2)", ""),
        float: ("much", "None", "(0.1,)", "1,5", ""),
        tuple: ("(1, 'a')", "(1, None)", "((1, 2),)", "(1, 2", "x", "('a',)", "(1.5,)"),
    }
    choices = [text for text in texts[type(default)] if not (field == "cost.memory" and "'a'" in text)]
    value = chance.choice(choices)
    mode, config = chance.choice(MODES), chance.choice(IMAGES + POINTS)
    return Case([*command(folder, mode, config), f"--config.{field}={value}"], (field, field.split(".")[-1]))


CHOICES_OF_MODE = {
    "train": (
        "training.sde", "training.high_order_estimator", "training.first_order_weighting", "training.init_reset",
        "training.high_order_weighting", "training.snapshot_sampler", "data.dataset", "data.path", "data.variant",
        "data.category", "model.name", "model.embedding_type", "model.nonlinearity", "model.normalization",
        "model.attention_type", "model.resblock_type", "model.progressive", "model.progressive_input",
        "model.progressive_combine", "model.dtype", "model.remat", "optim.optimizer", "optim.schedule",
    ),
    "eval": (
        "training.sde", "model.name", "data.dataset", "sampling.method", "eval.bpd_dataset", "eval.ode_solver",
        "eval.probe", "eval.likelihood_at", "eval.dequantization", "eval.features", "eval.statistics_split",
        "eval.statistics", "eval.checkpoint", "eval.rounding",
    ),
    "train_deq": ("deq.name", "training.sde", "data.dataset", "optim.optimizer", "eval.checkpoint"),
    "diagnose": ("data.dataset", "eval.bpd_dataset", "eval.dequantizer_checkpoint", "eval.dequantization"),
    "export": ("eval.checkpoint", "model.name"),
    "cost": ("cost.memory", "model.remat", "training.sde"),
    "selftest": ("model.nonlinearity", "model.progressive", "optim.schedule"),
    "stats": ("data.dataset", "eval.features", "eval.statistics_split", "eval.statistics"),
    "prepare": ("data.dataset", "data.archive", "data.variant"),
}  # fmt: skip
"""Text fields that a mode reads, which accept certain words, or paths."""

TIED = {"data.variant": ("ImageNet", "EMNIST"), "data.category": ("LSUN",)}
"""Fields that count for some data sets only."""


def unknown_word(chance: Chance, folder: Path) -> Case:
    """A word that a field does not know, or a path that does not exist."""
    mode = chance.choice(list(CHOICES_OF_MODE))
    field = chance.choice(CHOICES_OF_MODE[mode])
    word = chance.choice(("", "Adam2", "none!", "None", "x" * 300, "ψ", "a b", "../..", "0", "VESDE"))
    if DEFAULTS[field] == "" or not word:
        word = f"{folder / 'nothing here'}"
    value = f"('{word}',)" if field == "cost.memory" else word
    extra = [f"--config.data.dataset={chance.choice(TIED[field])}"] if field in TIED else []
    if mode == "prepare" and field == "data.archive":
        extra = ["--config.data.dataset=CIFAR10"]
    arguments = command(folder, mode, "configs/digits/smoke.py") + extra
    culprits = (field, field.split(".")[-1], word[:50], "sampling.method") + (("data.dir",) if field in TIED else ())
    return Case([*arguments, f"--config.{field}={value}"], culprits)


def misspelt_field(chance: Chance, folder: Path) -> Case:
    """A field that does not exist."""
    section, _, name = chance.choice([field for field in DEFAULTS if "." in field]).rpartition(".")
    position = chance.randrange(len(name))
    wrong = chance.choice(
        (name[:position] + name[position + 1 :] + "_", name.upper(), f"{name}s_", f"x{name}", f"{name}.{name}")
    )
    place = chance.choice((f"{section}.{wrong}", f"{section}x.{name}", wrong))
    arguments = command(folder, chance.choice(MODES), chance.choice(IMAGES + POINTS))
    return Case([*arguments, f"--config.{place}=1"], tuple(place.split(".")))


def contradicting_fields(chance: Chance, folder: Path) -> Case:
    """Fields whose values are allowed, but not together."""
    some = chance.randrange(2, 9)
    image, point = "configs/digits/smoke.py", "configs/toy/smoke.py"
    mode, config, fields = chance.choice(
        [
            ("train", image, {"training.batch_size": 2 * some + 1, "training.accumulation_steps": 2}),
            ("train", image, {"model.sigma_min": 60.0 + some}),
            ("train", image, {"model.beta_min": 30.0 + some, "training.sde": "vpsde", "model.scale_by_sigma": False}),
            ("train", image, {"model.scale_by_sigma": False}),
            ("train", image, {"model.name": "vdm"}),
            ("train", image, {"model.name": "mlp"}),
            ("train", point, {"model.name": "ncsnpp"}),
            ("train", point, {"training.snapshot_sampling": True}),
            ("train", image, {"training.exact_derivatives": True}),
            ("train", image, {"training.importance_weighting": True}),
            ("train", image, {"training.score_matching_order": 2, "training.reduce_mean": False}),
            ("train", image, {"training.init_reset": "opt"}),
            ("train", image, {"training.n_iters_from_start": some, "optim.schedule": "cosine"}),
            ("train", image, {"data.image_size": 8 + some}),
            ("train", image, {"data.num_channels": some}),
            ("train", image, {"data.levels": 40 + some}),
            ("train", image, {"data.path": "x.npz"}),
            ("eval", image, {"eval.enable_bpd": False, "eval.enable_sampling": False}),
            ("eval", image, {"eval.ode_steps": 2 * some + 1}),
            ("eval", image, {"eval.begin_ckpt": some, "eval.end_ckpt": some - 1}),
            ("eval", image, {"eval.dequantizer_checkpoint": "x"}),
            ("eval", image, {"sampling.predictor": "none", "sampling.corrector": "none"}),
            ("eval", image, {"eval.dequantizer": True, "eval.dequantization": "truncated_normal"}),
            ("diagnose", point, {"data.dataset": "moons"}),
            ("train_deq", point, {"data.dataset": "moons"}),
            ("train_deq", image, {"training.accumulation_steps": 2}),
            ("cost", image, {"cost.batch_sizes": f"({some}, {some})"}),
            ("cost", image, {"cost.memory": "('model.nf=8',)"}),
            ("cost", image, {"cost.orders": "()"}),
            ("prepare", image, {"data.num_channels": 1}),
            ("stats", point, {"data.num_points": 50}),
        ]
    )
    arguments = command(folder, mode, config) + [f"--config.{name}={value}" for name, value in fields.items()]
    names = [name.split(".")[-1] for name in fields]
    return Case(arguments, (*names, "dataset", "no checkpoint"))


def wrong_flag(chance: Chance, folder: Path) -> Case:
    """A flag that is unknown, is missing, has no effect or contradicts another; a file that is not a configuration."""
    config, workdir = "--config=configs/digits/smoke.py", f"--workdir={folder / 'run'}"
    word = chance.choice(("x", "Train", "eval2", "", "trian", "7"))
    broken = folder / f"config_{chance.randrange(99)}.py"
    broken.write_text(
        chance.choice(
            (
                "def get_config():\n    return 1 / 0\n",
                f"{DERIVED}    del c.eval\n    return c\n",
                f"{DERIVED}    c.seeds = 3\n    return c\n",
                "def get_config(:\n", "x = 1\n", "def get_config():\n    return undefined_name\n", "import no_module\n",
                "def get_config():\n    raise ValueError('no')\n", "\0\0", "def get_config():\n    return 3\n", "]",
                "def get_config(a, b):\n    return a\n", "get_config = 1\n", "def get_config():\n    return {'a': 1}\n",
                "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 1})\n",
            )
        )
    )  # fmt: skip
    port = chance.randrange(2000, 60000)
    return chance.choice(
        [
            Case([config, workdir, f"--mode={word}"], ("mode",)),
            Case([config, workdir], ("--mode",)),
            Case([config, "--mode=train"], ("--workdir",)),
            Case([workdir, "--mode=train"], ("--config",)),
            Case([config, workdir, "--mode=train", f"--{word or 'y'}z=1"], (f"{word or 'y'}z",)),
            Case([config, workdir, "--mode=train", word or "y"], (word or "y",)),
            Case([f"--config={folder / 'none.py'}", workdir, "--mode=eval"], ("none.py",)),
            Case([f"--config={folder}", workdir, "--mode=eval"], (str(folder),)),
            Case([f"--config={broken}", workdir, "--mode=train"], (broken.name, "seeds", "lacks the field")),
            Case([f"--config={broken}", workdir, "--mode=eval"], (broken.name, "seeds", "lacks the field")),
            Case([f"--config={broken}", workdir, "--mode=cost"], (broken.name, "seeds", "lacks the field")),
            Case([config, workdir, "--mode=train", "--eval_folder=e"], ("--eval_folder",)),
            Case([config, workdir, "--mode=eval", f"--eval_folder={chance.choice(('/x', '../x', 'train', ''))}"],
                 ("--eval_folder",)),
            Case([config, workdir, "--mode=train_deq", "--deq_folder=."], ("--deq_folder",)),
            Case([config, workdir, "--mode=train", "--deq_folder=d"], ("--deq_folder",)),
            Case([config, workdir, "--mode=report"], ("--config",)),
            Case([workdir, "--mode=report"], (str(folder),)),
            Case([config, workdir, "--mode=stats"], ("--workdir",)),
            Case([config, workdir, "--mode=train", "--compare=x"], ("--compare",)),
            Case([config, workdir, "--mode=train", f"--process_id={word or 'q'}"], ("process_id", "--coordinator")),
            Case([config, workdir, "--mode=train", "--num_processes=2"], ("--coordinator",)),
            Case([config, workdir, "--mode=train", f"--coordinator=host{port}"], ("no port",)),
            Case([config, workdir, "--mode=train", f"--coordinator=localhost:{port}"], ("--num_processes",)),
            Case([config, workdir, "--mode=train", f"--coordinator=localhost:{port}", "--num_processes=2",
                  f"--process_id={chance.choice((-1, 2, 9))}"], ("--process_id",)),
            Case([config, workdir, "--mode=train", f"--coordinator=localhost:{port + 9999999}", "--num_processes=2",
                  "--process_id=0"], ("--coordinator",)),
            Case([config, workdir, "--mode=train", f"--coordinator=no-such-host.invalid:{port}", "--num_processes=2",
                  "--process_id=1"], ("no-such-host.invalid",)),
            Case([config, workdir, "--mode=train", "--verbosity=loud"], ("verbosity",)),
        ]
    )  # fmt: skip


def damaged_bytes(chance: Chance, whole: bytes) -> bytes:
    """The bytes cut short, empty, replaced by noise, text or zeros, or with some of their first bytes flipped."""
    size = len(whole)
    flipped = bytearray(whole)
    for _ in range(8):
        flipped[chance.randrange(min(size, 64))] ^= 1 << chance.randrange(8)
    return chance.choice(
        (b"", whole[: chance.randrange(1, size // 2)], chance.randbytes(size), b"hello\n", bytes(size), bytes(flipped))
    )


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def bad_npz(chance: Chance, folder: Path) -> Case:
    """A damaged .npz file of images, or one whose arrays are not images of this kind."""
    path = folder / f"images_{chance.randrange(100)}.npz"
    good = np.random.default_rng(chance.randrange(99)).integers(0, 17, (40, 8, 8, 1), dtype=np.uint8)
    wrong = [
        {"images": good.astype(np.float32)}, {"pictures": good}, {"images": good[:0]}, {"images": good[:, :5]},
        {"images": good[0]}, {"images": np.repeat(good, 3, axis=3)}, {"images": good.transpose(0, 3, 1, 2)},
        {"images": good * 14}, {"images": good // 4}, {"x_train": good}, {"x_train": good, "x_test": good[:, :4, :4]},
        {"images": good, "labels": np.arange(7)}, {"images": good, "labels": np.full(40, 0.5)},
        {"images": good.astype(object)}, {"images": good.astype(np.int8)}, {"images": good, "labels": good[:, 0]},
    ]  # fmt: skip
    damaged = chance.random() < 0.4
    path.write_bytes(damaged_bytes(chance, _npz(images=good)) if damaged else _npz(**chance.choice(wrong)))
    fields = {"data.dataset": "npz", "data.path": path}
    mode = chance.choice(("train", "eval", "train_deq", "diagnose", "stats"))
    arguments = command(folder, mode, "configs/digits/smoke.py")
    return Case([*arguments, *(f"--config.{k}={v}" for k, v in fields.items())], (path.name, "data.path"))


def bad_folder(chance: Chance, folder: Path) -> Case:
    """A folder of images that is empty, is missing, or has files that cannot be decoded."""
    images, cache = folder / "images", folder / "cache"
    kind = chance.randrange(6)
    if kind:
        images.mkdir()
        cache.mkdir()
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(picture, "png")
    if kind == 1:
        (images / "notes.txt").write_text("no images here")
    elif kind == 2:
        for number in range(chance.randrange(1, 5)):
            (images / f"{number}.png").write_bytes(damaged_bytes(chance, picture.getvalue())[:60])
    elif kind == 3:
        for name in ("train", chance.choice(("Extra", "holdout"))):
            (images / name).mkdir()
            (images / name / "0.png").write_bytes(picture.getvalue())
    elif kind == 4:
        (images / "train").mkdir()
        (images / "train" / "0.png").write_bytes(picture.getvalue())
        (images / "test").mkdir()
    elif kind == 5:
        images.rmdir()
        images.write_bytes(picture.getvalue())
    fields = {"data.dataset": "folder", "data.path": images, "data.dir": cache, "data.levels": 256}
    arguments = command(folder, chance.choice(("train", "eval", "stats")), "configs/digits/smoke.py")
    return Case([*arguments, *(f"--config.{k}={v}" for k, v in fields.items())], (str(images), "data.path"))


def bad_checkpoint(chance: Chance, folder: Path) -> Case:
    """A checkpoint to start from or to evaluate, which is damaged, of another kind, or missing."""
    path = folder / chance.choice(("run1", "checkpoint_26.pth", "model.ckpt"))
    kind = chance.randrange(5)
    if kind == 0:
        path.write_bytes(damaged_bytes(chance, chance.randbytes(500)))
    elif kind == 1:
        (path / "checkpoints").mkdir(parents=True)
    elif kind == 2:
        (path / "checkpoints" / "7").mkdir(parents=True)
        (path / "checkpoints" / "7" / "state").write_bytes(chance.randbytes(99))
    elif kind == 3:
        path.mkdir()
        path = path / "checkpoints" / "12"
    field, mode = chance.choice(
        (
            ("training.init_from", "train"),
            ("eval.checkpoint", "eval"),
            ("eval.checkpoint", "train_deq"),
            ("eval.checkpoint", "export"),
            ("eval.checkpoint", "diagnose"),
        )
    )
    arguments = [*command(folder, mode, "configs/digits/smoke.py"), f"--config.{field}={path}"]
    return Case(arguments, (str(path), field))


def bad_file_of_a_run(chance: Chance, folder: Path) -> Case:
    """A path that cannot be a workdir, a workdir with damaged files, or damaged files that evaluation needs."""
    workdir, config = folder / "run", "configs/digits/smoke.py"
    kind = chance.randrange(6)
    if kind == 0:
        workdir.write_text("a file")
        return Case(command(folder, chance.choice(("train", "cost", "selftest")), config), (str(workdir),))
    if kind == 1:
        (folder / "file").write_text("")
        arguments = [f"--config={config}", "--mode=train", f"--workdir={folder / 'file' / 'run'}"]
        return Case(arguments, (str(folder / "file"),))
    if kind == 2:
        workdir.mkdir()
        (workdir / "cost.json").write_text(chance.choice(("{", "[]", '{"rows": 3}', '{"rows": [{}]}', "\x00")))
        return Case(command(folder, "cost", config), ("cost.json",))
    if kind == 3:
        path = folder / "statistics.npz"
        mu, sigma = np.zeros(2048), np.eye(4)
        path.write_bytes(damaged_bytes(chance, _npz(mu=mu, sigma=sigma)) if chance.random() < 0.5 else _npz(mu=mu))
        arguments = [*command(folder, "eval", config), f"--config.eval.statistics={path}"]
        return Case(
            [*arguments, "--config.eval.enable_bpd=False", f"--config.eval.statistics_dir={folder}"], (str(path),)
        )
    if kind == 4:
        path = folder / "inception.npz"
        path.write_bytes(damaged_bytes(chance, _npz(a=np.zeros(3))) if chance.random() < 0.7 else _npz(a=np.zeros(3)))
        arguments = [*command(folder, chance.choice(("eval", "stats")), config), "--config.eval.features=inception"]
        return Case([*arguments, f"--config.eval.inception={path}"], (str(path),))
    path = folder / chance.choice(("cifar-10-binary.tar.gz", "data.zip", "train-images-idx3-ubyte.gz"))
    path.write_bytes(damaged_bytes(chance, json.dumps(list(range(50))).encode()))
    name = chance.choice(("CIFAR10", "MNIST", "FashionMNIST", "SVHN"))
    fields = {"data.dataset": name, "data.archive": path, "data.dir": folder / "data"}
    arguments = [f"--config={config}", "--mode=prepare", *(f"--config.{k}={v}" for k, v in fields.items())]
    return Case(arguments, (path.name, str(folder)))


KINDS: tuple[Callable[[Chance, Path], Case], ...] = (
    number_out_of_range,
    value_of_another_type,
    unknown_word,
    misspelt_field,
    contradicting_fields,
    wrong_flag,
    bad_npz,
    bad_folder,
    bad_checkpoint,
    bad_file_of_a_run,
)
