"""What training one ticket costs."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TicketLoad:
    """What training one ticket costs.

    Args:
        step_seconds: Seconds of one optimizer step of the ticket on one device, at the batch size of one rank.
        steps: Its budget in optimizer steps when one rank trains it; None where nothing but time ends it.
        divisible: Whether ``R`` ranks need ``ceil(steps / R)`` steps: True where the Trainer is limited by epochs,
            which ranks go through together. False where it is limited by steps (``max_steps`` of the Trainer or of the
            region): more ranks then make batches larger, not steps fewer.

    Raises:
        ValueError: If ``step_seconds`` is no positive finite number, ``steps`` no integer of at least 0 or None, or
            ``divisible`` no bool.
    """

    step_seconds: float
    steps: int | None
    divisible: bool

    def __post_init__(self) -> None:
        time, steps = self.step_seconds, self.steps
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 < time < math.inf:
            raise ValueError(
                f"TicketLoad(step_seconds={time!r}) must be a positive finite number: the measured seconds of one "
                "optimizer step."
            )
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
            raise ValueError(
                f"TicketLoad(steps={steps!r}) must be an integer of at least 0, or None where only time ends the "
                "training."
            )
        if not isinstance(self.divisible, bool):
            raise ValueError(
                f"TicketLoad(divisible={self.divisible!r}) must be True (limited by epochs) or False (limited by "
                "steps)."
            )

    def steps_on(self, ranks: int) -> int | None:
        """The optimizer steps that the ticket takes on so many ranks; None without a budget."""
        return self.steps if self.steps is None or not self.divisible else -(-self.steps // ranks)

    def seconds_on(self, ranks: int) -> float | None:
        """The seconds that the ticket takes on so many ranks; None without a budget."""
        steps = self.steps_on(ranks)
        return None if steps is None else self.step_seconds * steps

    def shared(self, ranks: int, longest: int) -> float:
        """What sharing out compares: the seconds that fall to each of so many ranks.

        Args:
            ranks: Number of ranks.
            longest: The steps to count with where there is no budget.

        Returns:
            :meth:`seconds_on` where ranks share the steps, whole steps as it takes them. Otherwise the cost divided by
            the ranks, although the time is that of one, so that ranks are in proportion to cost there as well.
        """
        seconds = self.seconds_on(ranks) if self.divisible else None
        return seconds if seconds is not None else self.cost(longest) / ranks

    def cost(self, longest: int) -> float:
        """The seconds on one rank; ``longest`` steps of them where there is no budget."""
        return self.step_seconds * (longest if self.steps is None else self.steps)
