"""Tickets as a network of diffusers: what its pipelines ask of ``unet`` or ``transformer``, offloading, blending."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from typing_extensions import override

from lightning_earlybird.blending import blended, replaced_rows
from lightning_earlybird.ensemble import (
    TicketEnsemble,
    TimestepArgument,
    map_tensors,
    one_per_row,
    rows_by_ticket,
    select_rows,
)
from lightning_earlybird.offload import Offload
from lightning_earlybird.regions import TimestepPartition


# A subclass of diffusers' ModelMixin, since its pipelines save and load no other networks.
class StandIn(TicketEnsemble, ModelMixin):  # type: ignore[misc]  # diffusers has no types
    """Tickets in place of a network of diffusers; the arguments are those of :class:`TicketEnsembleSampler`.

    Attributes:
        offload: Where the tickets are at present; None where all of them stay together.
        blend: Whether outputs are blended in the overlap.
    """

    def __init__(
        self,
        tickets: Sequence[nn.Module],
        partition: TimestepPartition,
        timesteps: TimestepArgument,
        *,
        offload: bool = False,
        blend: bool = False,
    ) -> None:
        super().__init__(tickets, partition, timesteps)
        if blend and partition.overlap == 0:
            raise ValueError(
                "blend=True has no effect, as the regions were trained with overlap=0: neighbours share no timesteps "
                "in which their outputs could be blended. Leave it out, or train with an overlap."
            )
        self.blend = blend
        self.offload = Offload(self.tickets, self._device_of_tickets()) if offload else None
        self._last: int | None = None  # the region of the call before, which tells that a schedule passes one over
        self._warned_of_gap = False

    @property
    def device(self) -> torch.device:
        """The device that the tickets compute on."""
        return self._device_of_tickets() if self.offload is None else self.offload.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the tickets."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def add_embedding(self) -> nn.Module:
        """The first ticket's, whose input is as wide as the dense network's: pipelines read its width."""
        return self.tickets[0].add_embedding  # type: ignore[return-value]  # torch: a tensor or a module

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Tells the tickets for which of its calls a pipeline is about to call them."""
        with ExitStack() as stack:
            for ticket in self.tickets:
                if hasattr(ticket, "cache_context"):
                    stack.enter_context(ticket.cache_context(name, **kwargs))  # type: ignore[operator]
            yield

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the tickets as the denoiser was called; see :meth:`TicketEnsemble.forward`, and ``blend``."""
        if not self.blend or self.training or self.turn is not None:
            return super().forward(*args, **kwargs)
        steps = one_per_row(self.timesteps.find(args, kwargs))
        owners, weights = self.partition.blend(steps)
        self._watch(owners)
        output = self._dispatch(rows_by_ticket(owners), args, kwargs)
        shared = torch.nonzero(weights < 1).flatten()
        if len(shared) == 0:
            return output
        if len(shared) == len(owners) and len(set(owners.tolist())) == 1:
            lower = self._ticket(int(owners[0]) - 1)(*args, **kwargs)
            return blended(lower, output, weights if len(set(weights.tolist())) > 1 else weights[:1])

        def take(tensor: Tensor) -> Tensor:
            return select_rows(tensor, shared, len(owners))

        below = rows_by_ticket(owners[shared] - 1)
        lower = self._dispatch(below, map_tensors(args, take), map_tensors(kwargs, take))
        mixed = blended(lower, map_tensors(output, take), weights[shared])
        return replaced_rows(output, shared, mixed, len(owners))

    @override
    def _ticket(self, number: int) -> nn.Module:
        return self.tickets[number] if self.offload is None else self.offload.bring(number)

    @override
    def _route(self, timesteps: Any) -> dict[int, Tensor]:
        rows = super()._route(timesteps)
        self._watch(torch.tensor(list(rows)))
        return rows

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandIn:
        """Behind ``to``, ``cuda``, ``half`` and the like."""
        if self.offload is None:
            super()._apply(fn, recurse)
        else:
            self.offload.apply(fn)
        return self

    def _watch(self, owners: Tensor) -> None:
        """Warns once where a descending schedule passes over a region between two calls."""
        region = int(owners[0]) if len(set(owners.tolist())) == 1 and not self.training else None
        last, self._last = self._last, region
        if self._warned_of_gap or region is None or last is None or region >= last - 1 or torch.is_grad_enabled():
            return
        self._warned_of_gap = True
        warnings.warn(
            f"after a call in region {last} comes one in region {region}: the schedule passes over "
            f"{[f'[{each.start:g}, {each.stop:g})' for each in self.regions[region + 1 : last]]}, so that the ticket "
            "trained for it is never called. Take more steps or another spacing; `check_scheduler` tells beforehand.",
            stacklevel=2,
        )

    def _device_of_tickets(self) -> torch.device:
        return next(self.parameters()).device
