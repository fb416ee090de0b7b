"""Tickets that train together and tickets that train apart learn the same distribution.

From the same tickets, with as many samples for each: in one process, where every sample goes to the ticket of its
timestep, and under MultiTicketStrategy, where each ticket draws timesteps from its region and overlap, by interception
and by the module's own method. Compared are the losses in each region on held-out samples with fixed noise, over
several seeds. As a control, timesteps from the lower half of each region, which no check can tell from right ones.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import Strategy
from modules import Lit, Mlp, quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from worlds import run

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TimestepAwarePruner, draw_uniform

TIMESTEPS, OVERLAP = 900, 20
REGIONS = [(0, 300, 0.25), (300, 600, 0.5), (600, 900, 0.5)]  # of one length: each gets a third of a routed batch
SEEDS, STEPS, BATCH = range(6), 120, 64
LIMIT = 4.0
"""Of a t statistic with about ten degrees of freedom: beyond it in one of 400 comparisons of equal distributions."""


class Routed(Lit):
    """Points on two arcs; the loss as users write it, with timesteps that are drawn by torch.randint."""

    def __init__(self) -> None:
        super().__init__(lambda: Mlp(32), decaying)

    def timesteps(self, count: int) -> Tensor:
        return torch.randint(TIMESTEPS, (count,))

    def loss(self, samples: Tensor) -> Tensor:
        steps = self.timesteps(len(samples))
        return error(self.model, samples, torch.randn_like(samples), steps).mean()


class Own(Routed):
    """With a method of its own to draw timesteps, in pairs."""

    def sample_timesteps(self, batch_size: int, start: int = 0, stop: int = TIMESTEPS) -> Tensor:
        return draw_uniform(batch_size, start, stop, antithetic=True)

    def timesteps(self, count: int) -> Tensor:
        return self.sample_timesteps(count)


class LowerHalf(Own):
    """The control."""

    def sample_timesteps(self, batch_size: int, start: int = 0, stop: int = TIMESTEPS) -> Tensor:
        return draw_uniform(batch_size, start, (start + stop) // 2)


KINDS: dict[str, tuple[type[Routed], bool]] = {
    "together": (Routed, False),
    "apart, intercepted": (Routed, True),
    "apart, own draw": (Own, True),
    "apart, lower halves": (LowerHalf, True),
}


def decaying(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def error(denoiser: torch.nn.Module, samples: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    angle = (steps / TIMESTEPS * math.pi / 2)[:, None]
    return (denoiser(samples * angle.cos() + noise * angle.sin(), steps) - noise).square().mean(1)


def points(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(count, generator=generator) * math.pi
    side = torch.randint(2, (count,), generator=generator) * 2 - 1
    arcs = torch.stack([angle.cos() + 0.5 * side, angle.sin() * side], 1)
    return arcs + 0.05 * torch.randn(count, 2, generator=generator)


def fit(module: Routed, seed: int, strategy: str | Strategy, batch: int, *callbacks, steps: int = STEPS) -> None:
    trainer = quiet_trainer(*callbacks, strategy=strategy, max_steps=steps)
    seed_everything(seed, verbose=False)  # DDP goes back to it when it starts
    trainer.fit(module, DataLoader(TensorDataset(points(60 * BATCH, seed=1)), batch, shuffle=True))


@torch.no_grad()
def losses(module: Routed) -> list[float]:
    """For each region the mean over held-out points with fixed noise, each ticket on its own."""
    samples, generator = points(20_000, seed=2), torch.Generator().manual_seed(3)
    noise = torch.randn(samples.shape, generator=generator)
    found = []
    for ticket, (start, stop, _) in zip(module.model.tickets, REGIONS, strict=True):
        steps = torch.randint(start, stop, (len(samples),), generator=generator)
        found.append(error(ticket.eval(), samples, noise, steps).mean().item())
    return found


def train(out: Path) -> None:
    """The scenario: writes the losses of all kinds and seeds."""
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=5, window=2, threshold=1.0)
    search = TimestepAwarePruner(REGIONS, round_to=4, overlap=OVERLAP, dirpath=out / "saved")
    fit(Routed(), 0, "auto", 3 * BATCH, detector, search, steps=40)
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in SEEDS:
        for kind, (module_class, apart) in KINDS.items():
            module = module_class()
            pruner = TimestepAwarePruner(out / "saved" / "switch", dirpath=out / f"{kind}_{seed}")
            # Together, a ticket gets a third of each batch.
            strategy = MultiTicketStrategy() if apart else "auto"
            fit(module, seed, strategy, BATCH if apart else 3 * BATCH, pruner)
            found[kind].append(losses(module))
    (out / "losses.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[list[float]]]:
    out = tmp_path_factory.mktemp("agreement")
    run(__file__, out)
    return json.loads((out / "losses.json").read_text())


def statistic(one: list[float], other: list[float]) -> float:
    """Welch's t: the difference of the means in units of its standard error, told from the spread over seeds."""
    spread = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    return (statistics.mean(other) - statistics.mean(one)) / math.sqrt(spread)


def compare(found: dict[str, list[list[float]]], kind: str) -> list[float]:
    """The statistic in each region, against tickets that trained together."""
    together, apart = (list(zip(*found[name], strict=True)) for name in ("together", kind))
    return [statistic(one, other) for one, other in zip(together, apart, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["apart, intercepted", "apart, own draw"])
def test_losses_in_each_region_are_those_of_tickets_that_train_together(found, kind):
    assert len(found[kind]) == len(found["together"]) == len(SEEDS)
    assert max(map(abs, compare(found, kind))) < LIMIT
    for one, other in zip(zip(*found["together"], strict=True), zip(*found[kind], strict=True), strict=True):
        assert statistics.mean(other) == pytest.approx(statistics.mean(one), rel=0.02)


@pytest.mark.slow
def test_the_comparison_sees_timesteps_that_are_drawn_from_half_of_each_region(found):
    assert min(compare(found, "apart, lower halves")) > LIMIT


@pytest.mark.slow
def test_the_tickets_have_learned_something(found):
    # The mean of standard normal noise, which is as good as it gets without looking at the samples, scores 1.
    for row in found["together"]:
        assert all(loss < limit for loss, limit in zip(row, (0.95, 0.5, 0.1), strict=True))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
