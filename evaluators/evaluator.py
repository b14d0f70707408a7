"""The interface of all evaluators."""

from typing import Any, Protocol, runtime_checkable

from infra.workdir import EvaluationFolder
from models.score import Params


@runtime_checkable
class Evaluator(Protocol):
    """Computes one part of the results of a checkpoint, and writes its own artefacts."""

    @property
    def name(self) -> str:
        """The key of this part in the result file."""
        ...

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Evaluates a model with these parameters.

        Returns:
            Numbers and texts for the result file. If settings other than the parameters decide about them, the result
            also has the fields of `cache.BatchCache.origin`, whose key `values` tells results of different settings
            apart: without it, a new result replaces the last one instead of moving it to `earlier`.

        Raises:
            RuntimeError: if an ODE solve fails, or a value is not finite.
        """
        ...
