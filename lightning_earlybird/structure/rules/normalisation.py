"""Normalisation: scales and shifts follow what they normalise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_earlybird.structure.labels import varying
from lightning_earlybird.structure.rules.registry import Operation, freeze_all, rule

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


def _normalise(tracer: "ChannelTracer", op: Operation, dim: int, parameters: Sequence[Any]) -> None:
    source = op.args[0]
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    arriving = [axis.reshape(-1) for axis in tracer.along(source, keep=(dim,), must=dim)]
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            continue
        for axis in tracer.axes(parameter):
            for labels in arriving:
                tracer.couplings.tie(labels, axis.reshape(-1), "normalises an input without channels")
            if not arriving:
                tracer.couplings.freeze(axis, "normalises an input without channels")
    tracer.freeze_others(source, (0, dim) if dim == 1 else range(source.dim()), f"{op.name} across channels")
    gain = parameters[0] if parameters and isinstance(parameters[0], Tensor) else None
    axes = tracer.axes(source)
    if gain is not None and arriving and len(tracer.axes(gain)) == 1:
        # Tied to what it scales; where a query is normalised, its gain is what sets its scale.
        ours = tracer.axes(gain)[0].reshape([-1 if d == dim else 1 for d in range(source.dim())])
        axes = [ours if varying(axis) == (dim,) else axis for axis in axes]
    tracer.put(result, axes)


@rule("native_group_norm")
def group_norm(tracer: "ChannelTracer", op: Operation) -> None:
    """Statistics over groups of channels; the number of groups is adapted at extraction."""
    _normalise(tracer, op, 1, op.args[1:3])


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_batch_norm_no_update", "instance_norm")
def batch_norm(tracer: "ChannelTracer", op: Operation) -> None:
    """Statistics per channel, running ones included."""
    _normalise(tracer, op, 1, op.args[1:5])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(tracer: "ChannelTracer", op: Operation) -> None:
    """Statistics over the last dimension."""
    source = op.args[0]
    if len(op.args[1]) != 1:
        freeze_all(tracer, op, f"{op.name} over several dimensions")
        return
    _normalise(tracer, op, source.dim() - 1, op.args[2:4])
