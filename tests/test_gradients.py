"""Gradients by region from one forward pass, against gradients of losses that are restricted by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import ConvNet, Mlp, tiny_unet
from torch import Tensor, nn

from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.gradients import (
    TimeBins,
    bins_that_matter,
    keep_rows,
    output_gradients,
    parameter_gradients,
    recorded,
    sample_losses,
)
from lightning_earlybird.regions import TimestepPartition

THREE = TimestepPartition.of([(0, 300, 0.5), (300, 600, 0.5), (600, 1000, 0.5)])
SECOND = TimestepArgument("timesteps", 1)
STEPS = torch.tensor([700, 10, 350, 299, 999, 301, 600])


def by_region(network: nn.Module, loss: Callable[[], Tensor], partition: TimestepPartition = THREE, **settings: Any):
    """Region -> gradients of the parameters, None where no call of that region uses a parameter."""
    parameters = list(network.parameters())
    totals: dict[int, list[Tensor | None]] = {}
    with recorded(network, partition, settings.get("argument", SECOND)) as calls:
        flows = output_gradients(loss(), calls)
        for region, gradients in parameter_gradients(calls, flows, parameters):
            known = totals.setdefault(region, [None] * len(parameters))
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    known[index] = gradient if known[index] is None else known[index] + gradient
    return totals


def assert_close(ours: Any, theirs: Any) -> None:
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [Mlp, ConvNet])
def test_the_gradient_of_a_region_is_that_of_the_loss_over_its_samples(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = build()
    x, target = (torch.randn(len(STEPS), *network.sample_shape) for _ in range(2))

    def loss(rows: Any = slice(None)) -> Tensor:
        errors = (network(x, STEPS) - target).square().flatten(1).mean(1)
        return errors[rows].sum() / len(STEPS)

    found = by_region(network, loss)

    owners = THREE.lookup(STEPS)
    assert sorted(found) == [0, 1, 2]
    for region, gradients in found.items():
        assert_close(gradients, torch.autograd.grad(loss(owners == region), list(network.parameters())))


def test_outputs_in_containers_and_regions_without_samples() -> None:
    torch.manual_seed(0)
    network = tiny_unet()
    x, steps = torch.randn(2, 1, 8, 8), torch.tensor([10, 20])

    def loss() -> Tensor:
        return network(x, timestep=steps).sample.square().mean()

    found = by_region(network, loss, argument=TimestepArgument("timestep", 1))

    assert list(found) == [0]
    assert_close(found[0], torch.autograd.grad(loss(), list(network.parameters())))


def test_estimates_without_gradients_do_not_count_and_those_with_gradients_are_followed() -> None:
    torch.manual_seed(0)
    network = Mlp()
    x = torch.randn(len(STEPS), 2)

    def loss(detached: bool) -> Tensor:
        with torch.set_grad_enabled(not detached):
            estimate = network(x, STEPS)
        estimate = estimate * 2 + 1  # a part of the graph that all regions of the second call share
        return network(x + estimate, STEPS).square().mean()

    for detached in (True, False):
        found = by_region(network, lambda detached=detached: loss(detached))
        total = [sum(parts) for parts in zip(*found.values(), strict=True)]
        assert_close(total, torch.autograd.grad(loss(detached), list(network.parameters())))


@pytest.mark.parametrize("partition", [THREE, TimestepPartition.whole(0.5)])
def test_the_caller_may_write_to_the_output_and_forward_is_given_back(partition: TimestepPartition) -> None:
    network = Mlp()
    x = torch.randn(len(STEPS), 2)

    def loss() -> Tensor:
        output = network(x, STEPS)
        output += 1
        return output.square().mean()

    found = by_region(network, loss, partition)

    assert "forward" not in vars(network)
    total = [sum(parts) for parts in zip(*found.values(), strict=True)]
    assert_close(total, torch.autograd.grad(loss(), list(network.parameters())))
    network.forward = own = lambda x, timesteps: x
    with pytest.raises(RuntimeError, match="on the way"), recorded(network, THREE, SECOND):
        raise RuntimeError("on the way")
    assert vars(network)["forward"] is own


def test_a_timestep_that_is_given_for_all_rows_is_known_for_each() -> None:
    network = Mlp()
    with recorded(network, THREE, SECOND) as calls:
        network(torch.randn(3, 2), torch.tensor([400]))
    assert [(call.region, call.timesteps.tolist()) for call in calls] == [(1, [400.0] * 3)]


def test_what_is_frozen_or_unused_has_no_gradient() -> None:
    network = Mlp()
    network.up.requires_grad_(False)
    trained = list(network.down.parameters())
    with recorded(network, THREE, SECOND) as calls:
        flows = output_gradients(network(torch.randn(3, 2), torch.tensor([1, 2, 3]))[:, 0].sum(), calls)
        ((_, found),) = parameter_gradients(calls, flows, [*trained, nn.Parameter(torch.ones(1))])
    assert found[2] is None and found[0].shape == (2, 8)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_losses_of_samples_are_their_squared_errors_up_to_one_factor() -> None:
    torch.manual_seed(0)
    network, target = ConvNet(), torch.randn(len(STEPS), 1, 4, 4)
    whole = TimestepPartition.whole(0.5)
    for with_graph in (True, False):
        with recorded(network, whole, SECOND, with_graph=with_graph) as calls:
            output = network(torch.zeros_like(target), STEPS)
            (call,) = calls
            assert (call.outputs[0].grad_fn is not None) == with_graph
            (flow,) = output_gradients(nn.functional.mse_loss(output, target), calls)
        errors = (output - target).detach().square().flatten(1).sum(1).double()
        torch.testing.assert_close(sample_losses(call, flow), errors * 4 / target.numel() ** 2)


def test_rows_that_are_not_kept_send_nothing_back() -> None:
    flow = torch.ones(3, 2, 2)
    (kept, shared, none) = keep_rows([flow, torch.ones(()), None], torch.tensor([True, False, True]))
    assert kept.sum((1, 2)).tolist() == [4, 0, 4] and float(shared) == 1 and none is None


def test_bins_cover_the_axis_in_equal_parts_and_the_ends_take_what_lies_outside() -> None:
    bins = TimeBins(0, 100, 4)
    assert bins.index(torch.tensor([0.0, 24.9, 25.0, 99.0, 100.0, -5.0, 120.0])).tolist() == [0, 0, 1, 3, 3, 0, 3]
    assert TimeBins(5, 5, 4).index(torch.tensor([5.0, 5.0])).tolist() == [0, 0]
    totals = bins.totals(torch.tensor([1.0, 2.0, 60.0]), torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64))
    assert totals.tolist() == [[6, 0, 8, 0], [2, 0, 1, 0]]


def test_bins_below_the_threshold_of_the_largest_mean_loss_are_dropped() -> None:
    # Mean losses 10, 1, 0.9 and nothing known.
    totals = torch.tensor([[20.0, 1.0, 2.7, 0.0], [2.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    assert bins_that_matter(totals, 0.1).tolist() == [True, True, False, True]
    assert bins_that_matter(totals, 0.0).tolist() == [True] * 4
    assert bins_that_matter(totals, 1.0).tolist() == [True, False, False, True]
