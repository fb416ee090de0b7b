"""Channel labels: which channel every element of a tensor belongs to.

A tensor carries a list of *axes*. An axis is a long tensor of the tensor's own rank whose size is 1 along every
dimension where the label does not change, so that an activation of shape (B, C, H, W) costs one axis of shape (1, C, 1,
1). Label 0 means "no channel". Labels are handed out to the dimensions of parameters; operations move them, tie two of
them together (both channels must be kept or removed at once) or freeze them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def varying(axis: Tensor) -> tuple[int, ...]:
    """Dimensions along which the label changes."""
    return tuple(dim for dim, size in enumerate(axis.shape) if size > 1)


def compress(labels: Tensor) -> Tensor:
    """Narrow every dimension along which all labels are equal to size 1."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels = labels.narrow(dim, 0, 1)
    return labels


def align(axis: Tensor, rank: int) -> Tensor:
    """Prepend dimensions of size 1, as broadcasting does."""
    return axis.reshape((1,) * (rank - axis.dim()) + tuple(axis.shape))


def reshape_axis(axis: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The axis of ``tensor.reshape(new)``, given the axis of a tensor of shape ``old``.

    Works block by block (runs of dimensions with equal products), so that only the dimensions that the labels vary in
    are ever materialised.
    """
    expanded: list[int] = []
    target: list[int] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        left = right = 1
        while True:
            if left == right and i > i0 and j > j0:
                break
            if left <= right and i < len(old):
                left *= old[i]
                i += 1
            elif j < len(new):
                right *= new[j]
                j += 1
            elif i < len(old):
                left *= old[i]
                i += 1
            else:
                break
        changes = any(axis.shape[dim] > 1 for dim in range(i0, i))
        expanded += list(old[i0:i]) if changes else [1] * (i - i0)
        target += list(new[j0:j]) if changes else [1] * (j - j0)
    return compress(axis.expand(expanded).reshape(target))


class Couplings:
    """What a trace has learned about labels: which are tied, which are frozen and why, which a layer produces.

    Labels are integers from 1; they are handed out by :meth:`fresh`.
    """

    def __init__(self) -> None:
        self.count = 1
        self._edges: list[Tensor] = []
        self._frozen: list[tuple[Tensor, str]] = []
        self._produced: list[Tensor] = []
        self._followers: list[Tensor] = []
        self._joined: list[tuple[Tensor, Tensor]] = []

    def fresh(self, size: int) -> Tensor:
        """``size`` new labels, shape (size,)."""
        labels = torch.arange(self.count, self.count + size)
        self.count += size
        return labels

    def followers(self, axis: Tensor) -> Tensor:
        """Labels for what has one element a block of channels (a statistic of each head, say): tied to nothing."""
        if not varying(axis):
            return torch.zeros_like(axis)
        labels = self.fresh(axis.numel()).view(axis.shape)
        self._followers.append(labels.reshape(-1))
        return labels

    def join(self, whole: Tensor, dim: int, reason: str) -> None:
        """Couple labels along a dimension that holds no channels itself (positions of several origins)."""
        first = whole.narrow(dim, 0, 1)
        self.tie(whole, first, reason)
        self._joined.append((whole.reshape(-1), first.expand(whole.shape).reshape(-1)))

    def canonical(self, axis: Tensor) -> Tensor:
        """The axis with one label for what has been joined, so that it varies only where channels do."""
        names = torch.arange(self.count)
        for labels, first in self._joined:
            names[labels] = names[first]
        return compress(names[axis])

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Couple two axes element by element after broadcasting; a partner without a channel freezes the other.

        Axes that cannot be broadcast together have no such correspondence: both are frozen.
        """
        if any(m != n and 1 not in (m, n) for m, n in zip(first.shape[::-1], second.shape[::-1], strict=False)):
            self.freeze(first, reason)
            self.freeze(second, reason)
            return
        a, b = (side.reshape(-1) for side in torch.broadcast_tensors(first, second))
        distinct = a != b
        pairs = torch.unique(a[distinct] * self.count + b[distinct])  # as single numbers: much faster than as rows
        if len(pairs) == 0:
            return
        a, b = pairs // self.count, pairs % self.count
        if self._followers:
            free = torch.isin(a, torch.cat(self._followers)) | torch.isin(b, torch.cat(self._followers))
            a, b = a[~free], b[~free]
        without = (a == 0) | (b == 0)
        self.freeze((a + b)[without], reason)
        self._edges.append(torch.stack([a, b], dim=1)[~without])

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Never prune these; the first reason given is the one reported."""
        labels = torch.unique(labels)
        labels = labels[labels != 0]
        if len(labels):
            self._frozen.append((labels, reason))

    def produce(self, labels: Tensor) -> None:
        """Mark channels as the output of a layer: only those can be pruned (kernel or vocabulary positions cannot)."""
        self._produced.append(labels.reshape(-1))

    def components(self) -> Tensor:
        """Shape (count,): the smallest label that each label is tied to, directly or through others."""
        lowest = torch.arange(self.count)
        edges = torch.cat(self._edges) if self._edges else torch.zeros(0, 2, dtype=torch.long)
        first, second = edges.unbind(1)
        while True:
            smaller = torch.minimum(lowest[first], lowest[second])
            updated = lowest.clone()
            updated.scatter_reduce_(0, first, smaller, "amin")
            updated.scatter_reduce_(0, second, smaller, "amin")
            updated = updated[updated]
            if torch.equal(updated, lowest):
                return lowest
            lowest = updated

    def products(self) -> Tensor:
        """Shape (count,), bool, by label: a layer produces this very channel."""
        result = torch.zeros(self.count, dtype=torch.bool)
        for labels in self._produced:
            result[labels] = True
        result[0] = False
        return result

    def frozen_reasons(self, components: Tensor) -> dict[int, str]:
        """Component -> why it is frozen."""
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for component in torch.unique(components[labels]).tolist():
                reasons.setdefault(component, reason)
        return reasons
