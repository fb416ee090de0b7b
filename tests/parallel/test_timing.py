import contextlib
import time

import pytest
import torch
from modules import ConvNet

from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.parallel.timing import StepClock, pass_seconds
from lightning_earlybird.probe import DenoiserCall

CPU = torch.device("cpu")


def call(rows: int = 64) -> DenoiserCall:
    sample = torch.randn(1, 1, 4, 4)
    place = TimestepArgument("timesteps", 1)
    return DenoiserCall("model", (sample, torch.zeros(1)), {}, place, (1, 4, 4), torch.zeros(rows))


def test_a_pass_takes_the_batch_that_was_seen_and_leaves_everything_as_it_was():
    network = ConvNet(dropout=0.5)
    shapes = []
    network.register_forward_pre_hook(lambda _, args: shapes.append([arg.shape for arg in args]))
    network.conv_in.weight.grad = torch.full_like(network.conv_in.weight, 7.0)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    seen, state = call(), torch.get_rng_state()
    assert pass_seconds(network, seen, CPU, contextlib.nullcontext, repeats=2) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes == [[(64, 1, 4, 4), (64,)]] * 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert (network.conv_in.weight.grad == 7).all()
    assert network.hidden.weight.grad is None


def test_a_frozen_part_and_a_part_that_takes_no_part_are_no_obstacle():
    network = ConvNet()
    network.conv_in.requires_grad_(False)
    network.unused = torch.nn.Linear(2, 2)
    assert pass_seconds(network, call(), CPU, contextlib.nullcontext, repeats=1) > 0


def test_a_wider_network_takes_longer():
    narrow, wide = (pass_seconds(ConvNet(width), call(), CPU, contextlib.nullcontext) for width in (8, 256))
    assert wide > 3 * narrow


def test_one_long_pause_does_not_change_the_clock(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = StepClock()
    assert clock.seconds is None
    for pause in (0.0, 0.1, 0.1, 60.0, 0.1):
        now += pause
        clock.tick()
    assert clock.seconds == pytest.approx(0.1)
