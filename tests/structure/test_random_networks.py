"""A wrong extraction must not be reachable: random networks, and plans that have been tampered with.

What is compared, and how, is written here once more, without the code of the verification. ``EARLYBIRD_EXAMPLES`` sets
the number of examples, for a longer search than the suite's.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import random_mask
from random_networks import RandomNetwork, inputs, random_network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import (
    ChannelPlan,
    StructureError,
    WidthCost,
    count_macs,
    count_parameters,
    extract,
    trace_plan,
    verify_plan,
)

EXAMPLES = int(os.environ.get("EARLYBIRD_EXAMPLES", 0))
TOLERANCE = 1e-6  # in double precision; the factor of query scales is in single precision


# A ticket takes these over the channels that it has. Here they become sums, to which zeros add nothing, and functions
# of single elements that leave zero at zero; over other dimensions than channels that changes both networks alike.
IN_PLACE_OF_STATISTICS: dict[Any, Callable[..., Tensor]] = {
    Tensor.softmax: lambda x, dim: x.tanh(),
    Tensor.mean: lambda x, dim, keepdim=False: x.sum(dim, keepdim) / 8,
    Tensor.amax: lambda x, dim, keepdim=False: x.relu().sum(dim, keepdim) / 2,
    Tensor.std: lambda x, dim, keepdim=False: (x.square().sum(dim, keepdim) / 4 + 0.1).sqrt(),
}


class WithoutStatistics(TorchFunctionMode):
    """Norms over several channels become a function of each channel: zeros take part in them, missing ones do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in IN_PLACE_OF_STATISTICS:
            return IN_PLACE_OF_STATISTICS[func](*args, **given)
        if func is nn.functional.group_norm:
            weight, bias = given.get("weight"), given.get("bias")
            weight, bias = (*args[2:4], weight, bias)[:2]
            shape = (1, -1) + (1,) * (args[0].dim() - 2)
        elif func in (nn.functional.layer_norm, nn.functional.rms_norm):
            weight, bias = (*args[2:4], given.get("weight"), given.get("bias"))[:2]
            shape = (-1,)
        else:
            return func(*args, **given)
        out = torch.atan(3 * args[0])
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)


def without(network: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy whose removed slices are zero, one by one."""
    result = copy.deepcopy(network)
    tensors = dict([*result.named_parameters(), *result.named_buffers()])
    removed = {
        channel
        for group in plan.groups
        for channel, stays in zip(group.channels.tolist(), mask.kept[group.name].tolist(), strict=True)
        if not stays
    }
    with torch.no_grad():
        for name, dims in plan.ids.items():
            for dim, ids in dims.items():
                for position, channel in enumerate(ids.tolist()):
                    if channel in removed:
                        tensors[name].select(dim, position).zero_()
    return result


def difference(network: nn.Module, plan: ChannelPlan, mask: TicketMask, seed: int) -> float:
    """Largest difference between the ticket and the zeroed network, on other samples than those that were traced."""
    double = copy.deepcopy(network).double()
    given = tuple(tensor.double() for tensor in inputs(2, seed))
    with torch.no_grad(), WithoutStatistics():
        expected: Tensor = without(double, plan, mask)(*given)
        actual: Tensor = extract(double, plan, mask)(*given)
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def tampered(plan: ChannelPlan, random: Random) -> ChannelPlan:
    """The plan with one mistake of a kind that a tracer could make."""
    ids = {name: dict(dims) for name, dims in plan.ids.items()}
    name = random.choice(sorted(ids))
    dim = random.choice(sorted(ids[name]))
    old = ids[name][dim]
    kind = random.choice(["roll", "swap", "permute", "drop", "shift", "one lost", "as another", "merge", "no heads"])
    if kind == "drop":
        del ids[name][dim]
    elif kind == "roll":
        ids[name][dim] = old.roll(random.randrange(1, len(old)))
    elif kind == "permute":
        ids[name][dim] = old[torch.tensor(random.sample(range(len(old)), len(old)))]
    elif kind == "swap":
        first, second = random.sample(range(len(old)), 2)
        new = old.clone()
        new[first], new[second] = old[second], old[first]
        ids[name][dim] = new
    elif kind == "one lost":
        new = old.clone()
        new[random.randrange(len(old))] = -1
        ids[name][dim] = new
    elif kind == "shift":
        ids[name][dim] = torch.where(old < 0, old, (old + 1) % plan.num_channels)
    elif kind == "no heads":
        return replace(plan, groups=tuple(replace(group, rows=1) for group in plan.groups))
    else:
        first, second = random.choice(plan.groups), random.choice(plan.groups)
        order = random.sample(range(plan.num_channels), plan.num_channels)
        table = torch.tensor(order) if kind == "merge" and first is second else torch.arange(plan.num_channels)
        width = min(first.size, second.size)
        table[first.channels[:width]] = second.channels[:width]  # channels of one group are taken for another's
        places = [(name, dim)] if kind == "as another" else [(n, d) for n, dims in ids.items() for d in dims]
        for place, d in places:
            ids[place][d] = torch.where(ids[place][d] < 0, ids[place][d], table[ids[place][d].clamp_min(0)])
    return replace(plan, ids={key: dims for key, dims in ids.items() if dims})


def accepted(network: RandomNetwork, plan: ChannelPlan) -> ChannelPlan | None:
    """What verification makes of the plan; None where it refuses it."""
    try:
        verified = verify_plan(network, plan, inputs(1)).plan
    except StructureError:
        return None
    return verified


def traced(random: Random, steps: int) -> tuple[RandomNetwork, ChannelPlan | None]:
    """A random network and its plan; None where nothing of it can be pruned."""
    network = random_network(random, steps)
    try:
        return network, trace_plan(network, inputs(1))
    except StructureError:
        return network, None


def check(network: RandomNetwork, plan: ChannelPlan, seed: int) -> None:
    """Tickets at random ratios are equal to the zeroed network."""
    for index in range(3):
        mask = random_mask(plan, seed + index)
        assert difference(network, plan, mask, seed + index) <= TOLERANCE, network.names


def check_cost(network: RandomNetwork, plan: ChannelPlan, seed: int) -> None:
    """A ticket costs what the plan says, to the last digit."""
    mask = random_mask(plan, seed)
    ticket, counts = extract(network, plan, mask), torch.tensor([int(kept.sum()) for kept in mask.kept.values()])
    assert WidthCost(plan.parameters(), plan.groups)(counts) == count_parameters(ticket), network.names
    if int(counts.min()) > 1:  # einsum multiplies element by element over a width of one, which the counter passes over
        assert WidthCost(plan.macs, plan.groups)(counts) == count_macs(ticket, inputs(1)), network.names


search = settings(max_examples=EXAMPLES or 30, suppress_health_check=list(HealthCheck))


@search
@given(random=st.randoms(use_true_random=False), steps=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_what_verification_lets_through_is_equal_to_the_zeroed_network(random: Random, steps: int, seed: int) -> None:
    network, plan = traced(random, steps)
    verified = plan and accepted(network, plan)

    if verified:
        check(network, verified, seed)
        check_cost(network, verified, seed)


@search
@given(random=st.randoms(use_true_random=False), steps=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_of_a_wrong_plan_verification_lets_through_only_what_is_right(random: Random, steps: int, seed: int) -> None:
    network, plan = traced(random, steps)
    verified = plan and accepted(network, tampered(plan, random))

    if verified:
        check(network, verified, seed)


def test_random_networks_put_verification_to_the_test() -> None:
    groups = failed = frozen = 0
    for seed in range(20):
        network, plan = traced(Random(seed), 6)
        if plan is not None:
            verified = verify_plan(network, plan, inputs(1))
            groups, failed = groups + len(verified.plan.groups), failed + len(verified.failed)
            frozen += len(plan.frozen)

    assert groups > 60
    assert failed > 1
    assert frozen > 20
