"""What pruning costs and how fast it is won back, seen in the training loss on both sides of the switch."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor


class SwitchLoss:
    """Collects training losses around the switch, without waiting for the device at each step.

    Args:
        steps: Training steps on either side.
    """

    def __init__(self, steps: int = 50) -> None:
        self.steps = steps
        self._before: deque[Tensor] = deque(maxlen=steps)
        self._after: list[Tensor] | None = None

    def switch(self) -> None:
        """The denoiser has just been replaced."""
        self._after = []

    def add(self, outputs: Any) -> dict[str, float | None]:
        """Take what ``training_step`` returned.

        Returns:
            Once, when enough is known: the mean loss before the switch, the first loss after it, and the mean over the
            second half of the steps after it, named for a logger; empty otherwise.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or (self._after is not None and len(self._after) == self.steps):
            return {}
        if self._after is None:
            self._before.append(loss.detach())
            return {}
        self._after.append(loss.detach())
        if len(self._after) < self.steps:
            return {}
        return {
            "earlybird/loss_before_switch": _mean(list(self._before)),
            "earlybird/loss_at_switch": float(self._after[0]),
            "earlybird/loss_after_switch": _mean(self._after[self.steps // 2 :]),
        }


def _mean(values: list[Tensor]) -> float | None:
    return sum(float(value) for value in values) / len(values) if values else None
