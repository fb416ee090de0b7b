"""Whether a ticket computes what its zeroed dense network does, for one given mask."""

import torch
from models import Denoiser

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, extract
from lightning_earlybird.structure.counterpart import Counterpart, NumberRecord
from lightning_earlybird.structure.reference import ChannelLocalNorms, randomised, zeroed
from lightning_earlybird.structure.trace import undisturbed


def difference(given: Denoiser, plan: ChannelPlan, mask: TicketMask) -> float:
    """Largest difference of the outputs relative to the largest output, with random weights."""
    reference = randomised(given.network, torch.device("cpu"), torch.Generator().manual_seed(0)).eval()
    ticket, dense = extract(reference, plan, mask), zeroed(reference, plan, mask)
    record = NumberRecord()
    with undisturbed(reference), ChannelLocalNorms():
        with record:
            actual = given(ticket)
        with Counterpart(plan, mask, record.numbers):
            expected = given(dense)
    return float((actual - expected).abs().max() / expected.abs().max())
