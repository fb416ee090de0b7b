"""What the plan's step times are made of."""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from modules import REGIONS, Lit, Mlp, loader, quiet_trainer
from torch import nn
from worlds import run

from lightning_earlybird import TimestepAwarePruner
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.parallel import timing
from lightning_earlybird.parallel.timing import PassSeconds, StepClock, pass_seconds
from lightning_earlybird.probe import DenoiserCall

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A StepClock that goes by a time set by hand: ``clock.at(seconds, event)``."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    made = StepClock(CPU, window=3)

    def at(seconds: float, event: str) -> None:
        now[0] = float(seconds)
        getattr(made, event)()

    made.at = at
    return made


def batch(clock: StepClock, start: float, forward: float, backward: float) -> None:
    clock.at(start, "batch_begins")
    clock.at(start + forward, "backward_begins")
    clock.at(start + forward + backward, "backward_ends")


def test_a_step_is_timed_without_its_backward_pass(clock):
    for number in range(4):
        batch(clock, 10 * number, 2, 5)
    assert clock.seconds == 10 - 5


def test_several_backward_passes_of_one_batch_are_all_left_out(clock):
    batch(clock, 0, 0, 0)
    clock.at(10, "batch_begins")
    for start in (11, 14):
        clock.at(start, "backward_begins")
        clock.at(start + 2, "backward_ends")
    clock.at(20, "batch_begins")
    assert clock.seconds == 10 - 4


def test_the_first_batch_and_a_long_pause_do_not_count(clock):
    batch(clock, 0, 0, 0)
    assert clock.seconds is None
    for start in (1000, 1010, 1999, 2009):  # tracing, then steps of ten seconds around a validation
        batch(clock, start, 1, 1)
    assert clock.seconds == 9


def test_only_the_last_batches_count(clock):
    for start in (0, 10, 20, 30, 34, 38, 42):
        batch(clock, start, 1, 1)
    assert clock.seconds == 3


class Counting(Mlp):
    def forward(self, x, timesteps):
        self.sizes = [*getattr(self, "sizes", []), len(x)]
        return super().forward(nn.functional.dropout(x, 0.5), timesteps)


def call(rows: int) -> DenoiserCall:
    where = TimestepArgument("timesteps", 1)
    return DenoiserCall("model", (torch.randn(1, 2), torch.tensor([5])), {}, where, (2,), torch.zeros(rows))


def test_passes_are_timed_at_the_size_of_the_batch_and_change_nothing():
    network = Counting()
    network.up.weight.requires_grad_(False)
    network.down.weight.grad = torch.ones_like(network.down.weight)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seen, state = call(7), torch.get_rng_state()

    with torch.no_grad():  # whatever the caller does
        seconds = pass_seconds(network, seen, CPU, nullcontext, repeats=3)

    assert network.sizes == [7] * 4  # one to warm up
    assert len(seconds.forward) == len(seconds.backward) == 3
    assert seconds.least == min(seconds.forward) + min(seconds.backward) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(network.down.weight.grad, torch.ones_like(network.down.weight))
    assert network.up.bias.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_part_that_takes_no_part_is_no_obstacle():
    network = Counting()
    network.unused = nn.Linear(2, 2)
    assert pass_seconds(network, call(7), CPU, nullcontext, repeats=1).least > 0


def test_a_disturbance_does_not_make_a_network_look_slower():
    assert PassSeconds((1.0, 9.0, 1.1), (2.0, 2.1, 30.0)).least == 3.0


class Sleeping(Lit):
    """A step takes 50 ms before the denoiser is called, and 300 ms in the backward pass, as when ranks wait there."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        loss = super().training_step(batch, batch_idx)
        if self.trainer.strategy.plan is None:
            loss.register_hook(lambda gradient: time.sleep(0.3))
        return loss


def train(out: Path) -> None:
    """The scenario: writes down the planned seconds of a step."""
    module = Sleeping(Mlp)
    pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=6, dirpath=out)
    trainer = quiet_trainer(pruner, strategy="multi_ticket", max_steps=8)
    trainer.fit(module, loader(module, 10))
    steps = [load.step_seconds for load in trainer.strategy.plan.loads]
    (out / "steps.json").write_text(json.dumps(steps))


@pytest.mark.slow
def test_a_tickets_step_is_its_passes_and_what_a_dense_step_takes_besides_its_own(tmp_path):
    run(__file__, tmp_path)
    for seconds in json.loads((tmp_path / "steps.json").read_text()):
        assert 0.05 < seconds < 0.3


if __name__ == "__main__":
    train(Path(sys.argv[1]))
