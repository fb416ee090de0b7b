"""Budgets: from a sparsity to exact counts per channel group, and from scores to the mask with those counts."""

import math

import torch
from torch import Tensor

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelGroup, ChannelPlan


def kept_per_row(group: ChannelGroup, sparsity: float, round_to: int) -> int:
    """How many channels every row of a group keeps (a group without heads is one row).

    The group's kept width is the multiple of ``round_to`` nearest to ``(1 - sparsity)`` of its width, halves rounded
    up, at least one multiple; a group narrower than ``round_to`` stays whole.
    """
    width = group.size // group.rows
    if sparsity == 0.0:
        return width
    unit = round_to // math.gcd(round_to, group.rows)
    nearest = math.floor(width * (1.0 - sparsity) / unit + 0.5) * unit
    return min(width, max(unit, nearest))


def draw_mask(plan: ChannelPlan, scores: Tensor, sparsity: float, *, round_to: int = 8) -> TicketMask:
    """Keep the highest-scoring channels of every group, by exact count; ties go to the lower index.

    Args:
        plan: The denoiser's channel plan.
        scores: Shape (num_channels,), higher means more important.
        sparsity: Fraction of channels to remove, in [0, 1).
        round_to: Kept widths are multiples of this.

    Returns:
        The mask; its achieved sparsity differs from the nominal one by rounding.

    Raises:
        ValueError: Sparsity, ``round_to`` or the shape of the scores is out of range.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1): it is the fraction of channels to remove.")
    if round_to < 1:
        raise ValueError(
            f"round_to={round_to} must be at least 1. Use 8 for widths that tensor cores like, 1 for exact fractions."
        )
    if scores.shape != (plan.num_channels,):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} do not fit the plan: one score a channel is needed, "
            f"({plan.num_channels},)."
        )
    kept: dict[str, Tensor] = {}
    for group in plan.groups:
        rows = scores[group.channels].view(group.rows, -1)
        order = rows.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        mask.scatter_(1, order[:, : kept_per_row(group, sparsity, round_to)], True)
        kept[group.name] = mask.flatten()
    return TicketMask(kept)
