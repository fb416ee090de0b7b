"""What pruning costs and how fast it is won back, seen in the training loss on both sides of the switch."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor


class SwitchLoss:
    """Collects training losses around the switch, without waiting for the device at each step.

    Args:
        steps: Training batches on either side, which are steps where no gradients are accumulated.
    """

    def __init__(self, steps: int = 50) -> None:
        self.steps = steps
        self._before: deque[Tensor] = deque(maxlen=steps)
        self._after: list[Tensor] | None = None

    def switch(self) -> None:
        """The denoiser has just been replaced."""
        self._after = []

    def add(self, outputs: Any, parts: int = 1) -> dict[str, float | None]:
        """Take what ``training_step`` returned.

        Args:
            outputs: What it returned, as Lightning passes it on.
            parts: What the loss has been divided by since: the batches whose gradients are accumulated.

        Returns:
            What has become known, named for a logger: with the first loss after the switch that and the mean before it,
            and after ``steps`` the mean over the second half of them; empty at all other steps.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or (self._after is not None and len(self._after) == self.steps):
            return {}
        loss = loss.detach() * parts
        if self._after is None:
            self._before.append(loss)
            return {}
        self._after.append(loss)
        if len(self._after) == 1:
            before = _mean(list(self._before))
            return {"earlybird/loss_before_switch": before, "earlybird/loss_at_switch": float(self._after[0])}
        return self._recovered() if len(self._after) == self.steps else {}

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, in tensors and plain containers."""
        before = [loss.cpu() for loss in self._before]
        return {"before": before, "after": None if self._after is None else [loss.cpu() for loss in self._after]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            TypeError: If the state holds something else than losses.
        """
        after = state["after"]
        losses = [*state["before"], *(after or ())]
        if not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses):
            raise TypeError("losses around the switch are no tensors of one number")
        self._before = deque(state["before"], maxlen=self.steps)
        self._after = None if after is None else list(after)

    def end(self) -> dict[str, float | None]:
        """The mean after the switch, where the fit ends before ``steps`` of them; empty otherwise."""
        return self._recovered() if self._after and 1 < len(self._after) < self.steps else {}

    def _recovered(self) -> dict[str, float | None]:
        assert self._after is not None
        return {"earlybird/loss_after_switch": _mean(self._after[len(self._after) // 2 :])}


def _mean(values: list[Tensor]) -> float | None:
    return sum(float(value) for value in values) / len(values) if values else None
