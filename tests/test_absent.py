import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_earlybird.absent import AbsentTicket, clone_structure
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument, Turn
from lightning_earlybird.regions import TimestepPartition

REGIONS = [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)]


class Scale(nn.Module):
    """Multiplies by its weight, which stands under two names; a buffer is not saved with it."""

    kind = "scale"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.tied = self.weight
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x, t):
        return x * self.weight + self.offset


def ensemble(overlap: float = 0, absent: tuple[int, ...] = ()) -> TicketEnsemble:
    tickets: list[nn.Module] = [Scale(2.0), Scale(3.0), Scale(5.0)]
    for index in absent:
        tickets[index] = AbsentTicket(tickets[index])
    return TicketEnsemble(tickets, TimestepPartition.of(REGIONS, overlap), TimestepArgument("t", 1))


def test_an_absent_ticket_holds_no_numbers_and_comes_back_with_its_structure():
    ticket = Scale(2.0)
    ticket.weight.requires_grad_(False)
    absent = AbsentTicket(ticket)
    assert not list(absent.parameters()) and not list(absent.buffers()) and not absent.state_dict()
    assert absent.shapes() == {"weight": torch.Size([1]), "tied": torch.Size([1])}
    back = copy.deepcopy(absent).present(torch.device("cpu"))
    assert isinstance(back, Scale) and back.kind == "scale"
    assert back.weight is back.tied and back.weight is not ticket.weight
    assert not back.weight.requires_grad
    assert back.weight.device.type == back.offset.device.type == "cpu"
    with pytest.raises(RuntimeError, match="trained by other ranks"):
        absent(torch.ones(1), torch.zeros(1))


def test_a_structure_keeps_the_memory_layout():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    copied = clone_structure(clone_structure(network, torch.device("meta")), torch.device("cpu"))
    assert copied.weight.is_contiguous(memory_format=torch.channels_last)
    assert copied.weight.shape == network.weight.shape


def test_the_ticket_in_turn_gets_every_sample_and_sees_the_timesteps_checked():
    model, seen = ensemble(), []

    @contextmanager
    def around(timesteps):
        seen.append(timesteps)
        yield

    x = torch.ones(3, 1)
    steps = torch.tensor([0, 300, 999])
    model.turn = Turn(1, around)
    assert model(x, steps).flatten().tolist() == [3, 3, 3]
    assert seen == [steps]
    model.turn = None
    assert model(x, steps).flatten().tolist() == [2, 3, 5]


def test_the_check_of_a_turn_comes_before_the_ticket():
    model = ensemble()

    def refuse(timesteps):
        raise ValueError("not mine")

    model.turn = Turn(0, refuse)
    with pytest.raises(ValueError, match="not mine"):
        model(torch.ones(1, 1), torch.tensor([999]))


def test_samples_of_absent_tickets_go_to_the_nearest_present_one_with_one_warning():
    model = ensemble(absent=(0, 2)).eval()
    assert model.hosted == (1,)
    x, steps = torch.ones(3, 1), torch.tensor([0, 300, 999])
    assert model(x[1:2], steps[1:2]).item() == 3  # its own region: nothing to warn of
    with pytest.warns(UserWarning, match=r"tickets \[0, 2\] are trained by other ranks.*\[1\], which are here"):
        assert model(x, steps).flatten().tolist() == [3, 3, 3]
    assert model(x, steps).flatten().tolist() == [3, 3, 3]


def test_without_a_warning_a_rank_with_some_tickets_routes_between_them():
    model = ensemble(absent=(0,)).eval()
    assert model.hosted == (1, 2)
    assert model(torch.ones(2, 1), torch.tensor([300, 999])).flatten().tolist() == [3, 5]


def test_names_of_present_tickets_do_not_depend_on_who_is_absent():
    assert set(ensemble(absent=(0, 1)).state_dict()) == {"tickets.2.weight", "tickets.2.tied"}


def test_plain_attributes_are_those_of_a_present_ticket():
    assert ensemble(absent=(0,)).kind == "scale"


def test_an_empty_batch_is_given_to_a_present_ticket():
    model = ensemble(absent=(0,))
    assert model(torch.ones(0, 1), torch.zeros(0, dtype=torch.long)).shape == (0, 1)
