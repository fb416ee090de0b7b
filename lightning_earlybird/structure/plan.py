"""The channel plan: for every parameter and buffer, which channel each slice belongs to."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.products import Product


class StructureError(ValueError):
    """A network cannot be traced, verified or pruned; the message says what was found and what to do."""


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are chosen among each other: one layer's width, with everything that has to follow it.

    Attributes:
        name: The first parameter that produces the channels, without its ``.weight``.
        channels: Global channel ids, shape (size,), in the order in which masks list them.
        rows: Number of equal blocks that must keep equally many channels (attention heads); 1 where the choice is free.
        heads: Where the network keeps the number of rows, as (module name, attribute); with it, whole rows can go.
    """

    name: str
    channels: Tensor
    rows: int = 1
    heads: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        """Number of channels in the dense network."""
        return len(self.channels)

    @property
    def width(self) -> int:
        """Number of channels in one row."""
        return self.size // self.rows

    @property
    def can_lose_rows(self) -> bool:
        """Which masks are allowed: every row keeps equally many channels, or (if True) equally many or none."""
        return bool(self.heads)

    def rows_kept(self, kept: Tensor) -> Tensor:
        """Shape (rows,), bool: which rows keep any channel, for a mask of shape (size,)."""
        return kept.view(self.rows, -1).any(dim=1)


@dataclass(frozen=True)
class FrozenChannels:
    """Channels that are never pruned, and why."""

    name: str
    size: int
    reason: str


def by_reason(frozen: Iterable[FrozenChannels], examples: int = 3) -> list[tuple[int, str]]:
    """What cannot be pruned, gathered: most channels first.

    Numbers do not tell reasons apart, so that thirty blocks that fail alike are one entry.

    Returns:
        Number of channels; the reason, with some names.
    """
    reasons: dict[str, list[FrozenChannels]] = {}
    for entry in frozen:
        reasons.setdefault(re.sub(r"\d[\d.]*(e[+-]\d+)?", "", entry.reason), []).append(entry)
    result = []
    for entries in reasons.values():
        names = ", ".join(entry.name for entry in entries[:examples])
        more = f" and {len(entries) - examples} more" if len(entries) > examples else ""
        result.append((sum(entry.size for entry in entries), f"{entries[0].reason} ({names}{more})"))
    return sorted(result, key=lambda item: -item[0])


@dataclass(frozen=True, eq=False)
class QueryScale:
    """Rows of a projection that feed the query of an attention.

    Its scale is ``1 / sqrt(head width)``, computed from the shape at run time.

    Attributes:
        tensor: Name of the weight.
        dim: Its output dimension.
        rows: Positions along ``dim``, shape (heads, head width).
    """

    tensor: str
    dim: int
    rows: Tensor


@dataclass(frozen=True, eq=False)
class ChannelStatistic:
    """An operation that reduces over channels (a mean square, a norm, a softmax): a ticket's is over those that stay.

    Attributes:
        call: Name of the operation, and how many calls of it come before in a forward pass.
        dim: The reduced dimension of its input.
        ids: Channel ids along ``dim``; of the input's rank, with size 1 where they do not vary.
    """

    call: tuple[str, int]
    dim: int
    ids: Tensor


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """How a denoiser's tensors depend on its channels; traced once per fit.

    Attributes:
        ids: Tensor name -> dimension -> channel id of each slice along it, shape (size of the dimension,), -1 where the
            slice is never pruned.
        groups: The channel groups, in the order in which the network holds them.
        inputs: Module name -> channel ids of its input, for modules that keep a width as an attribute (see
            ``adapters``).
        frozen: What cannot be pruned, with the reason.
        unknown_operations: Operation name -> number of calls that the tracer had no rule for (their channels are
            frozen).
        query_scales: Where a narrower attention head needs its query rescaled to compute the same scores.
        shapes: Dense shape of every parameter, tied ones once.
        macs: Multiply-accumulates of the traced call, as a sum of products of widths.
        data_reads: Where Python code reads values of tensors: of what is decided there, only the branch that was taken
            has been seen.
        verified: Whether ``verify_plan`` has returned this plan; nothing is trained that comes from another one.
        statistics: Where the network reduces over channels.
        own_numbers: Calls whose numbers are a ticket's own, as it computes them from its widths: in norms that are
            written out, and where pieces are weighed before they are joined. Everywhere else a number that depends on
            widths makes verification fail.
        score_numbers: Calls whose numbers scale attention scores; queries are rescaled where those depend on widths.
    """

    ids: Mapping[str, Mapping[int, Tensor]]
    groups: tuple[ChannelGroup, ...]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[FrozenChannels, ...] = ()
    unknown_operations: Mapping[str, int] = field(default_factory=dict)
    query_scales: tuple[QueryScale, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    macs: tuple[Product, ...] = ()
    data_reads: tuple[str, ...] = ()
    verified: bool = False
    statistics: tuple[ChannelStatistic, ...] = ()
    own_numbers: frozenset[tuple[str, int]] = frozenset()
    score_numbers: frozenset[tuple[str, int]] = frozenset()

    @property
    def num_channels(self) -> int:
        """Channels that can be pruned."""
        return sum(group.size for group in self.groups)

    def summary(self, examples: int = 3) -> str:
        """What can be pruned and what stays, by reason; a line each."""
        many = "group" if len(self.groups) == 1 else "groups"
        lines = [f"{self.num_channels:,} channels in {len(self.groups)} {many} can be pruned"]
        return "\n".join([*lines, *(f"{size:,} stay: {text}" for size, text in by_reason(self.frozen, examples))])

    def group_of_channel(self) -> Tensor:
        """Shape (num_channels,): the index of each channel's group."""
        result = torch.empty(self.num_channels, dtype=torch.long)
        for index, group in enumerate(self.groups):
            result[group.channels] = index
        return result

    def renumbered(self, numbers: Tensor, groups: Sequence[ChannelGroup]) -> "ChannelPlan":
        """The plan with other channel ids everywhere.

        Args:
            numbers: Shape (num_channels,): the new id of each channel, -1 for those that can no longer be pruned; one
                id for several makes them one channel.
            groups: The groups that remain, with their new ids.
        """
        table = torch.cat([numbers, torch.tensor([-1])])  # the last entry serves id -1
        ids = {name: {dim: table[old] for dim, old in dims.items()} for name, dims in self.ids.items()}
        ids = {name: {dim: new for dim, new in dims.items() if bool((new >= 0).any())} for name, dims in ids.items()}
        return replace(
            self,
            ids={name: dims for name, dims in ids.items() if dims},
            groups=tuple(groups),
            inputs={name: table[old] for name, old in self.inputs.items()},
            macs=tuple(Product(each.constant, tuple(table[old] for old in each.factors)) for each in self.macs),
            statistics=tuple(replace(each, ids=table[each.ids]) for each in self.statistics),
        )

    def full_mask(self) -> TicketMask:
        """The mask that keeps everything."""
        return TicketMask({group.name: torch.ones(group.size, dtype=torch.bool) for group in self.groups})

    def kept(self, mask: TicketMask) -> Tensor:
        """Shape (num_channels,), bool: the mask by global channel id.

        Raises:
            ValueError: The mask's groups or sizes are not the plan's, or the rows of a group (attention heads) keep
                different numbers of channels.
        """
        if set(mask.kept) != {group.name for group in self.groups}:
            odd = sorted(set(mask.kept) ^ {group.name for group in self.groups})
            raise ValueError(
                f"mask does not belong to this plan: groups {odd[:3]} are in one of them only. Draw the mask from this "
                "plan."
            )
        result = torch.empty(self.num_channels, dtype=torch.bool)
        for group in self.groups:
            kept = mask.kept[group.name]
            if len(kept) != group.size:
                raise ValueError(
                    f"mask of group {group.name!r} has {len(kept)} channels, the plan has {group.size}. Draw the mask "
                    "from this plan."
                )
            counts = set(kept.view(group.rows, -1).sum(dim=1).tolist())
            if len(counts - {0} if group.can_lose_rows else counts) > 1:
                raise ValueError(
                    f"mask of group {group.name!r} keeps different numbers in its {group.rows} heads; every head must "
                    f"keep equally many{', or none' if group.can_lose_rows else ''}."
                )
            result[group.channels] = kept
        return result

    def keep_indices(self, mask: TicketMask) -> dict[str, dict[int, Tensor]]:
        """Tensor name -> dimension -> positions that stay, for every dimension that loses any."""
        kept = self.kept(mask)
        result: dict[str, dict[int, Tensor]] = {}
        for name, dims in self.ids.items():
            for dim, ids in dims.items():
                stays = (ids < 0) | kept[ids.clamp_min(0)]
                if not bool(stays.all()):
                    result.setdefault(name, {})[dim] = stays.nonzero().flatten()
        return result

    def parameters(self) -> tuple[Product, ...]:
        """The number of parameters, as a sum of products of widths."""
        products = []
        for name, shape in self.shapes.items():
            channels = self.ids.get(name, {})
            fixed = math.prod(size for dim, size in enumerate(shape) if dim not in channels)
            products.append(Product(fixed, tuple(channels.values())))
        return tuple(products)

    def input_widths(self, mask: TicketMask) -> dict[str, int]:
        """Width of the input of every module that the trace has seen receive channels, under the mask."""
        return {module: int(stays.sum()) for module, stays in self.kept_inputs(mask).items()}

    def kept_inputs(self, mask: TicketMask) -> dict[str, Tensor]:
        """Which channels of those inputs stay: module name -> shape (dense width,), bool."""
        kept = self.kept(mask)
        return {module: (ids < 0) | kept[ids.clamp_min(0)] for module, ids in self.inputs.items()}

    def row_factors(self, mask: TicketMask) -> dict[str, tuple[int, Tensor]]:
        """What keeps the scores of narrower attention heads as they were.

        Returns:
            Tensor name -> (dimension, factor per *dense* position): ``sqrt(new / old head width)`` on query rows, 1
            elsewhere.
        """
        kept = self.kept(mask)
        result: dict[str, tuple[int, Tensor]] = {}
        for scale in self.query_scales:
            ids = self.ids.get(scale.tensor, {}).get(scale.dim)
            if ids is None:
                continue
            stays = ((ids < 0) | kept[ids.clamp_min(0)])[scale.rows]
            # Heads that are gone altogether do not make the others narrower.
            old, new = scale.rows.shape[1], int(stays.sum(dim=1).max())
            if new in (0, old):
                continue
            _, factors = result.setdefault(scale.tensor, (scale.dim, torch.ones(len(ids), dtype=torch.float64)))
            factors[scale.rows.flatten()] = math.sqrt(new / old)
        return result
