"""What a checkpoint says about the fit that it was taken from: which one, and how ranks shared the tickets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_earlybird.parallel.assignment import Assignment
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.loads import TicketLoad

FIT_KEY = "lightning_earlybird_fit"
FIT_VERSION = 1


@dataclass(frozen=True)
class SplitRecord:
    """How ranks shared the tickets, and how far those had come whose checkpoint this is.

    Args:
        born: Drawn when the world was split. Who goes back to the search may find other tickets in the same fit.
        assignment: Who trained what.
        hosted: The tickets in the checkpoint, trained by one group of ranks; all of them in the one that is written
            when the world is split.
        at_split: Whether it is that one, written by all ranks together.
        group_size: Ranks of the group; all, where `at_split`.
        laid_out_for: Ranks that schedules were laid out for when the fit began.
        courses: Ticket -> its own steps; of the tickets in the checkpoint, as are the following.
        left: Ticket -> optimizer steps that its group had left for it; None without a limit. For one rank alone where
            `at_split`.
        divisible: Ticket -> whether these are fewer with more ranks.
        stopped: Whether something but a limit of steps had ended the group's training.
        step_seconds: Seconds of an optimizer step of each ticket.
        measured: Whether these are seconds, or only say which ticket costs more.
        by_epochs: Whether epochs limited the Trainer, rather than steps.
        schedule_left: Steps that schedules counted on from there; None without a limit.
        pace: Former and present steps and calls so far of :class:`SchedulerPace`; None where there was none.
        batches: Batches of an epoch of the group; None where that was not known.
        logged_steps: What loggers take for the step, at the beginning of the batch that follows.
        names: For each optimizer and group, the names of the parameters in their order.
        ensembles: Dotted names of the ensembles in the module.
    """

    born: str
    assignment: Assignment
    hosted: tuple[int, ...]
    at_split: bool
    group_size: int
    laid_out_for: int
    courses: Mapping[int, Course]
    left: Mapping[int, int | None]
    divisible: Mapping[int, bool]
    stopped: bool
    step_seconds: tuple[float, ...]
    measured: bool
    by_epochs: bool
    schedule_left: int | None
    pace: tuple[int, int, tuple[int, ...]] | None
    batches: int | None
    logged_steps: int
    names: tuple[tuple[tuple[str, ...], ...], ...]
    ensembles: tuple[str, ...]

    def load(self, ticket: int) -> TicketLoad:
        """What is left of a ticket, for one rank."""
        left, divisible = self.left[ticket], self.divisible[ticket]
        if left is not None and divisible and not self.at_split:
            left *= self.group_size
        return TicketLoad(self.step_seconds[ticket], left, divisible)

    def to_plain(self) -> dict[str, Any]:
        """Plain containers, as checkpoints hold them."""
        plain = {name: value for name, value in vars(self).items() if name != "assignment"}
        return {
            **plain,
            "assignment": self.assignment.to_json(),
            "world_size": self.assignment.world_size,
            "hosted": list(self.hosted),
            "courses": {ticket: asdict(course) for ticket, course in self.courses.items()},
            "left": dict(self.left),
            "divisible": dict(self.divisible),
            "step_seconds": list(self.step_seconds),
            "pace": None if self.pace is None else [*self.pace[:2], list(self.pace[2])],
            "names": [[list(group) for group in groups] for groups in self.names],
            "ensembles": list(self.ensembles),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SplitRecord:
        """Inverse of :meth:`to_plain`.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another kind.
            ValueError: The parts do not fit together.
        """
        values = dict(plain)
        by_ticket = tuple(tuple(ranks) for ranks in values.pop("assignment"))
        assignment = Assignment.of(by_ticket, len(by_ticket), values.pop("world_size"))
        hosted = tuple(values.pop("hosted"))
        courses = {ticket: Course(**course) for ticket, course in values.pop("courses").items()}
        left, divisible = dict(values.pop("left")), dict(values.pop("divisible"))
        for part in (courses, left, divisible):
            if set(part) != set(hosted):
                raise ValueError(f"it holds the tickets {list(hosted)}, but tells of {sorted(part)}")
        if not set(hosted) <= set(range(assignment.num_tickets)) or not hosted:
            raise ValueError(f"it holds the tickets {list(hosted)} of {assignment.num_tickets}")
        pace = values.pop("pace")
        return cls(
            assignment=assignment,
            hosted=hosted,
            courses=courses,
            left=left,
            divisible=divisible,
            step_seconds=tuple(map(float, values.pop("step_seconds"))),
            pace=None if pace is None else (int(pace[0]), int(pace[1]), tuple(map(int, pace[2]))),
            names=tuple(tuple(tuple(group) for group in groups) for groups in values.pop("names")),
            ensembles=tuple(values.pop("ensembles")),
            **values,
        )


@dataclass(frozen=True)
class FitRecord:
    """Which fit a checkpoint is of.

    Args:
        fit: Drawn when the fit began, and kept when it is resumed.
        session: How often it had been resumed.
        places: Directories in which there may be more of its checkpoints.
        split: None while all ranks train the dense denoiser.
    """

    fit: str
    session: int
    places: tuple[str, ...]
    split: SplitRecord | None

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Put it into a checkpoint."""
        checkpoint[FIT_KEY] = {
            "format_version": FIT_VERSION,
            "fit": self.fit,
            "session": self.session,
            "places": list(self.places),
            "split": None if self.split is None else self.split.to_plain(),
        }

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> FitRecord | None:
        """What a checkpoint says; None where it says nothing, not being of a fit under ``MultiTicketStrategy``.

        Raises:
            ValueError: What it says is damaged, or of a newer version.
        """
        plain = checkpoint.get(FIT_KEY)
        if plain is None:
            return None
        try:
            version = plain["format_version"]
            if version > FIT_VERSION:
                raise ValueError(
                    f"its groups of ranks are described in format version {version}, and this lightning-earlybird "
                    f"reads up to {FIT_VERSION}; upgrade it"
                )
            split = plain["split"]
            return cls(
                fit=str(plain["fit"]),
                session=int(plain["session"]),
                places=tuple(map(str, plain["places"])),
                split=None if split is None else SplitRecord.from_plain(split),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"what it says of groups of ranks is damaged ({type(error).__name__}: {error})") from error
