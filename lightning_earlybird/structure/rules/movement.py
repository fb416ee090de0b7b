"""Data movement: labels move along with the elements."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_earlybird.structure.labels import align, compress, reshape_axis, varying
from lightning_earlybird.structure.rules.registry import RULES, Operation, freeze_all, rule

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "positive", "_conj")
@rule("dropout", "native_dropout")
def same(tracer: "ChannelTracer", op: Operation) -> None:
    """The (first) result has the operand's labels."""
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    tracer.put(result, tracer.axes(op.args[0]))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten")
def reshape(tracer: "ChannelTracer", op: Operation) -> None:
    """Dimensions are merged or split; splitting channels into (..., width) makes every row keep equally many."""
    source, result = op.args[0], op.out
    moved = []
    for axis in tracer.axes(source):
        new = reshape_axis(axis, source.shape, result.shape)
        if 0 < len(varying(axis)) < len(varying(new)):
            for dim in varying(new)[1:]:
                tracer.record_rows(new.reshape(math.prod(new.shape[:dim]), -1))
        moved.append(new)
    tracer.put(result, moved)


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes")
def permute(tracer: "ChannelTracer", op: Operation) -> None:
    """Dimensions change places; axes have the operand's rank, so the same call moves them."""
    tracer.put(op.out, [op.func(axis, *op.args[1:], **op.kwargs) for axis in tracer.axes(op.args[0])])


@rule("expand", "expand_as", "broadcast_to")
def expand(tracer: "ChannelTracer", op: Operation) -> None:
    """New dimensions appear in front; a dimension of size 1 stays unlabelled."""
    tracer.put(op.out, [align(axis, op.out.dim()) for axis in tracer.axes(op.args[0])])


@rule("slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind")
def take(tracer: "ChannelTracer", op: Operation) -> None:
    """A part (or several) along one dimension."""
    source = op.args[0]
    results = list(op.out) if isinstance(op.out, list | tuple) else [op.out]
    position = 2 if op.name in ("split", "split_with_sizes", "chunk") else 1
    dim = op.argument(position, "dim", 0) % source.dim()
    drops_dim = op.name in ("select", "unbind")
    moved: list[list[Tensor]] = [[] for _ in results]
    for axis in tracer.axes(source):
        if axis.shape[dim] == 1:
            parts = [axis.squeeze(dim) if drops_dim else axis for _ in results]
        else:
            called = op.func(axis, *op.args[1:], **op.kwargs)
            parts = [compress(part) for part in (called if isinstance(called, list | tuple) else [called])]
            for part in parts:
                if not varying(part):
                    tracer.pick(part, axis)
        for target, part in zip(moved, parts, strict=True):
            target.append(part)
    for result, axes in zip(results, moved, strict=True):
        tracer.put(result, axes)


@rule("cat", "stack")
def concatenate(tracer: "ChannelTracer", op: Operation) -> None:
    """Labels are laid side by side; a piece without labels contributes "no channel"."""
    pieces: list[Tensor] = list(op.args[0])
    dim = op.argument(1, "dim", 0) % op.out.dim()
    axes = [tracer.axes(piece) for piece in pieces]
    if op.name == "stack":
        axes = [[axis.unsqueeze(dim) for axis in piece] for piece in axes]
    # What varies along the joined dimension and along positions has several origins; channels are what counts here.
    axes = [
        [
            tracer.couplings.canonical(axis) if dim in varying(axis) and len(varying(axis)) > 1 else axis
            for axis in piece
        ]
        for piece in axes
    ]
    if any(dim in varying(axis) for piece in axes for axis in piece):
        for joined in pieces:
            tracer.weigh(joined)
    directions = list(dict.fromkeys(varying(axis) for piece in axes for axis in piece))
    for along in directions:
        axes = [tracer.finest(piece, along) for piece in axes]
    moved = []
    while any(axes):
        along = max((varying(axis) for piece in axes for axis in piece), key=len)
        parts = []
        for index, piece in enumerate(axes):
            fitting = [axis for axis in piece if set(varying(axis)) <= set(along)]
            fitting.sort(key=lambda axis: len(varying(axis)), reverse=True)
            parts.append(fitting[0] if fitting else torch.zeros((1,) * op.out.dim(), dtype=torch.long))
            axes[index] = [axis for axis in piece if not fitting or axis is not fitting[0]]
        moved.append(_side_by_side(tracer, op, pieces, parts, dim))
    tracer.put(op.out, moved)


def _side_by_side(
    tracer: "ChannelTracer", op: Operation, pieces: list[Tensor], parts: list[Tensor], dim: int
) -> Tensor:
    """One axis of a joined tensor, of one axis of each piece."""
    sizes = [1 if op.name == "stack" else piece.shape[dim] for piece in pieces]
    other = [max(part.shape[d] for part in parts) for d in range(op.out.dim())]
    full = [
        part.expand([size if d == dim else other[d] for d in range(op.out.dim())])
        for part, size in zip(parts, sizes, strict=True)
    ]
    whole = torch.cat(full, dim)
    if any(size > 1 for d, size in enumerate(other) if d != dim):
        # In every other dimension the pieces must stay equally wide.
        tracer.couplings.join(whole, dim, "joined with a tensor that has no such channels")
    return compress(whole)


@rule("constant_pad_nd")
def pad(tracer: "ChannelTracer", op: Operation) -> None:
    """Spatial padding belongs to the channel beside it; padding channels adds positions without a channel."""
    amounts = list(op.args[1])
    moved = []
    for axis in tracer.axes(op.args[0]):
        own = [0] * len(amounts)
        for k in range(len(amounts) // 2):
            if axis.shape[axis.dim() - 1 - k] > 1:
                own[2 * k : 2 * k + 2] = amounts[2 * k : 2 * k + 2]
        moved.append(torch.constant_pad_nd(axis, own, 0))
    tracer.put(op.out, moved)


@rule("index_put", "copy")
def write(tracer: "ChannelTracer", op: Operation) -> None:
    """Values are written into another tensor, which may be part of a third: whatever channels they carry stay."""
    freeze_all(tracer, op, "written into another tensor")


@rule("repeat", "index", "index_select", "roll", "flip", "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle")
@rule("as_strided", "gather")
def rearrange(tracer: "ChannelTracer", op: Operation) -> None:
    """Any other data movement: the very operation is run on the labels, written out in full.

    As floating-point numbers, because some of these operations know no others; labels are far below 2**53.
    """
    source = op.args[0]
    rest = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (op.args[1:], op.kwargs))
    for other in op.tensors()[1:]:
        for axis in tracer.axes(other):
            tracer.couplings.freeze(axis, f"used as an index by {op.name}")
    if op.name == "roll":
        # The neighbour of a channel is another one in a narrower network.
        dims = {dim % source.dim() for dim in op.argument(2, "dims", ()) or range(source.dim())}
        if any(dims & set(varying(axis)) for axis in tracer.axes(source)):
            freeze_all(tracer, op, "roll over channels")
            return
    if op.name == "as_strided" and not source.is_contiguous():
        freeze_all(tracer, op, "strided access")
        return
    written_out = [axis.double().expand(source.shape).contiguous() for axis in tracer.axes(source)]
    tracer.put(op.out, [compress(op.func(axis, *rest[0], **rest[1]).long()) for axis in written_out])


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "max_pool2d_with_indices")
@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def spatial(tracer: "ChannelTracer", op: Operation) -> None:
    """Resampling within channels, (B, C, ...) -> (B, C, ...)."""
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    tracer.freeze_others(op.args[0], (0, 1), f"{op.name} across channels")
    tracer.put(result, tracer.along(op.args[0], keep=(0, 1)))


# What shows the elements of one tensor in other places.
MOVEMENTS = frozenset(
    name
    for name, function in RULES.items()
    if function in (same, reshape, permute, expand, take, concatenate, pad) or name == "repeat"
)
