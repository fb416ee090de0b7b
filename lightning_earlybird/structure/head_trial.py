"""The trial of heads: a claim that whole heads can go is believed once networks without some have been compared."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan

Compare = Callable[[ChannelPlan, TicketMask], tuple[float, str | None]]
"""Extracts along a mask; relative error against the zeroed dense network, and what is wrong (None if nothing is)."""


def confirm_heads(
    plan: ChannelPlan, compare: Compare, masks: Sequence[TicketMask], generator: torch.Generator
) -> tuple[ChannelPlan, float]:
    """Try without some of the heads, for a plan that has passed verification otherwise.

    Args:
        plan: The plan.
        compare: Tries a mask.
        masks: Two masks that pass, which say what the groups without heads keep meanwhile: with all their channels,
            rounding would grow on its way through a deep network.
        generator: Draws which heads stay.

    Returns:
        The plan, in which only groups that pass say that heads can go, and the largest error among them. A group that
        fails loses nothing but that claim.
    """
    while claiming := [group for group in plan.groups if group.can_lose_rows]:
        error, problem = _try(plan, claiming, compare, masks, generator)
        if problem is None:
            return plan, error
        # Those that pass alone but not together leave nobody to blame: then none of them may lose heads.
        failed = _failing(plan, claiming, compare, masks, generator) or {group.name for group in claiming}
        groups = (replace(group, heads=()) if group.name in failed else group for group in plan.groups)
        plan = replace(plan, groups=tuple(groups))
    return plan, 0.0


def rescue_heads(
    plan: ChannelPlan,
    failed: Mapping[str, str],
    compare: Compare,
    masks: Sequence[TicketMask],
    generator: torch.Generator,
) -> tuple[ChannelPlan, dict[str, str]]:
    """Groups that fail because a head's width is written down somewhere may still lose whole heads.

    Args:
        plan: The plan.
        failed: Group name -> why it fails when its heads get narrower.
        compare: Tries a mask.
        masks: Two masks, which say what groups that have not failed keep meanwhile.
        generator: Draws which heads stay.

    Returns:
        The plan, in which each head of such a group is a single channel, and the groups that fail all the same.
    """
    names = {group.name for group in plan.groups if group.can_lose_rows and group.name in failed}
    merged = _merge_rows(plan, names)
    passing = [
        TicketMask({n: kept if n not in failed else torch.ones_like(kept) for n, kept in m.kept.items()}) for m in masks
    ]
    candidates = [group for group in merged.groups if group.name in names]
    names -= _failing(merged, candidates, compare, passing, generator)
    rest = {name: problem for name, problem in failed.items() if name not in names}
    return (_merge_rows(plan, names), rest) if names else (plan, rest)


def _failing(
    plan: ChannelPlan,
    groups: Sequence[ChannelGroup],
    compare: Compare,
    masks: Sequence[TicketMask],
    generator: torch.Generator,
) -> set[str]:
    """Which of ``groups`` fail: by halves, since most of many groups are right."""
    if not groups or _try(plan, groups, compare, masks, generator)[1] is None:
        return set()
    if len(groups) == 1:
        return {groups[0].name}
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    return {name for half in halves for name in _failing(plan, half, compare, masks, generator)}


def _try(
    plan: ChannelPlan,
    groups: Sequence[ChannelGroup],
    compare: Compare,
    masks: Sequence[TicketMask],
    generator: torch.Generator,
) -> tuple[float, str | None]:
    worst, problem = 0.0, None
    for mask in _without_heads(plan, groups, masks, generator):
        error, problem = compare(plan, mask)
        worst = max(worst, error)
        if problem is not None:
            break
    return worst, problem


def _without_heads(
    plan: ChannelPlan, groups: Sequence[ChannelGroup], masks: Sequence[TicketMask], generator: torch.Generator
) -> Iterator[TicketMask]:
    """Two masks: the first keeps a random number of rows of each of ``groups``, the second those that it removes.

    The rows that remain are narrower in the first and whole in the second. Other groups are as in ``masks``.
    """
    chosen = {group.name for group in groups}
    rows = {
        group.name: torch.rand(group.rows, 1, generator=generator).argsort(dim=0)
        < torch.randint(1, group.rows, (1,), generator=generator)
        for group in groups
    }
    for number, mask in enumerate(masks):
        kept = dict(mask.kept)
        for group in plan.groups:
            if group.name in chosen:
                width = (
                    int(torch.randint(1, group.width + 1, (1,), generator=generator)) if number == 0 else group.width
                )
                columns = torch.rand(group.rows, group.width, generator=generator).argsort(dim=1) < width
                stays = rows[group.name] if number == 0 else ~rows[group.name]
                kept[group.name] = (stays & columns).flatten()
            elif len(kept[group.name]) != group.size:
                kept[group.name] = torch.ones(group.size, dtype=torch.bool)
        yield TicketMask(kept)


def _merge_rows(plan: ChannelPlan, names: Collection[str]) -> ChannelPlan:
    """The plan in which each row of the named groups is a single channel."""
    numbers = torch.empty(plan.num_channels, dtype=torch.long)
    groups: list[ChannelGroup] = []
    count = 0
    for group in plan.groups:
        size, repeats = (group.rows, group.width) if group.name in names else (group.size, 1)
        fresh = torch.arange(count, count + size)
        numbers[group.channels] = fresh.repeat_interleave(repeats)
        groups.append(replace(group, channels=fresh))
        count += size
    return plan.renumbered(numbers, groups)
