"""Verification: a plan is trusted only after an extracted network has computed what the dense one computes.

The dense network computes it with the same channels set to zero, and with its statistics over the channels that stay
(see ``counterpart``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.head_trial import confirm_heads, rescue_heads
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, StructureError
from lightning_earlybird.structure.preconditions import remedy
from lightning_earlybird.structure.reference import full_precision
from lightning_earlybird.structure.trial import Trial

ROUNDS = 3  # searches for groups that fail, before giving up


@dataclass(frozen=True)
class Verification:
    """What verification found.

    Attributes:
        plan: The plan to use: the one given, without the groups that failed, and with ``heads`` only where that works.
        max_error: Largest difference between extracted and zeroed dense output, relative to the output.
        failed: Group name -> what went wrong.
    """

    plan: ChannelPlan
    max_error: float
    failed: Mapping[str, str]


@torch.inference_mode(False)
def verify_plan(
    model: nn.Module,
    plan: ChannelPlan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> Verification:
    """Extract at random, non-uniform ratios and compare with the zeroed dense network.

    Three things must hold. Channels that change places, everywhere alike, change nothing. Tickets of two complementary
    masks, so that every channel is once removed and once kept, compute what the dense network computes with the same
    channels zeroed; groups of few channels, where a wrong plan might pass by luck, are tried with more masks. And the
    first of those tickets runs backward, in the modes that the network is in, and where these compute something else
    than evaluation does, the comparison holds there as well (dropout and noise apart). Where groups claim that whole
    heads can go, two further masks remove some: groups that fail these only lose that claim, and groups that pass
    nothing else keep it.

    Works on copies with random weights (a freshly initialised network may output zeros, which would prove nothing), in
    float64 on the CPU: what a wrong plan changes may be small, accelerators round products, and all ranks must come to
    the same verdict. Networks that insist on single precision, or are too large to double, are compared less strictly.
    Where fewer pixels make the network compute the same operations, it is given fewer, and all of them once at the end.
    Groups that fail are searched for by halves, and frozen.

    Args:
        model: The dense denoiser.
        plan: Its traced plan.
        args: Positional arguments of one call; one sample is enough: channels are told apart by what happens to them,
            and no tensor of a network grows with the batch.
        kwargs: Keyword arguments of that call.
        seed: Seed of the random weights and ratios.
        tolerance: Largest relative difference that counts as equal (1e-4 at least in single precision, and 1e-2 on an
            accelerator). Rounding made 1e-11 at most on U-Nets of 55 to 230 convolutions.

    Returns:
        The verified plan, the error, and the groups that failed.

    Raises:
        StructureError: No group passes, or those that pass alone fail together.
    """
    generator = torch.Generator().manual_seed(seed)
    with full_precision():
        trial = Trial(model, args, kwargs or {}, tolerance, generator)
        failed = scattered_groups(plan)
        if len(failed) == len(plan.groups):
            raise StructureError(f"plan: no channel group is whole ({next(iter(failed.values()))}). Trace it again.")
        reduced, problem = freeze_groups(plan, failed) if failed else plan, None
        for _ in range(ROUNDS):
            # The same draws decide which groups failed, and once more whether the others pass together.
            trial.draw(reduced)
            error, problem = trial.run(reduced, reduced.groups)
            if problem is None:
                reduced, worst = confirm_heads(reduced, trial.compare, trial.masks, generator)
                at_size, problem = trial.compare_uncropped(reduced)
                if problem is None:
                    return Verification(replace(reduced, verified=True), max(error, worst, at_size), failed)
            before, found = reduced, trial.failing(reduced, reduced.groups)
            reduced, found = rescue_heads(reduced, found, trial.compare, trial.masks, generator)
            failed |= found
            if len(failed) == len(plan.groups):
                raise StructureError(
                    f"denoiser: {type(model).__name__} cannot be pruned: every channel group fails verification. "
                    f"First: {next(iter(failed.values()))}.{remedy(model)}"
                )
            if not found and reduced is before:
                break
            reduced = freeze_groups(reduced, found)
        raise StructureError(
            f"denoiser: {type(model).__name__} cannot be pruned safely: {len(reduced.groups)} channel groups pass "
            f"verification alone but not together ({problem}). Groups whose widths depend on each other in Python "
            f"code are the usual cause.{remedy(model)}"
        )


@torch.inference_mode(False)
def failing_masks(
    model: nn.Module,
    plan: ChannelPlan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    masks: Mapping[str, TicketMask],
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> dict[str, str]:
    """Whether a verified plan holds at the very widths that will be used, where these are narrower than those tried.

    Verification keeps about a quarter of every group at least, as code may well have a least width that it works with.

    Args:
        model: The dense denoiser.
        plan: Its verified plan.
        args: Positional arguments of one call.
        kwargs: Its keyword arguments.
        masks: Masks of the plan, by any names.
        seed: As for :func:`verify_plan`.
        tolerance: Likewise.

    Returns:
        Name of a mask -> what is wrong with its ticket, for those that fail; empty where no mask is so narrow.
    """
    narrow = {
        name: mask
        for name, mask in masks.items()
        if any(4 * int(mask.kept[group.name].sum()) < group.size for group in plan.groups)
    }
    if not narrow:
        return {}
    with full_precision():
        trial = Trial(model, args, kwargs, tolerance, torch.Generator().manual_seed(seed))
        problems = {name: trial.compare(plan, mask)[1] for name, mask in narrow.items()}
    return {name: problem for name, problem in problems.items() if problem is not None}


def scattered_groups(plan: ChannelPlan) -> dict[str, str]:
    """Groups of which only some channels live in a dimension: a mask could leave nothing of it."""
    scattered: dict[str, str] = {}
    group_of = plan.group_of_channel()
    sizes = torch.tensor([group.size for group in plan.groups])
    for name, dims in plan.ids.items():
        for dim, ids in dims.items():
            counts = torch.bincount(group_of[ids[ids >= 0].unique()], minlength=len(sizes))
            for index in ((counts > 0) & (counts < sizes)).nonzero().flatten().tolist():
                group = plan.groups[index]
                scattered.setdefault(
                    group.name,
                    f"only {int(counts[index])} of its {group.size} channels live in dimension {dim} of {name!r}",
                )
    return scattered


def freeze_groups(plan: ChannelPlan, failed: Mapping[str, str]) -> ChannelPlan:
    """The plan without some of its groups; their channels are never pruned, for the reason given."""
    numbers = torch.full((plan.num_channels,), -1)
    groups: list[ChannelGroup] = []
    frozen = list(plan.frozen)
    count = 0
    for group in plan.groups:
        if group.name in failed:
            frozen.append(FrozenChannels(group.name, group.size, failed[group.name]))
            continue
        fresh = torch.arange(count, count + group.size)
        numbers[group.channels] = fresh
        groups.append(replace(group, channels=fresh))
        count += group.size
    return replace(plan.renumbered(numbers, groups), frozen=tuple(frozen))
