"""What a network costs, in parameters and multiply-accumulate operations, and how that depends on its widths."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_earlybird.structure.plan import ChannelGroup
from lightning_earlybird.structure.products import Product
from lightning_earlybird.structure.running import undisturbed


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-accumulate operations of one forward pass, as PyTorch's FLOP counter knows them.

    It counts convolutions, matrix products and attention.

    Args:
        network: The network; its mode and the random state are restored.
        args: Positional arguments of the call; pass one sample for the cost of one sample.
        kwargs: Its keyword arguments.

    Returns:
        Half the counted floating-point operations.
    """
    counter = FlopCounterMode(display=False)
    # PyTorch counts some fused attention kernels and not others; spelled out, attention costs the same everywhere.
    with undisturbed(network), sdpa_kernel(SDPBackend.MATH), counter:
        network(*args, **(kwargs or {}))
    return int(counter.get_total_flops()) // 2


class WidthCost:
    """A cost as a function of how many channels each group keeps, evaluated in no time.

    Exact where every channel of a group has as many positions in a dimension as the others, which is the rule; else the
    mean number is taken.

    Args:
        products: What adds up to the cost, by channel ids (``ChannelPlan.parameters()``, ``ChannelPlan.macs``).
        groups: The groups of the plan.
    """

    def __init__(self, products: Iterable[Product], groups: Sequence[ChannelGroup]) -> None:
        products = list(products)
        sizes = torch.tensor([group.size for group in groups], dtype=torch.float64)
        group_of = torch.empty(sum(group.size for group in groups), dtype=torch.long)
        for number, group in enumerate(groups):
            group_of[group.channels] = number
        rows: dict[bytes, int] = {}  # the same dimension occurs in many products
        widths = [torch.zeros(len(groups) + 1, dtype=torch.float64)]
        widths[0][-1] = 1.0  # the factor of products that have fewer factors than others
        longest = max((len(product.factors) for product in products), default=0)
        index = torch.zeros(len(products), longest, dtype=torch.long)
        for number, product in enumerate(products):
            for place, ids in enumerate(product.factors):
                positions = torch.bincount(group_of[ids[ids >= 0]], minlength=len(groups)) / sizes
                row = torch.cat([positions, (ids < 0).sum().reshape(1).double()])
                key = row.numpy().tobytes()
                if key not in rows:
                    rows[key] = len(widths)
                    widths.append(row)
                index[number, place] = rows[key]
        self._constants = torch.tensor([product.constant for product in products], dtype=torch.float64)
        self._widths = torch.stack(widths)
        self._index = index

    def __call__(self, counts: Tensor) -> float:
        """The cost.

        Args:
            counts: Channels that each group keeps, shape (groups,).
        """
        widths = self._widths @ torch.cat([counts.double(), torch.ones(1, dtype=torch.float64)])
        return float((widths[self._index].prod(dim=1) * self._constants).sum())
