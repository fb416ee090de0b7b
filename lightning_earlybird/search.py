"""The search for several early-bird tickets at once, without a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning_earlybird.convergence import MaskCheck, MaskWindow
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepRegion

SearchKey: TypeAlias = float | TimestepRegion
"""What a ticket is searched for: a sparsity, or a region where scores depend on the timesteps."""


class TicketSearch:
    """What a detector has seen: masks by sparsity or region, their distances, and which tickets have emerged.

    Args:
        sparsities: Fractions of channels to remove, each in (0, 1), without repetition.
        window: Masks in the FIFO, the newest included.
        threshold: Largest mask distance that counts as settled.
        regions: Search a ticket for each of these regions instead of one for each sparsity; those of sparsity 0, which
            stay dense, are left out.

    Attributes:
        windows: Sparsity (or region) -> its masks and checks.
        emerged: Sparsity (or region) -> step at which its ticket emerged.
        tickets: Sparsity (or region) -> the mask that emerged.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, sparsities: Sequence[float], *, window: int, threshold: float, regions: Sequence[TimestepRegion] = ()
    ) -> None:
        check_sparsities(sparsities)
        pruned = [region for region in regions if region.sparsity > 0]
        keys: list[SearchKey] = [*pruned] if pruned else [float(s) for s in sparsities]
        self.windows: dict[SearchKey, MaskWindow] = {
            key: MaskWindow(window=window, threshold=threshold) for key in keys
        }
        self.emerged: dict[SearchKey, int] = {}
        self.tickets: dict[SearchKey, TicketMask] = {}

    def key(self, wanted: SearchKey) -> SearchKey:
        """Under which key the masks for a region or a sparsity are kept.

        Raises:
            KeyError: There is none, or several regions have that sparsity.
        """
        if wanted in self.windows:
            return wanted
        if isinstance(wanted, TimestepRegion):
            if wanted.sparsity in self.windows:
                return wanted.sparsity
            raise KeyError(
                f"{describe(wanted)} is not searched for. There are {[describe(key) for key in self.windows]}."
            )
        alike = [key for key in self.windows if sparsity_of(key) == wanted]
        if not alike:
            known = [key if isinstance(key, float) else describe(key) for key in self.windows]
            raise KeyError(f"sparsity={wanted} is not searched for. This detector has {known}.")
        if len(alike) > 1:
            raise KeyError(
                f"sparsity={wanted} is that of {len(alike)} regions, {', '.join(map(describe, alike))}, each with a "
                "mask of its own. Ask for one of the regions."
            )
        return alike[0]

    @property
    def started(self) -> bool:
        """Whether the masks at initialisation are known."""
        return any(window.null_distance is not None for window in self.windows.values())

    @property
    def done(self) -> bool:
        """Whether every ticket has emerged."""
        return len(self.emerged) == len(self.windows)

    def start(self, masks: Mapping[SearchKey, TicketMask], step: int) -> dict[str, float]:
        """Take the masks at initialisation, which distances are measured from.

        Returns:
            The null line of each, named for a logger: the distance that two random masks would have.
        """
        for key, mask in masks.items():
            self.windows[key].start(mask, step)
        return {f"earlybird/null_line/{short_name(key)}": mask.null_distance() for key, mask in masks.items()}

    def push(self, masks: Mapping[SearchKey, TicketMask], step: int) -> dict[SearchKey, MaskCheck]:
        """Measure how far each new mask is from those before it; says nothing about emergence yet."""
        return {key: self.windows[key].push(mask, step) for key, mask in masks.items()}

    def emerge(self, key: SearchKey, mask: TicketMask, step: int) -> None:
        """Record that a ticket has emerged."""
        self.emerged[key] = step
        self.tickets[key] = mask

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, in tensors and plain containers."""
        return {
            "sparsities": [_plain(key) for key in self.windows],
            "emerged": [[_plain(key), step] for key, step in self.emerged.items()],
            "tickets": [[_plain(key), mask.state_dict()] for key, mask in self.tickets.items()],
            "windows": [window.state_dict() for window in self.windows.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: If the state is that of other sparsities or regions.
        """
        own, saved = [_plain(key) for key in self.windows], list(state["sparsities"])
        if own != saved:
            name = "regions" if any(isinstance(key, TimestepRegion) for key in self.windows) else "sparsities"
            raise ValueError(
                f"{name}={own} differ from the checkpoint's {saved}. Resume with the sparsities, regions (here "
                "[start, stop, sparsity]) and criterion that the search began with."
            )
        keys = list(self.windows)
        self.emerged = {keys[own.index(key)]: step for key, step in state["emerged"]}
        self.tickets = {keys[own.index(key)]: TicketMask.from_state_dict(mask) for key, mask in state["tickets"]}
        for window, kept in zip(self.windows.values(), state["windows"], strict=True):
            window.load_state_dict(kept)


def named_metrics(checks: Mapping[SearchKey, MaskCheck]) -> dict[str, float | None]:
    """The distances of one round of checks, named for a logger."""
    metrics: dict[str, float | None] = {}
    for key, check in checks.items():
        name = short_name(key)
        metrics[f"earlybird/distance/{name}"] = check.distance
        metrics[f"earlybird/distance_from_init/{name}"] = check.from_start
        metrics[f"earlybird/distance_to_half/{name}"] = check.from_half
    return metrics


def sparsity_of(key: SearchKey) -> float:
    """The nominal sparsity of a ticket."""
    return key.sparsity if isinstance(key, TimestepRegion) else key


def short_name(key: SearchKey) -> str:
    """For names of metrics: ``0.3``, or ``240-440`` for a region."""
    name = f"{key.start:g}-{key.stop:g}" if isinstance(key, TimestepRegion) else f"{key:g}"
    return name.replace("+", "")  # of 1e+06, which some loggers refuse in names


def describe(key: SearchKey) -> str:
    """For sentences: ``sparsity 0.3``, or ``region [240, 440) of sparsity 0.6``."""
    if isinstance(key, TimestepRegion):
        return f"region [{key.start:g}, {key.stop:g}) of sparsity {key.sparsity:g}"
    return f"sparsity {key:g}"


def _plain(key: SearchKey) -> float | list[float]:
    """For checkpoints, which hold no classes; nor NumPy's floats, which bounds may be."""
    if not isinstance(key, TimestepRegion):
        return float(key)
    return [float(value) if isinstance(value, float) else value for value in (key.start, key.stop, key.sparsity)]


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
