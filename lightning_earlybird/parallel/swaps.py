"""Whether averaged weights stand in the module's place, as they do in a validation that breaks off."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging


class SwapWatch:
    """Counts how often each averaging callback exchanges its weights for the module's.

    Args:
        trainer: The Trainer of the fit, whose callbacks are set up.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._swapped: dict[WeightAveraging, bool] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                self._swapped[callback] = False
                callback.__dict__["_swap_models"] = self._counted(callback, callback._swap_models)

    def put_back(self, module: pl.LightningModule) -> None:
        """Put the module's own weights into it, wherever they are in a callback at the moment."""
        for callback, swapped in self._swapped.items():
            if swapped:
                callback._swap_models(module)

    def undo(self) -> None:
        """Count no more."""
        for callback in self._swapped:
            callback.__dict__.pop("_swap_models", None)

    def _counted(
        self, callback: WeightAveraging, swap: Callable[[pl.LightningModule], None]
    ) -> Callable[[pl.LightningModule], None]:
        def counted(module: pl.LightningModule) -> None:
            swap(module)
            self._swapped[callback] = not self._swapped[callback]

        return counted
