"""The tracer: labels every tensor that a network computes, operation by operation."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_earlybird.structure.attention import TracedAttention, numbers_in, query_rows
from lightning_earlybird.structure.labels import Couplings, varying
from lightning_earlybird.structure.products import Product, products_of
from lightning_earlybird.structure.reads import DataReads
from lightning_earlybird.structure.rules import (
    CONTRACTIONS,
    MOVEMENTS,
    Call,
    CallCounter,
    Operation,
    find_rule,
    freeze_all,
)

# What scales a tensor, and what a norm computes its factor with: whatever else happens to a statistic, it is no norm's.
SCALINGS = frozenset(["mul", "div", "neg"])
STATISTICAL_ALGEBRA = SCALINGS.union(
    ["add", "sub", "rsub", "sqrt", "rsqrt", "reciprocal", "pow", "square", "abs", "_to_copy"],
    ["clamp", "clamp_min", "clamp_max", "maximum", "minimum"],
)


@dataclass
class _Labelled:
    """What the trace knows of one tensor."""

    axes: list[Tensor] = field(default_factory=list)
    parametric: bool = False  # a function of parameters only
    plain: bool = False  # a parameter, or the elements of one in other places
    scores: TracedAttention | None = None  # it holds the scores of this attention
    scalars: frozenset[Call] = frozenset()  # calls that have scaled it by a number since it left its layer
    statistic: bool = False  # a statistic over channels
    normalised: bool = False  # divided by one, without a gain since: how its layer scales it does not matter
    unit: bool = False  # divided by one, and scaled at most by parameters and numbers since
    weights: frozenset[Call] = frozenset()  # calls that have scaled it by a number, with nothing else in between


class ChannelTracer(TorchDispatchMode):
    """Labels every tensor that the network computes while the mode is active.

    Args:
        model: The network; its parameters and floating-point buffers get labels along every dimension wider than 1.
        inputs: The tensors of the call.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.couplings = Couplings()
        self.dimensions: dict[tuple[str, int], Tensor] = {}  # (tensor name, dim) -> labels, in the model's order
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.inputs: dict[str, Tensor] = {}  # module -> labels of its input's channel dimension
        self.rows: list[Tensor] = []  # label matrices whose rows must keep equally many
        self.attentions: list[TracedAttention] = []
        self.statistics: list[tuple[Call, int, Tensor]] = []  # call, reduced dimension, axis along it
        self.numbers: dict[Call, tuple[float, ...]] = {}  # the plain numbers in element-wise operations
        self.own_numbers: set[Call] = set()  # calls whose numbers a ticket computes from its own widths
        self.unknown: dict[str, int] = {}
        self.products: list[Product] = []  # the multiply-accumulates, by labels
        self.reads = DataReads(model, inputs)
        self._calls = CallCounter()
        self._picked: dict[int, Tensor] = {}  # label of a channel that was picked -> labels among which it was
        self._aside = False
        self._known: Any = WeakTensorKeyDictionary()
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        for name, tensor in [*model.named_parameters(), *buffers]:
            axes = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    labels = self.couplings.fresh(size)
                    self.dimensions[name, dim] = labels
                    axes.append(labels.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
            self._known[tensor] = _Labelled(axes, parametric=True, plain=True)

    # --- what rules read and write

    def axes(self, tensor: Any) -> list[Tensor]:
        """The axes of a tensor; empty where it carries no channels."""
        known = self._known.get(tensor) if isinstance(tensor, Tensor) else None
        return known.axes if known is not None else []

    def put(self, tensor: Any, axes: Sequence[Tensor]) -> None:
        """Give a result its axes; axes without any channel are dropped."""
        if isinstance(tensor, Tensor):
            self._labelled(tensor).axes = [axis for axis in axes if bool((axis != 0).any())]

    def along(self, tensor: Tensor, keep: Sequence[int], must: int | None = None) -> list[Tensor]:
        """The axes as functions of the dimensions ``keep`` only: labels that differ along any other one are tied.

        With ``must``, only axes that vary along that dimension.
        """
        result = []
        for axis in self.axes(tensor):
            dims = varying(axis)
            if (must is not None and must not in dims) or not any(dim in keep for dim in dims):
                continue
            for dim in dims:
                if dim not in keep:
                    first = axis.narrow(dim, 0, 1)
                    self.couplings.tie(axis, first, "different channels meet in one position")
                    axis = first
            result.append(axis)
        return result

    def finest(self, axes: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """The axes of something that meets channels spread over ``dims``, (heads, width) say, without those of heads.

        Every head keeps some of its channels: a parameter that has one element a head stays whole, and one of (heads,
        width) can be cut along the width, alike in all heads.
        """
        result = []
        for axis in axes:
            if set(varying(axis)) < set(dims) and max(dims) not in varying(axis):
                self.couplings.freeze(axis, "one element for each head")
            else:
                result.append(axis)
        return result

    def weigh(self, piece: Tensor) -> None:
        """A piece of a concatenation; the numbers that scaled it may weigh it by its width against the others."""
        known = self._known.get(piece)
        if known is not None:
            self.own_numbers |= known.weights

    def pick(self, channel: Tensor, among: Tensor) -> None:
        """One channel is taken out by its position; that matters as soon as it is used."""
        self._picked[int(channel.reshape(-1)[0])] = among

    def freeze_others(self, tensor: Tensor, dims: Iterable[int], reason: str) -> None:
        """Freeze the axes that vary, but along none of ``dims``: what follows does not know them."""
        for axis in self.axes(tensor):
            if varying(axis) and not set(varying(axis)) & set(dims):
                self.couplings.freeze(axis, reason)

    def vector(self, tensor: Tensor, dim: int) -> Tensor | None:
        """The labels along one dimension of a parameter or of something computed from parameters, shape (size,)."""
        found = self.along(tensor, keep=(dim,), must=dim)
        return found[0].reshape(-1) if found else None

    def is_parametric(self, tensor: Tensor) -> bool:
        """Whether the tensor is computed from parameters alone."""
        known = self._known.get(tensor)
        return known is not None and bool(known.parametric)

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter or buffer, however it is viewed."""
        known = self._known.get(tensor)
        return known is not None and bool(known.plain)

    def record_scores(self, tensor: Tensor, labels: Tensor, query: Tensor, operands: Sequence[Tensor]) -> None:
        """Remember that a tensor holds attention scores.

        Args:
            tensor: The scores.
            labels: What they were contracted over, without repetition.
            query: The labels of the query, (..., width).
            operands: Queries and keys.
        """
        attention = TracedAttention(labels, query_rows(query))
        self._labelled(tensor).scores = attention
        if not self._labelled(operands[0]).normalised:  # otherwise its factor is the ticket's own
            for operand in operands:
                attention.scalars |= self._labelled(operand).scalars
            self.attentions.append(attention)

    def scores_of(self, tensor: Tensor) -> Tensor | None:
        """The labels over which attention scores were contracted."""
        known = self._known.get(tensor)
        return known.scores.labels if known is not None and known.scores is not None else None

    def record_rows(self, matrix: Tensor) -> None:
        """Each row of this label matrix must keep equally many channels."""
        self.rows.append(matrix)

    def record_statistic(self, op: Operation, dim: int, axis: Tensor) -> None:
        """An operation that reduces a dimension which is labelled: among the channels that stay, in a ticket."""
        self.statistics.append((op.call, dim, axis))
        for result in op.outputs():
            self._labelled(result).statistic = result.dim() < op.args[0].dim() or result.shape[dim] == 1

    def record_fused_attention(self, op: Operation, query: Tensor) -> None:
        """An attention in one operation, of a query (B, heads, N, width)."""
        for axis in self.axes(query):
            if query.dim() - 1 in varying(axis):
                attention = TracedAttention(axis.reshape(-1), query_rows(axis))
                if op.kwargs.get("scale") is None:
                    attention.by_width = True
                else:
                    attention.scalars = {op.call, *self._labelled(query).scalars}
                    self.numbers[op.call] = (float(op.kwargs["scale"]),)
                self.attentions.append(attention)

    def record_input(self, name: str, dim: int, value: Any) -> None:
        """The channels that a module with a width attribute receives."""
        if not isinstance(value, Tensor):
            return
        with self.aside():
            for axis in self.along(value, keep=(dim % value.dim(),), must=dim % value.dim()):
                labels = axis.reshape(-1)
                if name in self.inputs:
                    self.couplings.tie(self.inputs[name], labels, "one module serves several widths")
                self.inputs.setdefault(name, labels)

    def record_read(self, tensors: Sequence[Tensor]) -> None:
        """Python learns values of these tensors, and may decide by them what to compute."""
        self._freeze_read(self.reads.read(tensors), tensors)

    def _freeze_read(self, place: str | None, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors if place is not None else ():
            for axis in self.axes(tensor):
                self.couplings.freeze(axis, f"Python code reads the values ({place})")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Arithmetic on labels between the network's operations, which is none of them."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    # --- the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then label its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._aside:
            return out
        call = self._calls.next(func)
        name = call[0]
        operation = Operation(func, name, args, kwargs, out, call)
        inputs = operation.tensors()
        self._freeze_read(self.reads.observe(operation), inputs)
        if not operation.outputs():
            return out
        if inputs and all(self.is_parametric(tensor) for tensor in inputs):
            for result in operation.outputs():
                labelled = self._labelled(result)
                labelled.parametric = True
                labelled.plain = name in MOVEMENTS and self.is_parameter(inputs[0])
        scalars = self._follow_scalars(operation, inputs)
        if any(self.axes(tensor) for tensor in inputs):
            self._apply(operation)
        self.products += products_of(self, operation)
        known = self._known.get(inputs[0]) if inputs and name not in CONTRACTIONS else None
        if known is not None and known.scores is not None:
            # Scaled, masked, normalised or reshaped attention scores are still that.
            known.scores.scalars |= scalars
            for result in operation.outputs():
                if result.numel() == inputs[0].numel():
                    self._labelled(result).scores = known.scores
        return out

    def _follow_scalars(self, operation: Operation, inputs: Sequence[Tensor]) -> frozenset[Call]:
        """Which calls have scaled the result by a number since it left its layer; this one included."""
        pointwise = torch.Tag.pointwise in operation.func.tags
        numbers = numbers_in(operation.args, operation.kwargs) if pointwise else ()
        if numbers:
            self.numbers[operation.call] = numbers
        if not pointwise and operation.name not in MOVEMENTS:
            return frozenset()
        scalars = frozenset([operation.call] if numbers else [])
        operands = [known for known in map(self._known.get, inputs) if known is not None]
        for known in operands:
            scalars |= known.scalars
        name = operation.name.rstrip("_")
        scales = name in SCALINGS or not pointwise
        weights = frozenset([operation.call] if numbers else []).union(*(known.weights for known in operands))
        statistic = name in STATISTICAL_ALGEBRA | MOVEMENTS and any(known.statistic for known in operands)
        mixed = any(known.axes and not known.statistic for known in operands)
        normalises, statistic = statistic and scales and mixed, statistic and not mixed
        gained = any(known.plain and known.axes for known in operands)
        normalised = normalises or (any(known.normalised for known in operands) and not gained)
        unit = normalises or (
            scales
            and any(known.unit for known in operands)
            and all(known.unit or known.parametric for known in operands)
        )
        if numbers and (statistic or unit):
            self.own_numbers.add(operation.call)  # the factor of a norm, so that its result does not depend on widths
        for known in operands if unit else ():
            self.own_numbers |= known.scalars if known.parametric else frozenset()  # a gain with that factor in it
        if scalars or statistic or unit:
            for labelled in map(self._labelled, operation.outputs()):
                labelled.scalars = frozenset() if normalises else scalars
                labelled.statistic, labelled.normalised = statistic, normalised
                labelled.unit = unit
                labelled.weights = weights if scales else frozenset()
        return scalars

    def _apply(self, operation: Operation) -> None:
        for tensor in operation.tensors():
            if any(not varying(axis) for axis in self.axes(tensor)):
                for axis in self.axes(tensor):
                    if not varying(axis):
                        # Its position must not change, so none of its neighbours can go.
                        beside = self._picked.get(int(axis.reshape(-1)[0]), axis)
                        self.couplings.freeze(beside, "one channel is picked by its position")
                self.put(tensor, [axis for axis in self.axes(tensor) if varying(axis)])
        applicable = find_rule(operation)
        if applicable is None:
            self.unknown[operation.name] = self.unknown.get(operation.name, 0) + 1
            freeze_all(self, operation, f"no rule for the operation {operation.name}")
        else:
            applicable(self, operation)

    def _labelled(self, tensor: Tensor) -> _Labelled:
        known: _Labelled | None = self._known.get(tensor)
        if known is None:
            known = self._known[tensor] = _Labelled()
        return known
