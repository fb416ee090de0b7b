"""Whether a ticket computes what its zeroed dense network does, for one given mask."""

from dataclasses import replace
from typing import Any

import torch
from models import Denoiser
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, extract
from lightning_earlybird.structure.counterpart import Counterpart, NumberRecord
from lightning_earlybird.structure.reference import ChannelLocalNorms, at_least, randomised, unrounded, zeroed
from lightning_earlybird.structure.running import undisturbed


def double(leaf: Any) -> Any:
    """A copy; floating-point tensors in double precision."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(at_least(leaf.dtype, torch.float64), copy=True)


def difference(given: Denoiser, plan: ChannelPlan, mask: TicketMask) -> float:
    """Largest difference of the outputs relative to the largest output, with random weights."""
    reference = randomised(given.network, double, torch.Generator().manual_seed(0)).eval()
    call = replace(given, args=tree_map(double, given.args), kwargs=tree_map(double, given.kwargs))
    ticket, dense = extract(reference, plan, mask), zeroed(reference, plan, mask)
    record = NumberRecord()
    with undisturbed(reference), unrounded(), ChannelLocalNorms():
        with record:
            actual = call(ticket)
        with Counterpart(plan, mask, record.numbers):
            expected = call(dense)
    return float((actual - expected).abs().max() / expected.abs().max())
