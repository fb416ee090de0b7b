"""How long a step takes, as far as that can be known before any is taken."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_earlybird.probe import DenoiserCall


class StepClock:
    """Seconds from one training batch to the next: the median of the last few, so that a validation does not count.

    Args:
        window: How many batches.
    """

    def __init__(self, window: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    def tick(self) -> None:
        """A batch begins."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    @property
    def seconds(self) -> float | None:
        """Seconds a batch; None before the second one."""
        return statistics.median(self._seconds) if self._seconds else None


def pass_seconds(
    network: nn.Module,
    call: DenoiserCall,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    repeats: int = 5,
) -> float:
    """Seconds of one forward and backward pass through a denoiser; the median of several, after one to warm up.

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
            _wait(device)
            started = time.perf_counter()
            with context():
                outputs = tree_leaves(network(*args, **kwargs))
                floating = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
                loss = torch.stack([leaf.float().square().mean() for leaf in floating]).sum()
            # Not `backward`: gradients that are being accumulated must not change, and no hooks of DDP be called.
            torch.autograd.grad(loss, parameters, allow_unused=True)
            _wait(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
