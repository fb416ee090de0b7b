"""A smaller call: the same operations on fewer pixels prove the same about channels, in less time."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_earlybird.structure.running import undisturbed

FACTORS = (4, 2)
ENOUGH = 64  # pixels; a call that small costs next to nothing as it is

Call = tuple[tuple[Any, ...], dict[str, Any]]


class OperationLog(TorchDispatchMode):
    """Writes down what a network computes: operations, the tensors of the network they read, shapes of the results.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[int, ...]]] = []
        self.shapes: list[tuple[int, ...]] = []
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = [name for name, _ in tensors]
        self._numbers = {id(tensor): number for number, (_, tensor) in enumerate(tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = (self._numbers.get(id(leaf)) for leaf in tree_leaves((args, kwargs)))
        self.operations.append((str(func), tuple(number for number in read if number is not None)))
        self.shapes += [tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def read(self) -> set[str]:
        """Names of the parameters and buffers that some operation has read."""
        return {self._names[number] for _, numbers in self.operations for number in numbers}

    def stands_for(self, other: "OperationLog") -> bool:
        """Whether this smaller run computed what the other one did, with no dimension shrunk to a single element.

        A softmax over one pixel, say, would hide everything that its scores depend on.
        """
        return (
            self.operations == other.operations
            and [len(shape) for shape in self.shapes] == [len(shape) for shape in other.shapes]
            and not any(
                mine == 1 and theirs > 1
                for small, large in zip(self.shapes, other.shapes, strict=True)
                for mine, theirs in zip(small, large, strict=True)
            )
        )


def crop(args: Sequence[Any], kwargs: Mapping[str, Any], factor: int) -> Call | None:
    """The call with height and width (or length, or depth too) of the sample divided by ``factor``.

    Other arguments of the same height and width (a mask, an image to condition on) are cropped alike.

    Returns:
        None where there are too few pixels, or a side is not a multiple.
    """
    sample = next((leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if _is_sample(leaf)), None)
    if sample is None:
        return None
    sides = tuple(sample.shape[2:])
    if math.prod(sides) <= ENOUGH or any(side % factor for side in sides):
        return None

    def cropped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < len(sides) or tuple(leaf.shape[-len(sides) :]) != sides:
            return leaf
        for dim, side in enumerate(sides, leaf.dim() - len(sides)):
            leaf = leaf.narrow(dim, 0, side // factor)
        return leaf.contiguous()

    return tree_map(cropped, tuple(args)), tree_map(cropped, dict(kwargs))


def _is_sample(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 2


def smallest_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The call on the fewest pixels on which the network computes the same operations; the call itself if need be."""
    whole = tuple(args), dict(kwargs)
    logs: dict[int, OperationLog] = {}
    for factor in FACTORS:
        smaller = crop(*whole, factor)
        if smaller is not None:
            with contextlib.suppress(Exception):  # not a network for any size
                for divisor, call in ((1, whole), (factor, smaller)):
                    if divisor not in logs:
                        log = OperationLog(model)
                        with undisturbed(model), log:
                            model(*call[0], **call[1])
                        logs[divisor] = log
                if logs[factor].stands_for(logs[1]):
                    return smaller
    return whole
