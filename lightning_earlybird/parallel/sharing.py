"""How ranks are shared out so that the slowest is done as early as can be: arithmetic on numbers alone."""

import itertools
from collections.abc import Callable, Iterable, Sequence

_EXACT_TICKETS = 10  # at most 115,975 ways to pack them, of which the bound leaves few; about 0.1 s
_EXACT_GROUPS = 7  # 5,040 orders


def share_out(seconds: Sequence[Callable[[int], float]], num_ranks: int) -> list[int]:
    """Gives every ticket one rank, and each further rank to the ticket that is slowest with those it has.

    Where times do not rise with the number of ranks, no other numbers of ranks make the largest time smaller: whoever
    wants the slowest ticket faster must take a rank from one that was as slow when it got it.

    Args:
        seconds: For each ticket its time as a function of its number of ranks.
        num_ranks: Number of ranks, at least one per ticket.

    Returns:
        The number of ranks of each ticket; ties go to the lower index.
    """
    counts = [1] * len(seconds)
    times = [time(1) for time in seconds]
    for _ in range(num_ranks - len(seconds)):
        slowest = times.index(max(times))
        counts[slowest] += 1
        times[slowest] = seconds[slowest](counts[slowest])
    return counts


def pack(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Packs tickets onto ranks so that the largest sum of costs is smallest, then the second largest, and so on.

    Exact for up to ten tickets; for more, longest first, each to the rank with the smallest sum, which makes the
    largest sum at most 4/3 of the smallest possible.

    Args:
        costs: The cost of each ticket, at least 0.
        num_ranks: Number of ranks, at most as many as tickets.

    Returns:
        The rank of each ticket. Every rank has at least one; ranks are numbered in the order of their first tickets.
    """
    order = sorted(range(len(costs)), key=lambda ticket: (-costs[ticket], ticket))
    best = _longest_first([costs[ticket] for ticket in order], num_ranks)
    if len(costs) <= _EXACT_TICKETS:
        best = _exact([costs[ticket] for ticket in order], num_ranks, best)
    rank_of = dict(zip(order, best, strict=True))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(rank_of[ticket], len(numbers)) for ticket in range(len(costs))]


def arrange(sizes: Sequence[int], ranks_per_node: int | None) -> list[int]:
    """Orders groups of consecutive ranks so that as few as possible straddle two nodes.

    Args:
        sizes: Number of ranks of each group.
        ranks_per_node: Number of ranks on each node; None where nodes do not matter.

    Returns:
        Indices of the groups in the order of their ranks: that of the groups, unless another one is better (sought
        among all orders of up to seven groups).
    """
    if ranks_per_node is None or len(sizes) > _EXACT_GROUPS:
        return list(range(len(sizes)))

    def straddling(order: Iterable[int]) -> int:
        crossed = first = 0
        for group in order:
            last = first + sizes[group] - 1
            crossed += last // ranks_per_node - first // ranks_per_node
            first = last + 1
        return crossed

    # Permutations come in lexicographic order, and min keeps the first of equals: the nearest to the given order.
    return list(min(itertools.permutations(range(len(sizes))), key=straddling))


def _longest_first(costs: Sequence[float], num_ranks: int) -> list[int]:
    sums = [0.0] * num_ranks
    counts = [0] * num_ranks
    ranks = []
    for cost in costs:
        # By count as well, or tickets that cost nothing would leave a rank empty.
        rank = min(range(num_ranks), key=lambda rank: (sums[rank], counts[rank], rank))
        sums[rank] += cost
        counts[rank] += 1
        ranks.append(rank)
    return ranks


def _exact(costs: Sequence[float], num_ranks: int, start: list[int]) -> list[int]:
    """Goes through all ways to pack descending costs, except those that are surely worse than the best so far."""

    def sums_of(ranks: Sequence[int]) -> list[float]:
        sums = [0.0] * num_ranks
        for cost, rank in zip(costs, ranks, strict=False):
            sums[rank] += cost
        return sums

    best, least = start, sorted(sums_of(start), reverse=True)
    waiting: list[list[int]] = [[]]
    while waiting:
        ranks = waiting.pop()
        used = max(ranks, default=-1) + 1
        sums = sums_of(ranks)
        # What is left must suffice to give every rank a ticket, and the largest sum only grows.
        if num_ranks - used > len(costs) - len(ranks) or max(sums) > least[0]:
            continue
        if len(ranks) < len(costs):
            # Empty ranks are alike, so that one of them is enough.
            waiting += [[*ranks, rank] for rank in reversed(range(min(used + 1, num_ranks)))]
            continue
        sums.sort(reverse=True)
        if sums < least:
            best, least = ranks, sums
    return best
