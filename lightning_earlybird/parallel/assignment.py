"""Which ranks train which ticket, as a user writes it and as everything else reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

RanksLike: TypeAlias = int | Sequence[int]
AssignmentLike: TypeAlias = Sequence[RanksLike] | Mapping[int, RanksLike] | Mapping[str, RanksLike]
"""Ranks by ticket: ``[[0], [1, 2]]``, ``[0, 0, 1]``, or ``{0: 0, 1: [1, 2]}`` (keys may be strings)."""

_REMEDY = "Give each ticket its ranks, such as [[0], [1, 2], [3]], or one rank per ticket, such as [0, 0, 1]."


@dataclass(frozen=True)
class Assignment:
    """For each ticket the ranks that train it.

    Ranks that train the same ticket form a *group*. A group of several ranks trains exactly one ticket; a rank by
    itself may host several, which take turns.

    Args:
        by_ticket: The ranks of each ticket, in ticket order; each tuple ascending.
        world_size: Number of ranks there are; each of them must have a ticket.

    Raises:
        ValueError: If there are no tickets, a ticket has no ranks, a rank does not exist, appears twice in a ticket or
            has no ticket, or tickets share ranks otherwise than alone on one rank.
    """

    by_ticket: tuple[tuple[int, ...], ...]
    world_size: int

    def __post_init__(self) -> None:
        if not self.by_ticket:
            raise ValueError(f"assignment={self._shown} must hold at least one ticket. {_REMEDY}")
        _check_ranks(self)
        _check_sharing(self)
        idle = sorted(set(range(self.world_size)) - {rank for ranks in self.by_ticket for rank in ranks})
        if idle:
            raise ValueError(
                f"assignment={self._shown} leaves {_ranks(idle)} of {self.world_size} without a ticket: every rank "
                f"must train one. Add {'it' if len(idle) == 1 else 'them'} to the ranks of a ticket, or start fewer "
                "processes."
            )

    @classmethod
    def of(cls, value: Assignment | AssignmentLike, num_tickets: int, world_size: int) -> Assignment:
        """Builds an assignment from what a user or a configuration file holds.

        Args:
            value: Lists of ranks in ticket order, one rank per ticket, or a mapping from tickets to either; lists and
                mappings of OmegaConf serve as well.
            num_tickets: Number of tickets there are.
            world_size: Number of ranks there are.

        Returns:
            The validated assignment; ranks are sorted within each ticket.

        Raises:
            ValueError: If a ticket is missing or unknown, an entry is no rank, or a rule of the class is broken.
        """
        if isinstance(value, Assignment):
            entries: dict[int, Any] = dict(enumerate(value.by_ticket))
        elif isinstance(value, Mapping):
            entries = {}
            for key, ranks in value.items():
                ticket = _ticket(key, value)
                if ticket in entries:
                    raise ValueError(f"assignment={value!r} names ticket {ticket} twice. Keep one of the two entries.")
                entries[ticket] = ranks
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            entries = dict(enumerate(value))
        else:
            raise ValueError(
                f"assignment={value!r} must be a list with an entry per ticket, or a mapping from tickets. {_REMEDY}"
            )
        _check_tickets(value, set(entries), num_tickets)
        return cls(tuple(_parse(entries[ticket], ticket) for ticket in range(num_tickets)), world_size)

    @property
    def num_tickets(self) -> int:
        """Number of tickets."""
        return len(self.by_ticket)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups by their first rank, the same on all ranks, as creating process groups needs it."""
        return tuple(sorted(set(self.by_ticket)))

    def ranks(self, ticket: int) -> tuple[int, ...]:
        """The ranks that train a ticket, ascending."""
        return self.by_ticket[ticket]

    def leader(self, ticket: int) -> int:
        """The first of the ranks that train a ticket."""
        return self.by_ticket[ticket][0]

    def hosted(self, rank: int) -> tuple[int, ...]:
        """The tickets that a rank trains, ascending; at least one.

        Raises:
            IndexError: If there is no such rank.
        """
        hosted = tuple(ticket for ticket, ranks in enumerate(self.by_ticket) if rank in ranks)
        if not hosted:
            raise IndexError(f"rank={rank!r} must be one of the {self.world_size} ranks, 0 to {self.world_size - 1}.")
        return hosted

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that train together with a rank, itself included, ascending.

        Raises:
            IndexError: If there is no such rank.
        """
        return self.by_ticket[self.hosted(rank)[0]]

    def to_json(self) -> list[list[int]]:
        """The ranks of each ticket in lists, as :meth:`of` reads them."""
        return [list(ranks) for ranks in self.by_ticket]

    @property
    def _shown(self) -> str:
        return repr(self.to_json())


def _ticket(key: object, value: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit():
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int) or key < 0:
        raise ValueError(
            f"assignment={value!r} has the key {key!r}, which must be the index of a ticket: an integer from 0 on, or "
            "a string of one. Tickets are numbered in region order."
        )
    return key


def _check_tickets(value: object, given: set[int], num_tickets: int) -> None:
    there_are = "there is 1" if num_tickets == 1 else f"there are {num_tickets}"
    unknown = sorted(given - set(range(num_tickets)))
    if unknown:
        raise ValueError(
            f"assignment={value!r} has {_tickets(unknown)}, but {there_are}, counted from 0 in region order. Remove "
            "what has no region."
        )
    missing = sorted(set(range(num_tickets)) - given)
    if missing:
        raise ValueError(
            f"assignment={value!r} misses {_tickets(missing)}: {there_are}, counted from 0 in region order, and each "
            f"must be trained. {_REMEDY}"
        )


def _parse(entry: object, ticket: int) -> tuple[int, ...]:
    ranks: list[Any] = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str | bytes) else [entry]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(
                f"assignment: ticket {ticket} has the rank {rank!r}, which must be an integer from 0 on. {_REMEDY}"
            )
    return tuple(sorted(ranks))


def _check_ranks(assignment: Assignment) -> None:
    shown, world_size = assignment._shown, assignment.world_size
    for ticket, ranks in enumerate(assignment.by_ticket):
        if not ranks:
            raise ValueError(f"assignment={shown}: ticket {ticket} has no ranks, and would not be trained. {_REMEDY}")
        twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
        if twice:
            raise ValueError(f"assignment={shown}: ticket {ticket} has {_ranks(twice)} twice. Name each rank once.")
    highest = max(rank for ranks in assignment.by_ticket for rank in ranks)
    if highest >= world_size:
        there_are = "there is 1" if world_size == 1 else f"there are {world_size}"
        raise ValueError(
            f"assignment={shown} needs {highest + 1} ranks, because it names rank {highest}, but {there_are}. Start "
            f"{highest + 1} processes (devices= and num_nodes= of the Trainer), or name "
            f"{'rank 0' if world_size == 1 else f'ranks 0 to {world_size - 1}'} only; a rank may host several tickets."
        )


def _check_sharing(assignment: Assignment) -> None:
    shown = assignment._shown
    for second, ranks in enumerate(assignment.by_ticket):
        for first, others in enumerate(assignment.by_ticket[:second]):
            shared = sorted(set(ranks) & set(others))
            if not shared:
                continue
            share = f"assignment={shown}: tickets {first} and {second} share {_ranks(shared)}"
            if ranks != others:
                raise ValueError(
                    f"{share}, but not all their ranks. A group of several ranks trains exactly one ticket, and a rank "
                    "by itself may host several: let the ranks of the two be the same single rank, or have none in "
                    "common."
                )
            if len(ranks) > 1:
                raise ValueError(
                    f"{share}, but a group of several ranks trains exactly one ticket. Divide the ranks between them, "
                    "or put both on one rank."
                )


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _tickets(tickets: Sequence[int]) -> str:
    return f"{'ticket' if len(tickets) == 1 else 'tickets'} {', '.join(map(str, tickets))}"
