"""The averaged copies of a LightningModule that callbacks such as ``WeightAveraging`` keep."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.optim.swa_utils import AveragedModel


def averaged_modules(trainer: pl.Trainer) -> list[pl.LightningModule]:
    """The averaged copies of the LightningModule, in the order of the callbacks that keep them."""
    kept = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    kept = [average.module if isinstance(average, AveragedModel) else average for average in kept]
    return [average for average in kept if isinstance(average, pl.LightningModule)]


def initial_share(trainer: pl.Trainer) -> float | None:
    """How much of the averaged weights is still the initialisation, in [0, 1].

    Returns:
        The share; None where nothing is averaged, or the averaging function cannot be asked.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel) and average.avg_fn is not None:
            updates = average.n_averaged.cpu()
            # What averaging a 0 into a 1 leaves is the decay; the first update copies, so that it does not decay.
            kept = float(average.avg_fn(torch.tensor(1.0), torch.tensor(0.0), updates))
            return float(kept ** max(0, int(updates) - 1))
    return None
