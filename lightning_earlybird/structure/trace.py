"""Tracing: one forward pass of the denoiser becomes a channel plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_earlybird.structure.adapters import adapter_of
from lightning_earlybird.structure.assemble import assemble
from lightning_earlybird.structure.heads import find_heads
from lightning_earlybird.structure.plan import ChannelPlan, StructureError
from lightning_earlybird.structure.preconditions import check_traceable, refuse_branches, remedy
from lightning_earlybird.structure.running import undisturbed
from lightning_earlybird.structure.tracer import ChannelTracer, QueryWatch


@torch.inference_mode(False)
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
        StructureError: The network is of a kind that cannot be traced, decides by the values of its inputs which layers
            to use, or no channel of it can be pruned.
    """
    check_traceable(model)
    kwargs = kwargs or {}
    tracer = ChannelTracer(model, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    hooks = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.input_dim is not None:
            hooks.append(module.register_forward_pre_hook(_watch_input(tracer, name, adapter.input_dim)))
    try:
        with undisturbed(model), QueryWatch(tracer), tracer:
            out = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for leaf in tree_flatten(_plain(out))[0]:
        for axis in tracer.axes(leaf):
            tracer.couplings.freeze(axis, "the network's output")
    if tracer.reads and tracer.unused:
        refuse_branches(model, args, kwargs, tracer.reads, set(tracer.unused.values()))
    plan = replace(find_heads(model, assemble(tracer)), data_reads=tuple(tracer.reads))
    if not plan.groups:
        reasons = sorted({entry.reason for entry in plan.frozen}) or ["no layer produces channels"]
        raise StructureError(
            f"denoiser: {type(model).__name__} has no channel that can be pruned. Reasons: {'; '.join(reasons[:5])}."
            f"{remedy(model)}"
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
