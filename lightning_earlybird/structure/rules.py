"""What each tensor operation does to channel labels.

Four kinds of operation matter: data movement (labels move along), element-wise operations (labels of the operands are tied), contractions (the contracted
labels are tied and vanish, the free ones remain) and normalisation (parameters are tied to what they normalise). Whatever has no rule freezes the channels
that it touches: a missing rule costs sparsity, never correctness.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from lightning_earlybird.structure.labels import align, compress, reshape_axis, varying

if TYPE_CHECKING:
    from lightning_earlybird.structure.trace import ChannelTracer


@dataclass(frozen=True)
class Operation:
    """One call that the tracer has seen, with its result."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        """Every tensor that the call returned."""
        return [leaf for leaf in tree_flatten(self.out)[0] if isinstance(leaf, Tensor)]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


Rule = Callable[["ChannelTracer", Operation], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the overload packets (``aten::name``) it understands."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find_rule(operation: Operation) -> Rule | None:
    """The rule of an operation: by name, else by name without the in-place underscore, else the element-wise one where torch tags it so."""
    known = RULES.get(operation.name) or RULES.get(operation.name.rstrip("_"))
    if known is None and torch.Tag.pointwise in operation.func.tags:
        return pointwise
    return known


# --- results that depend on shapes or on chance, not on values


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full", "bernoulli", "fill")
def fresh(tracer: "ChannelTracer", op: Operation) -> None:
    """The result does not depend on the operand's values: it carries no channels."""


# --- data movement


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "to", "lift_fresh", "dropout", "native_dropout", "positive", "_conj")
def same(tracer: "ChannelTracer", op: Operation) -> None:
    """The (first) result has the operand's labels."""
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    tracer.put(result, tracer.axes(op.args[0]))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten")
def reshape(tracer: "ChannelTracer", op: Operation) -> None:
    """Dimensions are merged or split; splitting a channel dimension into (heads, width) makes every head keep equally many."""
    source, result = op.args[0], op.out
    moved = []
    for axis in tracer.axes(source):
        new = reshape_axis(axis, source.shape, result.shape)
        if len(varying(axis)) == 1 and len(varying(new)) == 2:
            rows, width = (new.shape[dim] for dim in varying(new))
            tracer.record_rows(new.reshape(rows, width))
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
    position = 0 if op.name == "unbind" else 1
    is_dim_second = op.name in ("slice", "narrow", "select")
    dim = op.argument(position if is_dim_second or op.name == "unbind" else 2, "dim", 0) % source.dim()
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
                    tracer.couplings.freeze(part, "one channel is picked by its position")
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
    counts = {len(piece) for piece in axes}
    if max(counts) > 1 and len(counts) > 1:
        # A parameter with several axes beside activations with one (a class token, say): only the axis that varies as theirs do can go along.
        wanted = next((varying(piece[0]) for piece in axes if len(piece) == 1), ())
        for index, piece in enumerate(axes):
            if len(piece) > 1:
                match = [axis for axis in piece if varying(axis) == wanted][:1] or piece[:1]
                for axis in piece:
                    if axis is not match[0]:
                        tracer.couplings.freeze(axis, "joined with a tensor that has no such channels")
                axes[index] = match
    moved = []
    for slot in range(max(len(piece) for piece in axes)):
        blank = torch.zeros((1,) * op.out.dim(), dtype=torch.long)
        parts = [piece[slot] if len(piece) > slot else blank for piece in axes]
        sizes = [1 if op.name == "stack" else piece.shape[dim] for piece in pieces]
        other = [max(part.shape[d] for part in parts) for d in range(op.out.dim())]
        full = [part.expand([size if d == dim else other[d] for d in range(op.out.dim())]) for part, size in zip(parts, sizes, strict=True)]
        moved.append(compress(torch.cat(full, dim)))
    tracer.put(op.out, moved)


@rule("constant_pad_nd")
def pad(tracer: "ChannelTracer", op: Operation) -> None:
    """Spatial padding belongs to the channel beside it; padding of the channel dimension adds positions without a channel."""
    amounts = list(op.args[1])
    moved = []
    for axis in tracer.axes(op.args[0]):
        own = [0] * len(amounts)
        for k in range(len(amounts) // 2):
            if axis.shape[axis.dim() - 1 - k] > 1:
                own[2 * k : 2 * k + 2] = amounts[2 * k : 2 * k + 2]
        moved.append(torch.constant_pad_nd(axis, own, 0))
    tracer.put(op.out, moved)


@rule("repeat", "index", "index_select", "roll", "flip", "unfold", "im2col", "pixel_shuffle", "pixel_unshuffle", "as_strided", "gather")
def rearrange(tracer: "ChannelTracer", op: Operation) -> None:
    """Any other data movement: the very operation is run on the labels, written out in full."""
    source = op.args[0]
    rest = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (op.args[1:], op.kwargs))
    for other in op.tensors()[1:]:
        for axis in tracer.axes(other):
            tracer.couplings.freeze(axis, f"used as an index by {op.name}")
    if op.name == "as_strided" and not source.is_contiguous():
        freeze_all(tracer, op, "strided access")
        return
    moved = [compress(op.func(axis.expand(source.shape).contiguous(), *rest[0], **rest[1])) for axis in tracer.axes(source)]
    tracer.put(op.out, moved)


@rule(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool2d", "max_pool2d_with_indices",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def spatial(tracer: "ChannelTracer", op: Operation) -> None:
    """Resampling within channels, (B, C, ...) -> (B, C, ...)."""
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    tracer.put(result, tracer.along(op.args[0], keep=(0, 1)))


# --- element-wise operations


def pointwise(tracer: "ChannelTracer", op: Operation) -> None:
    """Operands that meet element by element share their channels."""
    result = op.outputs()[0]
    tracer.put(result, meet(tracer, op.tensors(), result.dim()))


def meet(tracer: "ChannelTracer", operands: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Tie the labels of broadcast operands; returns the axes of the result. Axes of earlier operands take precedence."""
    merged: list[Tensor] = []
    own: list[list[tuple[int, ...]]] = []
    for operand in operands:
        axes = [align(axis, rank) for axis in tracer.axes(operand)]
        own.append([varying(axis) for axis in axes])
        for axis in axes:
            for index, other in enumerate(merged):
                if set(varying(axis)) & set(varying(other)):
                    tracer.couplings.tie(other, axis, "meets a tensor without channels")
                    if len(varying(axis)) > len(varying(other)):
                        merged[index] = axis
                    break
            else:
                merged.append(axis)
    # An operand that is wide where others carry channels, but carries none itself, would not shrink with them.
    for operand, dims in zip(operands, own, strict=True):
        sizes = (1,) * (rank - operand.dim()) + tuple(1 if s == 0 else n for n, s in zip(operand.shape, operand.stride(), strict=True))
        for axis in merged:
            mine = set(varying(axis))
            if any(sizes[dim] > 1 for dim in mine) and not any(mine & set(theirs) for theirs in dims):
                tracer.couplings.freeze(axis, "meets a tensor of fixed width that carries no channels")
    return merged


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk")
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
    tracer.inherit_scores(result, source)


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm", "norm", "prod", "logsumexp")
def reduce(tracer: "ChannelTracer", op: Operation) -> None:
    """Reduced dimensions vanish. A sum over channels does not mind missing zeros; every other statistic over channels freezes them."""
    source = op.args[0]
    given = op.argument(2 if op.name in ("linalg_vector_norm", "norm") else 1, "dim")
    dims = [given] if isinstance(given, int) else list(given or range(source.dim()))
    reduced = {dim % source.dim() for dim in dims}
    for result in op.outputs():
        keepdim = result.dim() == source.dim()
        moved = []
        for axis in tracer.axes(source):
            hit = reduced & set(varying(axis))
            if hit and not (op.name == "sum" and hit == set(varying(axis))):
                tracer.couplings.freeze(axis, f"{op.name} over channels")
            elif not hit:
                moved.append(axis if keepdim else axis.squeeze(tuple(sorted(reduced))))
        tracer.put(result, moved)


# --- contractions


def contract(
    tracer: "ChannelTracer",
    first: Tensor,
    second: Tensor,
    over: tuple[int, int],
    out: Tensor,
    free: tuple[dict[int, int], dict[int, int]],
    batch: tuple[int, ...] = (),
) -> list[Tensor]:
    """Sum over dimension ``over[0]`` of ``first`` and ``over[1]`` of ``second``.

    Args:
        tracer: The trace.
        first: Left operand.
        second: Right operand.
        over: The contracted dimension of each.
        out: The result.
        free: For each operand, its remaining dimensions -> dimensions of the result.
        batch: Dimensions that both operands and the result share.

    Returns:
        The axes of the result.
    """
    sides = [tracer.along(operand, keep=(*batch, dim), must=dim) for operand, dim in zip((first, second), over, strict=True)]
    flat = [[_as_batch_and(axis, batch, dim) for axis in side] for side, dim in zip(sides, over, strict=True)]
    if sides[0] and sides[1]:
        for left in flat[0]:
            for right in flat[1]:
                tracer.couplings.tie(left, right, "contracted with a tensor without channels")
        if not tracer.is_parametric(first) and not tracer.is_parametric(second):
            tracer.set_scores(out, flat[0][0].reshape(-1))
    else:
        for axis in (*sides[0], *sides[1]):
            tracer.couplings.freeze(axis, "contracted with a tensor that carries no channels")
    # Attention weights times values: every code base computes the head width once, from queries or keys, so values follow them.
    for weights, values, dim in ((first, second, over[1]), (second, first, over[0])):
        scores = tracer.scores_of(weights)
        if scores is not None:
            for axis in tracer.axes(values):
                labels = _distinct(axis)
                if dim not in varying(axis) and len(labels) == len(scores):
                    tracer.couplings.tie(labels, scores, "attention")
    carried = []
    for operand, dim, mapping in ((first, over[0], free[0]), (second, over[1], free[1])):
        for axis in tracer.axes(operand):
            if varying(axis) and dim not in varying(axis):
                if tracer.is_parametric(operand):
                    tracer.couplings.produce(axis)
                carried.append(_carry(axis, {**{b: b for b in batch}, **mapping}, out.dim()))
    return carried


def _as_batch_and(axis: Tensor, batch: Sequence[int], dim: int) -> Tensor:
    """(batch..., contracted) with every other dimension (all of size 1) dropped."""
    return axis.permute(*batch, dim, *(d for d in range(axis.dim()) if d not in (*batch, dim))).flatten(len(batch))


def _carry(axis: Tensor, mapping: dict[int, int], rank: int) -> Tensor:
    """Move an axis to the result's dimensions; dimensions that are not mapped have size 1."""
    inverse = {target: source for source, target in mapping.items()}
    order = [inverse[target] for target in sorted(inverse)]
    rest = [d for d in range(axis.dim()) if d not in order]
    shape = [axis.shape[inverse[d]] if d in inverse else 1 for d in range(rank)]
    return axis.permute(*order, *rest).reshape(shape)


def _distinct(axis: Tensor) -> Tensor:
    """The labels of an axis without repetition, in order of appearance."""
    return torch.tensor(list(dict.fromkeys(axis.reshape(-1).tolist())), dtype=torch.long)


@rule("mm")
def mm(tracer: "ChannelTracer", op: Operation) -> None:
    """(m, k) x (k, n)."""
    tracer.put(op.out, contract(tracer, op.args[0], op.args[1], (1, 0), op.out, ({0: 0}, {1: 1})))


@rule("addmm")
def addmm(tracer: "ChannelTracer", op: Operation) -> None:
    """bias + (m, k) x (k, n)."""
    bias, first, second = op.args[:3]
    tracer.put(op.out, contract(tracer, first, second, (1, 0), op.out, ({0: 0}, {1: 1})))
    tracer.put(op.out, meet(tracer, (op.out, bias), 2))


@rule("bmm", "baddbmm")
def bmm(tracer: "ChannelTracer", op: Operation) -> None:
    """(b, m, k) x (b, k, n), with an optional summand."""
    first, second = op.args[-2:]
    tracer.put(op.out, contract(tracer, first, second, (2, 1), op.out, ({1: 1}, {2: 2}), batch=(0,)))
    if op.name == "baddbmm" and tracer.axes(op.args[0]):
        tracer.put(op.out, meet(tracer, (op.out, op.args[0]), 3))


@rule("mv")
def mv(tracer: "ChannelTracer", op: Operation) -> None:
    """(m, k) x (k,)."""
    tracer.put(op.out, contract(tracer, op.args[0], op.args[1], (1, 0), op.out, ({0: 0}, {})))


@rule("linear")
def linear(tracer: "ChannelTracer", op: Operation) -> None:
    """(..., k) x (n, k) + bias."""
    source, weight, bias = op.args[0], op.args[1], op.argument(2, "bias")
    last = source.dim() - 1
    tracer.put(op.out, contract(tracer, source, weight, (last, 1), op.out, ({d: d for d in range(last)}, {0: last})))
    if bias is not None:
        tracer.put(op.out, meet(tracer, (op.out, bias), op.out.dim()))


@rule("convolution", "_convolution")
def convolution(tracer: "ChannelTracer", op: Operation) -> None:
    """Dense, transposed and depthwise convolutions; other groupings are frozen."""
    source, weight, bias = op.args[:3]
    transposed, groups = op.args[6], op.args[8]
    tie, freeze = tracer.couplings.tie, tracer.couplings.freeze
    inputs = tracer.vector(weight, 0 if transposed else 1)
    outputs = tracer.vector(weight, 1 if transposed else 0)
    arriving = [axis.reshape(-1) for axis in tracer.along(source, keep=(1,), must=1)]
    if groups == 1:
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
    else:
        for labels in (inputs, outputs, *arriving):
            if labels is not None:
                freeze(labels, f"grouped convolution ({groups} groups)")
        outputs = None
    if bias is not None:
        labels = tracer.vector(bias, 0)
        if labels is not None:
            tie(labels, outputs if outputs is not None else torch.zeros(1, dtype=torch.long), "bias of a frozen convolution")
    if outputs is not None:
        tracer.put(op.out, [outputs.view([-1 if d == 1 else 1 for d in range(op.out.dim())])])


@rule("embedding")
def embedding(tracer: "ChannelTracer", op: Operation) -> None:
    """Rows of a table: the table's width becomes the last dimension."""
    outputs = tracer.vector(op.args[0], 1)
    if outputs is not None:
        tracer.couplings.produce(outputs)
        tracer.put(op.out, [align(outputs, op.out.dim())])


@rule(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math",
)  # fmt: skip
def attention(tracer: "ChannelTracer", op: Operation) -> None:
    """(B, H, N, D) queries, keys and values: the three share heads and width; the result is labelled as the values."""
    query, key, value = op.args[:3]
    result = op.out[0] if isinstance(op.out, tuple) else op.out
    keep = (0, 1, 3)
    sides = [tracer.along(tensor, keep=keep, must=3) for tensor in (query, key, value)]
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    if all(sides) and same_heads and query.shape[3] == value.shape[3]:
        tracer.couplings.tie(sides[0][0], sides[1][0], "attention")
        tracer.couplings.tie(sides[0][0], sides[2][0], "attention")
        tracer.put(result, [sides[2][0]])
    else:
        for axis in (axis for side in sides for axis in side):
            tracer.couplings.freeze(axis, "attention whose queries, keys and values differ in heads or width")


# --- normalisation


def _normalise(tracer: "ChannelTracer", op: Operation, dim: int, parameters: Iterator[Any] | Sequence[Any]) -> None:
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
    tracer.put(result, tracer.axes(source))


@rule("native_group_norm")
def group_norm(tracer: "ChannelTracer", op: Operation) -> None:
    """Statistics over groups of channels; the number of groups is adapted at extraction."""
    _normalise(tracer, op, 1, op.args[1:3])


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update", "instance_norm")
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


def freeze_all(tracer: "ChannelTracer", op: Operation, reason: str) -> None:
    """Freeze every channel that the operation touches; its result carries none."""
    for tensor in op.tensors():
        for axis in tracer.axes(tensor):
            tracer.couplings.freeze(axis, reason)
    for result in op.outputs():
        tracer.put(result, [])
