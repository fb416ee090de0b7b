"""What is left of a ticket on the ranks that do not train it: its structure, without its numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class AbsentTicket(nn.Module):
    """Keeps the place of a ticket that other ranks train; holds no numbers, only the structure.

    Args:
        ticket: The ticket that leaves. Not kept: what is kept of it lies on the meta device.
    """

    def __init__(self, ticket: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is no sub-module: it must not show among parameters, in optimizers or state dicts.
        self._structure = (clone_structure(ticket, torch.device("meta")),)

    def present(self, device: torch.device) -> nn.Module:
        """The ticket's network again, on a device, its parameters and buffers not filled in yet."""
        return clone_structure(self._structure[0], device)

    def shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of the tensors that the ticket's state dict holds where it is present."""
        return {key: value.shape for key, value in self._structure[0].state_dict().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: there is nothing to compute with.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this ticket is trained by other ranks and is not here; call the tickets that are.")


def clone_structure(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy whose parameters and buffers are new tensors on a device, with undefined values; ties are kept.

    Everything else is copied as it is.
    """
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device=device, requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)
