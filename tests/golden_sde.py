"""Check of golden sde_*.npz files."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sde_lib import SDES
from tests import sde_closed_forms
from tests.golden_common import Result, UnknownKind, relative_error


def check_sde(path: Path) -> Iterator[Result]:
    """Compares the SDE with the file, and with the exact closed forms in float64 to 1e-5 of each value.

    The numbers of the file are float32. At small times, those of VP and sub-VP are first-order expansions. The steps of
    the chains are differences of nearly equal numbers, so they carry the rounding of these numbers.
    """
    data = np.load(path)
    name = path.name.removeprefix("sde_").split(".")[0].split("_")[0]
    if name not in SDES:
        raise UnknownKind(f"{path.name}: unknown SDE {name!r}; known: {', '.join(SDES)}")
    got, truth = _sde_values(name, data["t"], data["x"]), sde_closed_forms.quantities(name, data["t"], data["x"])
    expanded = ("vp" in name) & (sde_closed_forms.beta_integral(data["t"]) <= 2e-3)
    size = {"discrete_drift": np.abs(data["x"]).max()}
    for quantity, value in jax.tree.map(np.asarray, got).items():
        yield Result(f"{quantity} (float64)", relative_error(value, truth[quantity]), 1e-5)
        golden = data[quantity]
        loose = 1e-4 if quantity == "discrete_diffusion" and name == "vesde" else 1e-5
        scale = size.get(quantity)
        yield Result(quantity, relative_error(value[~expanded], golden[~expanded], scale=scale), loose)
        if expanded.any():
            yield Result(f"{quantity} (small t)", relative_error(value[expanded], golden[expanded], scale=scale), 5e-4)
    yield from _check_quantiles(name, data)


@functools.partial(jax.jit, static_argnums=0)
def _sde_values(name: str, times: jax.Array, points: jax.Array) -> dict[str, jax.Array]:
    sde = SDES[name]()
    mean, std = sde.marginal(points, times)
    step_drift, step_diffusion = sde.discretize(points, times, 1000)
    return {
        "mean": mean,
        "std": std,
        "drift": sde.drift(points, times),
        "diffusion": sde.diffusion(times),
        "prior_logp": sde.prior_logp(points),
        "discrete_drift": step_drift,
        "discrete_diffusion": step_diffusion,
    }


def _check_quantiles(name: str, data: Any) -> Iterator[Result]:
    """Compares importance sampling for each smallest time in the file."""
    sde, prefix = SDES[name](), "cum_weight_T_eps"
    for key in data.files:
        if not key.startswith(prefix):
            continue
        eps = key.removeprefix(prefix)
        t_min, quantile = float(eps), data[f"quantile_eps{eps}"]
        total = np.asarray(sde.importance_weight(jnp.asarray(sde.t_max), t_min))
        times = np.asarray(sde.time_of_quantile(jnp.asarray(quantile), t_min))
        true_total = sde_closed_forms.importance_weight(name, np.asarray(1.0), t_min)
        true_times = sde_closed_forms.time_of_quantile(name, quantile, t_min)
        yield Result(f"cum_weight, eps {eps} (float64)", relative_error(total, true_total), 1e-5)
        yield Result(f"cum_weight, eps {eps}", relative_error(total, data[key]), 5e-4)
        yield Result(f"time_of_quantile, eps {eps} (float64)", relative_error(times, true_times), 1e-5)
        yield Result(f"time_of_quantile, eps {eps}", relative_error(times, data[f"time_of_quantile_eps{eps}"]), 5e-4)
