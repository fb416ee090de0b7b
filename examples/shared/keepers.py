"""Callbacks of the examples: what outlives the switch, and a restart."""

import copy
import csv
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_earlybird import TicketEnsemble, TimestepAwarePruner


class DenseKeeper(Callback):
    """Writes the averaged dense denoiser, as it was when tickets took its place, as a diffusers model.

    Stands before the pruner in the list of callbacks, and copies the denoiser whenever the pruner may replace it before
    the next batch: after each check of the masks, and at the search limit.

    Args:
        average: The callback that keeps the averaged weights.
        pruner: The pruner of the same Trainer.
        folder: Where the denoiser goes.
        checkpoint: What the fit goes on from. Where that is of another run and has tickets already, the denoiser is
            taken from the folder of that run, if it is there.
    """

    def __init__(
        self, average: EMAWeightAveraging, pruner: TimestepAwarePruner, folder: Path, checkpoint: Path | None = None
    ) -> None:
        self.average = average
        self.pruner = pruner
        self.folder = folder
        self._earlier = None if checkpoint is None else checkpoint.parent.parent / folder.name
        self.search_s = self.total_s = 0.0
        self._copy: nn.Module | None = None
        self._checks = -1
        self._started = 0.0

    @property
    def seconds(self) -> float:
        """Of the fit so far, what earlier processes took up to the checkpoint included."""
        return time.perf_counter() - self._started

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._started = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy_dense(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.pruner.phase == "tickets":
            return
        self.search_s = self.seconds
        detector = self.pruner.detector
        checks = sum(len(window.checks) for window in detector.windows.values()) if detector is not None else 0
        if checks != self._checks or trainer.global_step == self.pruner.max_search_steps:
            self._checks = checks
            self._copy_dense(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.pruner.phase == "tickets":  # before the first checkpoint with tickets, which has no dense denoiser
            self._write()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.total_s = self.seconds
        self._write()

    def _copy_dense(self, pl_module: L.LightningModule) -> None:
        if rank_zero_only.rank == 0 and not isinstance(pl_module.model, TicketEnsemble):
            # Lightning has no public way to the averaged weights.
            averaged = self.average._average_model.module.model
            self._copy = copy.deepcopy(getattr(averaged, "_orig_mod", averaged)).cpu().eval()

    def _write(self) -> None:
        if self._copy is not None:
            self._copy.save_pretrained(self.folder)
            self._copy = None
        elif self._earlier is not None and rank_zero_only.rank == 0 and not self.folder.exists():
            if self._earlier.is_dir():
                shutil.copytree(self._earlier, self.folder)
            self._earlier = None

    def state_dict(self) -> dict[str, Any]:
        return {"search_s": self.search_s, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.search_s = state_dict["search_s"]
        self._started = time.perf_counter() - state_dict["seconds"]


class LogKeeper(Callback):
    """Carries in checkpoints what was logged so far, so that a resumed run logs every step exactly once.

    Lightning's CSVLogger begins its file anew, and what the stopped process logged after its last checkpoint is going
    to be logged again.
    """

    def __init__(self, logger: CSVLogger, wandb_id: str) -> None:
        self.logger = logger
        self.wandb_id = wandb_id

    def state_dict(self) -> dict[str, Any]:
        # Only the first process logs, and its checkpoint counts.
        path = Path(self.logger.log_dir, "metrics.csv")
        lines: list[str] = []
        if rank_zero_only.rank == 0:
            self.logger.save()  # what was logged and not yet written belongs to it, too
            lines = path.read_text().splitlines() if path.exists() else []
        return {"rows": list(csv.DictReader(lines)), "wandb_id": self.wandb_id}

    @rank_zero_only
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.logger.experiment.metrics[:0] = [
            {name: value for name, value in row.items() if value} for row in state_dict["rows"]
        ]
        self.logger.save()


class PhaseBar(TQDMProgressBar):
    """The usual progress bar, with the phase of the run; the detector itself adds the mask distances."""

    def __init__(self, pruner: TimestepAwarePruner) -> None:
        super().__init__(refresh_rate=10)
        self.pruner = pruner

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if self.pruner.phase != "search":
            metrics = {name: value for name, value in metrics.items() if not name.startswith("distance/")}
        if getattr(trainer.strategy, "is_split", False):
            # Of this process's ticket; the strategy adds a line with that of every ticket.
            metrics.pop("train_loss", None)
        return {"phase": self.pruner.phase, **metrics}
