"""The plan of ticket training: which ranks train which ticket, and when they will be done.

With ``t_i`` the seconds of one optimizer step of ticket ``i`` and ``n_i`` its budget, ``R_i`` ranks train it in

    ``T_i = t_i * ceil(n_i / R_i)``,

or in ``t_i * n_i`` where the budget counts optimizer steps, which more ranks do not make fewer. A rank that hosts
several tickets takes the sum of their times; the slowest rank's time is the *critical path*. Left out are what a step
loses to exchanging gradients within a group, validation, and checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_earlybird.parallel.assignment import Assignment, AssignmentLike
from lightning_earlybird.parallel.loads import TicketLoad
from lightning_earlybird.parallel.sharing import arrange, pack, share_out
from lightning_earlybird.text import aligned, duration

__all__ = ["Assignment", "AssignmentLike", "TicketLoad", "TicketPlan", "plan_tickets"]


@dataclass(frozen=True)
class TicketPlan:
    """Which ranks train which ticket, and how long that takes.

    Args:
        assignment: The ranks of each ticket.
        loads: What each ticket costs.

    Raises:
        ValueError: If there are not as many loads as tickets.
    """

    assignment: Assignment
    loads: tuple[TicketLoad, ...]

    def __post_init__(self) -> None:
        if len(self.loads) != self.assignment.num_tickets:
            raise ValueError(
                f"loads has {len(self.loads)} entries, but the assignment {self.assignment.num_tickets} tickets. Give "
                "one TicketLoad per ticket, in ticket order."
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.assignment.world_size

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The optimizer steps that each ticket will take on its ranks; None without a budget."""
        return tuple(load.steps_on(len(self.assignment.ranks(ticket))) for ticket, load in enumerate(self.loads))

    @property
    def seconds(self) -> tuple[float | None, ...]:
        """The seconds that each ticket's own steps will take; None without a budget."""
        return tuple(load.seconds_on(len(self.assignment.ranks(ticket))) for ticket, load in enumerate(self.loads))

    @property
    def rank_seconds(self) -> tuple[float | None, ...]:
        """The seconds that each rank is busy: the sum over the tickets that it hosts; None where one has no budget."""
        seconds = self.seconds
        return tuple(
            _sum([seconds[ticket] for ticket in self.assignment.hosted(rank)]) for rank in range(self.world_size)
        )

    @property
    def critical_path_s(self) -> float | None:
        """Seconds until the slowest rank is done; None where a ticket has no budget."""
        known = [seconds for seconds in self.rank_seconds if seconds is not None]
        return max(known) if len(known) == self.world_size else None

    @property
    def total_s(self) -> float | None:
        """Device-seconds: the sum over ranks of the time that they are busy; None where a ticket has no budget."""
        return _sum(self.rank_seconds)

    @property
    def efficiency(self) -> float | None:
        """Share of the ranks' time until the end in which they are busy, in [0, 1]; None where a ticket has no budget.

        A group counts as busy also where its further ranks only make batches larger; :attr:`speedup` does not.
        """
        path, total = self.critical_path_s, self.total_s
        if path is None or total is None:
            return None
        return total / (self.world_size * path) if path > 0 else 1.0

    @property
    def speedup(self) -> float | None:
        """How many times sooner than on one rank that hosts all tickets; None where a ticket has no budget."""
        path, alone = self.critical_path_s, _sum([load.seconds_on(1) for load in self.loads])
        if path is None or alone is None:
            return None
        return alone / path if path > 0 else 1.0

    def table(self, regions: Sequence[str] | None = None) -> str:
        """The plan as fixed-width text.

        Args:
            regions: What to call each ticket's region, in ticket order; None leaves the column out.

        Returns:
            Lines without a trailing newline: a line per ticket, the sums, and what must be known to read them.

        Raises:
            ValueError: If there are not as many regions as tickets.
        """
        if regions is not None and len(regions) != len(self.loads):
            raise ValueError(
                f"regions has {len(regions)} entries, but there are {len(self.loads)} tickets. Give one label per "
                "ticket."
            )
        path = self.critical_path_s
        head = ["ticket", "region", "ranks", "steps", "ms a step", "time", "of the critical path"]
        body = [
            [
                str(ticket),
                "" if regions is None else regions[ticket],
                _span(self.assignment.ranks(ticket)),
                "no limit" if steps is None else str(steps),
                f"{load.step_seconds * 1e3:.1f}",
                "open" if seconds is None else duration(seconds),
                f"{seconds / path:.0%}" if seconds is not None and path else "-",
            ]
            for ticket, (load, steps, seconds) in enumerate(zip(self.loads, self.steps, self.seconds, strict=True))
        ]
        if regions is None:
            head, body = [head[0], *head[2:]], [[cells[0], *cells[2:]] for cells in body]
        left = {1, 2} if regions is not None else {1}
        return "\n".join([aligned(head, body, left), self._summary(), *self._remarks()])

    def metrics(self) -> dict[str, float | None]:
        """The plan as numbers for loggers.

        Returns:
            ``earlybird/plan/...`` -> value; None where a ticket has no budget.
        """
        metrics: dict[str, float | None] = {
            "earlybird/plan/critical_path_s": self.critical_path_s,
            "earlybird/plan/total_s": self.total_s,
            "earlybird/plan/efficiency": self.efficiency,
            "earlybird/plan/speedup": self.speedup,
        }
        for ticket, (load, steps, seconds) in enumerate(zip(self.loads, self.steps, self.seconds, strict=True)):
            prefix = f"earlybird/plan/ticket_{ticket}"
            metrics[f"{prefix}/ranks"] = len(self.assignment.ranks(ticket))
            metrics[f"{prefix}/steps"] = steps
            metrics[f"{prefix}/step_seconds"] = load.step_seconds
            metrics[f"{prefix}/expected_s"] = seconds
        return metrics

    def to_json(self) -> dict[str, Any]:
        """Plain containers that JSON can carry; None stands for what has no limit."""
        return {
            "world_size": self.world_size,
            "critical_path_s": self.critical_path_s,
            "total_s": self.total_s,
            "efficiency": self.efficiency,
            "speedup": self.speedup,
            "rank_seconds": list(self.rank_seconds),
            "tickets": [
                {
                    "ranks": list(self.assignment.ranks(ticket)),
                    "steps": steps,
                    "step_seconds": load.step_seconds,
                    "divisible": load.divisible,
                    "expected_s": seconds,
                }
                for ticket, (load, steps, seconds) in enumerate(zip(self.loads, self.steps, self.seconds, strict=True))
            ],
        }

    def _summary(self) -> str:
        path, total, efficiency = self.critical_path_s, self.total_s, self.efficiency
        if path is None or total is None or efficiency is None:
            return "critical path open: a ticket without a limit of steps trains until something else ends the training"
        idle = round(self.world_size * (1 - efficiency), 2)
        whose = "1 rank's" if self.world_size == 1 else f"{self.world_size} ranks'"
        return f"critical path {duration(path)}, device time {duration(total)}, {idle:g} of {whose} time idle"

    def _remarks(self) -> list[str]:
        larger = [
            str(ticket)
            for ticket, load in enumerate(self.loads)
            if not load.divisible and load.steps is not None and len(self.assignment.ranks(ticket)) > 1
        ]
        if not larger:
            return []
        return [
            f"ticket{'s' * (len(larger) > 1)} {', '.join(larger)}: the number of steps is fixed, so that several ranks "
            "make the batches larger, not the time shorter"
        ]


def plan_tickets(
    loads: Sequence[TicketLoad],
    world_size: int,
    assignment: Assignment | AssignmentLike | None = None,
    *,
    ranks_per_node: int | None = None,
) -> TicketPlan:
    """Shares the ranks out over the tickets so that the slowest rank is done as early as can be.

    With at least as many ranks as tickets, every ticket gets one, and each further rank goes to the ticket with the
    largest cost per rank, cost being step time times steps: ranks in proportion to cost. A group's ranks are
    consecutive. That holds for tickets with a fixed number of steps as well, whose time does not become shorter:
    further ranks fall to such a ticket only where it costs most, and then no rank could shorten the critical path.
    With fewer ranks than tickets, tickets are packed onto ranks so that the largest sum of costs is smallest. Tickets
    without a budget count as if they took as many steps as the largest budget of the others.

    The same arguments give the same plan everywhere, ties broken by index; measured step times differ between ranks,
    which must agree on them first.

    Args:
        loads: What each ticket costs, in ticket order.
        world_size: Number of ranks.
        assignment: Ranks by ticket to be used instead, see :meth:`Assignment.of`.
        ranks_per_node: Where given, groups are put in an order in which as few as possible straddle two nodes.

    Returns:
        The plan.

    Raises:
        ValueError: If there are no loads, a number of ranks is no positive integer, or the assignment is not valid.
    """
    loads = tuple(loads)
    if not loads:
        raise ValueError("loads=[] must hold at least one ticket. Give one TicketLoad per ticket.")
    for name, value in (("world_size", world_size), ("ranks_per_node", ranks_per_node)):
        if value is not None or name == "world_size":
            check_count(name, value)
    if assignment is not None:
        return TicketPlan(Assignment.of(assignment, len(loads), world_size), loads)
    longest = max((load.steps for load in loads if load.steps is not None), default=1)
    if world_size < len(loads):
        packed = pack([load.cost(longest) for load in loads], world_size)
        return TicketPlan(Assignment(tuple((rank,) for rank in packed), world_size), loads)
    sizes = share_out([partial(load.shared, longest=longest) for load in loads], world_size)
    by_ticket: list[tuple[int, ...]] = [()] * len(loads)
    first = 0
    for ticket in arrange(sizes, ranks_per_node):
        by_ticket[ticket] = tuple(range(first, first + sizes[ticket]))
        first += sizes[ticket]
    return TicketPlan(Assignment(tuple(by_ticket), world_size), loads)


def check_count(name: str, value: object) -> None:
    """Refuses what is no number of ranks or devices.

    Raises:
        ValueError: If the value is no integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    # Rounded once, so that the sum depends on no order, and never exceeds as many times the largest value.
    return math.fsum(known) if len(known) == len(values) else None


def _span(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))
