"""Layers that are one operation each: convolutions, embeddings and fused attention."""

from typing import TYPE_CHECKING

import torch

from lightning_earlybird.structure.labels import align
from lightning_earlybird.structure.rules.registry import Operation, freeze_all, rule

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


@rule("convolution", "_convolution")
def convolution(tracer: "ChannelTracer", op: Operation) -> None:
    """Dense, transposed and depthwise convolutions; other groupings are frozen."""
    source, weight, bias = op.args[:3]
    transposed, groups = op.args[6], op.args[8]
    tie, freeze = tracer.couplings.tie, tracer.couplings.freeze
    inputs = tracer.vector(weight, 0 if transposed else 1)
    outputs = tracer.vector(weight, 1 if transposed else 0)
    arriving = [axis.reshape(-1) for axis in tracer.along(source, keep=(1,), must=1)]
    tracer.freeze_others(source, (0, 1), "convolution across channels")
    # Channels folded into the batch, (B * C, 1, H, W), pass through.
    folded = [axis for axis in tracer.along(source, keep=(0,), must=0) if axis.shape[1] == 1]
    if groups == 1 and outputs is None and inputs is None and arriving and _is_diagonal(weight):
        outputs = arriving[0]
    elif groups == 1:
        if inputs is not None:
            for labels in arriving:
                tie(inputs, labels, "convolves an input without channels")
            if not arriving:
                freeze(inputs, "convolves an input without channels")
        else:
            for labels in arriving:
                freeze(labels, "convolved with a kernel that is not a parameter")
        if outputs is not None:
            tracer.couplings.produce(outputs)
    elif groups == source.shape[1] == op.out.shape[1] and outputs is not None and arriving:
        for labels in arriving:
            tie(outputs, labels, "depthwise convolution of an input without channels")
    elif groups == source.shape[1] == op.out.shape[1] and outputs is None and arriving:
        outputs = arriving[0]  # one fixed filter, repeated for every channel
    else:
        for touched in (inputs, outputs, *arriving):
            if touched is not None:
                freeze(touched, f"grouped convolution ({groups} groups)")
        outputs = None
    shift = tracer.vector(bias, 0) if bias is not None else None
    if shift is not None:
        tie(shift, outputs if outputs is not None else torch.zeros(1, dtype=torch.long), "bias of a frozen convolution")
    if outputs is not None:
        folded.append(outputs.view([-1 if d == 1 else 1 for d in range(op.out.dim())]))
    tracer.put(op.out, folded)


def _is_diagonal(kernel: torch.Tensor) -> bool:
    """Whether a kernel of (C, C, ...) sees one channel at a time: a depthwise convolution that is written out."""
    if kernel.shape[0] != kernel.shape[1]:
        return False
    apart = ~torch.eye(kernel.shape[0], dtype=torch.bool, device=kernel.device)
    return not bool(kernel[apart].any())


@rule("embedding")
def embedding(tracer: "ChannelTracer", op: Operation) -> None:
    """Rows of a table: the table's width becomes the last dimension."""
    outputs = tracer.vector(op.args[0], 1)
    if outputs is not None:
        tracer.couplings.produce(outputs)
        tracer.put(op.out, [align(outputs, op.out.dim())])


@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")
def attention(tracer: "ChannelTracer", op: Operation) -> None:
    """(B, H, N, D) queries, keys and values: the three share heads and width; the result is labelled as the values."""
    query, key, value = op.args[:3]
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    keep = (0, 1, 3)
    sides = [tracer.along(tensor, keep=keep, must=3) for tensor in (query, key, value)]
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    for tensor in (query, key, value):
        tracer.freeze_others(tensor, (3,), "attention across channels")
    tracer.record_fused_attention(op, query)
    for mask in op.tensors()[3:]:
        tracer.freeze_others(mask, (), "in an attention mask")
    if all(len(side) == 1 for side in sides) and same_heads and query.shape[3] == value.shape[3]:
        tracer.couplings.tie(sides[0][0], sides[1][0], "attention")
        tracer.couplings.tie(sides[0][0], sides[2][0], "attention")
        tracer.put(result, [sides[2][0]])
    else:
        freeze_all(tracer, op, "attention whose queries, keys and values do not have the same heads and width")
