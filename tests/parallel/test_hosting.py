"""What a rank keeps, and what it gets back; in one process, as a world of one."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from modules import REGIONS, Lit, OnStep, loader, quiet_trainer
from torch.optim.swa_utils import AveragedModel

from lightning_earlybird import EarlyBirdDetector, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.parallel.hosting import ensembles, gather_tickets, release_tickets


class WithAverage(Lit):
    """Averages its denoiser itself, beside the callback that does."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.model)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.model)


def run(act, module: pl.LightningModule, **settings) -> pl.Trainer:
    """Train to step 4, calling ``act`` after step 3; the switch is at step 2."""

    def on_step(trainer, module):
        if trainer.global_step == 3:
            act(trainer, module)

    trainer = quiet_trainer(
        OnStep(on_step),
        EMAWeightAveraging(decay=0.5),
        TimestepAwarePruner(REGIONS, denoiser="model", round_to=4, **settings),
        EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0, every_n_train_steps=1),
        max_steps=4,
    )
    trainer.fit(module, loader(module, 4), loader(module, 1))
    return trainer


def test_releasing_leaves_no_parameter_state_or_average_of_the_other_tickets(tmp_path):
    seen = {}

    def act(trainer, module):
        before = ensembles(trainer, module)
        optimizer = trainer.optimizers[0]
        groups, states = optimizer.param_groups, optimizer.state
        release_tickets(trainer, module, [1])
        assert (
            ensembles(trainer, module) == before and len(before) == 4
        )  # live, averaged by both, average of an average
        kept = set(module.parameters())
        assert {p for group in groups for p in group["params"]} >= set(states)
        assert set(states) <= kept
        assert optimizer.param_groups is groups and optimizer.state is states
        for each in before:
            assert [isinstance(ticket, AbsentTicket) for ticket in each.tickets] == [True, False]
        seen["parameters"] = [name for name, _ in module.model.named_parameters()]

    with pytest.warns(UserWarning, match="trained by other ranks"):
        trainer = run(act, WithAverage(), dirpath=tmp_path)
    assert trainer.global_step == 4  # the last step was taken with one ticket
    assert all(name.startswith("tickets.1.") for name in seen["parameters"])


@pytest.fixture
def world_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_ticket_that_comes_back_has_the_structure_of_the_one_that_left(tmp_path, world_of_one):
    def act(trainer, module):
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        release_tickets(trainer, module, [0])
        assert shapes != {name: tensor.shape for name, tensor in module.state_dict().items()}
        kept = {name: tensor.clone() for name, tensor in module.model.tickets[0].state_dict().items()}
        gather_tickets(trainer, module, leaders=[0, 0], rank=0)
        assert shapes == {name: tensor.shape for name, tensor in module.state_dict().items()}
        for each in ensembles(trainer, module):
            assert isinstance(each, TicketEnsemble) and each.hosted == (0, 1)
        assert all(torch.equal(kept[name], tensor) for name, tensor in module.model.tickets[0].state_dict().items())
        trainer.should_stop = True

    run(act, WithAverage(), dirpath=tmp_path)
