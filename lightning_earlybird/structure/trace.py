"""Tracing: one forward pass of the denoiser becomes a channel plan."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.adapters import adapter_of
from lightning_earlybird.structure.assemble import assemble, query_scales
from lightning_earlybird.structure.counterpart import NumberRecord
from lightning_earlybird.structure.extract import extract
from lightning_earlybird.structure.heads import find_heads
from lightning_earlybird.structure.plan import ChannelPlan, StructureError
from lightning_earlybird.structure.preconditions import check_traceable, refuse_branches, remedy
from lightning_earlybird.structure.reads import ReadWatch
from lightning_earlybird.structure.rules import Call
from lightning_earlybird.structure.running import undisturbed
from lightning_earlybird.structure.tracer import ChannelTracer
from lightning_earlybird.structure.widths import WidthWatch


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
    try:
        tracer, out = traced(model, args, kwargs)
    except Exception:  # code that wants plain integers, or a network that raises anyway
        tracer, out = traced(model, args, kwargs, watch_widths=False)
    for leaf in tree_flatten(_plain(out))[0]:
        for axis in tracer.axes(leaf):
            tracer.couplings.freeze(axis, "the network's output")
    if tracer.reads.places and tracer.reads.unused:
        refuse_branches(model, args, kwargs, tracer.reads.places, set(tracer.reads.unused.values()))
    plan = replace(find_heads(model, assemble(tracer)), data_reads=tuple(tracer.reads.places))
    plan = _settle_attention_scales(model, plan, tracer, args, kwargs)
    if not plan.groups:
        reasons = sorted({entry.reason for entry in plan.frozen}) or ["no layer produces channels"]
        raise StructureError(
            f"denoiser: {type(model).__name__} has no channel that can be pruned. Reasons: {'; '.join(reasons[:5])}."
            f"{remedy(model)}"
        )
    return plan


def traced(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    watch_widths: bool = True,
    evaluate: bool = True,
) -> tuple[ChannelTracer, Any]:
    """One forward pass under the tracer, and its output; in evaluation mode, or in the modes that the network is in."""
    tracer = ChannelTracer(model, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    hooks = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.couples is not None:
            adapter.couples(tracer, name, module)
        if adapter is not None and adapter.input_dim is not None:
            hooks.append(module.register_forward_pre_hook(_watch_input(tracer, name, adapter.input_dim)))
    try:
        with (
            undisturbed(model, evaluate=evaluate),
            WidthWatch(tracer) if watch_widths else nullcontext(),
            ReadWatch(tracer),
            tracer,
        ):
            return tracer, model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _settle_attention_scales(
    model: nn.Module, plan: ChannelPlan, tracer: ChannelTracer, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ChannelPlan:
    """Find out which attentions that are written out scale their scores by a number that depends on the width.

    Networks are run with these attentions narrower, and their numbers compared with the dense network's.
    """
    open_questions = [attention for attention in tracer.attentions if attention.by_width is None and attention.scalars]
    candidates = query_scales(tracer, open_questions)
    channels = [plan.ids[each.tensor][each.dim] for each in candidates if each.dim in plan.ids.get(each.tensor, {})]
    if not channels:
        return plan
    group_of = plan.group_of_channel()
    concerned = sorted({int(group_of[ids[ids >= 0][0]]) for ids in channels})
    changed = _changed_numbers(model, plan, concerned, tracer, args, kwargs)
    if changed is None:  # one of them does not run: each by itself
        each_alone = [_changed_numbers(model, plan, [index], tracer, args, kwargs) for index in concerned]
        changed = {call for found in each_alone for call in found or ()}
    for attention in open_questions:
        attention.by_width = bool(attention.scalars & changed)
    by_width = [attention for attention in tracer.attentions if attention.by_width]
    return replace(plan, query_scales=query_scales(tracer, by_width))


def _changed_numbers(
    model: nn.Module,
    plan: ChannelPlan,
    groups: Sequence[int],
    tracer: ChannelTracer,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> set[Call] | None:
    """The calls whose numbers change when half of each row of some groups is gone; None if that does not run."""
    kept = plan.full_mask().state_dict()
    for index in groups:
        rows = kept[plan.groups[index].name].view(plan.groups[index].rows, -1)
        rows[:, max(1, rows.shape[1] // 2) :] = False
    record = NumberRecord()
    try:
        ticket = extract(model, plan, TicketMask(kept))
        with undisturbed(ticket), record:
            ticket(*args, **kwargs)
    except Exception:  # whatever user code raises on a narrower network
        return None
    return {call for call, numbers in tracer.numbers.items() if record.numbers.get(call) not in (None, numbers)}


def _watch_input(tracer: ChannelTracer, name: str, dim: int) -> Callable[[nn.Module, Any], None]:
    def watch(module: nn.Module, args: Any) -> None:
        if args:
            tracer.record_input(name, dim, args[0])

    return watch


def _plain(out: Any) -> Any:
    """Dataclass outputs as dictionaries, so that every tensor in them is found."""
    return dict(vars(out)) if hasattr(out, "__dataclass_fields__") else out
