import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.evaluation.drawing import (
    decoded,
    default_scheduler,
    dense_sampler,
    drawn,
    ensemble_sampler,
    finite_uint8,
    share,
)
from lightning_earlybird.regions import TimestepPartition

# Raised inside diffusers' schedulers against NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Net(nn.Module):
    """Row by row alike, so that batches make no difference but by their noise; takes labels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.labels = []

    def forward(self, x, t, class_labels=None):
        if class_labels is not None:
            self.labels.append(class_labels)
        return x * self.scale


def draw(indices, **settings):
    sampler = dense_sampler(Net(), TimestepArgument("t", 1), (1, 4, 4))
    known = {"scheduler": DDPMScheduler(), "num_inference_steps": 3, "batch_size": 4, "seed": 0}
    return torch.cat([torch.empty(0, 1, 4, 4), *drawn(sampler, indices, **(known | settings))])


@pytest.mark.parametrize("count", [1, 4, 21, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_are_whole_batches_that_follow_each_other(count: int, world_size: int) -> None:
    shares = [share(count, 4, rank, world_size) for rank in range(world_size)]
    assert [index for each in shares for index in each] == list(range(count))
    assert all(each.start % 4 == 0 for each in shares if len(each))
    sizes = [-(-len(each) // 4) for each in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_samples_are_the_same_however_many_ranks_draw_them(world_size: int) -> None:
    whole = draw(range(21))
    assert whole.shape == (21, 1, 4, 4)
    shared = torch.cat([draw(share(21, 4, rank, world_size)) for rank in range(world_size)])
    assert torch.equal(shared, whole)


def test_samples_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    before = torch.get_rng_state()
    first = draw(range(6))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(draw(range(6)), first)
    assert not torch.equal(draw(range(6), seed=1), first)
    assert not torch.equal(first[:2], first[4:])


def test_classes_come_equally_often_and_in_turn() -> None:
    network = Net()
    sampler = dense_sampler(network, TimestepArgument("t", 1), (1, 4, 4))
    settings = {"scheduler": DDIMScheduler(), "num_inference_steps": 1, "batch_size": 4, "seed": 0}
    list(drawn(sampler, range(4, 10), num_classes=3, **settings))
    assert [labels.tolist() for labels in network.labels] == [[1, 2, 0, 1], [2, 0]]


def test_what_is_sampled_is_decoded() -> None:
    latents = torch.zeros(2, 4, 3, 3)
    assert decoded(latents, lambda x: x[:, :3].repeat(1, 1, 2, 2)).shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"samples: \(2, 4\) for 2 samples, expected images"):
        decoded(torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match=r"decode\(samples\): \(1, 4, 3, 3\) for 2 samples, expected images"):
        decoded(latents, lambda x: x[:1])
    with pytest.raises(ValueError, match=r"decode\(samples\): dict for 2 samples"):
        decoded(latents, lambda x: {})


def test_images_with_nan_are_counted_and_left_out() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = torch.nan
    images[2, 0, 1, 1] = torch.inf
    whole, broken = finite_uint8(images)
    assert whole.shape == (1, 1, 2, 2)
    assert broken == 2


def test_a_sampler_of_an_ensemble_shares_its_tickets_and_their_modes() -> None:
    ensemble = TicketEnsemble(
        [Net(), Net()], TimestepPartition.of([(0, 5, 0.1), (5, 10, 0.2)]), TimestepArgument("t", 1)
    )
    ensemble.train()
    sampler = ensemble_sampler(ensemble)
    assert all(ours is theirs for ours, theirs in zip(sampler.tickets, ensemble.tickets, strict=True))
    assert sampler.tickets[0].training
    assert sampler.regions == ensemble.regions


def test_the_schedule_is_the_modules_own_where_it_has_one() -> None:
    class Module(pl.LightningModule):
        def __init__(self, scheduler) -> None:
            super().__init__()
            self.noise = scheduler

    # 400 by position, which diffusers takes for a default.
    taken = default_scheduler(Module(DDPMScheduler(400, beta_schedule="squaredcos_cap_v2", prediction_type="sample")))
    assert type(taken).__name__ == "SpacedDDIMScheduler"
    assert (taken.config.num_train_timesteps, taken.config.spacing) == (400, "quadratic")
    assert (taken.config.beta_schedule, taken.config.prediction_type) == ("squaredcos_cap_v2", "sample")
    flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert default_scheduler(Module(flow)).config.shift == 2.0
    for nothing in (None, nn.Linear(1, 1)):
        assert default_scheduler(nothing).config.beta_schedule == "linear"
