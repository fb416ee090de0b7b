"""What a trace notes of attentions: whose channels queries are, and which numbers scale the scores.

Scores are divided by the square root of the head width. Where code computes that from the width, a narrower head would
change them, and queries are rescaled; where it was computed once, nothing must change.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_earlybird.structure.rules import Call


@dataclass(eq=False)
class TracedAttention:
    """One attention that the trace has seen.

    Attributes:
        labels: The channels that queries and keys were contracted over.
        rows: Labels of the query, one row (width,) for each head and for each layer that makes queries.
        scalars: The calls that scaled queries, keys or scores by a number.
        by_width: Whether the kernel divides by the square root of the width; None: it is for the scalars to tell.
    """

    labels: Tensor
    rows: list[Tensor]
    scalars: set[Call] = field(default_factory=set)
    by_width: bool | None = None


def numbers_in(args: Any, kwargs: Any) -> tuple[float, ...]:
    """The plain numbers among the arguments of an operation, in order."""
    leaves = tree_flatten((args, kwargs))[0]
    return tuple(leaf for leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool))


def query_rows(query: Tensor) -> list[Tensor]:
    """The distinct rows of a query's labels, (..., width) -> (rows, width); columns without a channel are dropped."""
    rows = query.reshape(-1, query.shape[-1])
    rows = rows[:, (rows != 0).any(dim=0)]
    return list(rows.unique(dim=0))
