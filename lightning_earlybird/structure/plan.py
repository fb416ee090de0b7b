"""The channel plan: for every parameter and buffer, which channel each slice belongs to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_earlybird.masks import TicketMask


class StructureError(ValueError):
    """A network cannot be traced, verified or pruned; the message says what was found and what to do."""


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are chosen among each other: one layer's width, with everything that has to follow it.

    Attributes:
        name: The first parameter that produces the channels, without its ``.weight``.
        channels: Global channel ids, shape (size,), in the order in which masks list them.
        rows: Number of equal blocks that must keep equally many channels (attention heads); 1 where the choice is free.
    """

    name: str
    channels: Tensor
    rows: int = 1

    @property
    def size(self) -> int:
        """Number of channels in the dense network."""
        return len(self.channels)


@dataclass(frozen=True)
class FrozenChannels:
    """Channels that are never pruned, and why."""

    name: str
    size: int
    reason: str


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
        statistics: Where the network reduces over channels.
        own_numbers: Calls whose numbers are a ticket's own, as it computes them from its widths: in norms that are
            written out, and where pieces are weighed before they are joined. Everywhere else a number that depends on
            widths makes verification fail.
    """

    ids: Mapping[str, Mapping[int, Tensor]]
    groups: tuple[ChannelGroup, ...]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: tuple[FrozenChannels, ...] = ()
    unknown_operations: Mapping[str, int] = field(default_factory=dict)
    query_scales: tuple[QueryScale, ...] = ()
    statistics: tuple[ChannelStatistic, ...] = ()
    own_numbers: frozenset[tuple[str, int]] = frozenset()

    @property
    def num_channels(self) -> int:
        """Channels that can be pruned."""
        return sum(group.size for group in self.groups)

    def group_of_channel(self) -> Tensor:
        """Shape (num_channels,): the index of each channel's group."""
        result = torch.empty(self.num_channels, dtype=torch.long)
        for index, group in enumerate(self.groups):
            result[group.channels] = index
        return result

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
            if group.rows > 1 and len(set(kept.view(group.rows, -1).sum(dim=1).tolist())) > 1:
                raise ValueError(
                    f"mask of group {group.name!r} keeps different numbers in its {group.rows} heads; every head must "
                    "keep equally many."
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

    def input_widths(self, mask: TicketMask) -> dict[str, int]:
        """Width of the input of every module that the trace has seen receive channels, under the mask."""
        kept = self.kept(mask)
        return {module: int(((ids < 0) | kept[ids.clamp_min(0)]).sum()) for module, ids in self.inputs.items()}

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
            old, new = scale.rows.shape[1], int(stays[0].sum())
            if new == old:
                continue
            _, factors = result.setdefault(scale.tensor, (scale.dim, torch.ones(len(ids))))
            factors[scale.rows.flatten()] = math.sqrt(new / old)
        return result
