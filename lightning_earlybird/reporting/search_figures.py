"""The figures of a search, drawn now and then while it goes on, and once more at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_earlybird.convergence import MaskWindow
from lightning_earlybird.reporting.figures import MATPLOTLIB_AVAILABLE, distance_figure, overlap_figure
from lightning_earlybird.reporting.loggers import log_figure
from lightning_earlybird.search import SearchKey

SHARE_OF_TIME = 0.02
"""Drawing may take so much of the time that the search takes."""

_FIRST_COST_S = 0.5  # until it has been measured


class SearchFigures:
    """Draws mask distances and overlaps of a search on rank 0.

    Attributes:
        folder: Where PNG files go; None writes none.
        namespace: What names of figures begin with.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.namespace = "earlybird"
        self._cost_s = _FIRST_COST_S
        self._drawn_at = time.monotonic()

    def begin(self) -> None:
        """A training begins."""
        self._drawn_at = time.monotonic()

    def consider(self, trainer: pl.Trainer, windows: Mapping[SearchKey, MaskWindow], threshold: float) -> None:
        """Draw after a check, unless that would take more than a small share of the time.

        Args:
            trainer: The Trainer of the fit.
            windows: Sparsity (or region) -> its masks.
            threshold: The distance at which a ticket emerges.
        """
        if time.monotonic() - self._drawn_at >= self._cost_s / SHARE_OF_TIME:
            self.draw(trainer, windows, threshold)

    def draw(self, trainer: pl.Trainer, windows: Mapping[SearchKey, MaskWindow], threshold: float) -> None:
        """Draw now, where anything shows figures; arguments as for :meth:`consider`."""
        shown = self.folder is not None or any(
            isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers
        )
        if not (trainer.is_global_zero and MATPLOTLIB_AVAILABLE and shown):
            return
        began = time.monotonic()
        figures = {"mask_distance": distance_figure(windows, threshold), "mask_overlap": overlap_figure(windows)}
        for name, figure in figures.items():
            log_figure(trainer, f"{self.namespace}/{name}", figure, folder=self.folder)
        self._drawn_at = time.monotonic()
        self._cost_s = self._drawn_at - began
