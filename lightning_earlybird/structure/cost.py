"""What a network costs: parameters and multiply-accumulate operations."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
