"""Whole heads: where a network keeps the number of its attention heads, and which groups may lose some."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.adapters import head_counts
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan


def find_heads(model: nn.Module, plan: ChannelPlan) -> ChannelPlan:
    """The plan, with groups that know which attributes say how many rows they have (see ``ChannelGroup.heads``).

    For each tensor that holds channels of a group, the attributes are looked for on the nearest module around it. It is
    a guess by name and value, for verification to confirm. An attribute that would count the rows of two groups at once
    counts for neither: each chooses for itself how many it keeps.
    """
    modules = dict(model.named_modules())
    owner = plan.group_of_channel()
    tensors: list[list[str]] = [[] for _ in plan.groups]
    for name, dims in plan.ids.items():
        found = {index for ids in dims.values() for index in owner[ids[ids >= 0]].unique().tolist()}
        for index in found:
            tensors[index].append(name)

    def holders(group: ChannelGroup, names: list[str]) -> tuple[tuple[str, str], ...]:
        result: dict[tuple[str, str], None] = {}
        for name in names if group.rows > 1 else ():
            while name:
                name, _, _ = name.rpartition(".")
                counts = [a for a, value in head_counts(modules[name]).items() if value == group.rows]
                if counts:
                    result |= dict.fromkeys((name, attribute) for attribute in counts)
                    break
        return tuple(result)

    claims = [holders(group, names) for group, names in zip(plan.groups, tensors, strict=True)]
    claimed = Counter(place for places in claims for place in places)
    groups = [
        replace(group, heads=places) if all(claimed[place] == 1 for place in places) else group
        for group, places in zip(plan.groups, claims, strict=True)
    ]
    return replace(plan, groups=tuple(groups))


Compare = Callable[[ChannelPlan, TicketMask], tuple[float, str | None]]
"""Extracts along a mask; relative error against the zeroed dense network, and what is wrong (None if nothing is)."""


def confirm_heads(plan: ChannelPlan, compare: Compare, generator: torch.Generator) -> tuple[ChannelPlan, float]:
    """Try without some of the heads, for a plan that has passed verification otherwise.

    Returns:
        The plan, in which only groups that pass say that heads can go, and the largest error among them. A group that
        fails loses nothing but that claim.
    """
    while claiming := [group for group in plan.groups if group.can_lose_rows]:
        error, problem = _try(plan, claiming, compare, generator)
        if problem is None:
            return plan, error
        # Those that pass alone but not together leave nobody to blame: then none of them may lose heads.
        failed = _failing(plan, claiming, compare, generator) or {group.name for group in claiming}
        groups = (replace(group, heads=()) if group.name in failed else group for group in plan.groups)
        plan = replace(plan, groups=tuple(groups))
    return plan, 0.0


def rescue_heads(
    plan: ChannelPlan, failed: Mapping[str, str], compare: Compare, generator: torch.Generator
) -> tuple[ChannelPlan, dict[str, str]]:
    """Groups that fail because a head's width is written down somewhere may still lose whole heads.

    Args:
        plan: The plan.
        failed: Group name -> why it fails when its heads get narrower.
        compare: Tries a mask.
        generator: Draws masks.

    Returns:
        The plan, in which each head of such a group is a single channel, and the groups that fail all the same.
    """
    names = {group.name for group in plan.groups if group.can_lose_rows and group.name in failed}
    merged = _merge_rows(plan, names)
    names -= _failing(merged, [group for group in merged.groups if group.name in names], compare, generator)
    rest = {name: problem for name, problem in failed.items() if name not in names}
    return (_merge_rows(plan, names), rest) if names else (plan, rest)


def _failing(
    plan: ChannelPlan, groups: Sequence[ChannelGroup], compare: Compare, generator: torch.Generator
) -> set[str]:
    """Which of ``groups`` fail: by halves, since most of many groups are right."""
    if not groups or _try(plan, groups, compare, generator)[1] is None:
        return set()
    if len(groups) == 1:
        return {groups[0].name}
    middle = len(groups) // 2
    return _failing(plan, groups[:middle], compare, generator) | _failing(plan, groups[middle:], compare, generator)


def _try(
    plan: ChannelPlan, groups: Sequence[ChannelGroup], compare: Compare, generator: torch.Generator
) -> tuple[float, str | None]:
    worst, problem = 0.0, None
    for mask in head_masks(plan, groups, generator):
        error, problem = compare(plan, mask)
        worst = max(worst, error)
        if problem is not None:
            break
    return worst, problem


def head_masks(
    plan: ChannelPlan, groups: Sequence[ChannelGroup], generator: torch.Generator
) -> tuple[TicketMask, TicketMask]:
    """Masks that remove whole rows: the first a random number of each of ``groups``, the second those it keeps.

    The first leaves fewer channels in the rows that remain, too; the second leaves them whole, and both every other
    group.
    """
    chosen = {group.name for group in groups}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for group in plan.groups:
        stays = goes = torch.ones(group.rows, group.width, dtype=torch.bool)
        if group.name in chosen:
            count = int(torch.randint(1, group.rows, (1,), generator=generator))
            width = int(torch.randint(1, group.width + 1, (1,), generator=generator))
            row = torch.rand(group.rows, 1, generator=generator).argsort(dim=0) < count
            stays = row & (torch.rand(group.rows, group.width, generator=generator).argsort(dim=1) < width)
            goes = ~row & goes
        first[group.name], second[group.name] = stays.flatten(), goes.flatten()
    return TicketMask(first), TicketMask(second)


def _merge_rows(plan: ChannelPlan, names: Collection[str]) -> ChannelPlan:
    """The plan in which each row of the named groups is a single channel."""
    renumbered = torch.full((plan.num_channels + 1,), -1, dtype=torch.long)  # the last entry serves id -1
    groups: list[ChannelGroup] = []
    count = 0
    for group in plan.groups:
        size, repeats = (group.rows, group.width) if group.name in names else (group.size, 1)
        fresh = torch.arange(count, count + size)
        renumbered[group.channels] = fresh.repeat_interleave(repeats)
        groups.append(replace(group, channels=fresh))
        count += size
    return replace(
        plan,
        ids={name: {dim: renumbered[numbers] for dim, numbers in dims.items()} for name, dims in plan.ids.items()},
        groups=tuple(groups),
        inputs={name: renumbered[numbers] for name, numbers in plan.inputs.items()},
    )


def set_heads(ticket: nn.Module, plan: ChannelPlan, mask: TicketMask) -> None:
    """Tell a ticket how many heads it has left, in place."""
    for group in plan.groups:
        if group.can_lose_rows:
            left = int(group.rows_kept(mask.kept[group.name]).sum())
            for module, attribute in group.heads:
                setattr(ticket.get_submodule(module), attribute, left)
