"""Samplers whose tickets were really cut from tiny networks, and a record of which ticket is called with what."""

import copy

import torch
from models import Denoiser
from torch import nn

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.structure import attribute_edits, count_macs, count_parameters, extract, trace_plan
from lightning_earlybird.tickets import EnsembleRecord, TicketFacts, describe_denoiser

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.5)]
STEP = TimestepArgument("timestep", 1)


def cut(found: Denoiser, regions=REGIONS, overlap=0, timesteps=STEP, **settings) -> TicketEnsembleSampler:
    """Tickets of a network, of random channels, in a sampler with its record."""
    partition = TimestepPartition.of(regions, overlap)
    dense = found.network.eval()
    plan = trace_plan(dense, found.args, found.kwargs)
    generator = torch.Generator().manual_seed(1)
    masks = [
        draw_mask(plan, torch.rand(plan.num_channels, generator=generator), region.sparsity, round_to=4)
        for region in partition
    ]
    tickets = [extract(dense, plan, mask) for mask in masks]
    facts = [
        TicketFacts(
            region,
            100,
            True,
            (mask.num_channels, mask.num_kept),
            (count_parameters(dense), count_parameters(ticket)),
            (count_macs(dense, found.args, found.kwargs), count_macs(ticket, found.args, found.kwargs)),
        )
        for region, mask, ticket in zip(partition, masks, tickets, strict=True)
    ]
    sampler = TicketEnsembleSampler(tickets, partition, timesteps, **settings).eval()
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    shape = tuple(found.args[0].shape[1:])
    sampler.record = EnsembleRecord(describe_denoiser(dense), edits, tuple(masks), tuple(facts), shape)
    return sampler


def whole(dense: nn.Module, regions=REGIONS, overlap=0, timesteps=STEP, **settings) -> TicketEnsembleSampler:
    """Every ticket is the dense network."""
    partition = TimestepPartition.of(regions, overlap)
    tickets = [copy.deepcopy(dense) for _ in partition]
    return TicketEnsembleSampler(tickets, partition, timesteps, **settings).eval()


def watch(sampler: TicketEnsembleSampler) -> tuple[TicketEnsembleSampler, list[tuple[int, float]]]:
    """A copy of a sampler, and the list of its calls: (ticket, timestep)."""
    calls: list[tuple[int, float]] = []
    clone = copy.deepcopy(sampler)
    for number, ticket in enumerate(clone.tickets):

        def note(module, args, kwargs, number=number):
            calls.append((number, float(torch.as_tensor(clone.timesteps.find(args, kwargs)).flatten()[0])))

        ticket.register_forward_pre_hook(note, with_kwargs=True)
    return clone, calls


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
