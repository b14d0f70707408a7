"""The one interface of evaluation steps."""

from typing import Any, Protocol

from infra.workdir import EvaluationFolder
from models.score import Params


class Evaluator(Protocol):
    """An evaluation step: computes a part of a checkpoint's results, and writes its own artefacts."""

    @property
    def name(self) -> str:
        """The key of the part in the result file."""
        ...

    def __call__(self, params: Params, folder: EvaluationFolder) -> dict[str, Any]:
        """Evaluates a model with these parameters.

        Raises:
            RuntimeError: if an ODE solve fails, or a value is not finite.
        """
        ...
