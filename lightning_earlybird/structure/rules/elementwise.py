"""Element-wise operations tie what meets; reductions over channels are statistics of those that stay."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_earlybird.structure.labels import align, varying
from lightning_earlybird.structure.rules.registry import Operation, freeze_all, rule

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@rule("new_zeros", "new_ones", "new_empty", "new_full", "bernoulli", "fill")
def fresh(tracer: "ChannelTracer", op: Operation) -> None:
    """The result does not depend on the operand's values: it carries no channels."""


@rule("any", "all")
def quantifier(tracer: "ChannelTracer", op: Operation) -> None:
    """A check of all values, for Python to act on, carries no channels; along some dimensions it mixes them."""
    if op.out.numel() > 1:
        freeze_all(tracer, op, f"{op.name} over channels")


@rule("pointwise", "_prelu_kernel")
def pointwise(tracer: "ChannelTracer", op: Operation) -> None:
    """Operands that meet element by element share their channels."""
    result = op.outputs()[0]
    operands = op.tensors()
    if op.name.rstrip("_") == "mul":
        # A gain that is a parameter comes last before what follows (a query's norm, say): its labels stay.
        operands.sort(key=lambda operand: not tracer.is_parameter(operand))
    tracer.put(result, meet(tracer, operands, result.dim()))


def meet(tracer: "ChannelTracer", operands: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Tie the labels of broadcast operands.

    Returns:
        The axes of the result; those of earlier operands take precedence.
    """
    merged: list[Tensor] = []
    own: list[list[tuple[int, ...]]] = []
    spread = {varying(align(axis, rank)) for operand in operands for axis in tracer.axes(operand)}
    for operand in operands:
        axes = [align(axis, rank) for axis in tracer.axes(operand)]
        own.append([varying(axis) for axis in axes])
        for others in spread:
            axes = tracer.finest(axes, others)
        for axis in axes:
            met = [index for index, other in enumerate(merged) if set(varying(axis)) & set(varying(other))]
            for index in met:
                tracer.couplings.tie(merged[index], axis, "meets a tensor without channels")
            if not met:
                merged.append(axis)
            elif len(varying(axis)) > len(varying(merged[met[0]])) and not tracer.is_parameter(operands[0]):
                merged[met[0]] = axis
    # An operand that is wide where others carry channels, but carries none itself, would not shrink with them.
    for operand, dims in zip(operands, own, strict=True):
        strides = zip(operand.shape, operand.stride(), strict=True)
        sizes = (1,) * (rank - operand.dim()) + tuple(1 if stride == 0 else size for size, stride in strides)
        for axis in merged:
            mine = set(varying(axis))
            labelled = mine & {dim for theirs in dims for dim in theirs}
            wide = {dim for dim in mine if sizes[dim] > 1}
            if wide and (not labelled or (max(mine) in wide and max(mine) not in labelled)):
                tracer.couplings.freeze(axis, "meets a tensor of fixed width that carries no channels")
    return merged


@rule("glu")
def gated(tracer: "ChannelTracer", op: Operation) -> None:
    """The first half times the sigmoid of the second: a channel of each go together."""
    source = op.args[0]
    dim = op.argument(1, "dim", -1) % source.dim()
    half = source.shape[dim] // 2
    moved = []
    for axis in tracer.axes(source):
        if axis.shape[dim] > 1:
            first, second = axis.narrow(dim, 0, half), axis.narrow(dim, half, half)
            tracer.couplings.tie(first, second, "gated by a tensor without channels")
            axis = first
        moved.append(axis)
    tracer.put(op.out, moved)


@rule("_softmax", "softmax")
def softmax(tracer: "ChannelTracer", op: Operation) -> None:
    """Shares of one whole: over channels, of those that stay."""
    source = op.args[0]
    dim = op.argument(1, "dim", -1) % source.dim()
    for axis in tracer.axes(source):
        if axis.shape[dim] > 1:
            tracer.record_statistic(op, dim, axis)
    tracer.put(op.out, tracer.axes(source))


@rule("_log_softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp")
def within(tracer: "ChannelTracer", op: Operation) -> None:
    """Elements along one dimension influence each other: its channels cannot go, the others stay labelled."""
    source = op.args[0]
    dim = op.argument(1, "dim", -1) % source.dim()
    kept = []
    for axis in tracer.axes(source):
        if axis.shape[dim] > 1:
            tracer.couplings.freeze(axis, f"{op.name} over channels")
        else:
            kept.append(axis)
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    tracer.put(result, kept)


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "norm", "prod", "logsumexp")
def reduce(tracer: "ChannelTracer", op: Operation) -> None:
    """Reduced dimensions vanish; a statistic over channels is one of those that stay."""
    source = op.args[0]
    given = op.argument(2 if op.name in ("linalg_vector_norm", "norm") else 1, "dim")
    dims = [given] if isinstance(given, int) else list(given or range(source.dim()))
    reduced = {dim % source.dim() for dim in dims}
    for result in op.outputs():
        keepdim = result.dim() == source.dim()
        moved = []
        for axis in tracer.axes(source):
            hit = reduced & set(varying(axis))
            if len(hit) > 1:
                tracer.couplings.freeze(axis, f"{op.name} over channels that lie along several dimensions")
                continue
            for dim in hit:
                tracer.record_statistic(op, dim, axis)
                axis = tracer.couplings.followers(axis.narrow(dim, 0, 1))
            if bool((axis != 0).any()):
                moved.append(axis if keepdim else axis.squeeze(tuple(sorted(reduced))))
        tracer.put(result, moved)
