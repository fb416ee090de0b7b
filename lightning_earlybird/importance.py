"""Channel scores: how much each channel of a denoiser matters."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_earlybird.structure import ChannelPlan

Criterion = Literal["magnitude", "random"]
CRITERIA: tuple[Criterion, ...] = ("magnitude", "random")


class NonFiniteWeightsError(ValueError):
    """Weights that are NaN or infinite cannot be scored."""


def channel_scores(
    tensors: Mapping[str, Tensor],
    plan: ChannelPlan,
    criterion: Criterion = "magnitude",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score every channel on the intact network.

    ``"magnitude"`` is the group magnitude that Early-Bird Diffusion prunes by (arXiv 2504.09606): the mean over
    everything that hangs on a channel (its filter, the slices of its consumers, whatever is coupled to it) of the sum
    of squared weights. Only the ranking within a group is used. ``"random"`` is the control.

    Args:
        tensors: The denoiser's parameters by name (raw or averaged).
        plan: Its channel plan.
        criterion: What to score by.
        generator: Source of the random scores.

    Returns:
        Shape (num_channels,), float32, CPU.

    Raises:
        NonFiniteWeightsError: A parameter holds NaN or infinity; the message names it.
        ValueError: The criterion is unknown, or weights of the plan are missing.
    """
    if criterion == "random":
        return torch.rand(plan.num_channels, generator=generator)
    if criterion != "magnitude":
        raise ValueError(f"criterion={criterion!r} is unknown. Choose one of {', '.join(CRITERIA)}.")
    weighed = {name: tensors[name].detach() for name in plan.ids if name in tensors and tensors[name].dim() > 1}
    sums, slots = [], []
    for name, weight in weighed.items():
        # One pass over the weight serves all of its dimensions: kernel positions are summed first.
        squares = weight.float().square()
        dims = plan.ids[name]
        rest = [d for d in range(weight.dim()) if d not in dims]
        squares = squares.sum(rest, keepdim=True) if rest else squares
        for dim, ids in dims.items():
            sums.append(squares.sum([d for d in range(weight.dim()) if d != dim]))
            slots.append(ids)
    # Added up on the CPU, in a fixed order: accelerators add where several slices share a channel in any order, and
    # masks of different ranks could differ by the last bit of a score.
    slot = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.long)
    slot = torch.where(slot < 0, plan.num_channels, slot)  # the last entry collects slices without a channel
    members = torch.bincount(slot, minlength=plan.num_channels + 1)
    if not bool((members[:-1] > 0).all()):
        missing = [name for name in plan.ids if name not in tensors]
        raise ValueError(
            f"tensors={list(tensors)[:3]}... lack weights of the plan, such as {missing[:3]}: some channels cannot be "
            "scored. Pass the denoiser's named_parameters(), without a prefix."
        )
    total = torch.zeros(plan.num_channels + 1).index_add_(0, slot, torch.cat(sums).cpu())
    _check_finite(tensors, total)
    return total[:-1] / members[:-1]


def _check_finite(tensors: Mapping[str, Tensor], total: Tensor) -> None:
    """Refuse NaN and infinity: in the sums of squares, or in parameters that are not summed (biases, norms)."""
    unsummed = [tensor.detach().float().sum().reshape(1) for tensor in tensors.values() if tensor.dim() <= 1]
    if bool(torch.isfinite(total).all()) and (not unsummed or bool(torch.isfinite(torch.cat(unsummed)).all())):
        return
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    named = ", ".join(repr(name) for name in bad[:3]) or "the sum of squares (weights too large for float32)"
    raise NonFiniteWeightsError(
        f"parameter {named} of the denoiser holds NaN or infinite values ({len(bad)} such parameters): no mask is "
        "drawn from them. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
    )
