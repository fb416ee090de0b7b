"""When an early-bird ticket has emerged: the FIFO of masks of Early-Bird tickets (arXiv 1909.11957)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_earlybird.masks import TicketMask


@dataclass(frozen=True)
class MaskCheck:
    """What one new mask says about convergence; all distances are mask distances in ``[0, 1]``.

    Args:
        step: The step at which the mask was drawn.
        distance: The largest distance of this mask to each *other* mask in the FIFO; ``None`` until the FIFO is full.
        from_start: Distance to the mask at initialisation; ``None`` if there is none.
        from_half: Distance to the stored mask whose step is closest to ``step / 2``; ``None`` if nothing is stored.
            Where masks drift on a logarithmic clock it stays level while ``distance`` falls.
        converged: Whether the FIFO is full and ``distance`` is at most the threshold.
    """

    step: int
    distance: float | None
    from_start: float | None
    from_half: float | None
    converged: bool


class MaskWindow:
    """Watches the masks of one sparsity for convergence.

    The rule is the papers': a mask drawn at every check enters a FIFO of ``window`` masks, and the ticket has emerged
    once the FIFO is full and the newest mask is at most ``threshold`` away from each of the others. The earliest
    possible emergence is therefore at check number ``window``.

    Besides the FIFO the window keeps a history, from which it measures how far the masks have come since the start and
    since half the training so far, and from which :meth:`pairwise` draws the overlap heat map of the paper.

    Args:
        window: Masks in the FIFO, the newest included; at least 2.
        threshold: Largest mask distance that counts as converged, in ``[0, 1]``.
        history_limit: Pushed masks to keep at most. Beyond it every second old one is forgotten, never one in the FIFO,
            so that recent history stays dense and early history becomes sparse. Above ``window``.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        masks = MaskWindow(window=5, threshold=0.1)
        masks.start(mask_at_initialisation)
        if masks.push(mask, step=trainer.global_step).converged:
            ticket = masks.newest
    """

    def __init__(self, *, window: int = 5, threshold: float = 0.1, history_limit: int = 256) -> None:
        if not window >= 2:
            raise ValueError(f"window={window!r} must be at least 2: the newest mask is compared with older ones.")
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"threshold={threshold!r} must lie in [0, 1]: it is a mask distance, a fraction of channels. "
                "The paper uses 0.1."
            )
        if not history_limit > window:
            raise ValueError(
                f"history_limit={history_limit!r} must be above window={window!r}, because the masks in the FIFO are "
                "never forgotten. Raise history_limit."
            )
        self.window = window
        self.threshold = threshold
        self.history_limit = history_limit
        self.checks: list[MaskCheck] = []
        self._start: tuple[int, TicketMask] | None = None
        # Pushed masks by ascending step. Thinning spares the last `window` of them, so they are always the FIFO.
        self._history: list[tuple[int, TicketMask]] = []

    @property
    def newest(self) -> TicketMask | None:
        """The mask pushed last; ``None`` before the first."""
        return self._history[-1][1] if self._history else None

    @property
    def null_distance(self) -> float | None:
        """Expected distance between random masks with the newest one's counts; ``None`` before there is any mask."""
        stored = self._stored()
        return stored[-1][1].null_distance() if stored else None

    def start(self, mask: TicketMask, step: int = 0) -> None:
        """Records the mask at initialisation, for :attr:`MaskCheck.from_start`. It does not enter the FIFO.

        Args:
            mask: The mask of the untrained network.
            step: The step at which it was drawn.

        Raises:
            RuntimeError: If masks were recorded already.
        """
        if self._stored():
            raise RuntimeError(
                f"start(step={step}) must come first and once, but the window already holds masks. "
                "Use a new MaskWindow for a new run."
            )
        self._start = (step, mask)

    def push(self, mask: TicketMask, step: int) -> MaskCheck:
        """Adds the newest mask and judges convergence.

        Args:
            mask: The mask drawn now, over the same channel groups as all before it.
            step: The step at which it was drawn; above that of the mask pushed before.

        Returns:
            The distances and the verdict; also appended to :attr:`checks`.

        Raises:
            ValueError: If ``step`` does not ascend, or the mask has other channel groups. The window is then unchanged.
        """
        if self._history and step <= self._history[-1][0]:
            raise ValueError(f"step={step} must be above that of the mask pushed before, {self._history[-1][0]}.")
        stored = self._stored()
        if stored:
            mask.check_same_groups(stored[0][1])

        others = self._history[-(self.window - 1) :]
        full = len(others) == self.window - 1
        distance = max(mask.distance(other) for _, other in others) if full else None
        # min() keeps the first of equals: of two masks equally close to step / 2, the earlier one.
        half = min(stored, key=lambda entry: abs(2 * entry[0] - step))[1] if stored else None
        check = MaskCheck(
            step=step,
            distance=distance,
            from_start=None if self._start is None else mask.distance(self._start[1]),
            from_half=None if half is None else mask.distance(half),
            converged=distance is not None and distance <= self.threshold,
        )
        self._history.append((step, mask))
        self._thin()
        self.checks.append(check)
        return check

    def pairwise(self) -> tuple[list[int], Tensor]:
        """Distances between all stored masks, the one at initialisation first: the overlap heat map of the paper.

        Returns:
            The n steps, and a float64 tensor of shape (n, n) with the mask distances; symmetric, zero diagonal.
        """
        stored = self._stored()
        if not stored:
            return [], torch.zeros(0, 0, dtype=torch.float64)
        # |a xor b| = |a| + |b| - 2 |a and b|; in float64 these counts are exact whatever torch's matmul precision is.
        flat = _stacked(stored).double()
        sizes = flat.sum(dim=1)
        differing = sizes[:, None] + sizes[None, :] - 2 * flat @ flat.T
        return [step for step, _ in stored], differing / flat.shape[1]

    def state_dict(self) -> dict[str, Any]:
        """Everything learned so far, in tensors and plain containers, so that it loads with ``weights_only=True``.

        Returns:
            A dict that :meth:`load_state_dict` restores exactly.
        """
        stored = self._stored()
        groups = {name: len(group) for name, group in stored[0][1].kept.items()} if stored else {}
        return {
            "window": self.window,
            "groups": groups,
            "has_start": self._start is not None,
            "steps": [step for step, _ in stored],
            "masks": _stacked(stored) if stored else torch.zeros(0, 0, dtype=torch.bool),
            "checks": [asdict(check) for check in self.checks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; threshold and history limit stay those of the constructor.

        Args:
            state: What :meth:`state_dict` gave.

        Raises:
            ValueError: If the state comes from a window of another size.
        """
        if state["window"] != self.window:
            raise ValueError(
                f"window={self.window} does not match the saved state, which has window={state['window']}: its FIFO "
                "would hold other masks. Resume with the saved value."
            )
        names, sizes = list(state["groups"]), list(state["groups"].values())
        stored = [
            # Cloned, so that a mask neither keeps its neighbours in memory nor shares it with the caller.
            (step, TicketMask({name: group.clone() for name, group in zip(names, row.split(sizes), strict=True)}))
            for step, row in zip(state["steps"], state["masks"], strict=True)
        ]
        self._start = stored.pop(0) if state["has_start"] else None
        self._history = stored
        self.checks = [MaskCheck(**check) for check in state["checks"]]

    def _stored(self) -> list[tuple[int, TicketMask]]:
        return self._history if self._start is None else [self._start, *self._history]

    def _thin(self) -> None:
        if len(self._history) > self.history_limit:
            old, fifo = self._history[: -self.window], self._history[-self.window :]
            self._history = old[1::2] + fifo


def _stacked(stored: list[tuple[int, TicketMask]]) -> Tensor:
    names = list(stored[0][1].kept)
    # By the first mask's names: masks may list the same groups in another order.
    return torch.stack([torch.cat([mask.kept[name] for name in names]) for _, mask in stored])
