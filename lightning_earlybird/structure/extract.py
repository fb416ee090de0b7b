"""Extraction: a physically smaller network from a dense one."""

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.adapters import repair_attributes
from lightning_earlybird.structure.heads import set_heads
from lightning_earlybird.structure.norms import keep_statistics_groups
from lightning_earlybird.structure.plan import ChannelPlan

Norm = Literal["shrink", "exact"]


class TicketSlicer:
    """Cuts tensors of one dense network down to one mask.

    Computed once for a mask, used for weights, moments and averages alike.

    Args:
        plan: The denoiser's channel plan.
        mask: The ticket's mask.
    """

    def __init__(self, plan: ChannelPlan, mask: TicketMask) -> None:
        self.plan = plan
        self.mask = mask
        self._keep = plan.keep_indices(mask)
        self._factors = plan.row_factors(mask)

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The ticket's part of a dense tensor shaped like parameter ``name`` (a weight, a gradient, a moment).

        Returns:
            A new tensor, never a view.
        """
        result = tensor.detach()
        for dim, keep in self._keep.get(name, {}).items():
            result = result.index_select(dim, keep.to(result.device))
        return _like(result, tensor)

    def weight(self, name: str, tensor: Tensor) -> Tensor:
        """As :meth:`slice`, with the rows of attention queries rescaled for the narrower head.

        The kernel divides by ``sqrt(head width)``.
        """
        if name not in self._factors:
            return self.slice(name, tensor)
        dim, factors = self._factors[name]
        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
        # Not in half precision, where the factor itself would be rounded.
        scaled = tensor.detach() * factors.to(tensor.device, torch.promote_types(tensor.dtype, torch.float32)).view(
            shape
        )
        return self.slice(name, scaled.to(tensor.dtype))


def _like(result: Tensor, source: Tensor) -> Tensor:
    """A copy of ``result`` in the memory format of ``source`` that shares no storage with it."""
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if memory_format is torch.channels_last else 5
        if source.dim() == rank and source.is_contiguous(memory_format=memory_format) and not source.is_contiguous():
            return result.clone(memory_format=memory_format)
    return result.clone(memory_format=torch.contiguous_format)


def extract(model: nn.Module, plan: ChannelPlan, mask: TicketMask, *, norm: Norm = "shrink") -> nn.Module:
    """The ticket that a mask selects: a plain, smaller network that is independent of the dense one.

    The dense network is not changed. Parameter names, tied parameters, train/eval modes, ``requires_grad``, dtype,
    device and memory format carry over; gradients do not. Modules that lose attention heads are told how many are left.

    Args:
        model: The dense network that the plan was traced on.
        plan: Its channel plan.
        mask: Which channels stay.
        norm: Over which channels a GroupNorm takes its statistics. "shrink" gives it the largest number of equal groups
            that divides its new width and does not exceed the old one, so that channels change groups. "exact" leaves
            every channel with what remains of its original group; where those differ in width, the norm becomes a
            :class:`~lightning_earlybird.structure.RaggedGroupNorm`.

    Raises:
        ValueError: The mask does not belong to the plan, or ``norm`` is something else.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} must be one of {', '.join(map(repr, get_args(Norm)))}.")
    slicer = TicketSlicer(plan, mask)
    # deepcopy looks tensors up in its memo first: with the slices put there, dense weights are never copied and tied
    # ones stay tied.
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        memo[id(parameter)] = nn.Parameter(slicer.weight(name, parameter), requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers(remove_duplicate=True):
        memo[id(buffer)] = slicer.weight(name, buffer)
    ticket: nn.Module = copy.deepcopy(model, memo)
    state = ticket.state_dict()
    for name, buffer in list(ticket.named_buffers()):
        if name not in state and buffer.shape != model.get_buffer(name).shape:
            register_persistent(ticket, name, buffer)
    set_heads(ticket, plan, mask)  # first: the width of a head follows from their number
    repair_attributes(ticket, model, plan.input_widths(mask).get)
    if norm == "exact":
        keep_statistics_groups(ticket, model, plan.kept_inputs(mask))
    return ticket


def register_persistent(network: nn.Module, name: str, buffer: Tensor) -> None:
    """Set a buffer that is part of the state dict from now on.

    What a constructor computes anew need not be saved, unless it has been cut since.
    """
    owner, _, leaf = name.rpartition(".")
    network.get_submodule(owner).register_buffer(leaf, buffer, persistent=True)
