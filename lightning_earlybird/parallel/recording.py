"""What a checkpoint is to say about the tickets, read off the Trainer at the moment that it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl

from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.parallel.budgets import steps_left
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.fit_record import SplitRecord
from lightning_earlybird.parallel.plan import TicketPlan
from lightning_earlybird.parallel.separate import SchedulerPace
from lightning_earlybird.transition.rehearsal import bare


def describe_split(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    born: str,
    plan: TicketPlan,
    courses: Mapping[int, Course],
    *,
    group_size: int,
    pace: SchedulerPace | None,
    step_seconds: Sequence[float],
    measured: bool,
    laid_out_for: int,
    at_split: bool = False,
) -> SplitRecord:
    """The record of a rank's tickets, or, at the split, of all of them.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule.
        born: Drawn at the split.
        plan: Who trains what.
        courses: Own steps of the tickets that the checkpoint holds.
        group_size: Ranks that train them together.
        pace: What keeps schedules in step with epochs.
        step_seconds: Seconds of one optimizer step of each ticket.
        measured: Whether these are seconds.
        laid_out_for: Ranks that schedules were laid out for.
        at_split: Whether the world is about to be split.
    """
    loop = trainer.fit_loop
    step = trainer.global_step
    left, by_epochs = steps_left(trainer)
    own = {
        ticket: None if course.limit is None else max(0, course.limit - course.taken(step))
        for ticket, course in courses.items()
    }
    shared = {ticket: _shared(left, limit, by_epochs) for ticket, limit in own.items()}
    if at_split:
        steps = {ticket: plan.loads[ticket].steps for ticket in courses}
        divisible = {ticket: plan.loads[ticket].divisible for ticket in courses}
    else:
        steps = {
            ticket: min((n for n in (left, limit) if n is not None), default=None) for ticket, limit in own.items()
        }
        divisible = shared
    names = {parameter: name for name, parameter in module.named_parameters()}
    batches = trainer.num_training_batches
    stopped = trainer.should_stop and loop._can_stop_early and not at_split
    return SplitRecord(
        born=born,
        assignment=plan.assignment,
        hosted=tuple(courses),
        at_split=at_split,
        group_size=group_size,
        laid_out_for=laid_out_for,
        courses=dict(courses),
        left=dict.fromkeys(steps, 0) if stopped else steps,
        divisible=divisible,
        stopped=bool(stopped),
        step_seconds=tuple(step_seconds),
        measured=measured,
        by_epochs=by_epochs,
        schedule_left=left if pace is None else pace.left,
        pace=None if pace is None else pace.state,
        batches=None if batches == float("inf") else int(batches),
        logged_steps=_logged_steps(trainer),
        names=tuple(
            tuple(
                tuple(names.get(parameter, "") for parameter in group["params"])
                for group in bare(optimizer).param_groups
            )
            for optimizer in trainer.strategy.optimizers
        ),
        ensembles=tuple(name for name, part in module.named_modules() if isinstance(part, TicketEnsemble)),
    )


def _shared(left: int | None, limit: int | None, by_epochs: bool) -> bool:
    """Whether more ranks make a ticket's steps fewer: epochs end it, and no limit of its own before that."""
    return by_epochs and (limit is None or (left is not None and left <= limit))


def _logged_steps(trainer: pl.Trainer) -> int:
    """What loggers will take for the step when the next batch begins.

    Lightning counts a batch that has stepped after the hooks of its end and after its validation, in which most
    checkpoints are written.
    """
    loop = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    in_hook_of_batch = current.completed < current.processed or trainer.validating  # type: ignore[attr-defined]
    due = in_hook_of_batch and current.ready > 0 and not loop._should_accumulate()
    return loop._batches_that_stepped + int(due)
