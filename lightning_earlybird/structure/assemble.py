"""Assembly: what a trace has learned about labels becomes a channel plan."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_earlybird.structure.attention import TracedAttention
from lightning_earlybird.structure.labels import varying
from lightning_earlybird.structure.plan import (
    ChannelGroup,
    ChannelPlan,
    ChannelStatistic,
    FrozenChannels,
    QueryScale,
)
from lightning_earlybird.structure.products import Product
from lightning_earlybird.structure.rules import Call
from lightning_earlybird.structure.tracer import ChannelTracer

Place = tuple[str, int]  # (tensor name, dimension)


def assemble(tracer: ChannelTracer) -> ChannelPlan:
    """Number the components of labels that can be pruned, and write down where each of them lives."""
    couplings = tracer.couplings
    components = couplings.components()
    products = couplings.products()
    reasons = couplings.frozen_reasons(components)
    produced, frozen = torch.zeros_like(products), torch.zeros_like(products)
    produced[components[products]] = True
    frozen[list(reasons)] = True
    for component in _all_in_one(tracer, components, produced & ~frozen).tolist():
        frozen[component] = True
        reasons[component] = "all channels of a layer depend on each other"

    members = _by_place(list(tracer.dimensions.values()), components, produced & ~frozen)
    channel = torch.full((couplings.count,), -1, dtype=torch.long)  # component -> channel id
    channel[[component for group in members.values() for component in group]] = torch.arange(
        sum(map(len, members.values()))
    )

    def ids_of(labels: Tensor) -> Tensor:
        return channel[components[labels]]

    ids: dict[str, dict[int, Tensor]] = {}
    for (name, dim), labels in tracer.dimensions.items():
        numbers = ids_of(labels)
        if bool((numbers >= 0).any()):
            ids.setdefault(name, {})[dim] = numbers
    heads = _heads([ids_of(matrix) for matrix in tracer.rows])
    names = _names(list(members), list(tracer.dimensions.items()), products)
    groups = [channel[group] for group in members.values()]
    return ChannelPlan(
        ids=ids,
        groups=tuple(_group(name, numbers, heads) for name, numbers in zip(names, groups, strict=True)),
        inputs={name: ids_of(labels) for name, labels in tracer.inputs.items()},
        frozen=_frozen_report(tracer, components, produced & frozen, reasons),
        unknown_operations=dict(tracer.unknown),
        shapes=dict(tracer.shapes),
        macs=tuple(Product(each.constant, tuple(map(ids_of, each.factors))) for each in tracer.products),
        query_scales=query_scales(tracer, [each for each in tracer.attentions if each.by_width]),
        statistics=statistics(tracer, ids_of),
        own_numbers=own_numbers(tracer),
        score_numbers=score_numbers(tracer),
    )


def statistics(tracer: ChannelTracer, ids_of: Callable[[Tensor], Tensor]) -> tuple[ChannelStatistic, ...]:
    """Where the network has reduced over channels; ``ids_of`` tells the channel ids of labels."""
    return tuple(ChannelStatistic(call, dim, ids_of(axis)) for call, dim, axis in tracer.statistics if varying(axis))


def own_numbers(tracer: ChannelTracer) -> frozenset[Call]:
    """Calls whose numbers are a ticket's own; an attention's scale is not: queries are rescaled instead."""
    return frozenset(tracer.own_numbers) - score_numbers(tracer)


def score_numbers(tracer: ChannelTracer) -> frozenset[Call]:
    """Calls whose numbers scale the scores of attentions."""
    return frozenset[Call]().union(*(each.scalars for each in tracer.attentions))


def _all_in_one(tracer: ChannelTracer, components: Tensor, usable: Tensor) -> Tensor:
    """Components that hold every slice along some dimension: to remove them would cut the network in two."""
    found = [components[labels[:1]] for labels in tracer.dimensions.values() if _is_one(components[labels])]
    whole: Tensor = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    return whole[usable[whole]]


def _is_one(components: Tensor) -> bool:
    return len(components) > 1 and bool((components == components[0]).all())


def _by_place(dimensions: Sequence[Tensor], components: Tensor, usable: Tensor) -> dict[tuple[int, ...], list[int]]:
    """Components that live in the same places form a group: numbers of those places -> components."""
    if not dimensions:
        return {}
    sizes = torch.tensor([len(labels) for labels in dimensions])
    place = torch.arange(len(dimensions)).repeat_interleave(sizes)
    component = components[torch.cat(list(dimensions))]
    chosen = usable[component]
    pairs = torch.unique(component[chosen] * len(dimensions) + place[chosen])
    found, counts = torch.unique_consecutive(pairs // len(dimensions), return_counts=True)
    places = iter((pairs % len(dimensions)).tolist())
    members: dict[tuple[int, ...], list[int]] = {}
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        members.setdefault(tuple(next(places) for _ in range(count)), []).append(number)
    return members


def _names(
    members: Sequence[tuple[int, ...]], dimensions: Sequence[tuple[Place, Tensor]], products: Tensor
) -> list[str]:
    """Each group is called after the first parameter that produces its channels; a number tells namesakes apart."""
    producing = [bool(products[labels].any()) for _, labels in dimensions]
    names: list[str] = []
    taken: dict[str, int] = {}
    for places in members:
        (name, _), _ = dimensions[next((place for place in places if producing[place]), places[0])]
        name = name.removesuffix(".weight")
        taken[name] = taken.get(name, 0) + 1
        names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return names


def _heads(matrices: Sequence[Tensor]) -> dict[frozenset[int], list[tuple[int, ...]]]:
    """Set of channels -> the finest split of it into rows that must keep equally many."""
    finest: dict[frozenset[int], list[tuple[int, ...]]] = {}
    for matrix in matrices:
        # Queries, keys and values side by side are one channel each.
        rows = list(dict.fromkeys(tuple(dict.fromkeys(row)) for row in matrix.tolist()))
        channels = frozenset(channel for row in rows for channel in row)
        disjoint = len(channels) == sum(map(len, rows)) and len({len(row) for row in rows}) == 1
        if -1 not in channels and disjoint and len(rows[0]) > 1 and len(rows) > len(finest.get(channels, [()])):
            finest[channels] = rows
    return finest


def _group(name: str, channels: Tensor, heads: Mapping[frozenset[int], list[tuple[int, ...]]]) -> ChannelGroup:
    """The group, ordered by heads where it has any."""
    rows = heads.get(frozenset(channels.tolist()))
    return ChannelGroup(name, channels) if rows is None else ChannelGroup(name, torch.tensor(rows).flatten(), len(rows))


def _frozen_report(
    tracer: ChannelTracer, components: Tensor, lost: Tensor, reasons: Mapping[int, str]
) -> tuple[FrozenChannels, ...]:
    """One entry for every layer output (first dimension of a weight) that is produced but frozen."""
    report = []
    for (name, dim), labels in tracer.dimensions.items():
        found = components[labels][lost[components[labels]]]
        if dim == 0 and name.endswith("weight") and len(found):
            report.append(FrozenChannels(name.removesuffix(".weight"), len(found), reasons[int(found[0])]))
    return tuple(report)


def query_scales(tracer: ChannelTracer, attentions: Sequence[TracedAttention]) -> tuple[QueryScale, ...]:
    """Find the weight rows that made each query: labels keep the identity of the parameter that produced them."""
    places = list(tracer.dimensions)
    if not places:
        return ()
    # Dimensions got their labels in this order, before everything else.
    starts = torch.stack([labels[0] for labels in tracer.dimensions.values()])
    found: dict[tuple[Place, int], list[Tensor]] = {}  # parameter, width -> rows
    for attention in attentions:
        for row in attention.rows:
            origins = torch.unique(torch.searchsorted(starts, row.contiguous(), right=True) - 1).tolist()
            if len(origins) == 1 and origins[0] >= 0:  # otherwise it is not one projection's
                rows = found.setdefault((places[origins[0]], len(row)), [])
                positions = row - starts[origins[0]]
                if not any(torch.equal(positions, other) for other in rows):
                    rows.append(positions)
    scales: list[QueryScale] = []
    for ((name, dim), _), rows in found.items():
        scales.append(QueryScale(name, dim, torch.stack(rows)))
        # nn.MultiheadAttention keeps the biases of separate projections in one, queries first.
        for ending, partner in (("weight", "bias"), ("q_proj_weight", "in_proj_bias")):
            bias = name.removesuffix(ending) + partner
            if name.endswith(ending) and (bias, 0) in tracer.dimensions:
                scales.append(QueryScale(bias, 0, torch.stack(rows)))
    return tuple(scales)
