"""Closed forms of the SDEs in float64 NumPy with the published constants, independent of sde_lib. Times are vectors."""

import math

import numpy as np

SIGMA_MIN, SIGMA_MAX = 0.01, 50.0
BETA_MIN, BETA_MAX = 0.1, 20.0


def beta_integral(t: np.ndarray) -> np.ndarray:
    return BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t**2


def quantities(name: str, t: np.ndarray, x: np.ndarray, num_steps: int = 1000) -> dict[str, np.ndarray]:
    """Returns the marginal, drift, diffusion and prior for x at time t, and one step of the discrete chain."""
    # The index of a step is computed in float32, because the rounding can decide which step it is.
    index = (t.astype(np.float32) * np.float32(num_steps - 1)).astype(int)
    t, x = t.astype(np.float64), x.astype(np.float64)
    forms = {"vesde": _ve, "linearvesde": _linear_ve, "vpsde": _vp, "subvpsde": _sub_vp}[name](t, index, num_steps)
    wide = {key: forms[key].reshape(-1, *(1,) * (x.ndim - 1)) for key in ("alpha", "drift_coeff", "step_coeff")}
    d, prior_sigma = x[0].size, SIGMA_MAX if "ve" in name else 1.0
    norm = np.sum(x**2, axis=tuple(range(1, x.ndim)))
    return {
        "mean": wide["alpha"] * x,
        "std": forms["std"],
        "drift": wide["drift_coeff"] * x,
        "diffusion": forms["diffusion"],
        "prior_logp": -0.5 * (norm / prior_sigma**2 + d * math.log(2 * math.pi * prior_sigma**2)),
        "discrete_drift": wide["step_coeff"] * x,
        "discrete_diffusion": forms["step_diffusion"],
    }


def _ve(t: np.ndarray, index: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    ladder = np.concatenate([[0.0], np.geomspace(SIGMA_MIN, SIGMA_MAX, num_steps)])
    std = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** t
    return {
        "alpha": np.ones_like(t),
        "std": std,
        "drift_coeff": np.zeros_like(t),
        "diffusion": std * math.sqrt(2 * math.log(SIGMA_MAX / SIGMA_MIN)),
        "step_coeff": np.zeros_like(t),
        "step_diffusion": np.sqrt(ladder[index + 1] ** 2 - ladder[index] ** 2),
    }


def _linear_ve(t: np.ndarray, index: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    return _euler_maruyama(np.ones_like(t), SIGMA_MAX * t, np.zeros_like(t), SIGMA_MAX * np.sqrt(2 * t), num_steps)


def _vp(t: np.ndarray, index: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    beta, integral = BETA_MIN + t * (BETA_MAX - BETA_MIN), beta_integral(t)
    step_beta = np.linspace(BETA_MIN / num_steps, BETA_MAX / num_steps, num_steps)[index]
    return {
        "alpha": np.exp(-0.5 * integral),
        "std": np.sqrt(-np.expm1(-integral)),
        "drift_coeff": -0.5 * beta,
        "diffusion": np.sqrt(beta),
        "step_coeff": np.sqrt(1 - step_beta) - 1,
        "step_diffusion": np.sqrt(step_beta),
    }


def _sub_vp(t: np.ndarray, index: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    beta, integral = BETA_MIN + t * (BETA_MAX - BETA_MIN), beta_integral(t)
    diffusion = np.sqrt(-beta * np.expm1(-2 * integral))
    return _euler_maruyama(np.exp(-0.5 * integral), -np.expm1(-integral), -0.5 * beta, diffusion, num_steps)


def _euler_maruyama(
    alpha: np.ndarray, std: np.ndarray, drift_coeff: np.ndarray, diffusion: np.ndarray, num_steps: int
) -> dict[str, np.ndarray]:
    return {
        "alpha": alpha,
        "std": std,
        "drift_coeff": drift_coeff,
        "diffusion": diffusion,
        "step_coeff": drift_coeff / num_steps,
        "step_diffusion": diffusion / math.sqrt(num_steps),
    }


def importance_weight(name: str, t: np.ndarray, t_min: float) -> np.ndarray:
    """Returns Z(t), the integral of g^2 / sigma^2 over [t_min, t]."""

    def primitive(time: np.ndarray) -> np.ndarray:
        if name == "vesde":
            return 2 * time * math.log(SIGMA_MAX / SIGMA_MIN)
        if name == "linearvesde":
            return 2 * np.log(time)
        log_growth = np.log(np.expm1(beta_integral(time)))
        return log_growth if name == "vpsde" else 2 * log_growth - beta_integral(time)

    return primitive(np.asarray(t, np.float64)) - primitive(np.asarray(t_min, np.float64))


def time_of_quantile(name: str, quantile: np.ndarray, t_min: float) -> np.ndarray:
    """Returns the t with Z(t) = quantile, by bisection, which needs no formula of the inverse."""
    low, high = np.full(np.shape(quantile), t_min), np.ones(np.shape(quantile))
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = importance_weight(name, middle, t_min) < quantile
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)
