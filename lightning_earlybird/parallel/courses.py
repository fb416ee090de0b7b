"""A ticket's own steps, on the count of the rank that trains it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Course:
    """Where a ticket stands when its rank has taken so many optimizer steps.

    Tickets that have always shared a rank, or always had one, begin together. In a fit that was resumed on another
    number of ranks, tickets that were trained apart may come to share one: the more advanced then sit out until the
    others have come as far, so that epochs and learning rates mean the same for all.

    Args:
        zero: Step of the rank from which the ticket's own steps count.
        start: Step of the rank from which the ticket takes part.
        limit: Its own steps at most; None has no limit of its own.
    """

    zero: int
    start: int
    limit: int | None

    def taken(self, step: int) -> int:
        """The ticket's own steps when the rank has taken `step`."""
        return max(step, self.start) - self.zero

    def has_ended(self, step: int) -> bool:
        """Whether the ticket has had all its own steps."""
        return self.limit is not None and self.taken(step) >= self.limit

    def takes_part(self, step: int) -> bool:
        """Whether the ticket is trained in the step that follows `step`."""
        return step >= self.start and not self.has_ended(step)

    def stopped(self, step: int) -> Course:
        """The course of a ticket that takes no more steps."""
        return replace(self, limit=self.taken(step))
