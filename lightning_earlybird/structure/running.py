"""Running somebody else's network without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = True) -> Iterator[None]:
    """No gradients, and evaluation mode unless told otherwise; modes and random states are as before afterwards.

    PyTorch's attention modules go through their single operations, not through one kernel that hides them.
    """
    training = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if evaluate:
        model.eval()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in training.items():
            module.training = flag
