"""Widths that a network reads off one tensor and gives to another.

``b, n, c = x.shape; h.reshape(b, n, c)`` makes the channels of ``h`` as many as those of ``x``. Operations on tensors
see plain integers there. So while a network is traced, the sizes that it asks for remember whose channels they count.
"""

from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from lightning_earlybird.structure.labels import varying
from lightning_earlybird.structure.tracer import ChannelTracer

SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
RESHAPES = frozenset([Tensor.reshape, torch.reshape, Tensor.view])
UNFLATTENS = frozenset([Tensor.unflatten, torch.unflatten])


class Width(int):
    """A number of channels, or a whole fraction of it.

    Attributes:
        labels: The channels that it counts.
        parts: How many times it is contained in their number.
    """

    labels: Tensor
    parts: int

    @classmethod
    def of(cls, labels: Tensor, parts: int = 1) -> "Width":
        """The number of these channels, divided by ``parts``."""
        width = cls(len(labels) // parts)
        width.labels, width.parts = labels, parts
        return width

    def __floordiv__(self, other: SupportsIndex) -> int:
        parts = self.parts * int(other) if int(other) > 0 else 0
        return Width.of(self.labels, parts) if parts and len(self.labels) % parts == 0 else int(self) // int(other)

    def __mul__(self, other: Any) -> Any:
        if type(other) is int and other > 0 and self.parts % other == 0:
            return Width.of(self.labels, self.parts // other)
        return int(self) * other

    __rmul__ = __mul__

    def __hash__(self) -> int:
        # What libraries remember by shape must not come back with the labels of another tensor.
        return hash((int(self), id(self.labels), self.parts))


class Shape(tuple[int, ...]):
    """A shape as a tuple: ``torch.Size`` keeps plain integers only."""

    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self).numel()


class WidthWatch(TorchFunctionMode):
    """Ties the channels of a reshaped tensor to those that its sizes were read from.

    Args:
        tracer: What knows the labels.
    """

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with self._tracer.aside():
            return self._noted(func, args, kwargs or {}, out)

    def _noted(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if func == SHAPE or func is Tensor.size:
            return self._sizes(args[0], out, args[1:], kwargs)
        sizes = tree_flatten((args[1:], kwargs))[0] if func in RESHAPES or func in UNFLATTENS else []
        if any(isinstance(size, Width) for size in sizes):
            first = 0
            if func in UNFLATTENS:
                first, sizes = int(sizes[0]) % args[0].dim(), sizes[1:]
            for dim, size in enumerate(sizes, start=first):
                if isinstance(size, Width):
                    self._tie(out, dim, size)
        return out

    def _sizes(self, tensor: Tensor, out: Any, args: Any, kwargs: Any) -> Any:
        axes = self._tracer.axes(tensor)
        if not axes:
            return out
        widths = [self._width(axes, dim, size) for dim, size in enumerate(tensor.size())]
        if isinstance(out, int):
            return widths[args[0] if args else kwargs["dim"]]
        return Shape(widths)

    def _width(self, axes: list[Tensor], dim: int, size: int) -> int:
        along = [axis for axis in axes if dim in varying(axis)]
        along = [axis if len(varying(axis)) == 1 else self._tracer.couplings.canonical(axis) for axis in along]
        along = [axis for axis in along if varying(axis) == (dim,)]
        return Width.of(along[0].reshape(-1)) if len(along) == 1 else size

    def _tie(self, out: Tensor, dim: int, width: Width) -> None:
        """Channel by channel in order, head by head; which of them go together is a free choice."""
        parts, each = width.parts, int(width)
        for axis in self._tracer.axes(out):
            # Queries, keys and values side by side count thrice.
            if axis.shape[dim] != each or len(axis.unique()) % len(width.labels):
                continue
            shape = [1] * axis.dim()
            shape[dim] = each
            counted = width.labels.view(parts, each)
            if parts > 1:
                heads = [d for d in varying(axis) if d < dim and axis.shape[d] % parts == 0]
                if not heads:
                    continue
                shape[heads[-1]] = axis.shape[heads[-1]]
                counted = counted.repeat(axis.shape[heads[-1]] // parts, 1)  # heads may be folded into the batch
            self._tracer.couplings.tie(axis, counted.reshape(shape), "as wide as another tensor")
