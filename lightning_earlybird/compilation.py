"""Looking through ``torch.compile``."""

from torch import nn
from torch._dynamo import OptimizedModule


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside a ``torch.compile`` wrapper, or the network itself."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module
