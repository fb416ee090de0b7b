"""Scores that callbacks and schedulers have seen of the dense denoiser, which tickets must not be held against.

Right after the switch the loss is many times higher. Compared with the dense network's, it would stop the fit, lower
the learning rate, or leave a dense checkpoint as the best one for good.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import ReduceLROnPlateau


def forget_scores(trainer: pl.Trainer) -> None:
    """Have everything that compares a monitored metric over time start anew; files that were written stay on disk."""
    forgetful = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = _worst(callback.mode)
        elif isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = _worst(callback.mode)
        else:
            continue
        forgetful.append(type(callback).__name__)
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler._reset()
            forgetful.append(type(config.scheduler).__name__)
    if forgetful:
        rank_zero_info(f"{', '.join(forgetful)}: what was monitored of the dense denoiser is forgotten at the switch.")


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(float("inf") if mode == "min" else -float("inf"))
