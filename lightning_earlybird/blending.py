"""Two tickets' outputs as one: the linear blend inside an overlap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_earlybird.ensemble import rebuild


def blended(lower: Any, upper: Any, weights: Tensor) -> Any:
    """``(1 - w) * lower + w * upper`` of every floating tensor in two outputs of one structure.

    Args:
        lower: What the lower ticket returned.
        upper: What the upper one did for the same samples.
        weights: w, shape (batch_size,), or (1,) where all samples share one.

    Returns:
        An output of that structure; what is no floating tensor is the upper ticket's.

    Raises:
        TypeError: If the tickets return different structures.
        ValueError: If the samples do not share a weight, and a tensor does not have one row per sample.
    """

    def leaf(leaves: list[Any], path: str) -> Any:
        low, high = leaves
        if not isinstance(high, Tensor) or not high.is_floating_point():
            return high
        share = weights.to(high)
        if len(share) > 1:
            if high.dim() == 0 or len(high) != len(share):
                raise ValueError(
                    f"{path} has shape {tuple(high.shape)} for {len(share)} rows: tickets whose outputs are blended "
                    "must return one row per sample; compute reductions outside of the denoiser."
                )
            share = share.view(-1, *[1] * (high.dim() - 1))
        return torch.lerp(low, high, share if high.dim() > 0 else share[0])

    return rebuild([lower, upper], leaf, "output")


def replaced_rows(output: Any, rows: Tensor, part: Any, batch_size: int) -> Any:
    """An output with other values in some of its rows.

    Args:
        output: For all samples.
        rows: Indices of the samples whose rows are replaced.
        part: An output of the same structure for just those.
        batch_size: Number of samples.

    Returns:
        The output with the rows of ``part`` in place of its own.
    """

    def leaf(leaves: list[Any], path: str) -> Any:
        whole, piece = leaves
        if not isinstance(whole, Tensor) or whole.dim() == 0 or len(whole) != batch_size:
            return whole
        return whole.index_copy(0, rows.to(whole.device), piece)

    return rebuild([output, part], leaf, "output")
