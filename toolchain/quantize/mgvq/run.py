"""What every stage of the method takes beside the values of the stages before it."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.files.store import ObjectStore
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.mgvq.recipe import Recipe
from toolchain.values import SILENT, Progress


@dataclass(frozen=True)
class MgvqRun:
    """A request, the parts of the method that are on, where finished pieces are kept, and who is told."""

    request: QuantizationRequest
    recipe: Recipe
    store: ObjectStore
    progress: Progress = SILENT

    @property
    def has_choice(self) -> bool:
        """Whether groups may get codes of their own, and there is a limit to choose them under."""
        return self.recipe.mix and not (self.request.bits is None and self.request.budget_bytes is None)
