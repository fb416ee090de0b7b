"""How far each ticket is, for rank 0 to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.reporting import log_metrics

INTERVAL_S = 1.0


class TicketProgress(pl.Callback):
    """Measures the pace of this rank's tickets, logs it, and tells it to rank 0.

    Logged every ``log_every_n_steps``: ``ticket_N/steps_per_second`` and ``ticket_N/remaining_seconds``.

    Args:
        courses: Own steps of this rank's tickets.
        steps: For each of them, the optimizer steps that it takes in all; None where nothing limits it.
        outputs: Gives what ``training_step`` returned for each ticket on the last batch.
        tell: Takes the status of this rank's tickets; None on ranks that do not tell.
        before_end: Called when training ends, before any other callback hears of it.
        logged_steps: In a fit that was resumed: what loggers take for the step at the next batch. Lightning loses count
            where a checkpoint was not written in one of its own hooks.
    """

    def __init__(
        self,
        courses: Mapping[int, Course],
        steps: Mapping[int, int | None],
        outputs: Callable[[], Mapping[int, STEP_OUTPUT]],
        tell: Callable[[dict[str, Any]], None] | None,
        before_end: Callable[[], None],
        logged_steps: int | None = None,
    ) -> None:
        self._courses = courses
        self._steps = steps
        self._outputs = outputs
        self._tell = tell
        self._before_end = before_end
        self._logged_steps = logged_steps
        self._pace: float | None = None
        self._last: tuple[float, int] | None = None  # moment and step of the last measurement

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._logged_steps is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._logged_steps
            self._logged_steps = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        then, step = self._last = self._last or (now, trainer.global_step)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        to_log = bool(every) and trainer.global_step % every == 0
        due = now - then >= INTERVAL_S or (to_log and self._pace is None)  # a short training, too, has a pace
        if due and trainer.global_step > step:
            pace = (trainer.global_step - step) / (now - then)
            # Half of the old value: a validation shows for some seconds and is then forgotten.
            self._pace = pace if self._pace is None else 0.5 * (self._pace + pace)
            self._last = now, trainer.global_step
            self._report(trainer.global_step)
        if self._pace is not None and to_log:
            left = {f"ticket_{t}/remaining_seconds": self._remaining(t, trainer.global_step) for t in self._steps}
            log_metrics(trainer, {"steps_per_second": self._pace, **left})

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_end()
        if self._tell is not None:
            done = {ticket: self._done(ticket, trainer.global_step) for ticket in self._steps}
            self._tell({str(t): {"step": taken, "steps": taken, "ended": True} for t, taken in done.items()})

    def _report(self, step: int) -> None:
        if self._tell is None:
            return
        status = {}
        for ticket, steps in self._steps.items():
            output = self._outputs().get(ticket)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            status[str(ticket)] = {
                "step": self._done(ticket, step),
                "steps": steps,
                "steps_per_second": self._pace,
                "remaining_s": self._remaining(ticket, step),
                "loss": float(loss.detach()) if isinstance(loss, Tensor) else None,
                "ended": False,
            }
        self._tell(status)

    def _done(self, ticket: int, step: int) -> int:
        done, steps = self._courses[ticket].taken(step), self._steps[ticket]
        return done if steps is None else min(done, steps)

    def _remaining(self, ticket: int, step: int) -> float | None:
        """Seconds until the ticket has had its steps; None where nothing limits them, or its pace is not known."""
        steps, course = self._steps[ticket], self._courses[ticket]
        # With the steps that it waits for others.
        return max(0, steps - (step - course.zero)) / self._pace if steps is not None and self._pace else None


def describe_progress(statuses: Mapping[int, Mapping[str, Any]]) -> str:
    """One line about all tickets.

    Args:
        statuses: Rank -> what :class:`TicketProgress` told there.

    Returns:
        For example ``0: 40% loss 0.034 12.1/s 0:01:20 left | 1: done``; empty where nothing has been told yet.
    """
    tickets = {int(ticket): status for told in statuses.values() for ticket, status in told.items()}
    parts = []
    for ticket, status in sorted(tickets.items()):
        if status["ended"]:
            parts.append(f"{ticket}: done")
            continue
        done = f"step {status['step']}" if not status["steps"] else f"{status['step'] / status['steps']:.0%}"
        loss = "" if status["loss"] is None else f" loss {status['loss']:.3g}"
        pace = "" if not status["steps_per_second"] else f" {status['steps_per_second']:.3g}/s"
        left = "" if status["remaining_s"] is None else f" {timedelta(seconds=round(status['remaining_s']))} left"
        parts.append(f"{ticket}: {done}{loss}{pace}{left}")
    return " | ".join(parts)


class Occasionally:
    """Calls a function now and then, ever more rarely: after 10 seconds at first, every 5 minutes in the end.

    Args:
        function: What to call.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._pause = 10.0
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Call the function if it is time."""
        if time.monotonic() - self._last >= self._pause:
            self._last = time.monotonic()
            self._pause = min(300.0, 1.5 * self._pause)
            self._function()


class AllTicketsInBar:
    """Adds a line about all tickets to the progress bar of the Trainer.

    Args:
        trainer: The Trainer of the fit.
        line: Gives the line.
    """

    def __init__(self, trainer: pl.Trainer, line: Callable[[], str]) -> None:
        self._bar: ProgressBar | None = trainer.progress_bar_callback
        if self._bar is None:
            return
        metrics = self._bar.get_metrics

        def with_tickets(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            shown = dict(metrics(trainer, pl_module))
            text = line()
            return {**shown, "tickets": text} if text else shown

        self._bar.__dict__["get_metrics"] = with_tickets

    def undo(self) -> None:
        """The bar shows what it did."""
        if self._bar is not None:
            self._bar.__dict__.pop("get_metrics", None)
