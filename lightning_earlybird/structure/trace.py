"""Tracing: one forward pass of the denoiser becomes a channel plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_earlybird.structure.adapters import adapter_of
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, QueryScale, StructureError
from lightning_earlybird.structure.tracer import ChannelTracer, QueryWatch


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

    The network runs in evaluation mode without gradients; its mode and the random state are restored. Channels that
    reach the output, that come straight from an input, or that pass an operation without a rule are frozen.

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
        raise StructureError(
            "denoiser: parameters on the meta device cannot be traced. Materialise them first (for example in "
            "configure_model)."
        )
    tracer = ChannelTracer(model)
    hooks = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.input_dim is not None:
            hooks.append(module.register_forward_pre_hook(_watch_input(tracer, name, adapter.input_dim)))
    try:
        with undisturbed(model), QueryWatch(tracer), tracer:
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
        raise StructureError(
            f"denoiser: {type(model).__name__} has no channel that can be pruned. Reasons: {'; '.join(reasons[:5])}."
        )
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

    groups = _named_groups(
        list(members), [channel[torch.tensor(group)] for group in members.values()], tracer, produced, components
    )
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
    places: list[tuple[tuple[str, int], ...]],
    channels: list[Tensor],
    tracer: ChannelTracer,
    produced: Tensor,
    components: Tensor,
) -> list[ChannelGroup]:
    own = torch.zeros(tracer.couplings.count, dtype=torch.bool)
    own[torch.cat(tracer.couplings._produced)] = True
    groups: list[ChannelGroup] = []
    taken: dict[str, int] = {}
    for where, numbers in zip(places, channels, strict=True):
        name = next(
            (name for name, dim in where if bool(own[tracer.dimensions[name, dim]].any())), where[0][0]
        ).removesuffix(".weight")
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


def _frozen_report(
    tracer: ChannelTracer, components: Tensor, produced: Tensor, reasons: Mapping[int, str]
) -> tuple[FrozenChannels, ...]:
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
