"""One ticket at a time on the device that computes, the others in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_HOME = torch.device("cpu")


class Offload:
    """Moves tickets to the device when they are called, and back when another one is.

    In a descending schedule that is once per region. The ticket that was there leaves before the next one comes, so
    that there is room for one only.

    Args:
        tickets: The tickets; moved to the CPU at once.

    Attributes:
        device: The device that computes.
        active: The ticket that is there; None before the first call.
        moves: How often a ticket was brought there.
    """

    def __init__(self, tickets: nn.ModuleList, device: torch.device) -> None:
        self._tickets = tickets
        self.device = device
        self.active: int | None = None
        self.moves = 0
        for ticket in tickets:
            ticket.to(_HOME)

    def bring(self, number: int) -> nn.Module:
        """The ticket, on the device that computes."""
        if number != self.active:
            if self.active is not None:
                self._tickets[self.active].to(_HOME)
            # Only then is it there: a move that fails for want of memory leaves all tickets at home.
            self.active = None
            self._tickets[number].to(self.device)
            self.active = number
            self.moves += 1
        return self._tickets[number]

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """What ``to``, ``cuda``, ``half`` and the like do with tensors; a device is taken as the one that computes.

        Args:
            function: What torch's ``Module._apply`` is called with.
        """
        # An empty tensor shows which device is meant; the tickets themselves go there one by one, and come back.
        device = function(torch.empty(0, device=self.device)).device
        self.active = None
        for ticket in self._tickets:
            ticket._apply(function)
            ticket.to(_HOME)
        self.device = device
