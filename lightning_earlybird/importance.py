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

    ``"magnitude"`` is the group norm of Early-Bird Diffusion (section 3, after L1/L2 filter pruning): the mean over
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
        ValueError: The criterion is unknown.
    """
    if criterion == "random":
        return torch.rand(plan.num_channels, generator=generator)
    if criterion != "magnitude":
        raise ValueError(f"criterion={criterion!r} is unknown. Choose one of {', '.join(CRITERIA)}.")
    weighed = {name: tensors[name].detach() for name in plan.ids if name in tensors and tensors[name].dim() > 1}
    device = next(iter(weighed.values())).device
    total = torch.zeros(plan.num_channels + 1, device=device)  # the last entry collects slices without a channel
    members = torch.zeros(plan.num_channels + 1)
    for name, weight in weighed.items():
        # One pass over the weight serves all of its dimensions: kernel positions are summed first.
        squares = weight.float().square()
        dims = plan.ids[name]
        rest = [d for d in range(weight.dim()) if d not in dims]
        squares = squares.sum(rest, keepdim=True) if rest else squares
        for dim, ids in dims.items():
            others = [d for d in range(weight.dim()) if d != dim]
            slot = torch.where(ids < 0, plan.num_channels, ids)
            total.index_add_(0, slot.to(device), squares.sum(others))
            members.index_add_(0, slot, torch.ones(len(slot)))
    scores = (total.cpu() / members.clamp_min(1))[:-1]
    if not bool(torch.isfinite(scores).all()):
        bad = [name for name, weight in weighed.items() if not bool(torch.isfinite(weight).all())]
        named = ", ".join(repr(name) for name in bad[:3]) or "the sum of squares (weights too large for float32)"
        raise NonFiniteWeightsError(
            f"parameter {named} of the denoiser holds NaN or infinite values ({len(bad)} such parameters): no mask is "
            "drawn from them. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )
    return scores
