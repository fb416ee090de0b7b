"""The tracer: labels every tensor that a network computes, operation by operation."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_earlybird.structure.labels import Couplings, varying
from lightning_earlybird.structure.products import Product, products_of
from lightning_earlybird.structure.rules import CONTRACTIONS, RULES, Operation, find_rule, freeze_all


@dataclass
class _Labelled:
    """What the trace knows of one tensor."""

    axes: list[Tensor] = field(default_factory=list)
    parametric: bool = False  # a function of parameters only
    data: bool = False  # a function of inputs, parameters or chance
    scores: Tensor | None = None  # attention scores: the labels of the width that was contracted


# Their results have as many elements as the values of their operands say.
DATA_DEPENDENT_SHAPES = frozenset(["nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"])
NOT_THE_NETWORKS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))  # code of
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # of these, no operation is seen


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
        self.queries: list[Tensor] = []  # labels of attention queries, (heads, width)
        self.unknown: dict[str, int] = {}
        self.products: list[Product] = []  # the multiply-accumulates, by labels
        self.reads: dict[str, str] = {}  # where Python has read a value -> the module that did
        self.unused = {id(parameter): name for name, parameter in model.named_parameters()}
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._known: Any = WeakTensorKeyDictionary()
        for tensor in inputs:
            self._known[tensor] = _Labelled(data=True)
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        for name, tensor in [*model.named_parameters(), *buffers]:
            axes = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    labels = self.couplings.fresh(size)
                    self.dimensions[name, dim] = labels
                    axes.append(labels.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
            self._known[tensor] = _Labelled(axes, parametric=True, data=True)

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

    def set_scores(self, tensor: Tensor, labels: Tensor) -> None:
        """Remember that a tensor holds attention scores, contracted over these labels."""
        self._labelled(tensor).scores = labels

    def scores_of(self, tensor: Tensor) -> Tensor | None:
        """The labels over which attention scores were contracted."""
        known = self._known.get(tensor)
        return known.scores if known is not None else None

    def record_rows(self, matrix: Tensor) -> None:
        """Each row of this label matrix must keep equally many channels."""
        self.rows.append(matrix)

    def record_query(self, query: Tensor) -> None:
        """An attention that will divide by the square root of its query's width, (..., heads, N, width)."""
        last = query.dim() - 1
        heads = [last - 2] if query.dim() > 3 else []
        for axis in self.axes(query):
            if last in varying(axis):
                # Several layers may have made queries for different positions.
                rest = [dim for dim in range(query.dim()) if dim not in (*heads, last)]
                rows = axis.shape[heads[0]] if heads else 1
                self.queries += axis.permute(*rest, *heads, last).reshape(-1, rows, axis.shape[last]).unique(dim=0)

    def record_input(self, name: str, dim: int, value: Any) -> None:
        """The channels that a module with a width attribute receives."""
        if not isinstance(value, Tensor):
            return
        for axis in self.along(value, keep=(dim % value.dim(),), must=dim % value.dim()):
            labels = axis.reshape(-1)
            if name in self.inputs:
                self.couplings.tie(self.inputs[name], labels, "one module serves several widths")
            self.inputs.setdefault(name, labels)

    def record_read(self, tensors: Iterable[Tensor]) -> None:
        """Python learns values of these tensors, and may decide by them what to compute."""
        touched = [self._known[tensor] for tensor in tensors if tensor in self._known]
        if any(known.data for known in touched):
            module, place = self._place()
            self.reads[place] = module
            for known in touched:
                for axis in known.axes:
                    self.couplings.freeze(axis, f"Python code reads the values ({place})")

    def _place(self) -> tuple[str, str]:
        """The innermost module of the network whose code is running: its name, and that with file and line."""
        where = ""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(NOT_THE_NETWORKS):
                where = where or f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
                owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
                name = self._modules.get(id(owner)) if isinstance(owner, nn.Module) else None
                if name is not None:
                    return name, f"{repr(name) if name else type(owner).__name__}, {where}"
            frame = frame.f_back
        return "", where or "the network"

    # --- the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then label its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = Operation(func, func._schema.name.rpartition("::")[2], args, kwargs, out)
        inputs, results = operation.tensors(), operation.outputs()
        for tensor in inputs:
            self.unused.pop(id(tensor), None)
        if not results or operation.name in DATA_DEPENDENT_SHAPES:
            self.record_read(inputs)
        if torch.Tag.nondeterministic_seeded in func.tags or (
            RULES.get(operation.name) is not RULES["zeros_like"] and any(self._is_data(tensor) for tensor in inputs)
        ):
            for result in results:
                self._labelled(result).data = True
        if not results:
            return out
        if inputs and all(self.is_parametric(tensor) for tensor in inputs):
            for result in results:
                self._labelled(result).parametric = True
        if any(self.axes(tensor) for tensor in inputs):
            self._apply(operation)
        self.products += products_of(self, operation)
        scores = self.scores_of(inputs[0]) if inputs and operation.name not in CONTRACTIONS else None
        if scores is not None:
            # Scaled, masked, normalised or reshaped attention scores are still that.
            for result in results:
                if result.numel() == inputs[0].numel():
                    self.set_scores(result, scores)
        return out

    def _is_data(self, tensor: Tensor) -> bool:
        known = self._known.get(tensor)
        return known is not None and bool(known.data)

    def _apply(self, operation: Operation) -> None:
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


class QueryWatch(TorchFunctionMode):
    """Sees scaled_dot_product_attention before it is decomposed, while its scale can still be told.

    Also what reads a tensor without any operation.

    Args:
        tracer: Where the queries are recorded whose scale depends on their width, and what Python reads.
    """

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            self._tracer.record_query(args[0] if args else kwargs["query"])
        elif func in READS:
            self._tracer.record_read(args[:1])
        return func(*args, **kwargs)
