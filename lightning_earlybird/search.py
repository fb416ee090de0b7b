"""The search for early-bird tickets of several sparsities at once, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_earlybird.convergence import MaskCheck, MaskWindow
from lightning_earlybird.masks import TicketMask


class TicketSearch:
    """What a detector has seen: masks by sparsity, their distances, and which tickets have emerged.

    Args:
        sparsities: Fractions of channels to remove, each in (0, 1), without repetition.
        window: Masks in the FIFO, the newest included.
        threshold: Largest mask distance that counts as settled.

    Attributes:
        windows: Sparsity -> its masks and checks.
        emerged: Sparsity -> step at which its ticket emerged.
        tickets: Sparsity -> the mask that emerged.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, sparsities: Sequence[float], *, window: int, threshold: float) -> None:
        check_sparsities(sparsities)
        self.windows = {float(s): MaskWindow(window=window, threshold=threshold) for s in sparsities}
        self.emerged: dict[float, int] = {}
        self.tickets: dict[float, TicketMask] = {}

    @property
    def started(self) -> bool:
        """Whether the masks at initialisation are known."""
        return any(window.null_distance is not None for window in self.windows.values())

    @property
    def done(self) -> bool:
        """Whether every ticket has emerged."""
        return len(self.emerged) == len(self.windows)

    def start(self, masks: Mapping[float, TicketMask], step: int) -> dict[str, float]:
        """Take the masks at initialisation, which distances are measured from.

        Returns:
            The null line by sparsity, named for a logger: the distance that two random masks would have.
        """
        for sparsity, mask in masks.items():
            self.windows[sparsity].start(mask, step)
        return {f"earlybird/null_line/{sparsity:g}": mask.null_distance() for sparsity, mask in masks.items()}

    def push(self, masks: Mapping[float, TicketMask], step: int) -> dict[float, MaskCheck]:
        """Measure how far each new mask is from those before it; says nothing about emergence yet."""
        return {sparsity: self.windows[sparsity].push(mask, step) for sparsity, mask in masks.items()}

    def emerge(self, sparsity: float, mask: TicketMask, step: int) -> None:
        """Record that a ticket has emerged."""
        self.emerged[sparsity] = step
        self.tickets[sparsity] = mask

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, in tensors and plain containers."""
        return {
            "sparsities": list(self.windows),
            "emerged": [[sparsity, step] for sparsity, step in self.emerged.items()],
            "tickets": [[sparsity, mask.state_dict()] for sparsity, mask in self.tickets.items()],
            "windows": [window.state_dict() for window in self.windows.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: If the state is that of other sparsities.
        """
        if list(state["sparsities"]) != list(self.windows):
            raise ValueError(
                f"sparsities={list(self.windows)} differ from the checkpoint's {list(state['sparsities'])}. "
                "Resume with the sparsities that the search began with."
            )
        self.emerged = {sparsity: step for sparsity, step in state["emerged"]}
        self.tickets = {sparsity: TicketMask.from_state_dict(mask) for sparsity, mask in state["tickets"]}
        for window, saved in zip(self.windows.values(), state["windows"], strict=True):
            window.load_state_dict(saved)


def named_metrics(checks: Mapping[float, MaskCheck]) -> dict[str, float | None]:
    """The distances of one round of checks, named for a logger."""
    metrics: dict[str, float | None] = {}
    for sparsity, check in checks.items():
        metrics[f"earlybird/distance/{sparsity:g}"] = check.distance
        metrics[f"earlybird/distance_from_init/{sparsity:g}"] = check.from_start
        metrics[f"earlybird/distance_to_half/{sparsity:g}"] = check.from_half
    return metrics


def check_sparsities(sparsities: Sequence[float]) -> None:
    """Refuse what is not a list of distinct numbers in (0, 1).

    Raises:
        ValueError: The message says which value is wrong.
    """
    if isinstance(sparsities, str | Mapping) or not isinstance(sparsities, Sequence) or not sparsities:
        raise ValueError(f"sparsities={sparsities!r} must be a non-empty list of numbers, for example [0.3, 0.6].")
    for value in sparsities:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(
                f"sparsities={list(sparsities)!r}: {value!r} must lie in (0, 1); it is the fraction of channels to "
                "remove."
            )
    if len({float(value) for value in sparsities}) != len(sparsities):
        raise ValueError(f"sparsities={list(sparsities)!r} must not repeat a value. Name each sparsity once.")
