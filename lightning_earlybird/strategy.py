"""MultiTicketStrategy: the tickets train side by side, each group of ranks at its own speed."""

from __future__ import annotations

import math
import signal
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_earlybird.conversion import find_ensemble
from lightning_earlybird.parallel.assignment import Assignment
from lightning_earlybird.parallel.budgets import ticket_loads
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.distress import (
    before_validations,
    child_processes,
    end_children,
    look_between_batches,
    replace_child_observer,
    restore_child_observer,
    save_interrupted,
    share_sigterm,
    stop_by_themselves,
    stop_together,
    validation_is_unfinished,
)
from lightning_earlybird.parallel.fit_files import SWITCH_FILE
from lightning_earlybird.parallel.fit_record import FIT_KEY, FitRecord
from lightning_earlybird.parallel.grouped import GroupedStrategy
from lightning_earlybird.parallel.groups import RankGroups
from lightning_earlybird.parallel.liaison import Liaison
from lightning_earlybird.parallel.loaders import check_loaders
from lightning_earlybird.parallel.phase import TicketPhase
from lightning_earlybird.parallel.plan import TicketPlan, plan_tickets
from lightning_earlybird.parallel.progress import Occasionally, describe_progress
from lightning_earlybird.parallel.recording import describe_split
from lightning_earlybird.parallel.separate import folder_of
from lightning_earlybird.parallel.swaps import SwapWatch
from lightning_earlybird.reporting import log_metrics
from lightning_earlybird.resume.random_states import capture_random_states, restore_random_states

GRACE_S = 20.0
"""Seconds that a rank which does not come to its next batch has to leave, once another one is lost."""

SAVING_S = 30.0
"""Seconds that ranks give each other to save what they have before they leave; torchrun gives as many."""


PLACES = 16
"""Directories that a checkpoint names at most: a fit may be resumed from one into another again and again."""


class MultiTicketStrategy(GroupedStrategy):
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
    next batch. Tickets that were trained to their end are in ``directory / "finished"``. A fit goes on, with each
    ticket where it was, from the directory that holds the checkpoints of all groups: ``fit(ckpt_path=DIRECTORY)``, or
    ``"last"``; on as many ranks as before, or on others.

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
        super().__init__(assignment, **kwargs)
        if not patience_s > 0:
            raise ValueError(f"patience_s={patience_s!r} must be above 0: seconds without a sign of life.")
        self.patience_s = patience_s
        self._phase: TicketPhase | None = None
        self._liaison: Liaison | None = None
        self._swaps: SwapWatch | None = None
        self._before_validation: dict[str, Any] | None = None  # random states
        self._on_gathered: Callable[[], None] | None = None
        self._failed = self._incomplete = self._interrupted = self._begun = False
        self._to_blame: bool | None = None  # for the exception under way, once that has been told
        self._waiting: list[int] = []  # tickets whose turn on the present batch is still to come
        self._step_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

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
            assignment = None if given is None else Assignment.of(given, num_tickets, self._all_ranks)
        except ValueError as error:
            raise MisconfigurationException(f"MultiTicketStrategy: {error}") from error
        shared = self._all_ranks < num_tickets or (
            assignment is not None and any(len(assignment.hosted(rank)) > 1 for rank in range(self._all_ranks))
        )
        if shared and not module.automatic_optimization:
            raise MisconfigurationException(
                f"automatic_optimization=False with {num_tickets} tickets on {self._all_ranks} rank(s): a rank with "
                "several tickets gives each its turn within one optimizer step, which is the module's own under manual "
                "optimization. Use a rank for each ticket, Trainer(strategy='ddp') or, on one device, "
                "Trainer(strategy='auto')."
            )
        resumption = self._resumption
        if resumption is not None:
            found = find_ensemble(module)
            assert found is not None
            self._phase = self._new_phase(module.trainer, found[0], resumption.plan, resumption.courses)
            # The sanity check may be the first to ask for loaders.
            self._phase.use_loaders_of_group([self._world_sampling, self._laid_out_sampling])

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

        To be called on every rank at the same step, right after the denoiser has become an ensemble. In a fit that goes
        on from checkpoints of groups the world is split already, and each rank goes on with what it was given.

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
        self._on_gathered = on_gathered
        check_loaders(trainer, module)
        labels = [f"[{region.start:g}, {region.stop:g})" for region in ensemble.regions]
        if self._phase is not None:
            self._go_on(self._phase, labels)
            return
        began = trainer.global_step if began is None else began
        # Rank 0's: where data sets are of unequal length the others count other steps, and might plan otherwise.
        loads = self.broadcast(ticket_loads(trainer, ensemble.regions, step_seconds, trainer.global_step - began))
        ranks_per_node = self.num_processes if self.num_nodes > 1 else None
        self.plan = plan = plan_tickets(loads, self.world_size, self.assignment, ranks_per_node=ranks_per_node)
        rank_zero_info(
            f"MultiTicketStrategy: who trains what from step {trainer.global_step} on.\n{plan.table(labels)}"
        )
        if measured:
            log_metrics(trainer, plan.metrics())
        else:
            rank_zero_info(
                "Times are relative: nothing was measured, and they stand for multiply-accumulate operations."
            )
        self._born = self.broadcast(uuid.uuid4().hex)
        self._step_seconds, self._measured = tuple(step_seconds), measured
        limits = [region.max_steps for region in ensemble.regions]
        courses = {ticket: Course(began, trainer.global_step, limit) for ticket, limit in enumerate(limits)}
        self._save_whole(trainer, module, plan, courses)
        self._ddp_kwargs["find_unused_parameters"] = self._find_unused
        self._groups = RankGroups(plan.assignment.groups, super().global_rank, self._timeout)
        own = {ticket: courses[ticket] for ticket in plan.assignment.hosted(self.global_rank)}
        self._phase = phase = self._new_phase(trainer, name, plan, own)
        phase.begin()
        self._doing(_training(phase.hosted, labels))

    def write_record(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Write into a checkpoint which fit it is of, and how ranks share the tickets."""
        if FIT_KEY in checkpoint or self._fit is None:
            return
        split = self._whole
        if split is None and self._phase is not None:
            split = self._phase.record(self._born, self._step_seconds, self._measured, self._layout)
        FitRecord(self._fit, self._session, self._places(trainer), split).write(checkpoint)

    def note_progress(self) -> None:
        """Says that this rank has come further: for hooks that take long, whose rank would be given up for hanging."""
        if self._liaison is not None:
            self._liaison.progress()

    @property
    def turn_outputs(self) -> dict[int, STEP_OUTPUT]:
        """Ticket -> what ``training_step`` returned in its turn on the present batch; empty before the switch."""
        return {} if self._phase is None else self._phase.turns.outputs

    @property
    def is_split(self) -> bool:
        """Whether this rank trains tickets of its own at present."""
        return self._phase is not None

    def _new_phase(
        self, trainer: pl.Trainer, name: str, plan: TicketPlan, courses: Mapping[int, Course]
    ) -> TicketPhase:
        assert self._groups is not None and self._liaison is not None and self._directory is not None
        return TicketPhase(
            trainer,
            self._module,
            name,
            plan,
            self._groups,
            courses,
            self._liaison,
            self._directory,
            self._world_sampling,
            self._counted_in_group,
        )

    def _save_whole(
        self, trainer: pl.Trainer, module: pl.LightningModule, plan: TicketPlan, courses: Mapping[int, Course]
    ) -> None:
        """Save all tickets with everything that belongs to them, for those that are lost before their first save."""
        assert self._directory is not None
        self._whole = describe_split(
            trainer,
            module,
            self._born,
            plan,
            courses,
            group_size=self.world_size,
            pace=None,
            step_seconds=self._step_seconds,
            measured=self._measured,
            laid_out_for=self._layout,
            at_split=True,
        )
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        path = self._directory / SWITCH_FILE
        try:
            self.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
            rank_zero_warn(
                f"{str(path)!r} could not be written ({error}). Training goes on, but a ticket whose ranks are lost "
                "before its first checkpoint cannot be resumed."
            )
        self.barrier("the state at the split is saved")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.save_last and not callback.save_weights_only:
                # Else ckpt_path="last" may find nothing, or nothing of the tickets.
                saved = callback._last_global_step_saved
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
                callback._last_global_step_saved = saved
        self._whole = None

    def _go_on(self, phase: TicketPhase, labels: Sequence[str]) -> None:
        assert self._resumption is not None and self._checkpoints is not None
        phase.go_on(self._resumption, self._checkpoints)
        self._resumption = self._checkpoints = None
        self._doing(_training(phase.hosted, labels))

    def _places(self, trainer: pl.Trainer) -> tuple[str, ...]:
        """Where there may be more checkpoints of this fit."""
        phase = self._phase
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback.dirpath for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        roots = phase.checkpoint_roots if phase is not None else [str(path) for path in found if path is not None]
        directory = [] if self._directory is None else [str(self._directory), str(self._directory / "interrupted")]
        return tuple(dict.fromkeys([*roots, *directory, *self._former_places]))[:PLACES]

    # --- training

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._failed, self._incomplete, self._begun, self._to_blame = False, False, False, None
        if self._fit is None:
            # From the operating system, so that the random states of the training stay as they are.
            self._fit, self._session = self.broadcast(uuid.uuid4().hex), 0
        self._swaps, self._before_validation = SwapWatch(trainer), None
        run = trainer.fit_loop.run
        trainer.fit_loop.__dict__["run"] = lambda: self._run_fit_loop(trainer, run)
        replace_child_observer()
        self._liaison = Liaison(
            self._store,
            self.global_rank,
            self._all_ranks,
            patience_s=self.patience_s,
            grace_s=GRACE_S,
            # What peers in a collective would wait for at most; ranks that train other tickets are in none.
            stall_s=self._timeout.total_seconds() if self._timeout is not None and self._all_ranks > 1 else None,
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
        self._begun = True
        share_sigterm(module.trainer, self._request_stop)
        stop_together(module.trainer, lambda: self._asked_to_stop)
        look_between_batches(module.trainer, self._look_between_batches)
        before_validations(module.trainer, self._note_random_states)
        if self._phase is None:  # else they were looked at before the world was split
            check_loaders(module.trainer, module)

    def _note_random_states(self) -> None:
        self._before_validation = capture_random_states(self._module.trainer)

    def _look_between_batches(self) -> None:
        """Has a rank been lost, or are we to stop?"""
        if self._liaison is not None:
            self._liaison.check()
        if self._asked_to_stop and self.world_size == 1:
            raise SIGTERMException  # a group of several ranks agrees on it right after this

    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The data have come."""
        if self._liaison is not None:
            self._liaison.progress()
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

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        # In a validation, too, a lost rank is noticed, and a rank that has nobody to agree with stops.
        if self._liaison is not None:
            self._liaison.progress()
            self._look_between_batches()
        if self._phase is None:
            return super().validation_step(*args, **kwargs)
        output: STEP_OUTPUT = None
        step = self._module.trainer.global_step
        for ticket, course in self._phase.courses.items():
            if step < course.start:
                continue  # it has come further, and was evaluated at this step before the fit was resumed
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
        self._phase, self._groups, self._incomplete = None, None, True
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
        if self.lightning_module is not None:
            self.lightning_module.trainer.fit_loop.__dict__.pop("run", None)
        if self._swaps is not None:
            self._swaps.undo()
            self._swaps = None
        if self._phase is not None:
            phase, self._phase = self._phase, None
            phase.close()
        self._leave_groups()
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
        # While tickets are gathered a rank holds some that are empty yet; all of them are in `finished`. Before the
        # training there is nothing new, and not all of a checkpoint may have been restored.
        if self._directory is None or self._incomplete or not self._begun:
            return
        if self.global_rank not in [saver for _, saver in self._savers()]:
            return
        name = "search" if self._phase is None else folder_of(self._phase.hosted)
        if self._swaps is not None:
            self._swaps.put_back(self._module)
        if self._before_validation is not None and validation_is_unfinished(self._module.trainer):
            # It is done again from its first batch.
            restore_random_states(self._module.trainer, {"random": self._before_validation})
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


def _training(hosted: Sequence[int], labels: Sequence[str]) -> str:
    return f"training {' and '.join(f'ticket {ticket} {labels[ticket]}' for ticket in hosted)}"


MultiTicketStrategy.register_strategies(StrategyRegistry)
