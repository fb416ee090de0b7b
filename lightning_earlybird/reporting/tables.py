"""The ticket table: nominal sparsity beside what was achieved, as text, rows and numbers."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from lightning_earlybird.records import TicketFacts
from lightning_earlybird.text import aligned

Cell: TypeAlias = str | int | float | bool | None

TICKET_COLUMNS = (
    "region",
    "sparsity",
    "target",
    "channels_removed",
    "parameters_removed",
    "macs_removed",
    "parameters",
    "macs",
    "step",
    "found",
)


def ticket_rows(facts: Sequence[TicketFacts]) -> list[list[Cell]]:
    """The ticket table as rows under :data:`TICKET_COLUMNS`, for ``wandb.Table`` or a data frame.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        One row per ticket; what was removed is a fraction in ``[0, 1]``; ``None`` where it was not measured.
    """
    rows: list[list[Cell]] = []
    for fact in facts:
        row: list[Cell] = [_interval(fact.region.start, fact.region.stop), fact.region.sparsity, fact.target]
        row += [fact.achieved_channels, fact.achieved_parameters, fact.achieved_macs]
        row += [fact.parameters[1], None if fact.macs is None else fact.macs[1]]
        row += [fact.step, _origin(fact)]
        rows.append(row)
    return rows


def ticket_metrics(facts: Sequence[TicketFacts]) -> dict[str, float | None]:
    """The ticket table as numbers for loggers that know no tables: nominal sparsity, and what was removed of each kind.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        ``ticket_N/...`` -> a fraction in ``[0, 1]``; ``None`` where it was not measured.
    """
    metrics: dict[str, float | None] = {}
    for index, fact in enumerate(facts):
        metrics[f"ticket_{index}/sparsity"] = fact.region.sparsity
        metrics[f"ticket_{index}/channels_removed"] = fact.achieved_channels
        metrics[f"ticket_{index}/parameters_removed"] = fact.achieved_parameters
        metrics[f"ticket_{index}/macs_removed"] = fact.achieved_macs
    return metrics


def ticket_table(facts: Sequence[TicketFacts]) -> str:
    """The ticket table as fixed-width text.

    Nominal sparsity stands beside what was achieved: rounding to multiples and channels that cannot be pruned move the
    one, and parameters and MACs fall roughly with the square of the other.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        Lines without a trailing newline; numbers are aligned to the right.
    """
    head = ["region", "sparsity", "channels", "parameters", "MACs", "step", "found"]
    body = [
        [
            _interval(fact.region.start, fact.region.stop),
            f"{fact.region.sparsity:g}" + ("" if fact.target == "channels" else f" of {fact.target}"),
            *(_removed(counts) for counts in (fact.channels, fact.parameters, fact.macs)),
            "-" if fact.step is None else str(fact.step),
            _origin(fact),
        ]
        for fact in facts
    ]
    return aligned(head, body, left={0, len(head) - 1})


def _interval(start: float, stop: float) -> str:
    opening = "(" if math.isinf(start) else "["
    return f"{opening}{start:g}, {stop:g})"


def _removed(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "-"
    dense, kept = counts
    return f"-{(dense - kept) / dense:.1%}"


def _origin(fact: TicketFacts) -> str:
    return "emerged" if fact.emerged else "search limit"
