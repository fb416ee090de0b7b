"""Every denoiser of the zoo, from the trace to a ticket that is read back from disk."""

import copy
from pathlib import Path

import pytest
import torch
from models import Denoiser, random_mask
from torch import nn
from zoo import ZOO, member, verified
from zoo.compare import difference

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import (
    ChannelPlan,
    WidthCost,
    attribute_edits,
    count_macs,
    count_parameters,
    extract,
    trace_plan,
    verify_plan,
)
from lightning_earlybird.tickets import describe_denoiser, load_ensemble, save_ensemble

# What stays besides the layers of the output, and why that is right.
FROZEN = {
    # The embedding is an input, as wide as it is.
    "UNet2D, class embeddings": {"meets a tensor of fixed width that carries no channels"},
    # Rotary positions turn pairs of channels against a table of fixed width.
    "Flux": {"meets a tensor of fixed width that carries no channels"},
    "Wan": {
        "joined with a tensor that has no such channels",
        "attention whose queries, keys and values do not have the same heads and width",
    },
    # Tokens of several samples are written into one padded tensor; rotary positions as complex numbers.
    "Lumina 2": {
        "meets a tensor of fixed width that carries no channels",
        "no rule for the operation view_as_complex",
        "attention whose queries, keys and values do not have the same heads and width",
        "written into another tensor",
    },
}
SPARSITIES = (0.3, 0.5, 0.8)


def drawn(given: Denoiser, plan: ChannelPlan, sparsity: float, round_to: int = 2) -> TicketMask:
    scores = channel_scores(dict(given.network.named_parameters()), plan)
    return draw_mask(plan, scores, sparsity, round_to=round_to)


def tickets_of(name: str) -> tuple[Denoiser, ChannelPlan, dict[str, TicketMask]]:
    """A denoiser, its plan, and masks at every sparsity and at random ratios."""
    given, verification = verified(name)
    masks = {f"{sparsity:g}": drawn(given, verification.plan, sparsity) for sparsity in SPARSITIES}
    return given, verification.plan, masks | {"random": random_mask(verification.plan, 1)}


@pytest.mark.parametrize("name", ZOO)
def test_nothing_that_is_traced_fails_verification(name: str) -> None:
    _, verification = verified(name)

    assert verification.failed == {}
    assert verification.max_error < 1e-9  # in double precision, of the largest output
    assert {entry.reason for entry in verification.plan.frozen} - {"the network's output"} == FROZEN.get(name, set())
    assert all(group.size > 1 for group in verification.plan.groups)


@pytest.mark.parametrize("name", ZOO)
def test_tickets_of_any_sparsity_compute_what_their_masks_say(name: str) -> None:
    given, plan, masks = tickets_of(name)

    assert {key: error for key, mask in masks.items() if (error := difference(given, plan, mask)) > 1e-8} == {}


@pytest.mark.parametrize("name", ZOO)
def test_what_a_ticket_costs_is_known_from_its_mask(name: str) -> None:
    given, plan, masks = tickets_of(name)
    parameters, macs = WidthCost(plan.parameters(), plan.groups), WidthCost(plan.macs, plan.groups)

    for mask in (plan.full_mask(), masks["0.5"], masks["random"]):
        ticket = extract(given.network, plan, mask)
        counts = torch.tensor([int(mask.kept[group.name].sum()) for group in plan.groups])
        assert parameters(counts) == count_parameters(ticket)
        if int(counts.min()) > 1:  # einsum multiplies element by element over a width of one: not counted
            assert macs(counts) == count_macs(ticket, given.args, given.kwargs)


@pytest.mark.parametrize("name", ZOO)
def test_tickets_train_in_all_their_parameters(name: str) -> None:
    given, plan, masks = tickets_of(name)
    dense = copy.deepcopy(given.network).train()
    given(dense).square().mean().backward()
    unused = {name for name, parameter in dense.named_parameters() if parameter.grad is None}

    for mask in masks.values():
        ticket = extract(given.network, plan, mask).train()
        optimizer = torch.optim.AdamW(ticket.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(0)  # the same labels are dropped at each step
            loss = (given(ticket) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        assert all(torch.isfinite(torch.tensor(losses)))
        assert losses[-1] < losses[0]
        assert {name for name, parameter in ticket.named_parameters() if parameter.grad is None} == unused
        assert all(p.grad.shape == p.shape for p in ticket.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ZOO)
def test_tickets_come_back_from_disk_bit_by_bit(name: str, tmp_path: Path) -> None:
    given, plan, masks = tickets_of(name)
    tickets = [extract(given.network, plan, mask) for mask in masks.values()]
    partition = TimestepPartition.of([(0, 250, 0.3), (250, 500, 0.5), (500, 750, 0.8), (750, 1000, 0.5)])
    description = describe_denoiser(given.network)

    save_ensemble(
        tmp_path / "ensemble",
        TicketEnsemble(tickets, partition, TimestepArgument("timestep", 1)),
        denoiser=description,
        edits=[attribute_edits(given.network, ticket) for ticket in tickets],
        masks=list(masks.values()),
        facts=None,
        sample_shape=None,
    )
    factory = None if description else lambda: member(name, seed=1).network
    loaded = load_ensemble(tmp_path / "ensemble", denoiser=factory)

    assert (description is None) == (not type(given.network).__module__.startswith("diffusers."))
    with torch.no_grad():
        for ticket, again in zip(tickets, loaded.tickets, strict=True):
            assert torch.equal(given(again), given(ticket))
    assert [mask.flat().tolist() for mask in loaded.record.masks] == [mask.flat().tolist() for mask in masks.values()]


@pytest.mark.parametrize("name", ["DiT", "EDM2", "nn.TransformerEncoderLayer", "einops U-Net"])
def test_a_ticket_can_be_pruned_again(name: str) -> None:
    given, plan, masks = tickets_of(name)
    ticket = Denoiser(extract(given.network, plan, masks["0.3"]), given.args, given.kwargs)

    again = trace_plan(ticket.network, ticket.args, ticket.kwargs)
    verification = verify_plan(ticket.network, again, ticket.args, ticket.kwargs)

    assert verification.failed == {}
    assert {group.name: group.size for group in verification.plan.groups} == {
        group: int(kept.sum()) for group, kept in masks["0.3"].kept.items()
    }


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_the_same_every_time(name: str) -> None:
    first, second = member(name), member(name)

    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))
    assert isinstance(first.network, nn.Module) and not first.network.training
