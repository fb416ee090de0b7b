"""Whole heads: where a network keeps the number of its attention heads, and telling a ticket how many it has."""

from collections import Counter
from dataclasses import replace

from torch import nn

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


def set_heads(ticket: nn.Module, plan: ChannelPlan, mask: TicketMask) -> None:
    """Tell a ticket how many heads it has left, in place."""
    for group in plan.groups:
        if group.can_lose_rows:
            left = int(group.rows_kept(mask.kept[group.name]).sum())
            for module, attribute in group.heads:
                setattr(ticket.get_submodule(module), attribute, left)
