"""Which files a fit goes on from, where every group of ranks has written its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_earlybird.parallel.fit_record import FitRecord, SplitRecord

SWITCH_FILE = "switch.ckpt"
"""The whole state when the world was split, in the pruner's directory."""

_OF_GROUP = re.compile(r"ticket_\d+|tickets(_\d+){2,}")


@dataclass(frozen=True)
class FitFile:
    """A checkpoint, as far as it was looked at.

    Args:
        path: The file.
        step: Its optimizer step.
        fit: Of which fit it is.
        split: Which tickets it holds, and how they were trained; None before the world was split.
        modified: When it was written, in seconds.
    """

    path: Path
    step: int
    fit: FitRecord
    modified: float

    @property
    def split(self) -> SplitRecord | None:
        """Which tickets it holds, and how they were trained; None before the world was split."""
        return self.fit.split

    def work(self, ticket: int) -> int:
        """How far a ticket has come, in steps; of one rank where the data are gone through by the epoch."""
        assert self.split is not None
        done = self.split.courses[ticket].taken(self.step)
        return done * self.split.group_size if self.split.divisible[ticket] else done


@dataclass
class FoundFiles:
    """What to go on from.

    Args:
        dense: The checkpoint of the search to load, where no ticket has been trained yet.
        tickets: Ticket -> its file; all tickets, or none.
        remarks: What to tell the user.
        warnings: What to warn him of.
    """

    dense: Path | None = None
    tickets: dict[int, FitFile] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_files(path: str | os.PathLike[str], places: Sequence[Path], weights_only: bool | None) -> FoundFiles:
    """Look for what a fit goes on from.

    A ticket goes on from the newest file that holds it: of the latest of several resumed fits, the one in which it has
    come furthest.

    Args:
        path: What the user gave: the file of a group, for which those of the others are sought beside it; the directory
            with the groups' folders; or any other checkpoint, which is taken as it is. Only a file whose name begins
            with ``last`` gives way to files of groups beside it: it is what ``ckpt_path="last"`` finds, and the last
            one of the search.
        places: Further directories in which tickets are sought that are missing there.
        weights_only: As for ``torch.load``.

    Raises:
        MisconfigurationException: If files are damaged or missing, or of several fits.
    """
    given = Path(path)
    if "://" in str(path) or not given.exists():
        return FoundFiles(dense=given)  # Lightning reads it, or says that it is not there
    search = _Search(given, weights_only)
    if given.is_dir():
        return search.in_directory(places)
    try:
        named = search.look_at(given)
    except _Unreadable as error:
        raise MisconfigurationException(
            f"ckpt_path={str(given)!r} cannot be read ({error}). Pass another checkpoint, or the directory: each group "
            "of ranks then goes on from its newest file that can be read."
        ) from error
    if named is None:
        return FoundFiles(dense=given)
    if given.stem.startswith("last") and not _in_folder_of_group(given) and _is_whole(named):
        return search.after_last(named, places)
    if named.split is None:
        return FoundFiles(dense=given)
    return search.beside(named, places)


class _Unreadable(Exception):
    """A file is damaged."""


class _Search:
    def __init__(self, given: Path, weights_only: bool | None) -> None:
        self.given = given
        self.weights_only = weights_only
        self.damaged: dict[Path, str] = {}

    def in_directory(self, places: Sequence[Path]) -> FoundFiles:
        root = self.given.parent if _OF_GROUP.fullmatch(self.given.name) else self.given
        files = list(self.files_in(root))
        fits = {file.fit.fit for file in files}
        if len(fits) > 1:
            shown = "; ".join(
                f"{len(own)} of one, such as {str(max(own, key=lambda file: file.modified).path)!r}"
                for fit in sorted(fits)
                for own in [[file for file in files if file.fit.fit == fit]]
            )
            raise MisconfigurationException(
                f"ckpt_path={str(self.given)!r} holds checkpoints of {len(fits)} different fits: {shown}. Pass a file "
                "of the one to go on with, or move the others away."
            )
        if not files:
            self.fail_without_files()
        of_search = max((file for file in files if file.split is None), key=_order_of_search, default=None)
        tickets = [file for file in files if file.split is not None and not _went_back(of_search, file)]
        if not tickets:
            assert of_search is not None
            return FoundFiles(dense=of_search.path)
        return self.choose(tickets, {}, places)

    def after_last(self, last: FitFile, places: Sequence[Path]) -> FoundFiles:
        folders = [last.path.parent, *map(Path, last.fit.places), *places]
        found_files = [file for folder in dict.fromkeys(folders) for file in self.files_in(folder)]
        files = [
            file
            for file in found_files
            if file.fit.fit == last.fit.fit and file.split is not None and not _went_back(last, file)
        ]
        if not files:
            return FoundFiles(dense=last.path)
        found = self.choose(files, {}, places)
        if any(file.path != last.path for file in found.tickets.values()):
            found.remarks.insert(
                0, f"{str(last.path)!r} is of step {last.step}; the tickets have been trained further since then."
            )
        return found

    def beside(self, named: FitFile, places: Sequence[Path]) -> FoundFiles:
        folder = named.path.parent
        root = folder.parent if _in_folder_of_group(named.path) else folder
        files = [file for file in self.files_in(root) if file.fit.fit == named.fit.fit]
        assert named.split is not None
        return self.choose(files, dict.fromkeys(named.split.hosted, named), places)

    def choose(self, files: Sequence[FitFile], named: Mapping[int, FitFile], places: Sequence[Path]) -> FoundFiles:
        """The newest file of each ticket, or the one that was named."""
        holding = [*named.values()] or [file for file in files if file.split is not None]
        newest = max(holding, key=lambda file: (file.fit.session, file.modified))
        split = newest.split
        assert split is not None
        everyone = range(split.assignment.num_tickets)
        files = [file for file in files if _same_tickets(file, newest)]
        chosen = dict(named) | self.newest(files, [ticket for ticket in everyone if ticket not in named])
        missing = [ticket for ticket in everyone if ticket not in chosen]
        if missing:
            folders = {Path(place) for file in (newest, *files) for place in file.fit.places} | set(places)
            others = [
                file for folder in sorted(folders) for file in self.files_in(folder) if _same_tickets(file, newest)
            ]
            chosen |= self.newest(others, missing)
        missing = [ticket for ticket in everyone if ticket not in chosen]
        damaged = [f"{str(path)!r} cannot be read ({error})" for path, error in self.damaged.items()]
        if missing:
            raise MisconfigurationException(
                f"ckpt_path={str(self.given)!r}: no checkpoint of the tickets {missing} of {len(everyone)} was found"
                f"{''.join(f'; {each}' for each in damaged)}. Keep the folders of all groups of ranks side by side, "
                f"or {SWITCH_FILE!r} of the tickets' directory with them, from which a ticket starts anew."
            )
        # One file may hold several tickets, of which another has come further elsewhere.
        return FoundFiles(
            tickets=dict(sorted(chosen.items())), warnings=[f"{each}; it is left out." for each in damaged]
        )

    def newest(self, files: Sequence[FitFile], tickets: Sequence[int]) -> dict[int, FitFile]:
        found = {}
        for ticket in tickets:
            holding = [file for file in files if file.split is not None and ticket in file.split.hosted]
            if holding:
                found[ticket] = max(
                    holding, key=lambda file: (file.fit.session, file.work(ticket), file.modified)
                )  # fmt: skip
        return found

    def files_in(self, root: Path) -> Iterator[FitFile]:
        """What can be read of the checkpoints in a directory, and in folders of groups in it."""
        if not root.is_dir():
            return
        folders = [each for each in sorted(root.iterdir()) if _OF_GROUP.fullmatch(each.name) and each.is_dir()]
        for path in [path for each in (root, *folders) for path in sorted(each.glob("*.ckpt"))]:
            try:
                file = self.look_at(path)
            except _Unreadable as error:
                self.damaged[path] = str(error)
                continue
            if file is not None:
                yield file

    def look_at(self, path: Path) -> FitFile | None:
        """What a checkpoint is; None where it is of no fit that a strategy of ours has had."""
        checkpoint = self.opened(path)
        try:
            fit = FitRecord.read(checkpoint)
            return None if fit is None else FitFile(path, int(checkpoint["global_step"]), fit, path.stat().st_mtime)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _Unreadable(str(error)) from error

    def opened(self, path: Path) -> Mapping[str, Any]:
        """A checkpoint whose tensors stay on the disk where they can."""
        problem: Exception | None = None
        for mmap in (True, False):  # files in torch's old format cannot be mapped
            try:
                checkpoint = torch.load(path, "cpu", weights_only=self.weights_only is not False, mmap=mmap)
            except Exception as error:  # damaged files raise whatever comes first
                problem = problem or error
                continue
            if isinstance(checkpoint, Mapping):
                return checkpoint
        raise _Unreadable("it is no checkpoint" if problem is None else str(problem).partition("\n")[0])

    def fail_without_files(self) -> None:
        damaged = "".join(f"; {str(path)!r} cannot be read ({error})" for path, error in self.damaged.items())
        raise MisconfigurationException(
            f"ckpt_path={str(self.given)!r} is a directory without checkpoints of a MultiTicketStrategy"
            f"{damaged}. Pass the directory that ModelCheckpoint wrote to, with the folders `ticket_0` and so on, "
            "`interrupted` of the tickets' directory, or a file."
        )


def describe_files(tickets: Mapping[int, FitFile]) -> str:
    """What each ticket goes on from, a line each."""
    lines = []
    for ticket, file in tickets.items():
        assert file.split is not None
        steps = file.split.courses[ticket].taken(file.step)
        lines.append(f"ticket {ticket} goes on after {steps} steps of its own, from {str(file.path)!r}")
    return "\n".join(lines)


def refuse_directories(trainer: pl.Trainer) -> None:
    """Have the strategy say what it cannot load, where the checkpoints of groups lie in folders of a directory.

    Args:
        trainer: A Trainer with another strategy than ``MultiTicketStrategy``.
    """
    strategy = trainer.strategy
    strategy.__dict__.pop("load_checkpoint", None)
    load = strategy.load_checkpoint

    def load_file(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = Path(checkpoint_path)
        if given.is_dir() and any(_OF_GROUP.fullmatch(path.name.removesuffix(".ckpt")) for path in given.iterdir()):
            raise MisconfigurationException(
                f"ckpt_path={str(given)!r} holds the checkpoints of tickets that were trained apart, each group of "
                f"ranks its own, which strategy={type(strategy).__name__} cannot put together. Resume with "
                "strategy='multi_ticket', for which one device is enough."
            )
        return load(checkpoint_path, *args, **kwargs)

    strategy.__dict__["load_checkpoint"] = load_file


def _in_folder_of_group(path: Path) -> bool:
    return _OF_GROUP.fullmatch(path.parent.name) is not None


def _is_whole(file: FitFile) -> bool:
    """Whether it was written by all ranks together."""
    return file.split is None or file.split.at_split


def _same_tickets(file: FitFile, other: FitFile) -> bool:
    return (
        file.split is not None
        and other.split is not None
        and (file.fit.fit, file.split.born) == (other.fit.fit, other.split.born)
    )


def _went_back(last: FitFile | None, file: FitFile) -> bool:
    """Whether the fit was resumed before the world was split, after that file had been written."""
    return last is not None and file.fit.session < last.fit.session


def _order_of_search(file: FitFile) -> tuple[int, int, float]:
    return file.fit.session, file.step, file.modified
