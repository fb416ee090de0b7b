"""What becomes of the training loss in the course of a fit: by region, and on both sides of the switch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_earlybird.arguments import taken
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.reporting.loggers import log_metrics
from lightning_earlybird.reporting.region_losses import (
    NotDerivableError,
    RegionLosses,
    WatchedBatch,
    check_state,
    watch_calls,
)
from lightning_earlybird.search import short_name
from lightning_earlybird.switch_loss import SwitchLoss

SAMPLE_LOSSES = "sample_losses"
"""Key under which ``training_step`` may return the loss of each sample itself."""


class LossReport:
    """Logs what :class:`SwitchLoss` and :class:`RegionLosses` tell, at the steps at which Lightning logs.

    ``earlybird/region_loss/START-STOP`` is the mean loss, since it was last logged, of the samples whose timesteps lie
    in a region; those of rank 0, as for any metric without ``sync_dist``. Where tickets train apart it is the mean of
    what ``training_step`` returned for the ticket. Nothing is watched where there is no logger.

    The random state, the weights and what is compiled are left alone.
    """

    def __init__(self) -> None:
        self.regions: RegionLosses | None = None
        """None where nothing is watched."""
        self._tells = True  # the loss can be told by region
        self._batch: WatchedBatch | None = None
        self._unwatch: Callable[[], None] | None = None
        self._due = False
        self._added: set[int] = set()  # tickets whose loss of the present batch has been taken in
        self._saved: Mapping[str, Any] | None = None
        self._switch = SwitchLoss()
        self._by_ticket: dict[int, SwitchLoss] = {}  # where tickets train apart

    def switch(self, partition: TimestepPartition) -> None:
        """The denoiser has just been replaced by tickets for these regions."""
        self._switch.switch()
        if self._saved is not None:
            self._take_up(partition)
        if self.regions is not None:
            self.regions.switch()

    def samples_seen(self) -> tuple[float, list[float]] | None:
        """Samples that were trained on in the search, and by each ticket since the switch.

        A fit that is resumed at its very end has no batch any more: what its checkpoint held is told.

        Returns:
            The two; None where samples were not counted, or only some of them.
        """
        if self.regions is not None and self._tells:
            return self.regions.samples_seen()
        if self._saved is not None and self._saved["tells"]:
            return self._saved["seen_before_switch"], self._saved["seen"].tolist()
        return None

    # --- one batch

    def batch_begins(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        name: str,
        timesteps: TimestepArgument,
        partition: TimestepPartition,
        *,
        apart: bool,
    ) -> None:
        """Watch the denoiser in the batch that begins now.

        Args:
            trainer: The Trainer of the fit.
            module: Its LightningModule.
            name: Dotted name of the denoiser in it.
            timesteps: Where that takes its timesteps.
            partition: The regions.
            apart: Whether tickets train apart, and each batch belongs to one of them.
        """
        self.leave()
        self._added.clear()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.loggers or not every:
            return
        if self.regions is None:
            self._take_up(partition)
        # In a module that is compiled as a whole a hook would be compiled, too.
        if self._tells and not apart and trainer.is_global_zero and module._compiler_ctx is None:
            self._batch = WatchedBatch()
            self._unwatch = watch_calls(module.get_submodule(name), timesteps, self._batch)

    def backward_begins(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """A loss goes backward: the first one of the batch counts."""
        if self._batch is None or self._batch.loss is not None or not module.automatic_optimization:
            return
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler._scale
        share = 1 / trainer.accumulate_grad_batches
        self._batch.loss = loss.detach()
        self._batch.scale = share if scale is None else scale.detach() * share

    def backward_ended(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, apart: Mapping[int, Any] | None
    ) -> None:
        """The gradients have passed the denoiser's output.

        Here and not at the end of the batch losses are taken in: other callbacks may write a checkpoint there before
        our turn comes.
        """
        if self.regions is None or not module.automatic_optimization:
            return
        if self._batch is not None and self._unwatch is not None:
            self._stop_watching()
            self.regions.add(self._batch)
        self._add_apart(self.regions, apart)
        self._due = _logs_at_this_batch(trainer, module)

    def batch_ended(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        *,
        apart: Mapping[int, Any] | None,
    ) -> None:
        """Log what is due.

        Args:
            trainer: The Trainer of the fit.
            module: Its LightningModule.
            outputs: What ``training_step`` returned.
            apart: Ticket -> what it returned for that ticket, where tickets train apart.

        Raises:
            MisconfigurationException: If ``training_step`` returned sample losses of another shape than one number for
                each sample.
        """
        # Lightning divides what it passes on by the batches of a step; what tickets return apart comes as it was.
        parts = trainer.accumulate_grad_batches if module.automatic_optimization and apart is None else 1
        for prefix, loss, output in self._switch_losses(outputs, apart):
            log_metrics(trainer, {prefix + name: value for name, value in loss.add(output, parts).items()})
        if self.regions is None:
            return
        self._add_apart(self.regions, apart)
        batch = self._batch
        if batch is not None and isinstance(outputs, Mapping) and outputs.get(SAMPLE_LOSSES) is not None:
            batch.losses = _checked(outputs[SAMPLE_LOSSES], batch)
        if batch is not None and not module.automatic_optimization and batch.losses is not None:
            self.regions.add(batch)
        self.leave()
        due, self._due = self._due or _logs_at_this_batch(trainer, module), False
        if due:
            self._log(trainer, self.regions)

    def end(self, trainer: pl.Trainer, *, apart: Mapping[int, Any] | None) -> None:
        """The training is over."""
        self.leave()
        for prefix, loss, _ in self._switch_losses(None, apart):
            log_metrics(trainer, {prefix + name: value for name, value in loss.end().items()})

    def leave(self) -> None:
        """Stop watching, also after an exception."""
        self._stop_watching()
        self._batch = None

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep, in tensors and plain containers."""
        state: dict[str, Any] = {
            "losses": self._switch.state_dict(),
            "losses_by_ticket": {str(ticket): loss.state_dict() for ticket, loss in self._by_ticket.items()},
        }
        if self.regions is not None:
            # What is due is logged at the end of this batch, and not again by a fit that is resumed.
            state["region_losses"] = {"tells": self._tells, **self.regions.state_dict(taken=self._due)}
        elif self._saved is not None:
            state["region_losses"] = self._saved
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; all of it may be absent.

        Raises:
            KeyError: If the state lacks something.
            TypeError: If the state holds something else than losses.
        """
        if "losses" in state:
            self._switch.load_state_dict(state["losses"])
        self._by_ticket = {}
        for ticket, losses in state.get("losses_by_ticket", {}).items():
            own = self._by_ticket[int(ticket)] = SwitchLoss()
            own.load_state_dict(losses)
        self.regions = None  # of an earlier fit
        self._saved = taken({"region_losses": None, **state}, "region_losses", dict, type(None))
        if self._saved is not None:
            check_state(self._saved)
            taken(self._saved, "tells", bool)

    # --- small change

    def _take_up(self, partition: TimestepPartition) -> None:
        """Begin to collect, where the fit is a resumed one with what its checkpoint held."""
        self.regions = RegionLosses(partition)
        saved, self._saved = self._saved, None
        if saved is not None:
            self._tells = bool(saved["tells"])
            self.regions.load_state_dict(saved)

    def _stop_watching(self) -> None:
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def _add_apart(self, regions: RegionLosses, apart: Mapping[int, Any] | None) -> None:
        """Take in what ``training_step`` has returned for each ticket on this batch, once."""
        for ticket, output in (apart or {}).items():
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor) and ticket not in self._added:
                self._added.add(ticket)
                regions.add_mean(ticket, loss)

    def _log(self, trainer: pl.Trainer, regions: RegionLosses) -> None:
        try:
            means = regions.take()
        except NotDerivableError as error:
            self._tells = False
            rank_zero_info(
                "TimestepAwarePruner: the loss by region is not logged, as what training_step returns is not the mean "
                f"squared error of the denoiser's output ({error}). For it, return the loss of each sample as well: "
                f"{{'loss': losses.mean(), {SAMPLE_LOSSES!r}: losses}}."
            )
            return
        names = [f"earlybird/region_loss/{short_name(region)}" for region in regions.partition]
        log_metrics(trainer, dict(zip(names, means, strict=True)), save=False)

    def _switch_losses(self, outputs: Any, apart: Mapping[int, Any] | None) -> list[tuple[str, SwitchLoss, Any]]:
        """Prefix of names, collector, output of ``training_step``: for each ticket, where they train apart."""
        if apart is None:
            return [("", self._switch, outputs)]
        return [
            (f"ticket_{ticket}/", self._by_ticket.setdefault(ticket, copy.deepcopy(self._switch)), output)
            for ticket, output in apart.items()
        ]


def _logs_at_this_batch(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether Lightning logs, at the end of the batch under way, what has been logged in it."""
    if trainer.fit_loop._should_accumulate() and module.automatic_optimization:
        return False
    rehearsal: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return trainer._logger_connector.should_update_logs or bool(rehearsal)


def _checked(losses: Any, batch: WatchedBatch) -> Tensor:
    samples = len(batch.calls[0].timesteps) if batch.calls else None
    if not isinstance(losses, Tensor) or (samples is not None and losses.shape != (samples,)):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise MisconfigurationException(
            f"{SAMPLE_LOSSES!r} in what training_step returned is {found}, expected a tensor of shape ({samples},): "
            "one loss for each sample that the denoiser was given. Take the mean over all dimensions but the first."
        )
    return losses.detach()
