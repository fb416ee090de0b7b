"""A fit goes on after the world was split: who trains what, from which files, and where on its way each ticket is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_earlybird.parallel.assignment import Assignment, AssignmentLike
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.fit_files import FitFile
from lightning_earlybird.parallel.fit_record import SplitRecord
from lightning_earlybird.parallel.merging import MergedOptimizers, Part, begin_folders_anew, drop_loader_states, merge
from lightning_earlybird.parallel.plan import TicketPlan, plan_tickets

Load = Callable[[Path], dict[str, Any]]


def forget_unfinished_batch(checkpoint: dict[str, Any]) -> None:
    """Count a batch no more that had begun, but not ended, when a checkpoint was written: it is to come again.

    Lightning forgets it in the count of the epoch, but not in that of the fit. A validation that had begun comes again
    from its first batch: the training batch before it counts as one that is ending. Changed in place.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress, validated = loops["epoch_loop.batch_progress"], loops.get("epoch_loop.val_loop.batch_progress")
    for count in (progress["total"], progress["current"]):
        if count["processed"] == count["completed"]:
            count["ready"] = count["started"] = count["completed"]
    if validated is not None and validated["total"]["ready"] != validated["total"]["completed"]:
        for count in (progress["total"], progress["current"]):
            count["completed"] = max(0, count["processed"] - 1)
        for key in ("total", "current"):
            validated[key] = dict.fromkeys(validated[key], 0)


def plan_resumed(
    files: Mapping[int, FitFile],
    world_size: int,
    given: Assignment | AssignmentLike | None,
    ranks_per_node: int | None,
) -> TicketPlan:
    """Who goes on with what: as before where there are as many ranks, otherwise shared out anew.

    Args:
        files: Ticket -> its file.
        world_size: Ranks that there are now.
        given: The user's assignment, if any.
        ranks_per_node: As for :func:`plan_tickets`.
    """
    splits = {ticket: _split(file) for ticket, file in files.items()}
    if given is None:
        before = {split.assignment for split in splits.values()}
        if len(before) == 1 and (same := before.pop()).world_size == world_size:
            given = same
    loads = [splits[ticket].load(ticket) for ticket in sorted(files)]
    return plan_tickets(loads, world_size, given, ranks_per_node=ranks_per_node)


class Resumption:
    """What a rank goes on with.

    Args:
        files: Ticket -> its file; the same on all ranks.
        plan: Who goes on with what.
        rank: This rank.
        accumulated: Batches of an optimizer step.
        load: Reads a checkpoint.

    Attributes:
        checkpoint: What the rank is to restore.
        courses: Ticket -> its own steps, of those that the rank trains.
        base: What the rest of the rank's state was saved with.
        exact: Whether the rank goes on as one did that trained the same tickets in a group as large.
    """

    def __init__(self, files: Mapping[int, FitFile], plan: TicketPlan, rank: int, accumulated: int, load: Load) -> None:
        self.plan = plan
        self.hosted = plan.assignment.hosted(rank)
        self.session = 1 + max(file.fit.session for file in files.values())
        self.fit = next(iter(files.values())).fit.fit
        self._size = len(plan.assignment.group_of(rank))
        own = {ticket: files[ticket] for ticket in self.hosted}
        first = next(iter(own.values()))
        split = _split(first)
        self.exact = (
            all(file.path == first.path for file in own.values())
            and split.hosted == self.hosted
            and split.group_size == self._size
            and not split.at_split
        )
        paths = dict.fromkeys(file.path for file in own.values())
        parts = {path: Part(load(path), next(_split(f) for f in own.values() if f.path == path)) for path in paths}
        for part in parts.values():
            forget_unfinished_batch(part.checkpoint)
        self._optimizers: MergedOptimizers | None = None
        self._new_folder = False
        if self.exact:
            self.base, self.shift = split, 0
            self.checkpoint = parts[first.path].checkpoint
            self.courses = {
                ticket: course.stopped(first.step) if split.stopped else course
                for ticket, course in split.courses.items()
            }
            self.step = first.step
            return
        by_ticket = {ticket: parts[file.path] for ticket, file in own.items()}
        places = self._places(own, by_ticket, accumulated)
        going_on = [ticket for ticket, file in own.items() if not _is_over(ticket, file)]
        leading = min(going_on, key=places.__getitem__) if going_on else max(own, key=places.__getitem__)
        base = by_ticket[leading]
        self.base = base.split
        self.shift = self._taken(leading, own[leading]) - _taken(leading, own[leading])
        self.step = own[leading].step + self.shift
        self.courses = {}
        for ticket, file in own.items():
            taken = self._taken(ticket, file)
            if _is_over(ticket, file):
                self.courses[ticket] = Course(self.step - taken, self.step, taken)
            else:
                start = self.step + places[ticket] - places[leading]
                self.courses[ticket] = Course(start - taken, start, _split(file).courses[ticket].limit)
        self.checkpoint = merge(base, by_ticket, len(files))
        self._optimizers = MergedOptimizers(base, by_ticket)
        self._new_folder = any(split.at_split or split.hosted != self.hosted for split in map(_split, own.values()))
        if self.resized:
            drop_loader_states(self.checkpoint)

    @property
    def resized(self) -> bool:
        """Whether the data are shared by another number of ranks than when the checkpoint was written."""
        return self.base.group_size != self._size

    def prepare_callbacks(self, trainer: pl.Trainer) -> None:
        """Have callbacks whose files lie elsewhere now begin with none; for when they know where they write."""
        if self._new_folder:
            begin_folders_anew(trainer, self.checkpoint)

    def load_optimizers(self, module: pl.LightningModule, optimizers: list[Optimizer]) -> bool:
        """Restore the optimizers where that is no matter of one checkpoint; whether it is done."""
        if self._optimizers is None:
            return False
        self._optimizers.load(module, optimizers)
        self._optimizers = None
        return True

    def pace(self, present: int | None) -> tuple[int, int, tuple[int, ...]] | None:
        """Steps that schedules count on, steps that there will be, and calls of each scheduler so far.

        Args:
            present: Steps that the Trainer's limits leave to this rank.
        """
        base = self.base
        if not (self.resized or base.at_split):
            return base.pace
        former = base.schedule_left
        if not base.by_epochs or former is None or present is None or present == 0 or former == present:
            return None
        return former, present, ()

    def settle(self, trainer: pl.Trainer) -> None:
        """Bring the loops to where the rank is; to be called when the data have been set up for its group."""
        loop = trainer.fit_loop
        batches = loop.epoch_loop.batch_progress
        known = loop.max_batches != float("inf")
        if self.resized and not self.base.at_split and known and self.base.batches:
            # The same share of the epoch, as whole windows of accumulation.
            done = batches.current.processed * int(loop.max_batches) // self.base.batches  # type: ignore[attr-defined]
            if done < loop.max_batches:
                done -= done % trainer.accumulate_grad_batches
            moved = done - batches.current.processed  # type: ignore[attr-defined]
            for name in ("ready", "started", "processed", "completed"):
                setattr(batches.current, name, getattr(batches.current, name) + moved)
            batches.is_last_batch = batches.current.ready >= loop.max_batches
        if self.shift:
            automatic = trainer.lightning_module.automatic_optimization
            inner = loop.epoch_loop
            steps: Any = (
                inner.automatic_optimization.optim_progress.optimizer.step.total
                if automatic
                else inner.manual_optimization.optim_step_progress.total
            )
            steps.ready += self.shift
            steps.completed += self.shift
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback._latest_update_step += self.shift

    def _places(self, own: Mapping[int, FitFile], parts: Mapping[int, Part], accumulated: int) -> dict[int, int]:
        """How far each ticket is on the common way to the Trainer's limit, in steps of a group as large as this one.

        Where epochs are the limit that is a matter of the data that a ticket has seen, not of its steps.
        """
        splits = [part.split for part in parts.values()]
        if not all(split.by_epochs and split.batches for split in splits):
            return {ticket: max(file.step, _split(file).courses[ticket].start) for ticket, file in own.items()}
        places = {}
        for ticket, part in parts.items():
            loops, split = part.checkpoint["loops"]["fit_loop"], part.split
            assert split.batches is not None
            epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
            done: int = batches["processed"] if epochs["ready"] > epochs["processed"] else 0
            in_epoch = -(-split.batches * split.group_size // self._size)
            if not split.at_split:  # there the count of batches stays what it was
                done = done * in_epoch // split.batches
            places[ticket] = epochs["processed"] * -(-in_epoch // accumulated) + done // accumulated
        return places

    def _taken(self, ticket: int, file: FitFile) -> int:
        """The ticket's own steps, as many as a group as large as this rank's would have taken."""
        split, taken = _split(file), _taken(ticket, file)
        return taken * split.group_size // self._size if split.divisible[ticket] else taken


def _is_over(ticket: int, file: FitFile) -> bool:
    """Whether the ticket is trained to its end, whatever the Trainer's limits."""
    split = _split(file)
    return split.stopped or split.courses[ticket].has_ended(file.step)


def _taken(ticket: int, file: FitFile) -> int:
    return _split(file).courses[ticket].taken(file.step)


def _split(file: FitFile) -> SplitRecord:
    if file.split is None:
        raise MisconfigurationException(f"{str(file.path)!r} was written before the world of ranks was split.")
    return file.split
