"""How long a step takes, as far as that can be known before any is taken."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_earlybird.probe import DenoiserCall

Mark: TypeAlias = "float | torch.cuda.Event"
"""A moment: of the clock, or on a CUDA stream, which the host does not have to wait for."""


class StepClock:
    """Seconds from one training batch to the next, without the backward passes: what a step takes besides them.

    A backward pass under DDP exchanges gradients and waits for the slowest rank, which a ticket that trains alone does
    not. The median of the last few batches, so that a validation does not count; the first one, in which the denoiser
    is found and traced, never does.

    Args:
        device: Where the module is.
        window: How many batches.
    """

    def __init__(self, device: torch.device, window: int = 50) -> None:
        self._device = device
        self._batches: deque[tuple[Mark, Mark, list[tuple[Mark, Mark]]]] = deque(maxlen=window)
        self._start: Mark | None = None
        self._warm = False
        self._backward: Mark | None = None
        self._spans: list[tuple[Mark, Mark]] = []

    def batch_begins(self) -> None:
        """A batch begins, and the one before has ended."""
        now = self._now()
        if self._start is not None and self._warm:
            self._batches.append((self._start, now, self._spans))
        self._warm = self._start is not None
        self._start, self._spans = now, []

    def backward_begins(self) -> None:
        """The batch's loss is there; there may be several backward passes in a batch."""
        self._backward = self._now()

    def backward_ends(self) -> None:
        """The gradients are there."""
        if self._backward is not None:
            self._spans.append((self._backward, self._now()))
            self._backward = None

    @property
    def seconds(self) -> float | None:
        """Seconds a batch, without its backward passes; None before two have ended."""
        if not self._batches:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return statistics.median(
            _between(start, end) - sum(_between(*span) for span in spans) for start, end, spans in self._batches
        )

    def _now(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


class PassSeconds(NamedTuple):
    """Seconds of several passes through a denoiser."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @property
    def least(self) -> float:
        """Seconds of a forward and a backward pass when nothing disturbs them.

        What slows them down differs from one moment to the next, and networks are to be compared.
        """
        return min(self.forward) + min(self.backward)


def pass_seconds(
    network: nn.Module,
    call: DenoiserCall,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    repeats: int = 5,
) -> PassSeconds:
    """Seconds of a forward and a backward pass through a denoiser; several times, after one to warm up.

    Parameters, their gradients and the global random state are left as they are.

    Args:
        network: The denoiser or a ticket, on ``device``.
        call: A call of it; its one sample is repeated to the size of the batch that it was seen with.
        device: Where it is.
        context: The precision plugin's context for a training step.
        repeats: How many passes are timed.
    """
    rows = len(call.seen)

    def batch(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.to(device)
        return leaf.repeat(rows, *[1] * (leaf.dim() - 1)) if leaf.dim() and leaf.shape[0] == 1 else leaf

    args, kwargs = tree_map(batch, call.for_network(network))
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    seconds = []
    with isolate_rng(include_cuda=device.type == "cuda"), torch.enable_grad():
        for _ in range(1 + repeats):
            started = _wait(device)
            with context():
                outputs = tree_leaves(network(*args, **kwargs))
                floating = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
                loss = torch.stack([leaf.float().square().mean() for leaf in floating]).sum()
            halfway = _wait(device)
            # Not `backward`: gradients that are being accumulated must not change, and no hooks of DDP be called.
            torch.autograd.grad(loss, parameters, allow_unused=True)
            seconds.append((halfway - started, _wait(device) - halfway))
    forward, backward = zip(*seconds[1:], strict=True)
    return PassSeconds(forward, backward)


def _wait(device: torch.device) -> float:
    """The time when everything so far has been computed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
