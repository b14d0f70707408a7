"""Trains models of points on a checkerboard by score matching of first, second and third order.

    python -m examples.train_density --out=.

A first-order model is trained first. Each order then continues from it for the same number of steps, as in the paper.
The last column of the output is the negative log-likelihood of test points under the model's ODE. On average it cannot
be below the entropy of the checkerboard, ln 32 = 3.466 nats. The script takes a minute or two on one core.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation import MeanEstimate, mean_estimate
from likelihood import GaussianReference, ode_log_likelihood
from losses import ORDERS, Objective
from models.mlp import MLP
from models.score import NetworkScore, ScoreModel
from report.density_figures import density_maps
from sde_lib import VESDE
from sources.densities import Checkerboard
from train_state import Trainer, TrainState, create_state

DATA, SDE, T_MIN = Checkerboard(), VESDE(sigma_min=0.01, sigma_max=50.0), 1e-5
MODEL = ScoreModel(MLP(time_widths=(64, 64), data_widths=(64, 64), widths=(128, 128), scale_by_sigma=True), SDE)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
compiled_losses = jax.jit(Objective.losses, static_argnums=(0, 2))
BATCH_SIZE, STEPS_PER_CALL, LIMIT = 256, 50, 5.0


def main(
    out: Path, first_steps: int = 2000, more_steps: int = 800, num_points: int = 2000, cells: int = 48
) -> dict[str, MeanEstimate]:
    """Trains the models, draws their densities, and returns the negative log-likelihood of each, in nats."""
    points = DATA.sample(jax.random.key(0), (num_points, 2))
    side = LIMIT * jnp.linspace(-1 + 1 / cells, 1 - 1 / cells, cells)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    params = jax.jit(MODEL.init, static_argnums=1)(jax.random.key(1), (2,))
    untrained = create_state(params, OPTIMIZER)
    first = train(untrained, order=1, num_steps=first_steps)
    states = {"untrained": untrained} | {f"order {order}": train(first, order, more_steps) for order in ORDERS}

    nll, densities = {}, {}
    for name, state in states.items():
        score_fn = MODEL.score_fn(state.ema_params)  # the parameters, averaged over the last steps
        logp = log_likelihood(score_fn, jnp.concatenate([points, grid]))
        nll[name] = mean_estimate(-logp[:num_points])
        print(f"{name:9}  {losses(score_fn, points)}  NLL {nll[name].mean:.3f} +- {nll[name].se:.3f} nats")
        densities[name] = np.exp(logp[num_points:]).reshape(cells, cells)
    del densities["untrained"]  # nearly 0 everywhere on the grid
    data = np.exp(DATA.log_density_of_data(grid)).reshape(cells, cells)
    out.mkdir(parents=True, exist_ok=True)
    density_maps(LIMIT, data, densities).savefig(out / "train_density.png", dpi=120)
    print(f"densities: {out / 'train_density.png'}")
    return nll


def train(state: TrainState, order: int, num_steps: int) -> TrainState:
    """Returns the state after `num_steps` more steps, rounded up to whole calls, with the objective of this order."""
    objective = Objective(order, T_MIN, second_weight=0.5, third_weight=0.1, exact=True)
    trainer = Trainer(MODEL, objective, OPTIMIZER, preprocess=lambda key, points: points, ema_rate=0.995)
    train_steps = jax.jit(trainer.train_steps)
    for call in range(-(-num_steps // STEPS_PER_CALL)):
        data_key, key = jax.random.split(jax.random.fold_in(jax.random.key(2), call))
        batches = DATA.sample(data_key, (STEPS_PER_CALL * BATCH_SIZE, 2)).reshape(STEPS_PER_CALL, BATCH_SIZE, 2)
        state, _ = train_steps(state, batches, key)
    return state


def losses(score_fn: NetworkScore, x: jax.Array) -> str:
    """Returns the terms of all orders as text, averaged over noisy points that are the same for every model."""
    objective = Objective(order=3, t_min=T_MIN, exact=True)
    noise = jax.jit(Objective.draw_noise, static_argnums=(0, 2, 3))(objective, jax.random.key(3), SDE, x.shape)
    terms = compiled_losses(objective, score_fn, SDE, x, noise)
    return "  ".join(f"{name} {np.mean(value):.4f}" for name, value in terms.items() if name != "total")


def log_likelihood(score_fn: NetworkScore, x: jax.Array) -> np.ndarray:
    """Returns ln p(x) of each point under the model's ODE, in nats."""
    # The standard deviation of the data makes the solve cheap. Any other value gives the same result.
    data = GaussianReference(std=2.3)
    solver = {"method": "adams_log", "num_steps": 48, "reference": data}
    result = ode_log_likelihood(score_fn, SDE, x, None, t_min=T_MIN, **solver)
    result.info.require_success()
    return np.asarray(result.logp)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: this one)")
    parser.add_argument("--first_steps", type=int, default=2000, help="steps of the first order (default: %(default)s)")
    parser.add_argument("--more_steps", type=int, default=800, help="steps of each order (default: %(default)s)")
    main(**vars(parser.parse_args()))
