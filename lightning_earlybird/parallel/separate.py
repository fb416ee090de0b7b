"""What callbacks and limits of the Trainer become when each group of ranks trains tickets of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_earlybird.parallel.courses import Course


def folder_of(hosted: Sequence[int]) -> str:
    """Name of the directory, or the stem of the file, of a group's tickets: ``ticket_2``, ``tickets_0_1``."""
    return f"ticket{'s' if len(hosted) > 1 else ''}_{'_'.join(map(str, hosted))}"


class SeparateCheckpoints:
    """Each group's ``ModelCheckpoint`` writes to a directory of its own, below the one that it had.

    What it has written of the dense denoiser is forgotten, not deleted.

    Args:
        trainer: The Trainer of the fit.
        hosted: The tickets of this rank.
        resumed: Whether a checkpoint tells later what has been written there.
    """

    def __init__(self, trainer: pl.Trainer, hosted: Sequence[int], *, resumed: bool = False) -> None:
        self._former: list[tuple[ModelCheckpoint, Any]] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                self._former.append((callback, callback.dirpath))
                callback.dirpath = os.path.join(callback.dirpath, folder_of(hosted))
                if resumed:
                    continue
                callback.best_k_models = {}
                callback.best_model_path = callback.kth_best_model_path = callback.last_model_path = ""
                callback._last_checkpoint_saved = ""

    @property
    def roots(self) -> list[str]:
        """The directories that hold those of all groups."""
        return [os.fspath(dirpath) for _, dirpath in self._former]

    def save_last(self, trainer: pl.Trainer) -> None:
        """Bring every ``last`` up to the last step; without it, it is as old as the last file that was among the best.

        All ranks of the group take part.
        """
        for callback, _ in self._former:
            if not callback.save_last:
                continue
            link, callback.save_last = callback.save_last, True  # a link would point to the newest of the best
            previous = callback.last_model_path
            if previous and Path(previous).is_symlink() and trainer.is_global_zero:
                Path(previous).unlink()
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
            callback.save_last = link

    def undo(self) -> None:
        """Later fits write where the user said."""
        for callback, dirpath in self._former:
            callback.dirpath = dirpath
        self._former = []


class StepLimit:
    """Ends the group's part of the fit when the last of its tickets has had its ``max_steps``.

    Args:
        trainer: The Trainer of the fit.
        courses: Own steps of the group's tickets.
    """

    def __init__(self, trainer: pl.Trainer, courses: Collection[Course]) -> None:
        self._loop = trainer.fit_loop.epoch_loop
        self._former = self._loop.max_steps
        ends = [course.zero + course.limit for course in courses if course.limit is not None]
        if len(ends) == len(courses):
            own = max(ends)
            self._loop.max_steps = own if self._former == -1 else min(self._former, own)

    def undo(self) -> None:
        """The Trainer has its own limit back."""
        self._loop.max_steps = self._former


class FinishedAverages(pl.Callback):
    """Stops the averages of tickets that are not trained at present, while others on the same rank go on.

    Averaging callbacks know one step for all: the average of a ticket that has had its ``max_steps`` would creep on to
    its last weights, and depend on who shares its rank. To be placed after them and before ``ModelCheckpoint``.

    Args:
        step: The rank's optimizer step, at which this begins to act.
        courses: Ticket -> its own steps.
        averages: Ticket -> its averaged copies.
    """

    def __init__(self, step: int, courses: Mapping[int, Course], averages: Mapping[int, Sequence[nn.Module]]) -> None:
        self._courses = courses
        self._averages = averages
        self._kept: dict[nn.Module, list[Tensor]] = {}
        # In a resumed fit tickets may rest from the beginning.
        self._keep([ticket for ticket, course in courses.items() if not course.takes_part(step)])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._keep(self._resting(trainer.global_step))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(self._resting(trainer.global_step))

    def _resting(self, step: int) -> list[int]:
        """The tickets whose averages are to be what they were: the step that ended at `step` was none of theirs."""
        resting = []
        for ticket, course in self._courses.items():
            if course.has_ended(step) or step <= course.start:
                resting.append(ticket)
            else:
                for average in self._averages[ticket]:
                    self._kept.pop(average, None)
        return resting

    def _keep(self, tickets: Sequence[int]) -> None:
        for average in [average for ticket in tickets for average in self._averages[ticket]]:
            tensors = [tensor.data for tensor in (*average.parameters(), *average.buffers())]
            if average not in self._kept:
                self._kept[average] = [tensor.clone() for tensor in tensors]
            for tensor, kept in zip(tensors, self._kept[average], strict=True):
                tensor.copy_(kept)


class SchedulerPace:
    """Keeps learning rates, which go by steps, in step with the epochs when an epoch comes to have more steps.

    A schedule was laid out for the steps of all ranks together. In a smaller group an epoch has more of them: a
    scheduler then moves on at some of its calls only, evenly spread, and ends with the last one where it was to end.
    In a fit that goes on with more ranks than it began with an epoch may have fewer, and a scheduler moves on by
    several steps at a time.

    Args:
        module: The LightningModule, whose ``lr_scheduler_step`` is shadowed.
        former: Optimizer steps that were left to all ranks together.
        present: Those that are left to the group instead; at least 1.
        calls: How often each scheduler has been called already; empty where none has.
    """

    def __init__(self, module: pl.LightningModule, former: int, present: int, calls: Sequence[int] = ()) -> None:
        self._module = module
        self._former, self._present = former, present
        self._calls = dict(enumerate(calls))  # by the scheduler's number
        step: Callable[..., None] = module.lr_scheduler_step

        def paced(scheduler: Any, metric: Any) -> None:
            number = next(
                (
                    number
                    for number, config in enumerate(module.trainer.lr_scheduler_configs)
                    if config.scheduler is scheduler and config.interval == "step" and not config.reduce_on_plateau
                ),
                None,
            )
            moves = 1
            if number is not None:
                calls = self._calls[number] = self._calls.get(number, 0) + 1
                moves = calls * former // present - (calls - 1) * former // present
            for _ in range(moves):
                step(scheduler, metric)

        self._paced = paced
        module.__dict__["lr_scheduler_step"] = paced

    @property
    def state(self) -> tuple[int, int, tuple[int, ...]]:
        """Former and present steps, and the calls of each scheduler so far."""
        count = len(self._module.trainer.lr_scheduler_configs)
        return self._former, self._present, tuple(self._calls.get(number, 0) for number in range(count))

    @property
    def left(self) -> int:
        """Steps that schedules still are to make."""
        calls = max(self._calls.values(), default=0)
        return self._former - calls * self._former // self._present

    def undo(self) -> None:
        """Schedulers move on at every call again."""
        if self._module.__dict__.get("lr_scheduler_step") is self._paced:
            del self._module.__dict__["lr_scheduler_step"]


class ClippingByTicket:
    """Gradients are clipped by the norm of each ticket, as if it trained alone, not by one of them all.

    Args:
        precision: The precision plugin, whose ``clip_grad_by_norm`` is shadowed.
        tickets: The tickets of this rank.
    """

    def __init__(self, precision: Precision, tickets: Sequence[nn.Module]) -> None:
        self._precision = precision

        def clip(optimizer: Optimizer, clip_val: int | float) -> None:
            if clip_val <= 0:
                return
            rest = dict.fromkeys(precision.main_params(optimizer))
            for ticket in tickets:
                own = [parameter for parameter in ticket.parameters() if parameter in rest]
                for parameter in own:
                    del rest[parameter]
                nn.utils.clip_grad_norm_(own, clip_val)
            if rest:
                nn.utils.clip_grad_norm_(list(rest), clip_val)

        precision.__dict__["clip_grad_by_norm"] = clip

    def undo(self) -> None:
        """One norm over all parameters again."""
        self._precision.__dict__.pop("clip_grad_by_norm", None)
