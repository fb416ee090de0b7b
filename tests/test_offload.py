"""Offloading: which ticket is where, how often one is moved, and that the images are the same.

Where there is no second device, numbers can be compared on one only. What is moved is seen by recording the moves, and
on the meta device, which has no numbers.
"""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, HeunDiscreteScheduler
from samplers import cut, seeded
from torch import nn

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.records import EnsembleRecord

REGIONS = [(0, 240, 0.0), (240, 440, 0.0), (440, 1000, 0.0)]
CPU, META = torch.device("cpu"), torch.device("meta")


class Ticket(nn.Module):
    """Records where it is told to go, and where it is when it is called; comes back from the meta device as it left."""

    def __init__(self, number=0):
        super().__init__()
        torch.manual_seed(number)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.home = copy.deepcopy(self.conv.state_dict())
        self.moves = []
        self.called_on = []

    def to(self, device):
        self.moves.append(device)
        if device == META or self.conv.weight.device != META:
            return super().to(device)
        self.conv.to_empty(device=device)
        self.conv.load_state_dict(self.home)
        return self

    def forward(self, sample, timestep):
        self.called_on.append(self.conv.weight.device)
        return self.conv(sample)


def sampler(**settings):
    partition = TimestepPartition.of(REGIONS, overlap=50)
    tickets = [Ticket(number) for number in range(3)]
    made = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", 1), **settings).eval()
    made.record = EnsembleRecord(None, ({}, {}, {}), sample_shape=(1, 4, 4))
    for ticket in made.tickets:
        ticket.moves.clear()
    return made


def places(ensemble):
    return [ticket.conv.weight.device for ticket in ensemble.tickets]


def call(ensemble, step):
    return ensemble(torch.zeros(2, 1, 4, 4, device=ensemble.device), step)


def test_only_the_ticket_that_is_called_is_on_the_device():
    ensemble = sampler(offload=True).to(META)
    assert ensemble.device == META and places(ensemble) == [CPU] * 3
    call(ensemble, 999)
    assert places(ensemble) == [CPU, CPU, META]
    call(ensemble, 441)
    call(ensemble, 300)
    assert places(ensemble)[:2] == [CPU, META]
    assert [ticket.called_on for ticket in ensemble.tickets] == [[], [META], [META, META]]
    assert ensemble.offload.moves == 2 and ensemble.offload.active == 1


def test_the_one_that_was_there_leaves_before_the_next_one_comes():
    ensemble = sampler(offload=True)
    order = []
    for number, ticket in enumerate(ensemble.tickets):
        ticket.to = lambda device, number=number: order.append((number, "comes" if device == META else "goes"))
    ensemble.offload.device = META
    for step in (999, 500, 300, 250, 239, 0, 999):
        ensemble._ticket(int(ensemble.partition.lookup(torch.tensor(step))))
    assert order == [
        (2, "comes"),
        (2, "goes"), (1, "comes"),
        (1, "goes"), (0, "comes"),
        (0, "goes"), (2, "comes"),
    ]  # fmt: skip


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler])
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_a_descending_schedule_moves_each_ticket_once_and_makes_the_same_images(scheduler):
    settings = {"scheduler": scheduler(), "num_inference_steps": 30, "progress": False}
    offloaded = sampler(offload=True)
    images = offloaded.sample(2, generator=seeded(), **settings)
    assert torch.equal(images, sampler().sample(2, generator=seeded(), **settings))
    assert offloaded.offload.moves == 3
    assert [len(ticket.moves) for ticket in offloaded.tickets] == [1, 2, 2]  # there and back; the last one stays
    offloaded.sample(4, batch_size=2, generator=seeded(), **settings)
    assert offloaded.offload.moves == 9


def test_a_blend_moves_tickets_at_every_step_of_the_overlap_and_is_the_same():
    settings = {"scheduler": DDIMScheduler(), "num_inference_steps": 40, "progress": False}
    offloaded = sampler(offload=True, blend=True)
    images = offloaded.sample(1, generator=seeded(), **settings)
    assert torch.equal(images, sampler(blend=True).sample(1, generator=seeded(), **settings))
    assert offloaded.offload.moves > 3


def test_batches_of_several_regions_are_served_ticket_by_ticket():
    torch.manual_seed(1)
    inputs = torch.randn(4, 1, 4, 4), torch.tensor([900, 10, 300, 20])
    offloaded = sampler(offload=True)
    assert torch.equal(offloaded(*inputs), sampler()(*inputs))
    assert offloaded.offload.moves == 3


def test_conversions_reach_every_ticket_and_leave_it_at_home():
    ensemble = sampler(offload=True).to(META)
    call(ensemble, 999)
    ensemble.half()
    assert ensemble.device == META  # which a conversion says nothing of
    assert {ticket.conv.weight.dtype for ticket in ensemble.tickets} == {torch.float16}
    assert places(ensemble)[:2] == [CPU, CPU]
    for device, dtype in ((META, torch.float64), (CPU, torch.bfloat16)):
        ensemble = sampler(offload=True).to(device, dtype)
        assert (ensemble.device, ensemble.dtype) == (device, dtype)
        assert {ticket.conv.weight.dtype for ticket in ensemble.tickets} == {dtype}


def test_a_move_that_fails_leaves_every_ticket_at_home():
    ensemble = sampler(offload=True)
    ensemble(torch.zeros(1, 1, 4, 4), 999)

    def full(device):
        raise torch.OutOfMemoryError("no room")

    arrive, ensemble.tickets[1].to = ensemble.tickets[1].to, full
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        ensemble(torch.zeros(1, 1, 4, 4), 300)
    assert ensemble.offload.active is None
    ensemble.tickets[1].to = arrive
    assert ensemble(torch.zeros(1, 1, 4, 4), 300).shape == (1, 1, 4, 4)


def test_pipelines_and_copies_and_files_do_not_mind(tmp_path):
    from models import Denoiser, tiny_unet

    torch.manual_seed(0)
    found = Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {})
    plain = cut(found)
    plain.save_pretrained(tmp_path / "e")
    offloaded = TicketEnsembleSampler.from_pretrained(tmp_path / "e", offload=True)
    for ensemble in (offloaded, copy.deepcopy(offloaded)):
        images = []
        for network in (plain, ensemble):
            pipeline = DDIMPipeline(unet=network, scheduler=DDIMScheduler()).to("cpu")
            pipeline.set_progress_bar_config(disable=True)
            images.append(pipeline(batch_size=1, generator=seeded(), num_inference_steps=8, output_type="pt").images)
        assert torch.equal(*images)
        assert ensemble.offload.moves == 3
    offloaded.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "e").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert plain.offload is None


def test_a_sampler_from_a_trainer_copies_the_tickets_one_by_one(monkeypatch):
    """So that there is never more than one copy on the device, where the trained tickets are, too."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = TicketEnsemble(sampler().tickets, TimestepPartition.of(REGIONS), TimestepArgument("t", 1))

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module = Module()
    trainer.strategy.connect(module)
    order = []
    to = Ticket.to

    def deep(self, memo):
        order.append("copied")
        clone = Ticket()
        clone.load_state_dict(self.state_dict())
        return clone

    monkeypatch.setattr(Ticket, "__deepcopy__", deep, raising=False)
    monkeypatch.setattr(Ticket, "to", lambda self, device: order.append("home") or to(self, device))
    offloaded = TicketEnsembleSampler.from_trainer(trainer, offload=True)
    assert order[:6] == ["copied", "home"] * 3
    assert offloaded.offload is not None and offloaded.device == CPU
    for own, trained in zip(offloaded.parameters(), module.parameters(), strict=True):
        assert torch.equal(own, trained) and own is not trained
