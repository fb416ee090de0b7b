"""Extraction: a physically smaller network from a dense one, and the way back from shapes on disk."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.adapters import adapter_of, repair_attributes
from lightning_earlybird.structure.plan import ChannelPlan


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
        return self.slice(name, tensor.detach() * factors.to(tensor).view(shape))


def _like(result: Tensor, source: Tensor) -> Tensor:
    """A copy of ``result`` in the memory format of ``source`` that shares no storage with it."""
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if memory_format is torch.channels_last else 5
        if source.dim() == rank and source.is_contiguous(memory_format=memory_format) and not source.is_contiguous():
            return result.clone(memory_format=memory_format)
    return result.clone(memory_format=torch.contiguous_format)


def extract(model: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """The ticket that a mask selects: a plain, smaller network that is independent of the dense one.

    The dense network is not changed. Parameter names, tied parameters, train/eval modes, ``requires_grad``, dtype,
    device and memory format carry over; gradients do not. GroupNorm keeps the largest number of groups that divides its
    new width and does not exceed the old one.

    Args:
        model: The dense network that the plan was traced on.
        plan: Its channel plan.
        mask: Which channels stay.

    Raises:
        ValueError: The mask does not belong to the plan.
    """
    slicer = TicketSlicer(plan, mask)
    # deepcopy looks tensors up in its memo first: with the slices put there, dense weights are never copied and tied
    # ones stay tied.
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=True):
        memo[id(parameter)] = nn.Parameter(slicer.weight(name, parameter), requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers(remove_duplicate=True):
        memo[id(buffer)] = slicer.weight(name, buffer)
    ticket = copy.deepcopy(model, memo)
    repair_attributes(ticket, model, lambda module: plan.input_width(module, mask))
    return ticket


def resize_(model: nn.Module, shapes: Mapping[str, Sequence[int]], edits: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give a dense network the shapes of a ticket, in place.

    The values of resized tensors are undefined until a state dict is loaded. This is how a ticket comes back from disk
    without tracing. Shapes and edits may come from a file that nobody vouches for: only existing tensors are resized
    and only the width attributes of known modules are written.

    Args:
        model: A dense network, freshly built.
        shapes: Shape of every parameter and buffer in the ticket's state dict.
        edits: Module name -> attribute -> value, as :func:`~lightning_earlybird.structure.attribute_edits` wrote them.

    Returns:
        ``model``.

    Raises:
        ValueError: A tensor or attribute does not exist in the network or does not fit; the message names it.
    """
    state = model.state_dict(keep_vars=True)
    odd = sorted(set(state) ^ set(shapes))
    if odd:
        where = "missing from the shapes" if odd[0] in state else "not a tensor of the network"
        raise ValueError(
            f"tensor {odd[0]!r} is {where} ({len(odd)} such). Build the same dense network that the ticket was made "
            "from."
        )
    checked = [
        (*_checked_edit(model, name, attribute, value), attribute)
        for name, values in edits.items()
        for attribute, value in values.items()
    ]

    resized: dict[int, Tensor] = {}
    for name, tensor in state.items():
        shape = tuple(shapes[name])
        if len(shape) != tensor.dim() or any(not 1 <= new <= old for new, old in zip(shape, tensor.shape, strict=True)):
            raise ValueError(
                f"tensor {name!r} has shape {shape}, which is no part of the dense network's {tuple(tensor.shape)}."
            )
        if shape == tuple(tensor.shape):
            continue
        if id(tensor) not in resized:
            empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            resized[id(tensor)] = (
                nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, resized[id(tensor)])

    widths = {name: values.get("channels") for name, values in edits.items()}
    repair_attributes(model, copy_of_attributes(model), lambda module: widths.get(module))
    for module, value, attribute in checked:
        setattr(module, attribute, value)
    for name, submodule in model.named_modules():
        if isinstance(submodule, nn.GroupNorm) and submodule.num_channels % submodule.num_groups:
            raise ValueError(
                f"attribute {name}.num_groups = {submodule.num_groups} does not divide its {submodule.num_channels} "
                "channels."
            )
    return model


def copy_of_attributes(model: nn.Module) -> nn.Module:
    """The same module tree over the same tensors: it remembers attributes while the original's are repaired."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _checked_edit(model: nn.Module, name: str, attribute: str, value: Any) -> tuple[nn.Module, int | tuple[int, ...]]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"module {name!r} is not in the network. Build the same dense network that the ticket was made from."
        ) from None
    adapter = adapter_of(module)
    if adapter is None or attribute not in adapter.names:
        raise ValueError(f"attribute {name}.{attribute} is not a width that a ticket may change.")
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(f"attribute {name}.{attribute} = {value!r} must be a positive integer or a list of them.")
    return module, cast("int | tuple[int, ...]", tuple(value) if isinstance(value, list | tuple) else value)
