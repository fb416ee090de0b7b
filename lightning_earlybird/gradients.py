"""Gradients of a denoiser's parameters by timestep region, from one forward pass for all regions.

The denoiser's outputs are cut off from its graph, call by call. The gradient of a loss with respect to those cut
outputs is then known sample by sample, and is sent through the network once for each region.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument, map_tensors
from lightning_earlybird.regions import TimestepPartition


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of the denoiser on the samples of one region.

    Attributes:
        region: Index of the region.
        timesteps: Shape (rows,), float64, on the CPU.
        outputs: The floating-point outputs, with their graphs.
        leaves: The same values as leaves, which the caller went on with.
    """

    region: int
    timesteps: Tensor
    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Number of samples."""
        return len(self.timesteps)


class _Recorder(nn.Module):
    """Stands where the ensemble expects a ticket: calls the whole denoiser, and cuts off what it returns."""

    def __init__(
        self,
        region: int,
        forward: Callable[..., Any],
        timesteps: TimestepArgument,
        calls: list[RecordedCall],
        with_graph: bool,
    ) -> None:
        super().__init__()
        self._region, self._forward, self._timesteps = region, forward, timesteps
        self._calls, self._with_graph = calls, with_graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)  # an estimate that is not learned from, such as self-conditioning
        with torch.set_grad_enabled(self._with_graph):
            output = self._forward(*args, **kwargs)
        outputs: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or (self._with_graph and not tensor.requires_grad):
                return tensor
            leaf = tensor.detach().requires_grad_()
            outputs.append(tensor)
            leaves.append(leaf)
            return leaf.clone()  # which the caller may write to, as to any output; a leaf would refuse

        output = map_tensors(output, cut)
        steps = self._timesteps.find(args, kwargs)
        steps = torch.as_tensor(steps, dtype=torch.float64).detach().cpu().reshape(-1)
        rows = next((leaf.shape[0] for leaf in leaves if leaf.dim() > 0), len(steps))
        # One timestep may be given for all rows.
        self._calls.append(RecordedCall(self._region, steps.expand(rows), tuple(outputs), tuple(leaves)))
        return output


@contextlib.contextmanager
def recorded(
    network: nn.Module, partition: TimestepPartition, timesteps: TimestepArgument, *, with_graph: bool = True
) -> Iterator[list[RecordedCall]]:
    """Have the denoiser keep its calls, split by region as :class:`TicketEnsemble` splits them in training.

    Args:
        network: The denoiser; its ``forward`` is replaced until the end of the context.
        partition: The regions; inside an overlap a sample goes to either neighbour at random.
        timesteps: Where ``forward`` takes the timesteps.
        with_graph: Whether to keep the graphs of the outputs; without them only losses can be told, at the cost of a
            forward pass.

    Yields:
        The calls that were made with gradients enabled, oldest first; to be cleared by the caller.
    """
    calls: list[RecordedCall] = []
    attributes, forward = vars(network), network.forward
    recorders = [_Recorder(index, forward, timesteps, calls, with_graph) for index in range(len(partition))]
    router = TicketEnsemble(recorders, partition, timesteps).train()

    @functools.wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        return router(*args, **kwargs)

    own = attributes.get("forward")
    attributes["forward"] = routed  # past nn.Module's own bookkeeping, and in front of the class's method
    try:
        yield calls
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


def output_gradients(loss: Tensor, calls: Sequence[RecordedCall], scale: float = 1.0) -> list[list[Tensor | None]]:
    """The gradient of ``scale * loss`` with respect to every output of every call; None where the loss has none.

    What reaches an output through a later call is not in it: :func:`parameter_gradients` adds that.
    """
    leaves = [leaf for call in calls for leaf in call.leaves]
    flat = iter(
        torch.autograd.grad(loss, leaves, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
        if leaves
        else ()
    )
    return [[next(flat) for _ in call.leaves] for call in calls]


def parameter_gradients(
    calls: Sequence[RecordedCall], flows: Sequence[Sequence[Tensor | None]], parameters: Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """Send the gradients of the outputs through the network, a call at a time; ``.grad`` is left alone.

    Args:
        calls: The calls, oldest first, with their graphs.
        flows: What :func:`output_gradients` gave for them, perhaps with samples set to zero.
        parameters: Parameters that require gradients.

    Yields:
        Region index, and the gradients of the parameters (None: the call does not use it); latest call first.
    """
    earlier = [leaf for call in calls for leaf in call.leaves]
    into = [flow for gradients in flows for flow in gradients]
    for call in reversed(calls):
        # From the last call to the first, because a call may have been given what an earlier one returned.
        first = len(earlier) - len(call.leaves)
        pairs = [(out, flow) for out, flow in zip(call.outputs, into[first:], strict=True) if flow is not None]
        del earlier[first:], into[first:]
        if not pairs:
            continue
        outputs, gradients = zip(*pairs, strict=True)
        inputs = [*parameters, *earlier]
        found = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
        for index, more in enumerate(found[len(parameters) :]):
            known = into[index]
            into[index] = more if known is None else known if more is None else known + more
        yield call.region, found[: len(parameters)]


def sample_losses(call: RecordedCall, flows: Sequence[Tensor | None]) -> Tensor:
    """The loss of each sample up to a common factor, from the gradients of its outputs.

    For a mean squared error ``mean((output - target) ** 2)`` the squared norm of that gradient *is* the sample's
    squared error, times ``4 / n ** 2``.

    Returns:
        Shape (rows,), float64, on the CPU; zero where no gradient has one row per sample.
    """
    losses = torch.zeros(call.rows, dtype=torch.float64)
    for flow in flows:
        if flow is not None and flow.dim() > 0 and flow.shape[0] == call.rows:
            losses += flow.detach().float().reshape(call.rows, -1).square().sum(1).double().cpu()
    return losses


def keep_rows(flows: Sequence[Tensor | None], kept: Tensor) -> list[Tensor | None]:
    """The gradients with the rows that are not kept set to zero.

    Args:
        flows: Gradients of one call's outputs.
        kept: Shape (rows,), bool, on the CPU.
    """

    def keep(flow: Tensor | None) -> Tensor | None:
        if flow is None or flow.dim() == 0 or flow.shape[0] != len(kept):
            return flow
        return flow * kept.to(flow).view(-1, *[1] * (flow.dim() - 1))

    return [keep(flow) for flow in flows]


@dataclass(frozen=True)
class TimeBins:
    """Equal bins over a stretch of the time axis.

    Args:
        start: Lower end.
        stop: Upper end.
        count: Number of bins.
    """

    start: float
    stop: float
    count: int = 20

    def index(self, timesteps: Tensor) -> Tensor:
        """Shape (n,), long: the bin of each timestep; those outside of the stretch fall into the nearest."""
        width = (self.stop - self.start) / self.count
        if width <= 0:
            return torch.zeros(timesteps.shape, dtype=torch.long)
        return ((timesteps - self.start) / width).floor().long().clamp(0, self.count - 1)

    def totals(self, timesteps: Tensor, losses: Tensor) -> Tensor:
        """Shape (2, count), float64: the sum of the losses in every bin, and their number."""
        totals = torch.zeros(2, self.count, dtype=torch.float64)
        index = self.index(timesteps)
        totals[0].index_add_(0, index, losses)
        totals[1].index_add_(0, index, torch.ones_like(losses))
        return totals


def bins_that_matter(totals: Tensor, threshold: float) -> Tensor:
    """Which bins have a mean loss of at least ``threshold`` times that of the bin with the largest (arXiv 2305.10924).

    Diff-Pruning drops the timesteps with ``L_t / L_max`` below its threshold.

    Args:
        totals: Shape (2, bins): sums of losses, and their numbers.
        threshold: In [0, 1].

    Returns:
        Shape (bins,), bool; True for bins about which nothing is known.
    """
    means = totals[0] / totals[1].clamp_min(1)
    return (totals[1] == 0) | (means >= threshold * means.max())
