"""MultiTicketStrategy: the tickets train side by side, each group of ranks at its own speed."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.optim import Optimizer
from typing_extensions import override

from lightning_earlybird.conversion import find_ensemble
from lightning_earlybird.parallel.assignment import Assignment
from lightning_earlybird.parallel.budgets import ticket_loads
from lightning_earlybird.parallel.distress import (
    child_processes,
    end_children,
    replace_child_observer,
    restore_child_observer,
    save_interrupted,
    share_sigterm,
    stop_by_themselves,
    stop_together,
)
from lightning_earlybird.parallel.liaison import Liaison
from lightning_earlybird.parallel.loaders import check_loaders
from lightning_earlybird.parallel.phase import TicketPhase
from lightning_earlybird.parallel.plan import TicketPlan, plan_tickets
from lightning_earlybird.parallel.progress import Occasionally, describe_progress
from lightning_earlybird.parallel.separate import folder_of
from lightning_earlybird.reporting import log_metrics

GRACE_S = 20.0
"""Seconds that a rank which does not come to its next batch has to leave, once another one is lost."""

SAVING_S = 30.0
"""Seconds that ranks give each other to save what they have before they leave; torchrun gives as many."""


class MultiTicketStrategy(DDPStrategy):
    """DDP while the tickets are searched for; then every ticket trains on ranks of its own, at its own speed.

    To be used with a :class:`TimestepAwarePruner`. At the switch the world of ranks is split into groups: each ticket
    gets ranks in proportion to its cost (measured step time times steps), with DDP inside the group; where there are
    fewer ranks than tickets, a rank hosts several and gives each its turn on every batch. From then on a rank holds
    its own tickets only, sees the whole data set (sharded inside the group), and draws timesteps from its tickets'
    regions and overlaps. There is no traffic between groups until all have finished; then every rank gets all tickets.

    A ticket takes ``region.max_steps`` optimizer steps at most, else what the Trainer's ``max_steps`` or
    ``max_epochs`` leave. Under ``max_epochs`` an epoch is one pass of the *group* through the data, and learning rates
    that go by steps keep pace with the epochs.

    ``ModelCheckpoint`` writes to a directory for each group, ``EarlyStopping``, ``Timer``, ``sync_dist`` and
    torchmetrics act within the group, and metrics reach the logger of rank 0 as ``ticket_N/name``.

    When a rank is lost, every other one says which and what it was training, and ends; what they hold is saved in
    ``directory / "interrupted"``, the pruner's directory. A SIGTERM to any rank has all of them save and end at their
    next batch. Tickets that were trained to their end are in ``directory / "finished"``.

    Differs from the paper (arXiv 2504.09606), which trains one ticket after another by hand on a device each: all is
    one fit, and cost decides which ticket gets how many ranks.

    Args:
        assignment: Who trains what: for each ticket its rank or ranks, as a list (``[0, [1, 2]]``) or a mapping
            (``{0: 0, 1: [1, 2]}``); ranks that train several tickets train alone. None goes by measured cost.
        patience_s: Seconds without a sign of life after which a rank of another machine is given up.
        timeout: As for ``DDPStrategy``: what a collective may take. A rank that has not come to another batch for so
            long is given up, too, whichever ticket it trains.
        **kwargs: As for :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        plan: Who trains what and how long that should take; None before the switch.

    Raises:
        MisconfigurationException: Before training, if the assignment does not fit the regions or the ranks, or the
            launcher, module or data cannot be used.
        RankLostError: In the fit, on every rank, when another one is gone.

    Example::

        trainer = L.Trainer(
            strategy=MultiTicketStrategy(),  # or "multi_ticket"
            devices=3,
            callbacks=[TimestepAwarePruner([(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)], overlap=20)],
        )
    """

    strategy_name = "multi_ticket"

    def __init__(
        self,
        assignment: Sequence[Any] | Mapping[Any, Any] | None = None,
        *,
        patience_s: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not patience_s > 0:
            raise ValueError(f"patience_s={patience_s!r} must be above 0: seconds without a sign of life.")
        self.assignment = assignment
        self.patience_s = patience_s
        self.plan: TicketPlan | None = None
        self._phase: TicketPhase | None = None
        self._liaison: Liaison | None = None
        self._directory: Path | None = None
        self._on_gathered: Callable[[], None] | None = None
        self._failed = self._incomplete = self._interrupted = False
        self._to_blame: bool | None = None  # for the exception under way, once that has been told
        self._waiting: list[int] = []  # tickets whose turn on the present batch is still to come
        self._step_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._find_unused = bool(self._ddp_kwargs.get("find_unused_parameters", False))

    # --- what the pruner calls

    def prepare(self, module: pl.LightningModule, num_tickets: int, directory: Path) -> None:
        """Check what can be checked before training; for ``on_fit_start``.

        Args:
            module: The LightningModule of the fit.
            num_tickets: How many tickets there will be.
            directory: Where they will be written.

        Raises:
            MisconfigurationException: See the class.
        """
        self._directory = directory
        try:
            given = self.assignment
            assignment = None if given is None else Assignment.of(given, num_tickets, self.world_size)
        except ValueError as error:
            raise MisconfigurationException(f"MultiTicketStrategy: {error}") from error
        shared = self.world_size < num_tickets or (
            assignment is not None and any(len(assignment.hosted(rank)) > 1 for rank in range(self.world_size))
        )
        if shared and not module.automatic_optimization:
            raise MisconfigurationException(
                f"automatic_optimization=False with {num_tickets} tickets on {self.world_size} rank(s): a rank with "
                "several tickets gives each its turn within one optimizer step, which is the module's own under manual "
                "optimization. Use a rank for each ticket, Trainer(strategy='ddp') or, on one device, "
                "Trainer(strategy='auto')."
            )

    def split(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step_seconds: Sequence[float],
        on_gathered: Callable[[], None],
        *,
        began: int | None = None,
        measured: bool = True,
    ) -> None:
        """Split the world: from here on this rank trains its own tickets only.

        To be called on every rank at the same step, right after the denoiser has become an ensemble.

        Args:
            trainer: The Trainer of the fit.
            module: Its LightningModule, with the ensemble of all tickets.
            step_seconds: Seconds of one optimizer step of each ticket on one device; the same on all ranks.
            on_gathered: Called at the end, when all ranks hold all trained tickets.
            began: Optimizer step at which the tickets began, in a fit that goes on with them; None means now.
            measured: Whether ``step_seconds`` are seconds; False where they only say which ticket costs more.
        """
        found = find_ensemble(module)
        assert found is not None and self._directory is not None and self._liaison is not None
        name, ensemble = found
        check_loaders(trainer, module)
        began = trainer.global_step if began is None else began
        # Rank 0's: where data sets are of unequal length the others count other steps, and might plan otherwise.
        loads = self.broadcast(ticket_loads(trainer, ensemble.regions, step_seconds, trainer.global_step - began))
        ranks_per_node = self.num_processes if self.num_nodes > 1 else None
        self.plan = plan = plan_tickets(loads, self.world_size, self.assignment, ranks_per_node=ranks_per_node)
        labels = [f"[{region.start:g}, {region.stop:g})" for region in ensemble.regions]
        rank_zero_info(
            f"MultiTicketStrategy: who trains what from step {trainer.global_step} on.\n{plan.table(labels)}"
        )
        if measured:
            log_metrics(trainer, plan.metrics())
        else:
            rank_zero_info(
                "Times are relative: nothing was measured, and they stand for multiply-accumulate operations."
            )
        self._on_gathered = on_gathered
        self._ddp_kwargs["find_unused_parameters"] = self._find_unused
        phase = TicketPhase(trainer, module, name, plan, began, self._liaison, self._directory, self._timeout)
        self._phase = phase
        phase.begin()
        self._doing(f"training {' and '.join(f'ticket {ticket} {labels[ticket]}' for ticket in phase.hosted)}")

    @property
    def turn_outputs(self) -> dict[int, STEP_OUTPUT]:
        """Ticket -> what ``training_step`` returned in its turn on the present batch; empty before the switch."""
        return {} if self._phase is None else self._phase.turns.outputs

    @property
    def is_split(self) -> bool:
        """Whether this rank trains tickets of its own at present."""
        return self._phase is not None

    # --- the group in place of the world

    @property
    @override
    def world_size(self) -> int:
        return super().world_size if self._phase is None else self._phase.groups.size

    @property
    @override
    def global_rank(self) -> int:
        # The world's number in general: only loaders are made by the number within the group.
        phase = self._phase
        return phase.groups.position if phase is not None and phase.in_loader_hook else super().global_rank

    @property
    @override
    def is_global_zero(self) -> bool:
        return super().is_global_zero if self._phase is None else self._phase.leads

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._phase is None:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self._phase.groups.size, "rank": self._phase.groups.position}

    # --- training

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.plan = self._directory = None
        self._failed, self._incomplete, self._to_blame = False, False, None
        replace_child_observer()
        self._liaison = Liaison(
            c10d._get_default_store() if self.world_size > 1 else None,
            self.global_rank,
            self.world_size,
            patience_s=self.patience_s,
            grace_s=GRACE_S,
            # What peers in a collective would wait for at most; ranks that train other tickets are in none.
            stall_s=self._timeout.total_seconds() if self._timeout is not None and self.world_size > 1 else None,
            children=lambda: child_processes(self),
        )
        self._liaison.start()
        self._doing("searching for tickets")

    def on_train_start(self) -> None:
        """Lightning's signal handlers are in place, and the training data is set up."""
        module = self._module
        if self._directory is None:
            rank_zero_warn(
                "strategy=MultiTicketStrategy without a TimestepAwarePruner among the callbacks: there will be no "
                "tickets, and all ranks train together, as under Trainer(strategy='ddp'). Add the pruner."
            )
        share_sigterm(module.trainer, self._request_stop)
        stop_together(module.trainer, lambda: self._asked_to_stop)
        if self._phase is None:  # else they were looked at before the world was split
            check_loaders(module.trainer, module)

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Between two batches: has a rank been lost, or are we to stop?"""
        if self._liaison is not None:
            self._liaison.progress()
            self._liaison.check()
        if self._asked_to_stop and self.world_size == 1:
            raise SIGTERMException  # a group of several ranks agrees on it before its next batch
        if self._phase is not None:
            self._phase.deliver()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._phase is None:
            return super().training_step(*args, **kwargs)
        self._step_inputs = args, kwargs
        self._waiting = self._phase.turns.begin_step()
        output: STEP_OUTPUT = None
        while output is None and self._waiting:  # a training_step may skip a batch by returning None
            output = self._take_turn()
        if output is None or not self._module.automatic_optimization:
            self._phase.turns.end()  # no backward pass will follow
        return output

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Each ticket's backward pass right after its forward pass, so that memory holds one's activations at a time.
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._phase is not None and self._module.automatic_optimization:
            while self._waiting:
                output = self._take_turn()
                accumulated = self._module.trainer.accumulate_grad_batches
                result = ClosureResult.from_training_step_output(output, accumulated)
                if result.closure_loss is not None:
                    super().backward(result.closure_loss, optimizer, *args, **kwargs)
            self._phase.turns.end()
        return loss

    def _take_turn(self) -> STEP_OUTPUT:
        assert self._phase is not None
        module, ticket = self._module, self._waiting.pop(0)
        # Turns after the first are taken within the backward hook, where Lightning allows no logging.
        hook, module._current_fx_name = module._current_fx_name, "training_step"
        if self._phase.turns.outputs:
            # In the first batch of an epoch Lightning forgets what a hook has logged when another has logged since.
            module.trainer._logger_connector._current_fx = "training_step"
        try:
            with self._phase.turns.take(ticket):
                args, kwargs = self._step_inputs
                output = super().training_step(*args, **kwargs)
        finally:
            module._current_fx_name = hook
        self._phase.turns.outputs[ticket] = output
        return output

    def on_validation_start(self) -> None:
        """The first time this is before training, when the data are tried out: a SIGTERM may come then, too."""
        if self._liaison is not None:
            share_sigterm(self._module.trainer, self._request_stop)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """In a validation, too, a lost rank is noticed, and a rank that has nobody to agree with stops."""
        if self._liaison is not None:
            self._liaison.progress()
            self._liaison.check()
            if self._asked_to_stop and self.world_size == 1:
                raise SIGTERMException

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._phase is None:
            return super().validation_step(*args, **kwargs)
        output: STEP_OUTPUT = None
        for ticket in self._phase.hosted:
            with self._phase.turns.evaluation(ticket):
                output = super().validation_step(*args, **kwargs)
        return output

    # --- the end

    def on_train_end(self) -> None:
        """Wait for the others without a pending collective, then have all tickets on all ranks."""
        phase, liaison = self._phase, self._liaison
        if phase is None or liaison is None:
            return
        phase.write_finished()
        self._doing(f"waiting for other tickets, with {' and '.join(f'ticket {t}' for t in phase.hosted)} trained")
        liaison.mark("finished")
        show = Occasionally(lambda: rank_zero_info(f"Tickets: {describe_progress(liaison.statuses())}"))

        def meanwhile() -> None:
            phase.deliver()
            show()

        if not liaison.wait_for_all("finished", meanwhile):
            raise SIGTERMException
        self._doing("gathering the trained tickets")
        self._phase, self._incomplete = None, True
        phase.gather()
        self._incomplete = False
        assert self._on_gathered is not None
        self._on_gathered()
        phase.deliver(math.inf)  # the last metrics, for which nobody waits any more
        phase.remove_finished()

    def report(self, exception: BaseException) -> None:
        """Tell the others that this rank is going down; for a callback's ``on_exception``, before those that save.

        A ``ModelCheckpoint(save_on_exception=True)`` waits for the ranks of its group, which may wait for this one.
        """
        if self._liaison is not None and self._to_blame is None and not isinstance(exception, SIGTERMException):
            self._to_blame = self._liaison.failed(exception)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._failed, self._interrupted = True, isinstance(exception, KeyboardInterrupt)
        liaison = self._liaison
        if liaison is None:
            return
        self.report(exception)
        stopped = isinstance(exception, SIGTERMException)
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM  # without it the process would end as if all had gone well
        if stopped or not self._to_blame:
            # Weights are those of the last whole step: what breaks when another rank is lost is a collective, and the
            # optimizer steps after those.
            liaison.extend(SAVING_S)
            self._save_interrupted()
        # Whoever launched the processes may kill those that are left when the first one is gone.
        liaison.settle("saved", SAVING_S, [saver for group, saver in self._savers() if self.global_rank not in group])

    @override
    def teardown(self) -> None:
        if self._phase is not None:
            phase, self._phase = self._phase, None
            phase.close()
        if self._liaison is not None:
            self._liaison.stop()
            self._liaison = None
            stop_by_themselves(self._module.trainer)
            if not self._failed:
                restore_child_observer(self)
            elif not self._interrupted:  # else Lightning ends them at once
                end_children(self, GRACE_S + 2)
        super().teardown()

    def _save_interrupted(self) -> None:
        # While tickets are gathered a rank holds some that are empty yet; all of them are in `finished`.
        if self._directory is None or self._incomplete:
            return
        if self.global_rank not in [saver for _, saver in self._savers()]:
            return
        name = "search" if self._phase is None else folder_of(self._phase.hosted)
        save_interrupted(self._module.trainer, self._directory / "interrupted" / f"{name}.ckpt")

    def _savers(self) -> list[tuple[Sequence[int], int]]:
        """Each group of ranks that hold the same, and the one of them that saves it: the first that is still there."""
        lost = self._liaison.lost_rank if self._liaison is not None else None
        ranks = range(super().world_size)
        groups: Sequence[Sequence[int]] = [ranks] if self._phase is None else self._phase.plan.assignment.groups
        left = [(group, [rank for rank in group if rank != lost]) for group in groups]
        return [(group, there[0]) for group, there in left if there]

    # --- small change

    @property
    def _module(self) -> pl.LightningModule:
        module = self.lightning_module
        assert module is not None
        return module

    @property
    def _asked_to_stop(self) -> bool:
        return self._liaison is not None and self._liaison.stop_requested

    def _request_stop(self) -> None:
        if self._liaison is not None:
            self._liaison.request_stop()

    def _doing(self, text: str) -> None:
        if self._liaison is not None:
            self._liaison.doing(text)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description="DDP, then tickets side by side")


MultiTicketStrategy.register_strategies(StrategyRegistry)
