"""What verification compares with, and under which conditions."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan

ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


def zeroed(model: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy of the dense network in which every slice that the mask removes is zero."""
    result = copy.deepcopy(model)
    tensors = _tensors_by_name(result)
    with torch.no_grad():
        for name, dims in plan.keep_indices(mask).items():
            for dim, keep in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool, device=tensors[name].device)
                gone[keep.to(gone.device)] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return result


def at_least(dtype: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """The type to compute with in place of ``dtype``: not less precise, and of the same kind."""
    return torch.promote_types(dtype, precision) if dtype.is_floating_point or dtype.is_complex else dtype


def randomised(model: nn.Module, moved: Callable[[Tensor], Tensor], generator: torch.Generator) -> nn.Module:
    """A copy with random weights, ready to be trained.

    The weights are a little larger than what keeps activations at their size, and biases smaller: what happens deep
    inside must not drown on its way to the output, nor grow so much that rounding does the same.

    Args:
        model: The network.
        moved: Copies one tensor to the device and the type that are wanted. (``nn.Module.to`` would copy everything on
            the model's device first, and some networks have ideas of their own about it.)
        generator: Draws the weights.
    """
    memo: dict[int, Any] = {}  # deepcopy finds the tensors here
    for tensor in [*model.parameters(), *model.buffers()]:
        new = moved(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    result: nn.Module = copy.deepcopy(model, memo)
    for parameter in result.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
                else:
                    parameter.copy_(0.3 * noise if name.endswith("bias") else 1.0 + 0.1 * noise)
    return result


def permute_(model: nn.Module, plan: ChannelPlan, groups: Iterable[ChannelGroup], generator: torch.Generator) -> None:
    """Let the channels of ``groups`` change places, wherever the plan says that they live; in place.

    The channels of each row of a group (each attention head) move on by one, in a random order. Only channels that live
    equally often in every place change places with each other. Such a network computes the same, or the plan is wrong;
    unlike a mask, this tells any two channels apart.
    """
    kinds = torch.zeros(plan.num_channels, dtype=torch.long)  # how often a channel lives in each place, as one number
    for dims in plan.ids.values():
        for ids in dims.values():
            weight = int(torch.randint(1, 2**31, (1,), generator=generator))
            kinds += weight * torch.bincount(ids[ids >= 0], minlength=plan.num_channels)
    successor = torch.arange(plan.num_channels)
    for group in groups:
        for row in group.channels.view(group.rows, -1):
            for kind in kinds[row].unique():
                alike = row[kinds[row] == kind]
                cycle_of = alike[torch.randperm(len(alike), generator=generator)]
                successor[cycle_of] = cycle_of.roll(1)
    tensors = _tensors_by_name(model)
    with torch.no_grad():
        for name, dims in plan.ids.items():
            for dim, ids in dims.items():
                wanted = torch.where(ids < 0, ids, successor[ids.clamp_min(0)])
                if not torch.equal(wanted, ids):
                    # Where a channel lives several times, its first place goes to the first of the other, and so on.
                    source = torch.empty_like(ids)
                    source[wanted.argsort(stable=True)] = ids.argsort(stable=True)
                    tensor = tensors[name]
                    tensor.copy_(tensor.index_select(dim, source.to(tensor.device)))


def complementary_masks(
    plan: ChannelPlan, groups: Iterable[ChannelGroup], generator: torch.Generator, *, coprime: bool = True
) -> tuple[TicketMask, TicketMask]:
    """The first removes a random share of each of ``groups`` at random positions, the second what the first keeps.

    Shares differ between groups of the same width as far as they can: what works at equal ratios only must not pass.
    Each is at least about a quarter. All other groups stay whole, and so do rows of a single channel.

    Args:
        plan: The plan.
        groups: The groups that lose channels.
        generator: Draws shares and positions.
        coprime: Keep numbers that share no divisor with the width: code that splits a width into equal parts which the
            plan does not know of cannot work then.
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
                # One channel alone would be broadcast where it does not fit.
                least = max(1 if coprime or width < 4 else 2, width // 4)
                numbers = [
                    number for number in range(least, width - least + 1) if not coprime or math.gcd(number, width) == 1
                ]
                shares[width] = cycle([numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()])
            rank = torch.rand(group.rows, width, generator=generator).argsort(dim=1)
            stays = rank < next(shares[width])
            if group.rows > 1 and bool((stays == stays[:1]).all()):
                stays[1::2] = stays[1::2].roll(1, dims=1)  # rows that keep the same positions could be mixed up unseen
            goes = ~stays
        first[group.name], second[group.name] = stays.flatten(), goes.flatten()
    return TicketMask(first), TicketMask(second)


def limited(mask: TicketMask, groups: Iterable[ChannelGroup]) -> TicketMask:
    """The mask with every group whole but ``groups``."""
    chosen = {group.name for group in groups}
    return TicketMask({name: kept if name in chosen else torch.ones_like(kept) for name, kept in mask.kept.items()})


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


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


class _Unrounded(TorchDispatchMode):
    """Whatever asks for a lower precision gets the double one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("dtype") in ROUNDED:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **(kwargs or {}))


@contextmanager
def unrounded() -> Iterator[None]:
    """Nothing is rounded on the way through a network in double precision.

    It may compute its attention in float32 whatever the rest is in, or make its time embedding in the default type.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Unrounded():
            yield
    finally:
        torch.set_default_dtype(default)


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
