"""Draws samples from a trained image model, and computes its bits/dim, given the folder of the run.

    python main.py --config=configs/digits/ncsnpp.py --workdir=runs/digits --mode=train
    python -m examples.sample_workdir runs/digits --out=.

main.py --mode=eval computes bits/dim of whole data sets, resumes, and writes a report. This script shows the steps
behind the numbers: the configuration, the checkpoint, a sampler, dequantization and the likelihood.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from build import Run, build
from configs.default import Config, get_config
from datasets import Preprocess, source_from_config
from dequantization.noise import dequantizer_from_config
from evaluation import MeanEstimate, mean_estimate
from infra.console import one_line_errors, quiet_libraries
from infra.image_grid import save_grid
from infra.workdir import Workdir
from likelihood import bits_per_dim, draw_probes, ode_log_likelihood
from models.score import NetworkScore
from samplers.few_step import DPMSolverSampler
from samplers.sampler import image_keys


def main(workdir: Path, out: Path, num_samples: int = 16, num_images: int = 32) -> MeanEstimate:
    """Draws samples into a PNG file, and returns the bits/dim of the first test images."""
    for name, count in (("num_samples", num_samples), ("num_images", num_images)):
        if count < 1:
            raise ValueError(f"--{name} is {count}; it must be at least 1")
    run = build(load_config(workdir), for_training=False)  # other devices need not divide its batch
    state = run.load_state(workdir)
    score_fn = run.score_fn(state.ema_params)  # the averaged parameters, without dropout

    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / "samples.png", draw_samples(run, score_fn, num_samples), run.config.data.levels)
    print(f"{num_samples} samples of step {int(state.step)}: {out / 'samples.png'}")

    bpd = mean_estimate(image_bits(run, score_fn, num_images))
    print(f"{bpd.mean:.3f} +- {bpd.se:.3f} bits/dim, mean and standard error over {bpd.n} test images")
    return bpd


def load_config(workdir: Path) -> Config:
    """The configuration of a run: the defaults, updated with the values in its config.json."""
    folder, config = Workdir(workdir), get_config()
    folder.require_run()
    config.update(json.loads(folder.config.read_text()))  # makes tuples of JSON's lists where there were some
    return config.lock()


def draw_samples(run: Run, score_fn: NetworkScore, count: int) -> np.ndarray:
    """Returns samples as integer levels, drawn with 20 evaluations of the network."""
    if not isinstance(run.preprocess, Preprocess):
        raise ValueError("this run trained a model of points; give the folder of a run on images")
    # eta=1 follows the reverse-time SDE, whose noise removes errors that the network makes at large noise.
    sampler = DPMSolverSampler(sde=run.sde, max_nfe=20, eta=1.0, data_range=run.preprocess.data_range)
    samples = sampler(score_fn, jax.random.key(0), jnp.arange(count), run.data_shape)
    return np.asarray(run.preprocess.to_levels(samples.x))


def image_bits(run: Run, score_fn: NetworkScore, count: int) -> np.ndarray:
    """Returns bits/dim of each of the first `count` test images under the model's ODE, or of all if there are fewer."""
    source = source_from_config(run.config, "test")
    count = min(count, len(source))
    images = jnp.asarray(source.images(np.arange(count)))
    noise_key, probe_key = jax.random.split(jax.random.key(1))

    # Noise within each grey level turns an image into a point with a density.
    dequantizer = dequantizer_from_config(run.config, run.sde)
    noisy = dequantizer(image_keys(noise_key, jnp.arange(count)), images)

    # Two random probes for each image estimate the divergence of the ODE without bias.
    probes = draw_probes(probe_key, "rademacher", noisy.x.shape, num_probes=2)
    result = ode_log_likelihood(score_fn, run.sde, noisy.x, probes, t_min=dequantizer.t_min, method="adams_log")
    result.info.require_success()

    nats = result.terms | {"dequantization": noisy.log_q}
    bins = {"levels": dequantizer.bins_per_unit, "unit_scale": dequantizer.unit_scale}
    return np.asarray(bits_per_dim(nats, num_dims=images[0].size, **bins)["bpd"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="folder of a run of main.py on images")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: this one)")
    parser.add_argument("--num_samples", type=int, default=16, help="images to draw (default: %(default)s)")
    parser.add_argument("--num_images", type=int, default=32, help="test images for bits/dim (default: %(default)s)")
    quiet_libraries()  # the checkpoint library warns of folders that are opened to read only
    with one_line_errors():
        main(**vars(parser.parse_args()))
