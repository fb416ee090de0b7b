"""Contractions: the contracted labels are tied and vanish, the free ones remain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_earlybird.structure.labels import varying
from lightning_earlybird.structure.rules.elementwise import meet
from lightning_earlybird.structure.rules.registry import Operation, rule

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer

CONTRACTIONS = frozenset(["mm", "addmm", "bmm", "baddbmm", "mv", "linear"])


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
    operands = list(zip((first, second), over, strict=True))
    for operand, dim in operands:
        if any(dim in varying(axis) and len(varying(axis)) > 1 for axis in tracer.axes(operand)):
            tracer.put(operand, [tracer.couplings.canonical(axis) for axis in tracer.axes(operand)])
    query = next((axis.movedim(over[0], -1) for axis in tracer.axes(first) if over[0] in varying(axis)), None)
    sides = [tracer.along(operand, keep=(*batch, dim), must=dim) for operand, dim in operands]
    flat = [[_as_batch_and(axis, batch, dim) for axis in side] for side, dim in zip(sides, over, strict=True)]
    if sides[0] and sides[1]:
        for left in flat[0]:
            for right in flat[1]:
                tracer.couplings.tie(left, right, "contracted with a tensor without channels")
        activations = not tracer.is_parametric(first) and not tracer.is_parametric(second)
        if activations and tracer.scores_of(first) is None and tracer.scores_of(second) is None:
            tracer.record_scores(out, _distinct(flat[0][0]), flat[0][0] if query is None else query, (first, second))
    else:
        for axis in (*sides[0], *sides[1]):
            tracer.couplings.freeze(axis, "contracted with a tensor that carries no channels")
    # Attention weights times values: every code base computes the head width once, from queries or keys, so values
    # follow them.
    for weights, values, dim in ((first, second, over[1]), (second, first, over[0])):
        scores = tracer.scores_of(weights)
        if scores is not None and not tracer.is_parametric(values):
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
    for others in {varying(axis) for axis in carried}:
        carried = tracer.finest(carried, others)
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
    """A bias plus (m, k) x (k, n)."""
    bias, first, second = op.args[:3]
    tracer.put(op.out, contract(tracer, first, second, (1, 0), op.out, ({0: 0}, {1: 1})))
    tracer.put(op.out, meet(tracer, (op.out, bias), 2))


@rule("bmm", "baddbmm")
def bmm(tracer: "ChannelTracer", op: Operation) -> None:
    """(b, m, k) x (b, k, n), with an optional summand."""
    first, second = op.args[-2:]
    tracer.put(op.out, contract(tracer, first, second, (2, 1), op.out, ({1: 1}, {2: 2}), batch=(0,)))
    if op.name == "baddbmm":
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
