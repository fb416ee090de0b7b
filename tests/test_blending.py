"""The linear blend of neighbours inside an overlap, on tickets whose outputs are known."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from samplers import seeded
from torch import nn

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.blending import blended
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.records import EnsembleRecord

REGIONS = [(0, 100, 0.0), (100, 300, 0.0), (300, 1000, 0.0)]


class Constant(nn.Module):
    """Answers with its number, so that a blend shows its weight."""

    def __init__(self, number, scale=1.0):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(float(number)))
        self.scale = scale
        self.seen = []

    def forward(self, sample, timestep, labels=None):
        self.seen.append((len(sample), None if labels is None else labels.tolist()))
        return UNet2DOutput(sample=self.scale * (torch.zeros_like(sample) + self.number))


def sampler(overlap=50, blend=True, **settings):
    tickets = [Constant(number) for number in range(3)]
    partition = TimestepPartition.of(REGIONS, overlap)
    made = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", 1), blend=blend, **settings).eval()
    made.record = EnsembleRecord(None, ({}, {}, {}), sample_shape=(1, 2, 2))
    return made


# Ticket k answers k: inside [b, b + 50) above a boundary b the answer rises linearly from k - 1 to k.
KNOWN = [
    (0, 0),
    (99, 0),
    (100, 0),
    (110, 0.2),
    (125, 0.5),
    (149, 0.98),
    (150, 1),
    (299, 1),
    (300, 1),
    (325, 1.5),
    (350, 2),
]


def test_the_weights_rise_linearly_from_the_boundary_to_the_end_of_the_overlap():
    partition = TimestepPartition.of(REGIONS, overlap=50)
    steps = torch.tensor([step for step, _ in KNOWN])
    for timesteps in (steps, steps.double(), steps.float()):
        owners, weights = partition.blend(timesteps)
        assert torch.equal(owners, partition.lookup(timesteps))
        answers = owners - 1 + weights
        torch.testing.assert_close(answers, torch.tensor([answer for _, answer in KNOWN]).double())
        assert ((weights >= 0) & (weights <= 1)).all()
    owners, weights = TimestepPartition.of(REGIONS).blend(steps)
    assert torch.equal(owners, partition.lookup(steps)) and (weights == 1).all()
    with pytest.raises(ValueError, match="outside the time axis"):
        partition.blend(torch.tensor([1000]))
    assert partition.blend(torch.tensor([1000, -1]), check=False)[0].tolist() == [-1, -1]


@pytest.mark.parametrize(("step", "answer"), KNOWN)
def test_scalar_timesteps_are_blended_as_pipelines_pass_them(step, answer):
    for timestep in (step, float(step), torch.tensor(step), torch.full((2,), step)):
        output = sampler()(torch.zeros(2, 1, 2, 2), timestep)
        torch.testing.assert_close(output.sample, torch.full((2, 1, 2, 2), float(answer)))


def test_each_row_of_a_batch_has_its_own_weight():
    ensemble = sampler()
    steps = torch.tensor([step for step, _ in KNOWN])
    output = ensemble(torch.zeros(len(KNOWN), 1, 2, 2), steps, torch.arange(len(KNOWN)))
    expected = torch.tensor([float(answer) for _, answer in KNOWN])
    torch.testing.assert_close(output.sample[:, 0, 0, 0], expected)
    # Each ticket is called with the rows of its region and then, from below, with those of the overlap above it.
    assert [ticket.seen for ticket in ensemble.tickets] == [
        [(2, [0, 1]), (4, [2, 3, 4, 5])],
        [(6, [2, 3, 4, 5, 6, 7]), (2, [8, 9])],
        [(3, [8, 9, 10])],
    ]


def test_rows_that_are_all_in_one_overlap_differ_in_their_weights():
    output = sampler()(torch.zeros(3, 1, 2, 2), torch.tensor([100, 125, 149]))
    torch.testing.assert_close(output.sample[:, 0, 0, 0], torch.tensor([0, 0.5, 0.98]))


def test_without_it_the_tickets_are_switched_and_outside_of_overlaps_nothing_changes():
    steps = torch.tensor([step for step, _ in KNOWN])
    hard = sampler(blend=False)(torch.zeros(len(KNOWN), 1, 2, 2), steps).sample[:, 0, 0, 0]
    assert hard.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    ensemble = sampler()
    ensemble(torch.zeros(2, 1, 2, 2), 200)
    assert [len(ticket.seen) for ticket in ensemble.tickets] == [0, 1, 0]


def test_training_draws_one_of_the_neighbours_as_ever():
    output = sampler().train()(torch.zeros(64, 1, 2, 2), torch.full((64,), 125)).sample[:, 0, 0, 0]
    assert set(output.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler(999, shift=2.0)])
def test_sampling_blends_like_the_forward_pass(scheduler):
    ensemble = sampler()
    images = ensemble.sample(2, scheduler=scheduler, num_inference_steps=40, generator=seeded(), progress=False)
    scheduler.set_timesteps(40)
    sample = torch.randn(2, 1, 2, 2, generator=seeded())
    plain = sampler()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(plain(sample, timestep).sample, timestep, sample).prev_sample
    torch.testing.assert_close(images, sample.clamp(-1, 1))
    assert sum(len(ticket.seen) for ticket in ensemble.tickets) > 40
    switched = sampler(blend=False)
    other = switched.sample(2, scheduler=scheduler, num_inference_steps=40, generator=seeded(), progress=False)
    assert not torch.equal(other, images)
    assert sum(len(ticket.seen) for ticket in switched.tickets) == 40


def test_half_precision_and_gradients_pass_through():
    half = sampler().to(torch.bfloat16)
    output = half(torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), torch.tensor([125, 500])).sample
    assert output.dtype == torch.bfloat16 and output[:, 0, 0, 0].tolist() == [0.5, 2.0]
    ensemble = sampler()
    ensemble(torch.zeros(1, 1, 2, 2), 110).sample.sum().backward()
    assert [ticket.number.grad for ticket in ensemble.tickets[:2]] == [
        pytest.approx(4 * 0.8),
        pytest.approx(4 * 0.2),
    ]


def test_it_can_be_switched_on_and_off():
    ensemble = sampler(blend=False)
    ensemble.blend = True
    assert ensemble(torch.zeros(1, 1, 2, 2), 125).sample[0, 0, 0, 0] == 0.5


@pytest.mark.parametrize("late", [True, False])
def test_without_an_overlap_it_is_refused(late):
    with pytest.raises(ValueError, match=r"blend=True has no effect, as the regions were trained with overlap=0"):
        if late:
            sampler(overlap=0, blend=False).blend = True
        else:
            sampler(overlap=0)


def test_outputs_that_cannot_be_blended_by_row_are_refused():
    low, high = (torch.zeros(3), 5, "text"), (torch.ones(3), 6, "text")
    assert blended(low, high, torch.tensor([0.25]))[0].tolist() == [0.25] * 3
    assert blended(low, high, torch.tensor([0.25]))[1:] == (6, "text")
    assert blended(torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.25])) == 0.25
    assert blended(torch.tensor([1]), torch.tensor([2]), torch.tensor([0.25])).item() == 2
    with pytest.raises(ValueError, match=r"output\[0\] has shape \(3,\) for 2 rows: tickets whose outputs are blended"):
        blended(low, high, torch.tensor([0.25, 0.5]))
    with pytest.raises(TypeError, match="the tickets return different types"):
        blended(torch.zeros(3), (torch.zeros(3),), torch.tensor([0.25]))
