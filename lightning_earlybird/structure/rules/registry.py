"""How rules are written down and found."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


Call = tuple[str, int]  # name of an operation, how many calls of it came before


class CallCounter:
    """Numbers the calls of each operation, so that runs of the same network can be laid side by side."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next(self, func: Any) -> Call:
        """The call of an operation that is about to be made."""
        name = func._schema.name.rpartition("::")[2]
        call = (name, self._counts[name])
        self._counts[name] += 1
        return call


@dataclass(frozen=True)
class Operation:
    """One call that the tracer has seen, with its result."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    call: Call = ("", 0)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        """Every tensor that the call returned."""
        return [leaf for leaf in tree_flatten(self.out)[0] if isinstance(leaf, Tensor)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Rule = Callable[["ChannelTracer", Operation], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the overload packets (``aten::name``) it understands."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find_rule(operation: Operation) -> Rule | None:
    """The rule of an operation by its name, with or without the underscore of in-place operations.

    Operations without a rule of their own that torch tags as element-wise have the rule ``"pointwise"``.
    """
    known = RULES.get(operation.name) or RULES.get(operation.name.rstrip("_"))
    if known is None and torch.Tag.pointwise in operation.func.tags:
        return RULES["pointwise"]
    return known


def freeze_all(tracer: "ChannelTracer", op: Operation, reason: str) -> None:
    """Freeze every channel that the operation touches; its result carries none."""
    for tensor in op.tensors():
        for axis in tracer.axes(tensor):
            tracer.couplings.freeze(axis, reason)
    for result in op.outputs():
        tracer.put(result, [])
