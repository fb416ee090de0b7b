"""What verification compares with, and under which conditions."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan

HALF_PRECISION = (torch.float16, torch.bfloat16)


def zeroed(model: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy of the dense network in which every slice that the mask removes is zero."""
    result = copy.deepcopy(model)
    tensors = {
        **dict(result.named_parameters(remove_duplicate=False)),
        **dict(result.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, dims in plan.keep_indices(mask).items():
            for dim, keep in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool, device=tensors[name].device)
                gone[keep.to(gone.device)] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return result


def randomised(model: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A copy in at least float32 with random weights, ready to be trained.

    The weights are a little larger than what keeps activations at their size, and biases smaller: what happens deep
    inside must not drown on its way to the output, nor grow so much that rounding does the same.
    """
    memo: dict[int, Any] = {}  # deepcopy finds the tensors here: nothing is copied twice, nor on the model's device
    for tensor in [*model.parameters(), *model.buffers()]:
        dtype = torch.float32 if tensor.dtype in HALF_PRECISION else tensor.dtype
        moved = tensor.detach().to(device, dtype, copy=True)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=moved.is_floating_point() or moved.is_complex())
        else:
            memo[id(tensor)] = moved
    result: nn.Module = copy.deepcopy(model, memo)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
                else:
                    parameter.copy_(0.3 * noise if name.endswith("bias") else 1.0 + 0.1 * noise)
    return result


def complementary_masks(
    plan: ChannelPlan, groups: Iterable[ChannelGroup], generator: torch.Generator
) -> tuple[TicketMask, TicketMask]:
    """The first removes a random share of each of ``groups`` at random positions, the second what the first keeps.

    Shares differ between groups of the same width as far as they can: what works at equal ratios only must not pass.
    Each is at least about a quarter. All other groups stay whole, and so do rows of a single channel.
    """
    chosen = {group.name for group in groups}
    shares: dict[int, Iterator[int]] = {}  # width -> numbers to keep
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for group in plan.groups:
        width = group.size // group.rows
        stays = goes = torch.ones(group.rows, width, dtype=torch.bool)
        if group.name in chosen and width > 1:
            if width not in shares:
                least = max(1, width // 4)
                shares[width] = cycle((torch.randperm(width + 1 - 2 * least, generator=generator) + least).tolist())
            rank = torch.rand(group.rows, width, generator=generator).argsort(dim=1)
            stays = rank < next(shares[width])
            goes = ~stays
        first[group.name], second[group.name] = stays.flatten(), goes.flatten()
    return TicketMask(first), TicketMask(second)


class ChannelLocalNorms(TorchDispatchMode):
    """Replaces statistics over several channels by a bounded function of each channel alone.

    Zeroed channels take part in a dense normalisation and missing ones do not: without this, two correct networks would
    differ.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name == "native_group_norm":
            return self._bounded(args[0], args[1], args[2], dim=1)
        if name == "native_layer_norm":
            return self._bounded(args[0], args[2], args[3], dim=args[0].dim() - 1)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _bounded(source: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = [-1 if d == dim else 1 for d in range(source.dim())]
        result = nn.functional.softsign(4 * source)  # steep, so that small differences do not fade layer by layer
        if weight is not None:
            result = result * weight.view(shape)
        if bias is not None:
            result = result + bias.view(shape)
        return result, source.new_zeros(1), source.new_zeros(1)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, whatever precision was given up for speed."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set through both of PyTorch's interfaces; not ours to disentangle
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
