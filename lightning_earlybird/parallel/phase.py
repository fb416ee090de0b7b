"""The part of a fit in which this rank trains its tickets, apart from the ranks that train others."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.parallel.budgets import steps_left
from lightning_earlybird.parallel.groups import RankGroups
from lightning_earlybird.parallel.hosting import gather_tickets, release_tickets
from lightning_earlybird.parallel.liaison import Liaison
from lightning_earlybird.parallel.loaders import GroupLoaders, adapt_samplers, reshard
from lightning_earlybird.parallel.plan import TicketPlan
from lightning_earlybird.parallel.progress import AllTicketsInBar, TicketProgress, describe_progress
from lightning_earlybird.parallel.relay import MetricRelay
from lightning_earlybird.parallel.separate import (
    ClippingByTicket,
    FinishedAverages,
    SchedulerPace,
    SeparateCheckpoints,
    StepLimit,
    folder_of,
)
from lightning_earlybird.parallel.turns import Turns
from lightning_earlybird.tickets import save_one_ticket
from lightning_earlybird.transition import averaged_modules, unwrap_ddp

if TYPE_CHECKING:
    from datetime import timedelta

DELIVERY_S = 1.0
"""How long rank 0 logs what others have sent, between two batches or while it waits."""


class TicketPhase:
    """What a rank does, and what it has changed in the Trainer, between the split of the world and the end.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, holding the ensemble of all tickets.
        name: Dotted name of the ensemble in the module.
        plan: Who trains what.
        began: Optimizer step from which the tickets' own steps count.
        liaison: How ranks keep in touch.
        directory: Where tickets are written.
        timeout: For collectives within the group.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        name: str,
        plan: TicketPlan,
        began: int,
        liaison: Liaison,
        directory: Path,
        timeout: timedelta | None,
    ) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy)
        self.plan = plan
        self.rank = strategy.global_rank
        self.hosted: tuple[int, ...] = plan.assignment.hosted(self.rank)
        self.began = began
        self.directory = directory
        self._trainer, self._module, self._name = trainer, module, name
        self._strategy, self._liaison = strategy, liaison
        ensemble = module.get_submodule(name)
        assert isinstance(ensemble, TicketEnsemble)
        self.ensemble = ensemble
        self.limits = {ticket: ensemble.regions[ticket].max_steps for ticket in self.hosted}
        self.turns = Turns(module, ensemble, self.limits, lambda: trainer.global_step - began)
        self._world_sampling = strategy.distributed_sampler_kwargs
        self.in_loader_hook = False
        """Whether a hook is being asked for loaders: ranks are then counted within the group."""
        self._undo: list[Callable[[], None]] = []
        self._arrived: deque[tuple[int, dict[str, Any]]] = deque()  # messages that are still to be logged
        self.groups = RankGroups(plan.assignment.groups, self.rank, timeout)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its group."""
        return self.groups.position == 0

    def begin(self) -> None:
        """Let go of what other ranks train, and have the Trainer go on within the group.

        The strategy must answer for the group already.
        """
        trainer, module, strategy = self._trainer, self._module, self._strategy
        self._tell_what_is_trained_apart()
        release_tickets(trainer, module, self.hosted)
        unwrap_ddp(strategy)
        if self.groups.size > 1:
            # A group of one needs no DDP, and is faster without.
            strategy.configure_ddp()
        if len(self.hosted) > 1:
            tickets = [self.ensemble.tickets[ticket] for ticket in self.hosted]
            self._undo.append(ClippingByTicket(strategy.precision_plugin, tickets).undo)
        former, by_epochs = steps_left(trainer)
        group = strategy.distributed_sampler_kwargs
        self._undo.append(GroupLoaders(trainer, self._world_sampling, group, self._numbered).undo)
        reshard(trainer, self._world_sampling)
        present, _ = steps_left(trainer)
        if by_epochs and former is not None and present is not None and present > former:
            self._undo.append(SchedulerPace(module, former, present).undo)
        self._undo.append(StepLimit(trainer, self.began, list(self.limits.values())).undo)
        left, _ = steps_left(trainer)
        whole = math.inf if left is None else trainer.global_step - self.began + left
        ends = {t: min(whole, math.inf if limit is None else limit) for t, limit in self.limits.items()}
        steps = {t: None if math.isinf(end) else int(end) for t, end in ends.items()}
        checkpoints = SeparateCheckpoints(trainer, self.hosted)
        self._undo.append(checkpoints.undo)
        tell = self._liaison.set_status if self.leads else None
        progress = TicketProgress(
            self.began, steps, lambda: self.turns.outputs, tell, before_end=lambda: checkpoints.save_last(trainer)
        )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = self._averages_that_may_end()
        if averages:
            ending = FinishedAverages(self.began, self.limits, averages)
            # Lightning keeps checkpoints last.
            end = next((i for i, each in enumerate(callbacks) if isinstance(each, Checkpoint)), len(callbacks))
            callbacks = [*callbacks[:end], ending, *callbacks[end:]]
            self._undo.append(lambda: self._remove(ending))
        # A new list, since Lightning may be going through the old one; first, to hear of the end before averages are
        # copied into the module.
        trainer.callbacks = [progress, *callbacks]  # type: ignore[attr-defined]
        self._undo.append(lambda: self._remove(progress))
        self.relay = MetricRelay(
            trainer.loggers,
            self.hosted,
            self.rank,
            self._liaison.post if self.leads else None,
        )
        self.relay.attach()
        self._undo.append(self.relay.detach)
        if self.rank == 0:
            self._undo.append(AllTicketsInBar(trainer, lambda: describe_progress(self._liaison.statuses())).undo)

    def _averages_that_may_end(self) -> dict[int, list[nn.Module]]:
        """Ticket -> its averaged copies, where one ticket may end before another; empty elsewhere."""
        if len(set(self.limits.values())) < 2:
            return {}
        roots = [root.get_submodule(self._name) for root in averaged_modules(self._trainer)]
        copies = {ticket: [root.get_submodule(f"tickets.{ticket}") for root in roots] for ticket in self.hosted}
        return copies if roots else {}

    @contextmanager
    def _numbered(self) -> Iterator[None]:
        self.in_loader_hook = True
        try:
            yield
        finally:
            self.in_loader_hook = False

    def deliver(self, seconds: float = DELIVERY_S) -> None:
        """On rank 0: log what other ranks have sent, for so many seconds; the rest comes the next time.

        Loggers may be slow, and rank 0 has a ticket to train, and others who wait for it at the end.
        """
        if self.rank != 0:
            return
        self._arrived.extend(self._liaison.receive())
        until = time.monotonic() + seconds

        def due() -> Iterator[tuple[int, dict[str, Any]]]:
            while self._arrived and time.monotonic() < until:
                yield self._arrived.popleft()

        self.relay.deliver(due())

    def write_finished(self) -> None:
        """Write this group's trained tickets, one directory each, before others are waited for."""
        if not self.leads:
            return
        root = (averaged_modules(self._trainer) or [self._module])[0]
        ensemble = root.get_submodule(self._name)
        assert isinstance(ensemble, TicketEnsemble)
        for ticket in self.hosted:
            place = self.directory / "finished" / folder_of([ticket])
            try:
                save_one_ticket(place, ensemble, ticket)
            except OSError as error:
                # On the rank that it happens to, whichever that is.
                warnings.warn(
                    f"MultiTicketStrategy: the trained ticket {ticket} could not be written to {str(place)!r} ({error})"
                    ". It is in this process, and will be gathered from there when the other tickets are trained.",
                    stacklevel=2,
                )

    def gather(self) -> None:
        """Put the world together again and fill in all tickets on all ranks; every rank must have finished."""
        self.close()
        leaders = [self.plan.assignment.leader(ticket) for ticket in range(len(self.ensemble.tickets))]
        gather_tickets(self._trainer, self._module, leaders, self.rank)

    def remove_finished(self) -> None:
        """Remove the directories of single tickets, once the ensemble of all is there."""
        if self.rank == 0:
            shutil.rmtree(self.directory / "finished", ignore_errors=True)

    def close(self) -> None:
        """Undo what was changed in the Trainer, and have the world back; no communication. Again: nothing happens."""
        self.turns.end()
        while self._undo:
            self._undo.pop()()
        if self.groups.leave():
            # Not what the strategy says, which may speak for the world again by now.
            group = {"num_replicas": self.groups.size, "rank": self.groups.position}
            adapt_samplers(self._trainer, group, self._world_sampling)

    def _tell_what_is_trained_apart(self) -> None:
        """What the module trains besides the denoiser has no ticket to belong to."""
        inside = set(self.ensemble.parameters())
        outside = [
            name for name, value in self._module.named_parameters() if value.requires_grad and value not in inside
        ]
        if outside and len(self.plan.assignment.groups) > 1:
            shown = f"{', '.join(map(repr, outside[:3]))}{', ...' if len(outside) > 3 else ''}"
            rank_zero_warn(
                f"The parameters {shown} lie outside of the denoiser {self._name!r}. From the switch on each group of "
                "ranks trains its own copy of them, and none is part of the ensemble. Freeze them, or make them a part "
                "of the denoiser."
            )

    def _remove(self, callback: pl.Callback) -> None:
        callbacks: list[pl.Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        self._trainer.callbacks = [each for each in callbacks if each is not callback]  # type: ignore[attr-defined]
