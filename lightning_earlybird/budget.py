"""Budgets: from a sparsity to the number of channels that every group keeps, and from scores to the mask with those."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_earlybird.arguments import check_choice, check_positive
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelGroup, ChannelPlan, Product, WidthCost

Target = Literal["channels", "params", "macs"]
Scope = Literal["uniform", "global"]
Heads = Literal["equal", "whole"]

TOLERANCE = 0.01
"""How far what is achieved may be from the nominal sparsity, as a fraction of it, before something is done about it."""


@dataclass(frozen=True)
class Allocation:
    """What a sparsity counts, and how it is shared out among the channel groups.

    Args:
        target: What is removed a fraction of: ``"channels"`` that can be pruned, ``"params"`` or ``"macs"`` of the
            whole denoiser (multiply-accumulates for one sample).
        scope: ``"uniform"`` takes the same fraction from every group; ``"global"`` ranks the channels of all groups by
            their score over the mean score of their group, so that groups of many weak channels lose more.
        round_to: Kept widths are multiples of this; a group no wider than it stays whole.
        min_width: Channels that every group keeps at least, or, as a float in (0, 1), the fraction of its width.
        heads: ``"equal"`` narrows all heads of an attention by the same number; ``"whole"`` removes whole heads where
            the module can be told how many it has, and narrows the others.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    target: Target = "channels"
    scope: Scope = "uniform"
    round_to: int = 8
    min_width: int | float = 1
    heads: Heads = "equal"

    def __post_init__(self) -> None:
        check_choice("target", self.target, get_args(Target))
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("heads", self.heads, get_args(Heads))
        check_positive(round_to=self.round_to)
        width = self.min_width
        if isinstance(width, bool) or not (
            (isinstance(width, int) and width >= 1) or (isinstance(width, float) and 0 < width < 1)
        ):
            raise ValueError(
                f"min_width={width!r} must be an integer of at least 1 (channels), or a float in (0, 1) (the fraction "
                "of each group's width)."
            )


@dataclass(frozen=True)
class _Ladder:
    """The steps in which one group is narrowed.

    Its channels are seen as ``rows`` rows of ``items`` items of ``weight`` channels each; every row keeps equally many
    items. Items are channels, or heads where whole ones are removed.
    """

    group: ChannelGroup
    rows: int
    items: int
    weight: int
    unit: int  # items that leave a row at a time
    least: int  # items that every row keeps

    @classmethod
    def of(cls, plan: ChannelPlan, group: ChannelGroup, allocation: Allocation) -> _Ladder:
        least, round_to = allocation.min_width, allocation.round_to
        channels = math.ceil(least * group.size) if isinstance(least, float) else least
        rows, items, weight = group.rows, group.width, 1
        width = rows  # of what leaves at a time, in the network
        if group.can_lose_rows and group.width == 1:
            # Heads that cannot be narrowed: each is one channel that stands for all positions of the head.
            rows, items, width = 1, rows, _positions(plan, group)
        elif group.can_lose_rows and allocation.heads == "whole" and round_to // math.gcd(round_to, items) <= rows:
            rows, items, weight, width = 1, rows, items, items
        unit = round_to // math.gcd(round_to, width)
        steps = max(1, math.ceil(channels / (rows * weight * unit)))
        return cls(group, rows, items, weight, unit, min(items, steps * unit))

    @property
    def steps(self) -> list[int]:
        """Items that stay by number of steps kept, without those that always do: ascending, the last one is all."""
        return [
            *range(self.least + self.unit, self.items, self.unit),
            *([self.items] if self.least < self.items else []),
        ]

    def ranked(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the items, highest first, and which items they are; both of shape (rows, items).

        Ties go to the lower index.
        """
        own = scores[self.group.channels].view(self.rows, self.items, self.weight).mean(dim=2)
        order = own.argsort(dim=1, descending=True, stable=True)
        return own.gather(1, order), order

    def mask(self, order: Tensor, kept: int) -> Tensor:
        """Shape (group size,), bool: the first ``kept`` items of every row stay."""
        stays = torch.zeros(self.rows, self.items, dtype=torch.bool)
        stays.scatter_(1, order[:, :kept], True)
        return stays.unsqueeze(2).expand(-1, -1, self.weight).flatten()


class Budget:
    """Draws masks of one plan that meet a sparsity as exactly as whole steps allow.

    Every group can lose its channels in steps (multiples of ``round_to``, the same number from every head). All steps
    of all groups are put into one order, and as many are kept as bring the target nearest to its nominal value. The
    order is by place within the group for ``scope="uniform"`` (a step is kept before all that lie deeper in their
    groups, in fractions of the width; equals are spread over the depth of the network), and by normalised score for
    ``"global"``. Only where that misses by more than one percent of the nominal sparsity, single steps are exchanged.

    Args:
        plan: The denoiser's channel plan.
        allocation: What to count and how to share it out.
    """

    def __init__(self, plan: ChannelPlan, allocation: Allocation) -> None:
        self.plan = plan
        self.allocation = allocation
        self.cost = WidthCost(_counted(plan, allocation.target), plan.groups)
        self.dense = self.cost(torch.tensor([group.size for group in plan.groups]))
        self._ladders = [_Ladder.of(plan, group, allocation) for group in plan.groups]
        self._always = torch.tensor([ladder.least * ladder.rows * ladder.weight for ladder in self._ladders])
        # One entry for each step of each group, equals in the order in which they are kept: first by the fractional
        # part of multiples of the golden ratio, which spreads any number of them evenly over the depth.
        spread = sorted(range(len(self._ladders)), key=lambda number: (number + 1) * 0.6180339887498949 % 1)
        groups, sizes, places = [], [], []
        for number in spread:
            ladder, before = self._ladders[number], self._ladders[number].least
            for kept in ladder.steps:
                groups.append(number)
                sizes.append((kept - before) * ladder.rows * ladder.weight)
                places.append((kept + before) / 2 / ladder.items)
                before = kept
        self._group = torch.tensor(groups, dtype=torch.long)
        self._size = torch.tensor(sizes, dtype=torch.long)
        self._place = torch.tensor(places, dtype=torch.float64)
        self._uniform: dict[float, Tensor] = {}

    def draw(self, scores: Tensor, sparsity: float) -> TicketMask:
        """Keep the highest-scoring channels of every group, by exact count; ties go to the lower index.

        Args:
            scores: Shape (num_channels,), higher means more important.
            sparsity: Fraction of the target to remove, in [0, 1).

        Returns:
            The mask. :meth:`achieved` tells what it removes.

        Raises:
            ValueError: The sparsity or the shape of the scores is out of range.
        """
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(
                f"sparsity={sparsity} must lie in [0, 1): it is the fraction of {self.allocation.target} to remove."
            )
        if scores.shape != (self.plan.num_channels,):
            raise ValueError(
                f"scores of shape {tuple(scores.shape)} do not fit the plan: one score a channel is needed, "
                f"({self.plan.num_channels},)."
            )
        if sparsity == 0.0:
            return self.plan.full_mask()
        ranked = [ladder.ranked(scores) for ladder in self._ladders]
        if self.allocation.scope == "global":
            counts = self._counts(self._by_score([own for own, _ in ranked]), sparsity)
        else:
            if sparsity not in self._uniform:
                self._uniform[sparsity] = self._counts(self._place.argsort(stable=True), sparsity)
            counts = self._uniform[sparsity]
        return TicketMask(
            {
                ladder.group.name: ladder.mask(order, int(count) // (ladder.rows * ladder.weight))
                for ladder, (_, order), count in zip(self._ladders, ranked, counts, strict=True)
            }
        )

    def achieved(self, mask: TicketMask) -> float:
        """The fraction of the target that a mask removes."""
        counts = torch.tensor([int(mask.kept[group.name].sum()) for group in self.plan.groups])
        return 1.0 - self.cost(counts) / self.dense

    @property
    def most(self) -> float:
        """The largest sparsity that can be achieved: every group keeps its minimum."""
        return 1.0 - self.cost(self._always) / self.dense

    def misses(self, mask: TicketMask, sparsity: float) -> bool:
        """Whether what a mask removes is further from the nominal sparsity than one percent of it."""
        return abs(self.achieved(mask) - sparsity) > TOLERANCE * sparsity

    def explain_miss(self, mask: TicketMask, sparsity: float) -> str | None:
        """What is possible instead, where a mask misses its sparsity by more than one percent of it; None elsewhere."""
        if not self.misses(mask, sparsity):
            return None
        narrow = sum(not ladder.steps for ladder in self._ladders)
        held = f" {narrow} of {len(self._ladders)} layers have no step to lose and stay whole." if narrow else ""
        return (
            f"sparsity={sparsity:g} of the {self.allocation.target} cannot be met: {self.achieved(mask):.4g} is what "
            f"steps of round_to={self.allocation.round_to} channels come to, shared out with "
            f"scope={self.allocation.scope!r}, and {self.most:.4g} is the most that can be removed, with every layer "
            f"at its minimum.{held} Use a smaller round_to or min_width, or ask for that sparsity."
        )

    def _by_score(self, scores: list[Tensor]) -> Tensor:
        """The order of the steps by falling mean score of what they hold, over the mean score of their group."""
        keys: list[list[float]] = []
        for ladder, own in zip(self._ladders, scores, strict=True):
            normal = float(own.abs().mean().double()) or 1.0
            sums = torch.cat([own.new_zeros(1), own.sum(dim=0).cumsum(0)]).double()
            means = [
                float(sums[high] - sums[low]) / ((high - low) * ladder.rows * normal)
                for low, high in itertools.pairwise([ladder.least, *ladder.steps])
            ]
            # Rounding must not let a step overtake one above it in the same group.
            keys.append(list(itertools.accumulate((-mean for mean in means), max)))
        next_step = [iter(steps) for steps in keys]
        flat = torch.tensor([next(next_step[n]) for n in self._group.tolist()], dtype=torch.float64)
        # Equals as for "uniform", or the whole of one group would go before anything of another.
        uniform = self._place.argsort(stable=True)
        return uniform[flat[uniform].argsort(stable=True)]

    def _counts(self, order: Tensor, sparsity: float) -> Tensor:
        """Channels that each group keeps, shape (groups,): the steps that come first, as many as meet the target."""
        goal = (1.0 - sparsity) * self.dense

        def first(number: int) -> Tensor:
            steps = order[:number]
            return self._always.index_add(0, self._group[steps], self._size[steps])

        low, high = (
            0,
            len(order),
        )  # the cost at `low` is at most the goal, as far as it can be, that above `high` is not
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(first(middle)) <= goal:
                low = middle
            else:
                high = middle - 1
        # Of two that are equally near, the one that keeps more: a half goes up.
        candidates = [first(number) for number in (low + 1, low) if number <= len(order)]
        counts = min(candidates, key=lambda each: abs(self.cost(each) - goal))
        return self._exchanged(counts, goal, TOLERANCE * sparsity * self.dense)

    def _exchanged(self, counts: Tensor, goal: float, tolerance: float) -> Tensor:
        """Add or take a step, or two, while the goal is missed by more than the tolerance and that brings it nearer."""

        def miss(each: Tensor) -> float:
            return abs(self.cost(each) - goal)

        while miss(counts) > tolerance:
            moves = self._moves(counts)
            if not len(moves):
                break
            # Of pairs there are many; their costs are nearly those of their two moves, which tells the best few.
            changes = torch.tensor([self.cost(counts + move) - self.cost(counts) for move in moves]).double()
            together = (self.cost(counts) - goal + changes[:, None] + changes).abs()
            same = (moves[:, None] != 0) & (moves != 0)
            together[same.any(dim=2)] = torch.inf
            best = together.flatten().argsort(stable=True)[:16]
            pairs = moves[best // len(moves)] + moves[best % len(moves)]
            candidates = [counts + move for move in (*moves, *pairs[together.flatten()[best].isfinite()])]
            nearest = min(candidates, key=miss)
            if miss(nearest) >= miss(counts):
                break
            counts = nearest
        return counts

    def _moves(self, counts: Tensor) -> Tensor:
        """Every single step up or down from here, as differences of the counts: shape (moves, groups)."""
        moves = []
        for number, ladder in enumerate(self._ladders):
            ways = [kept * ladder.rows * ladder.weight for kept in (ladder.least, *ladder.steps)]
            here = ways.index(int(counts[number]))
            for there in (here - 1, here + 1):
                if 0 <= there < len(ways):
                    move = torch.zeros_like(counts)
                    move[number] = ways[there] - ways[here]
                    moves.append(move)
        return torch.stack(moves) if moves else counts.new_zeros(0, len(counts))


def draw_mask(
    plan: ChannelPlan,
    scores: Tensor,
    sparsity: float,
    *,
    target: Target = "channels",
    scope: Scope = "uniform",
    round_to: int = 8,
    min_width: int | float = 1,
    heads: Heads = "equal",
) -> TicketMask:
    """Draw one mask; see :class:`Budget`, which is to be kept where several are drawn, and :class:`Allocation`."""
    return Budget(plan, Allocation(target, scope, round_to, min_width, heads)).draw(scores, sparsity)


def _positions(plan: ChannelPlan, group: ChannelGroup) -> int:
    """How many positions of a tensor's dimension one channel of a group stands for, at least."""
    first = group.channels[0]
    counts = [int((ids == first).sum()) for dims in plan.ids.values() for ids in dims.values()]
    return min((count for count in counts if count), default=1)


def _counted(plan: ChannelPlan, target: Target) -> Iterable[Product]:
    if target == "params":
        return plan.parameters()
    return plan.macs if target == "macs" else (Product(1, (torch.arange(plan.num_channels),)),)
