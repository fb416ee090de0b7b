"""Scoring on two processes that see different data."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from modules import Lit, Mlp, loader, quiet_trainer
from torch import Tensor, nn

import lightning_earlybird
from lightning_earlybird import EarlyBirdDetector, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.score_batches import scoring_batches
from lightning_earlybird.structure import ChannelPlan
from lightning_earlybird.untouched import isolated_rng, seed_everything_by

REGIONS = [(0, 500, 0.5), (500, 1000, 0.5)]


class Gathering(Lit):
    """Waits for the other ranks in its training step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("everywhere", self.all_gather(loss.detach()).mean(), sync_dist=True)
        return loss


class Compare(pl.Callback):
    """By hand: sums of weight times gradient over each slice, averaged over the ranks before their absolute value."""

    def __init__(self, detector: EarlyBirdDetector, out: Path) -> None:
        self.detector, self.out = detector, out
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        network, total = pl_module.model, torch.zeros(2, 8)
        weights = [network.up.weight, network.down.weight]
        with isolated_rng():
            seed_everything_by(trainer.global_step, trainer.global_rank)
            for index, scored in enumerate(scoring_batches(trainer, 1)):
                seed_everything_by(trainer.global_step, trainer.global_rank, index)
                gradients = torch.autograd.grad(pl_module.loss(scored[0]), weights)
                up, down = (w.detach() * g for w, g in zip(weights, gradients, strict=True))
                total += torch.stack([up.sum(1), down.sum(0)])
        (mask,) = self.detector.masks.values()
        both = trainer.strategy.all_gather(total)
        scores = both.mean(0).abs().mean(0), both.abs().mean(0).mean(0), total.abs().mean(0)
        masks = [torch.zeros(8).scatter(0, s.argsort(descending=True, stable=True)[:4], 1) for s in scores]
        self.rows.append(torch.stack([mask.flat().float(), *masks]))

    def on_fit_end(self, trainer, pl_module):
        rows = trainer.strategy.all_gather(torch.stack(self.rows))  # (ranks, steps, kinds, channels)
        if trainer.is_global_zero:
            torch.save(rows, self.out)


class Masks(pl.Callback):
    """What every rank has drawn, written down by the first."""

    def __init__(self, detector: EarlyBirdDetector, out: Path) -> None:
        self.detector, self.out = detector, out

    def on_fit_end(self, trainer, pl_module):
        masks = torch.stack([mask.flat().float() for mask in self.detector.masks.values()])
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        tickets = torch.tensor(float(isinstance(pl_module.model, TicketEnsemble)))
        everywhere = [trainer.strategy.all_gather(each) for each in (masks, weights, tickets)]
        if trainer.is_global_zero:
            torch.save(everywhere, self.out)


def differing(denoiser: nn.Module, plan: ChannelPlan) -> Tensor:
    """Other scores on every rank."""
    return torch.arange(plan.num_channels) * (-1.0) ** int(os.environ.get("LOCAL_RANK", "0"))


def run(module: Lit, *callbacks: pl.Callback) -> None:
    torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", "0")))
    trainer = quiet_trainer(*callbacks, strategy="ddp", devices=2, max_epochs=4, log_every_n_steps=1)
    trainer.fit(module, loader(module, 8))


def run_two_processes(out: Path) -> None:
    def detector(criterion: Any, **settings: Any) -> EarlyBirdDetector:
        settings = {"every_n_train_steps": 1, "round_to": 1} | settings
        return EarlyBirdDetector([0.5], criterion=criterion, **settings)

    def adam(module: Lit) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 0.1)

    compared = detector("taylor", score_batches=1)
    run(Gathering(lambda: Mlp(8), adam), compared, Compare(compared, out / "taylor.pt"))
    own = detector(differing)
    run(Lit(Mlp), own, Masks(own, out / "own.pt"))
    thresholded = detector("diff_pruning", window=2, threshold=1.0)
    pruner = TimestepAwarePruner(REGIONS, overlap=20, round_to=1, dirpath=out / "tickets")
    run(Gathering(Mlp), thresholded, pruner, Masks(thresholded, out / "regions.pt"))


@pytest.mark.slow
def test_two_processes_average_their_gradients_and_draw_the_same_masks(tmp_path: Path) -> None:
    package = Path(lightning_earlybird.__file__).parents[1]
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "took" in done.stderr and done.stderr.count("batches, the cost of about 1.0 training steps") == 1
    )  # by one rank

    first, second = torch.load(tmp_path / "taylor.pt", weights_only=True)
    drawn, averaged, absolute, alone = first.unbind(1)
    assert torch.equal(drawn, second[:, 0]) and torch.equal(drawn, averaged)
    assert not torch.equal(averaged, absolute)  # absolute values taken on each rank would rank otherwise
    assert not torch.equal(averaged, alone) and not torch.equal(alone, second[:, 3])  # the ranks saw different data

    masks, _, _ = torch.load(tmp_path / "own.pt", weights_only=True)
    assert masks.tolist() == [[[0.0] * 4 + [1.0] * 4]] * 2  # those of the first rank

    masks, weights, tickets = torch.load(tmp_path / "regions.pt", weights_only=True)
    assert masks.shape == (2, 2, 8) and torch.equal(*masks) and torch.equal(*weights) and bool(tickets.all())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
