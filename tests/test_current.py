"""The denoiser of the moment as a sampler: dense or tickets, averaged where that is kept, and never a copy."""

import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from modules import ConvNet, Lit, OnStep, fit, quiet_trainer
from torch import nn

from lightning_earlybird import EarlyBirdDetector, TicketEnsemble, TimestepAwarePruner, TimestepPartition
from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.current import current_sampler
from lightning_earlybird.ensemble import TimestepArgument

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_search_steps=. reached"),
]

REGIONS = [(0, 300, 0.25), (300, 1000, 0.5)]
HALVES = TimestepPartition.of(REGIONS)


class UnnamedNet(ConvNet):
    def forward(self, x, when):
        return super().forward(x, when)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(sampler):
    generator = torch.Generator().manual_seed(5)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    return sampler.sample(2, scheduler=scheduler, num_inference_steps=3, generator=generator, progress=False)


def test_the_sampler_is_the_dense_denoiser_before_the_switch_and_the_tickets_after_it() -> None:
    seen = {}

    def look(trainer, module):
        sampler = current_sampler(trainer, module)
        modes = [part.training for part in module.modules()]
        assert drawn(sampler).shape == (2, 1, 4, 4)
        assert [part.training for part in module.modules()] == modes
        shared = {id(parameter) for parameter in module.parameters()}
        assert {id(parameter) for parameter in sampler.parameters()} == shared
        seen[trainer.global_step] = [(region.start, region.stop) for region in sampler.regions]

    pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=2)
    fit(Lit(), pruner, OnStep(look), max_steps=4)
    whole = [(-float("inf"), float("inf"))]
    assert seen == {1: whole, 2: whole, 3: [(0, 300), (300, 1000)], 4: [(0, 300), (300, 1000)]}


def test_averaged_weights_are_sampled_from_where_they_are_kept() -> None:
    found = []

    def look(trainer, module):
        sampler = current_sampler(trainer, module)
        average = trainer.callbacks[0]._average_model.module
        found.append({id(p) for p in sampler.parameters()} == {id(p) for p in average.parameters()})

    pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=1)
    fit(Lit(), EMAWeightAveraging(decay=0.5), pruner, OnStep(look), max_steps=3)
    assert found == [True, True, True]


def test_a_name_needs_no_detector() -> None:
    def look(trainer, module):
        with pytest.raises(RuntimeError, match="denoiser=None: no EarlyBirdDetector has found the denoiser yet"):
            current_sampler(trainer, module)
        sampler = current_sampler(trainer, module, denoiser="model")
        assert sampler.timesteps.name == "timesteps"
        with pytest.raises(ValueError, match="denoiser='nothing' is not a sub-module of Lit"):
            current_sampler(trainer, module, denoiser="nothing")

    fit(Lit(), OnStep(look), max_steps=1)


def test_a_network_that_does_not_name_its_timesteps_needs_a_detector() -> None:
    def look(trainer, module):
        with pytest.raises(ValueError, match=r"forward takes \['x', 'when'\], of which 0 have a name"):
            current_sampler(trainer, module, denoiser="model")

    fit(Lit(UnnamedNet), OnStep(look), max_steps=1)

    def sample(trainer, module):
        assert isinstance(current_sampler(trainer, module, denoiser="model").tickets[0], nn.Module)

    fit(Lit(UnnamedNet), EarlyBirdDetector([0.5], round_to=1), OnStep(sample), max_steps=1)


def test_tickets_of_other_ranks_are_not_made_up() -> None:
    module = Lit(lambda: TicketEnsemble([ConvNet(), AbsentTicket(ConvNet())], HALVES, TimestepArgument("timesteps", 1)))
    with pytest.raises(RuntimeError, match=r"this rank has the tickets \[0\] of 2: other ranks train the rest"):
        current_sampler(quiet_trainer(), module)
