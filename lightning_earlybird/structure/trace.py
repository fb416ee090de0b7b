"""Tracing: one forward pass of the denoiser becomes a channel plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_earlybird.structure.adapters import adapter_of
from lightning_earlybird.structure.labels import Couplings, varying
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, QueryScale, StructureError
from lightning_earlybird.structure.rules import Operation, find_rule, freeze_all


@dataclass
class _Labelled:
    """What the trace knows of one tensor."""

    axes: list[Tensor] = field(default_factory=list)
    parametric: bool = False  # a function of parameters only
    scores: Tensor | None = None  # attention scores: the labels of the width that was contracted


class ChannelTracer(TorchDispatchMode):
    """Labels every tensor that the network computes while the mode is active.

    Args:
        model: The network; its parameters and floating-point buffers get labels along every dimension wider than 1.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.couplings = Couplings()
        self.dimensions: dict[tuple[str, int], Tensor] = {}  # (tensor name, dim) -> labels, in the model's order
        self.inputs: dict[str, Tensor] = {}  # module -> labels of its input's channel dimension
        self.rows: list[Tensor] = []  # label matrices whose rows must keep equally many
        self.queries: list[Tensor] = []  # labels of attention queries, (heads, width)
        self.unknown: dict[str, int] = {}
        self._known: Any = WeakTensorKeyDictionary()
        named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.is_floating_point() and b.numel() > 1)]
        for name, tensor in named:
            axes = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    labels = self.couplings.fresh(size)
                    self.dimensions[name, dim] = labels
                    axes.append(labels.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
            self._known[tensor] = _Labelled(axes, parametric=True)

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
        """The axes seen as functions of the dimensions ``keep`` only: labels that differ along any other dimension are tied.

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
        self._labelled(tensor).scores = torch.unique(labels) if labels.dim() > 1 else labels

    def scores_of(self, tensor: Tensor) -> Tensor | None:
        """The labels over which attention scores were contracted."""
        known = self._known.get(tensor)
        return known.scores if known is not None else None

    def inherit_scores(self, result: Any, source: Tensor) -> None:
        """A tensor computed element by element from attention scores is attention scores."""
        scores = self.scores_of(source)
        if scores is not None and isinstance(result, Tensor) and result.numel() == source.numel():
            self._labelled(result).scores = scores

    def record_rows(self, matrix: Tensor) -> None:
        """Each row of this label matrix must keep equally many channels."""
        self.rows.append(matrix)

    def record_query(self, query: Tensor) -> None:
        """An attention that will divide by the square root of its query's width, (B, heads, N, width)."""
        for axis in self.along(query, keep=(1, 3), must=3):
            if axis.shape[1] in (1, query.shape[1]):
                self.queries.append(axis.reshape(axis.shape[1], axis.shape[3]))

    def record_input(self, name: str, dim: int, value: Any) -> None:
        """The channels that a module with a width attribute receives."""
        if not isinstance(value, Tensor):
            return
        for axis in self.along(value, keep=(dim % value.dim(),), must=dim % value.dim()):
            labels = axis.reshape(-1)
            if name in self.inputs:
                self.couplings.tie(self.inputs[name], labels, "one module serves several widths")
            self.inputs.setdefault(name, labels)

    # --- the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then label its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = Operation(func, func._schema.name.rpartition("::")[2], args, kwargs, out)
        inputs = operation.tensors()
        if inputs and all(self.is_parametric(tensor) for tensor in inputs):
            for result in operation.outputs():
                self._labelled(result).parametric = True
        if any(self.axes(tensor) for tensor in inputs):
            self._apply(operation)
        if inputs and self.scores_of(inputs[0]) is not None:
            for result in operation.outputs():
                self.inherit_scores(result, inputs[0])
        return out

    def _apply(self, operation: Operation) -> None:
        applicable = find_rule(operation)
        if applicable is None:
            self.unknown[operation.name] = self.unknown.get(operation.name, 0) + 1
            freeze_all(self, operation, f"no rule for the operation {operation.name}")
        else:
            applicable(self, operation)

    def _labelled(self, tensor: Tensor) -> _Labelled:
        known = self._known.get(tensor)
        if known is None:
            known = self._known[tensor] = _Labelled()
        return known  # type: ignore[no-any-return]


class _QueryWatch(TorchFunctionMode):
    """Sees scaled_dot_product_attention before it is decomposed, while it can still be told whether the scale depends on the width."""

    def __init__(self, tracer: ChannelTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            self._tracer.record_query(args[0] if args else kwargs["query"])
        return func(*args, **kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are as before afterwards."""
    training = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def trace_plan(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> ChannelPlan:
    """Run the network once and read off how its tensors depend on its channels.

    The network runs in evaluation mode without gradients; its mode and the random state are restored. Channels that reach the output, that come straight
    from an input, or that pass an operation without a rule are frozen.

    Args:
        model: The denoiser, not compiled and not wrapped.
        args: Positional arguments of one call; a single sample is enough.
        kwargs: Keyword arguments of that call.

    Returns:
        The plan; it has not been verified yet (see ``verify_plan``).

    Raises:
        StructureError: The network has parameters on the meta device, or no channel of it can be pruned.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise StructureError("denoiser: parameters on the meta device cannot be traced. Materialise them first (for example in configure_model).")
    tracer = ChannelTracer(model)
    hooks = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.input_dim is not None:
            hooks.append(module.register_forward_pre_hook(_watch_input(tracer, name, adapter.input_dim)))
    try:
        with undisturbed(model), _QueryWatch(tracer), tracer:
            out = model(*args, **(kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    for leaf in tree_flatten(_plain(out))[0]:
        for axis in tracer.axes(leaf):
            tracer.couplings.freeze(axis, "the network's output")
    plan = _assemble(tracer)
    if not plan.groups:
        reasons = sorted({entry.reason for entry in plan.frozen}) or ["no layer produces channels"]
        raise StructureError(f"denoiser: {type(model).__name__} has no channel that can be pruned. Reasons: {'; '.join(reasons[:5])}.")
    return plan


def _watch_input(tracer: ChannelTracer, name: str, dim: int) -> Callable[[nn.Module, Any], None]:
    def watch(module: nn.Module, args: Any) -> None:
        if args:
            tracer.record_input(name, dim, args[0])

    return watch


def _plain(out: Any) -> Any:
    """Dataclass outputs as dictionaries, so that every tensor in them is found."""
    return dict(vars(out)) if hasattr(out, "__dataclass_fields__") else out


def _assemble(tracer: ChannelTracer) -> ChannelPlan:
    """Number the prunable components and write down where each of them lives."""
    components = tracer.couplings.components()
    produced = tracer.couplings.produced(components)
    reasons = tracer.couplings.frozen_reasons(components)
    frozen = torch.zeros_like(produced)
    frozen[list(reasons)] = True

    places: dict[int, list[tuple[str, int]]] = {}  # component -> where its labels occur
    for place, labels in tracer.dimensions.items():
        for component in torch.unique(components[labels]).tolist():
            if bool(produced[component]) and not bool(frozen[component]):
                places.setdefault(component, []).append(place)

    members: dict[tuple[tuple[str, int], ...], list[int]] = {}  # channels that live in the same places form a group
    for component in sorted(places):
        members.setdefault(tuple(places[component]), []).append(component)

    channel = torch.full((tracer.couplings.count,), -1, dtype=torch.long)
    for number, component in enumerate(component for group in members.values() for component in group):
        channel[component] = number
    ids_of = lambda labels: channel[components[labels]]  # noqa: E731

    ids: dict[str, dict[int, Tensor]] = {}
    for (name, dim), labels in tracer.dimensions.items():
        numbers = ids_of(labels)
        if bool((numbers >= 0).any()):
            ids.setdefault(name, {})[dim] = numbers

    groups = _named_groups(list(members), [channel[torch.tensor(group)] for group in members.values()], tracer, produced, components)
    groups = [_with_rows(group, [ids_of(matrix) for matrix in tracer.rows]) for group in groups]
    return ChannelPlan(
        ids=ids,
        groups=tuple(groups),
        inputs={name: ids_of(labels) for name, labels in tracer.inputs.items()},
        frozen=_frozen_report(tracer, components, produced, reasons),
        unknown_operations=dict(tracer.unknown),
        query_scales=_query_scales(tracer),
    )


def _named_groups(
    places: list[tuple[tuple[str, int], ...]], channels: list[Tensor], tracer: ChannelTracer, produced: Tensor, components: Tensor
) -> list[ChannelGroup]:
    own = torch.zeros(tracer.couplings.count, dtype=torch.bool)
    own[torch.cat(tracer.couplings._produced)] = True
    groups: list[ChannelGroup] = []
    taken: dict[str, int] = {}
    for where, numbers in zip(places, channels, strict=True):
        name = next((name for name, dim in where if bool(own[tracer.dimensions[name, dim]].any())), where[0][0]).removesuffix(".weight")
        taken[name] = taken.get(name, 0) + 1
        groups.append(ChannelGroup(name if taken[name] == 1 else f"{name}#{taken[name]}", numbers))
    return groups


def _with_rows(group: ChannelGroup, matrices: list[Tensor]) -> ChannelGroup:
    """Order the group by the finest split into heads that covers it."""
    own = set(group.channels.tolist())
    best = group
    for matrix in matrices:
        flat = matrix.flatten()
        if matrix.shape[0] > best.rows and len(flat) == len(own) and set(flat.tolist()) == own:
            best = ChannelGroup(group.name, flat, rows=matrix.shape[0])
    return best


def _frozen_report(tracer: ChannelTracer, components: Tensor, produced: Tensor, reasons: Mapping[int, str]) -> tuple[FrozenChannels, ...]:
    """One entry for every layer output (first dimension of a weight) that is produced but frozen."""
    report = []
    for (name, dim), labels in tracer.dimensions.items():
        found = [reasons[c] for c in components[labels].tolist() if c in reasons and bool(produced[c])]
        if dim == 0 and name.endswith("weight") and found:
            report.append(FrozenChannels(name.removesuffix(".weight"), len(found), found[0]))
    return tuple(report)


def _query_scales(tracer: ChannelTracer) -> tuple[QueryScale, ...]:
    """Find the weight rows that made each query: labels keep the identity of the parameter that produced them."""
    scales: dict[tuple[str, int], QueryScale] = {}
    for matrix in tracer.queries:
        for (name, dim), labels in tracer.dimensions.items():
            start, stop = int(labels[0]), int(labels[-1])
            if bool(((matrix >= start) & (matrix <= stop)).all()):
                scales[name, dim] = QueryScale(name, dim, matrix - start)
                bias = name.removesuffix("weight") + "bias"
                if name.endswith("weight") and (bias, 0) in tracer.dimensions:
                    scales[bias, 0] = QueryScale(bias, 0, matrix - start)
    return tuple(scales.values())
