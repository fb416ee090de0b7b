"""A rank keeps the tickets that it trains, and gets the others back when all are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.transition.averages import averaged_modules
from lightning_earlybird.transition.optimizers import family
from lightning_earlybird.transition.rehearsal import bare


def ensembles(trainer: pl.Trainer, module: pl.LightningModule) -> list[TicketEnsemble]:
    """All ensembles of the fit, the live one first: averages of callbacks and inside of the module hold one each."""
    roots = [module, *averaged_modules(trainer)]
    found = [part for root in roots for part in root.modules() if isinstance(part, TicketEnsemble)]
    return list(dict.fromkeys(found))


def release_tickets(trainer: pl.Trainer, module: pl.LightningModule, hosted: Sequence[int]) -> None:
    """Let go of the tickets that other ranks train: parameters, buffers, gradients, optimizer state and averages.

    Optimizers stay the same objects. To be called where no forward or backward pass is under way.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, changed in place.
        hosted: Indices of the tickets that stay.
    """
    leaving: set[nn.Parameter] = set()
    for ensemble in ensembles(trainer, module):
        staying = {parameter for index in hosted for parameter in ensemble.tickets[index].parameters()}
        for index, ticket in enumerate(ensemble.tickets):
            if index not in hosted:
                leaving |= set(ticket.parameters()) - staying
                ensemble.tickets[index] = AbsentTicket(ticket)
    for optimizer in trainer.strategy.optimizers:
        for member in family(bare(optimizer)):
            _forget(member, leaving)
    for parameter in leaving:
        module._param_requires_grad_state.pop(parameter, None)  # type: ignore[call-overload]


def gather_tickets(trainer: pl.Trainer, module: pl.LightningModule, leaders: Sequence[int], rank: int) -> None:
    """Fill in the absent tickets of every rank from the ranks that have trained them; the whole world takes part.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, changed in place.
        leaders: For each ticket, the rank (of the world) that sends it.
        rank: This rank.
    """
    device = trainer.strategy.root_device
    for ensemble in ensembles(trainer, module):
        home = next(tensor.device for tensor in ensemble.tickets[ensemble.hosted[0]].parameters())
        for index, leader in enumerate(leaders):
            ticket = ensemble.tickets[index]
            if isinstance(ticket, AbsentTicket):
                ticket = ensemble.tickets[index] = ticket.present(home).train(ensemble.training)
            for tensor in _tensors(ticket):
                _send(tensor, leader, rank, device)


def _forget(optimizer: Optimizer, leaving: set[nn.Parameter]) -> None:
    for parameter in leaving:
        optimizer.state.pop(parameter, None)
    done: set[int] = set()
    for group in optimizer.param_groups:
        if id(group) in done or not leaving.intersection(group["params"]):
            continue
        done.add(id(group))
        stays = [parameter not in leaving for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [value for value, stay in zip(group[key], stays, strict=True) if stay]


def _tensors(ticket: nn.Module) -> Iterator[Tensor]:
    yield from ticket.parameters()
    yield from ticket.buffers()


@torch.no_grad()
def _send(tensor: Tensor, source: int, rank: int, device: torch.device) -> None:
    """Broadcast as bytes: backends differ in the dtypes that they know."""
    values = tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
    if values.numel():
        dist.broadcast(values, src=source)
    if rank != source:
        # `data`, since parameters of a ticket in use may be leaves that autograd watches.
        tensor.data.copy_(values.view(tensor.dtype).reshape(tensor.shape))
