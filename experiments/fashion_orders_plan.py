"""The models that `make fashion-orders` compares, and what is measured of them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

from build import build
from configs.default import Config
from evaluators.step_cost import traced_step
from experiments.main_calls import parsed_config

CONFIG = "configs/fashion/ncsnpp.py"
RESIDUAL = {"first_order_weighting": "residual", "high_order_weighting": "residual"}
UNBIASED = {"high_order_estimator": "unbiased"}
BRANCHES: dict[str, dict[str, object]] = {
    "K": {},
    "C": {"first_order_weighting": "residual"},
    "2": {"score_matching_order": 2},
    "W": {"score_matching_order": 2, **RESIDUAL},
    "V2": {"score_matching_order": 2, **UNBIASED, **RESIDUAL},
    "3": {"score_matching_order": 3},
    "V3": {"score_matching_order": 3, **UNBIASED, **RESIDUAL},
}
"""Differences in `training` from the first branch, order 1. The cheapest come first.

C is the control for W, V2 and V3: the same weights of the first order, without the terms of orders 2 and 3."""

TITLES = {
    "K": "order 1",
    "C": "order 1, weighted by 1/r",
    "2": "order 2 as published",
    "W": "order 2, published terms, weights by r",
    "V2": "order 2, unbiased, weights by r",
    "3": "order 3 as published",
    "V3": "order 3, unbiased, weights by r",
}
CONTROLS = ("K", "C")
SEEDS = (1, 2)
LEVEL_BATCHES = 6
"""Batches of test images whose terms are measured by noise level."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of the experiment."""

    runs: Path
    base_steps: int
    steps: int
    images: int
    samples: int
    extra: tuple[str, ...] = ()
    """More settings for all calls."""

    @property
    def arguments(self) -> str:
        """The arguments of the command, without the folder."""
        sizes = (f"--{name}={getattr(self, name)}" for name in ("base_steps", "steps", "images", "samples"))
        return " ".join(
            [*sizes, *(["--set"] if self.extra else []), *(e.removeprefix("--config.") for e in self.extra)]
        )

    def fields(self, settings: Mapping[str, object]) -> list[str]:
        """Returns the arguments of main.py for these settings. A setting in `extra` overrides one of them."""
        return [*(f"--config.{name}={value}" for name, value in settings.items()), *self.extra]

    def folder(self, branch: str, seed: int) -> Path:
        return self.runs / "base" if branch == "base" else self.runs / f"{branch}_seed{seed}"


def long(control: str) -> str:
    """Returns the name of the branch of a control that does as much arithmetic as the best branch."""
    return f"{control}_long"


@functools.cache
def gflop_per_step(plan: Plan, branch: str) -> float:
    return traced_step(build(branch_config(plan, branch)))[0]["gflop"]


def branch_config(plan: Plan, branch: str) -> Config:
    return parsed_config(plan.fields(objective(branch)), CONFIG)


def objective(branch: str) -> dict[str, object]:
    """Returns the settings that a branch changes in the base model. A control and its longer version share them."""
    return {f"training.{name}": value for name, value in BRANCHES.get(branch.removesuffix("_long"), {}).items()}


def likelihoods(plan: Plan) -> dict[str, dict[str, object]]:
    """Returns the evaluations of bits/dim, of test and of training images."""
    common: dict[str, object] = {"eval.enable_sampling": False, "eval.max_examples": plan.images}
    bound: dict[str, object] = {"eval.bound": True, "eval.likelihood_at": "x_tmin"}
    train_split: dict[str, object] = {"eval.bpd_dataset": "train"}
    return {
        "eval": common | {"eval.likelihood_at": "both"},
        "eval_bound": common | bound,
        "eval_train": common | train_split | {"eval.likelihood_at": "x_tmin"},
        "eval_train_bound": common | train_split | bound,
    }


def samples(plan: Plan) -> dict[str, dict[str, object]]:
    """Returns the evaluations of FID, of samples of the ODE and of the SDE."""
    common: dict[str, object] = {
        "eval.enable_bpd": False,
        "eval.enable_sampling": True,
        "eval.num_samples": plan.samples,
    }
    return {
        "eval_ode_samples": common | {"sampling.eta": 0.0},
        "eval_sde_samples": common | {"sampling.eta": 1.0},
    }
