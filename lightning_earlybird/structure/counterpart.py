"""What a ticket computes from its own width, where the zeroed dense network would compute something else.

A mean over channels divides by how many there are, a softmax gives every channel a share, a norm's factor may be
computed from a shape. A ticket does all of that over the channels that it has. For a comparison, the zeroed dense
network must do the same: take its statistics over the channels that stay, and use the ticket's numbers. It still has to
find its own way through all weights, so that a slice in the wrong place shows as ever.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.attention import numbers_in
from lightning_earlybird.structure.plan import ChannelPlan
from lightning_earlybird.structure.rules import Call, CallCounter

Numbers = Mapping[Call, tuple[float, ...]]


class NumberRecord(TorchDispatchMode):
    """Notes the plain numbers in element-wise operations.

    Attributes:
        numbers: Call -> its numbers.
        from_data: Whether the network has read a real number out of a tensor: those are not a matter of widths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[Call, tuple[float, ...]] = {}
        self.from_data = False
        self._calls = CallCounter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._calls.next(func)
        self.from_data |= call[0] == "_local_scalar_dense" and args[0].is_floating_point()
        if torch.Tag.pointwise in func.tags:
            found = numbers_in(args, kwargs)
            if found:
                self.numbers[call] = found
        elif kwargs.get("scale") is not None:  # a fused attention
            self.numbers[call] = (float(kwargs["scale"]),)
        return func(*args, **kwargs)


class Counterpart(TorchDispatchMode):
    """Lets the zeroed dense network compute statistics and factors as its ticket does.

    Args:
        plan: The channel plan.
        mask: The ticket's mask.
        numbers: The ticket's numbers; only the plan's ``own_numbers`` are used.
    """

    def __init__(self, plan: ChannelPlan, mask: TicketMask, numbers: Numbers) -> None:
        super().__init__()
        kept = plan.kept(mask)
        self._statistics: dict[Call, list[tuple[int, Tensor]]] = {}
        for statistic in plan.statistics:
            stays = (statistic.ids < 0) | kept[statistic.ids.clamp_min(0)]
            if not bool(stays.all()):
                self._statistics.setdefault(statistic.call, []).append((statistic.dim, stays))
        self._numbers = {call: found for call, found in numbers.items() if call in plan.own_numbers}
        self._calls = CallCounter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._calls.next(func)
        if call in self._statistics:
            return self._among_those_that_stay(func, self._statistics[call], args, kwargs)
        if call in self._numbers and torch.Tag.pointwise in func.tags:
            args, kwargs = _with_numbers(args, kwargs, self._numbers[call])
        return func(*args, **kwargs)

    @staticmethod
    def _among_those_that_stay(func: Any, reduced: list[tuple[int, Tensor]], args: Any, kwargs: Any) -> Any:
        source: Tensor = args[0]
        places = []
        for dim, stays in reduced:
            index = _positions(stays, dim, source)
            if index is not None:
                source = source.gather(dim, index)
                places.append((dim, index))
        out = func(source, *args[1:], **kwargs)
        if "softmax" not in func._schema.name:
            return out
        for dim, index in places:  # no share for those that are gone
            out = torch.zeros_like(args[0]).scatter(dim, index, out)
        return out


def _positions(stays: Tensor, dim: int, source: Tensor) -> Tensor | None:
    """Where a source's channels stay along a dimension, shaped for ``gather``.

    None if they are not equally many everywhere or do not fit the source: then the comparison speaks for itself.
    """
    counts = stays.sum(dim)
    fits = stays.dim() == source.dim() and all(n in (1, m) for n, m in zip(stays.shape, source.shape, strict=True))
    if not fits or stays.shape[dim] != source.shape[dim] or int(counts.min()) != int(counts.max()):
        return None
    index = stays.to(torch.int8).argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, int(counts.max()))
    return index.to(source.device).expand([index.shape[dim] if d == dim else n for d, n in enumerate(source.shape)])


def _with_numbers(args: Any, kwargs: Any, numbers: tuple[float, ...]) -> tuple[Any, Any]:
    leaves, structure = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, int | float) and not isinstance(leaf, bool)]
    if len(places) != len(numbers):
        return args, kwargs
    for place, number in zip(places, numbers, strict=True):
        leaves[place] = number
    result: tuple[Any, Any] = tree_unflatten(leaves, structure)
    return result
