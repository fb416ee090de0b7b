"""Checkpoints that were written at the end of a batch or of an epoch, when something was still to come.

After a checkpoint of ``on_train_batch_end`` Lightning (2.6) goes on with the next batch, or even the next epoch: the
validation that was due, the hooks of the epoch's end and everything that acts in them are left out, and from then on
its count of epochs is wrong. After one of ``on_train_epoch_end`` it leaves out what follows these hooks: the schedules
that go by metrics, and the logging of the epoch's means; and where ``max_steps`` is given, the epoch does not end.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fit_loop import RestartStage as FitRestartStage
from lightning.pytorch.loops.loop import _Loop


class UnfinishedEnd:
    """Has a fit go on from within the end of a batch or of an epoch."""

    def __init__(self) -> None:
        self.of_epoch = False
        """Whether the checkpoint was written in ``on_train_epoch_end``."""
        self._of_batch = False

    def look_at(self, loops: dict[str, Any]) -> None:
        """Note at which moment a checkpoint was written, and count the batch that was ending then as completed.

        Args:
            loops: The state of the fit loop in a checkpoint; changed in place.
        """
        self.of_epoch = _is_ending(loops["epoch_progress"]["total"])
        progress = loops["epoch_loop.batch_progress"]
        self._of_batch = _is_ending(progress["total"])
        if self._of_batch:
            for count in (progress["total"], progress["current"]):
                count["completed"] = count["processed"]

    def go_on(self, trainer: pl.Trainer) -> bool:
        """Have the loop do what comes after that batch; for ``on_train_start``, when the loops have been reset.

        Returns:
            Whether the end of the epoch comes next, without another batch.
        """
        loop = trainer.fit_loop.epoch_loop
        if trainer.fit_loop.restarting:
            self._begin_next_epoch(trainer)
        at_end = trainer.fit_loop.restarted_mid_epoch and loop._num_ready_batches_reached()
        if not self._of_batch:
            return at_end
        self._of_batch = False
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if trainer.limit_val_batches and loop._should_check_val_fx(fetcher):
            # The stage at which it goes back to a validation; that starts from its first batch.
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            loop.val_loop._restarting = False
            return at_end
        if not loop._should_accumulate():
            # The loop counts these at the end of a batch, which it takes for done.
            loop._batches_that_stepped += 1
        if at_end:
            method = loop.on_run_start

            def ended(data_fetcher: Any) -> None:
                loop.__dict__.pop("on_run_start", None)
                method(data_fetcher)
                loop.restarting = False  # or it would take another batch

            loop.__dict__["on_run_start"] = ended
        return at_end

    def _begin_next_epoch(self, trainer: pl.Trainer) -> None:
        """Go on from the end of an epoch with the next one, as Lightning does unless steps limit the fit.

        There it would call the hooks of an epoch's end again, and count it twice: the data of the next one would come
        in another order, and a limit of epochs be reached too early. After a whole fit it would count an empty epoch.
        """
        fit_loop = trainer.fit_loop
        count, batches = fit_loop.epoch_progress.total, fit_loop.epoch_loop.batch_progress
        if not count.ready == count.started == count.processed:  # type: ignore[attr-defined]
            return
        if fit_loop.restarted_on_epoch_end:
            fit_loop.epoch_progress.increment_completed()
            fit_loop._restart_stage = FitRestartStage.RESUMED_ON_EPOCH_END
        elif not batches.is_last_batch:
            return  # the limit of steps was reached within an epoch, which goes on
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # its own setter refuses
        fit_loop.epoch_loop.update_restart_stage()

    def finish_epoch(self, trainer: pl.Trainer) -> None:
        """Do what comes after the hooks of ``on_train_epoch_end``; its metrics must be known again."""
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        epochs = trainer.fit_loop.epoch_progress.current
        epochs.completed -= 1  # what is logged now bears the number of that epoch
        connector.on_epoch_end()
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop._batches_that_stepped -= 1  # the epoch's means belong to its last step
        connector.update_train_epoch_metrics()
        loop._batches_that_stepped += 1
        epochs.completed += 1


def _is_ending(total: dict[str, int]) -> bool:
    return total["ready"] == total["started"] == total["processed"] == total["completed"] + 1
