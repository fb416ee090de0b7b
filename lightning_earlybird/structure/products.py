"""What operations multiply: their multiply-accumulates as products of dimensions, some of which hold channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_earlybird.structure.labels import varying
from lightning_earlybird.structure.rules.registry import Operation

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer


@dataclass(frozen=True, eq=False)
class Product:
    """A constant times, for each factor, the number of its positions that stay.

    Attributes:
        constant: What does not depend on channels: samples, image positions, kernel size, fixed widths.
        factors: One vector for each dimension (or dimensions that share channels, such as heads and their width): the
            channel of every position, shape (positions,). In a plan these are channel ids, -1 where the position always
            stays; while tracing, labels.
    """

    constant: int
    factors: tuple[Tensor, ...]


def products_of(tracer: "ChannelTracer", op: Operation) -> list[Product]:
    """The multiply-accumulates of one operation, as PyTorch's FLOP counter counts them; empty for what it passes over.

    Attention counts as its two matrix products, whichever kernel computes it.
    """
    if op.name in ("convolution", "_convolution"):
        source, weight, transposed, groups = op.args[0], op.args[1], op.args[6], op.args[8]
        places = (source if transposed else op.out).shape[2:]
        rest = math.prod(places) * math.prod(weight.shape[2:])
        # The sizes of the weight count, (out, in / groups) or (in, out / groups). A kernel made on the fly, as wide as
        # what it convolves, has no labels: then the input and the result tell whose channels those are.
        pair = "io" if transposed else "oi"
        counted = set(pair if groups == 1 else pair[0])
        sides = [(source, "b" + ("i" if "i" in counted else ".")), (op.out, "b" + ("o" if "o" in counted else "."))]
        operands = [(tensor, letters + "." * len(places)) for tensor, letters in ((weight, pair), *sides)]
        return [_product(tracer, operands, rest)]
    if op.name in ("mm", "addmm"):
        return [_product(tracer, list(zip(op.args[-2:], ("mk", "kn"), strict=True)))]
    if op.name in ("bmm", "baddbmm"):
        return [_product(tracer, list(zip(op.args[-2:], ("bmk", "bkn"), strict=True)))]
    if op.name.startswith("_scaled_dot_product"):
        query, key, value = op.args[:3]
        scores = _product(tracer, [(query, "bhnd"), (key, "bhmd")])
        return [scores, _product(tracer, [(value, "bhme")], query.shape[2])]
    return []


def _product(tracer: "ChannelTracer", operands: Sequence[tuple[Tensor, str]], rest: int = 1) -> Product:
    """The product of the sizes of all letters, which name the operands' dimensions as einsum does ('.': not counted).

    A letter that an operand has channels along becomes (part of) a factor. Where both operands have, the one whose axis
    spans more letters is taken: their channels are tied.
    """
    sizes: dict[str, int] = {}
    labelled: list[tuple[list[str], Tensor]] = []  # letters of an axis; labels, a dimension for each letter
    for tensor, letters in operands:
        for dim, letter in enumerate(letters):
            if letter != ".":
                sizes.setdefault(letter, tensor.shape[dim])
        for axis in tracer.axes(tensor):
            if len(varying(axis)) > 1:
                axis = tracer.couplings.canonical(axis)  # tokens of several origins are no channels
            named = [letters[dim] for dim in varying(axis)]
            if named and "." not in named:
                labelled.append((named, axis.squeeze()))
    factors: list[Tensor] = []
    covered: set[str] = set()
    for named, labels in sorted(labelled, key=lambda entry: len(entry[0]), reverse=True):
        if not covered.issuperset(named):
            # Where the heads are counted, the width of one tells that of all.
            index = tuple(0 if letter in covered else slice(None) for letter in named)
            covered |= set(named)
            factors.append(labels[index].reshape(-1))
    constant = rest * math.prod(size for letter, size in sizes.items() if letter not in covered)
    return Product(constant, tuple(factors))
