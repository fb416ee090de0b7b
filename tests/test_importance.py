from typing import Any

import pytest
import torch
from models import DENOISERS, denoiser, random_mask
from torch import Tensor, nn

from lightning_earlybird.importance import (
    NonFiniteWeightsError,
    channel_scores,
    check_criterion,
    custom_scores,
    slice_slots,
    slice_sums,
    taylor_scores,
    weight_names,
)
from lightning_earlybird.structure import ChannelPlan, extract, trace_plan


class Toy(nn.Module):
    """Two layers, one group of three channels; weights count up from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.arange(1.0, 7.0).view(3, 2))  # [1 2], [3 4], [5 6]
            self.last.weight.copy_(torch.arange(1.0, 7.0).view(2, 3))  # columns [1 4], [2 5], [3 6]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def traced(network: nn.Module) -> tuple[dict[str, Tensor], ChannelPlan]:
    return dict(network.named_parameters()), trace_plan(network, (torch.ones(1, 2),))


def test_a_score_is_the_mean_over_the_slices_of_their_sums_of_squares() -> None:
    scores = channel_scores(*traced(Toy()))

    # (1 + 4 + 1 + 16) / 2, (9 + 16 + 4 + 25) / 2, (25 + 36 + 9 + 36) / 2
    assert scores.tolist() == [11, 27, 53]
    assert scores.dtype == torch.float32


def test_kernel_positions_belong_to_their_slice() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.arange(8.0).view(2, 1, 2, 2))  # 0..3, 4..7
        network[1].weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
    plan = trace_plan(network, (torch.ones(1, 1, 4, 4),))

    assert channel_scores(dict(network.named_parameters()), plan).tolist() == [(14 + 1) / 2, (126 + 4) / 2]


def test_every_slice_of_a_coupled_channel_counts_and_biases_and_norms_do_not() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.last = nn.Linear(1, 4), nn.LayerNorm(2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.wide(x).chunk(2, dim=-1)
            return self.last(self.norm(value * gate.sigmoid()))

    network = Gated()
    with torch.no_grad():
        network.wide.weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        network.last.weight.copy_(torch.tensor([[5.0, 6.0]]))
        network.wide.bias.fill_(100)
        network.norm.weight.fill_(100)
    plan = trace_plan(network, (torch.ones(3, 1),))

    scores = channel_scores(dict(network.named_parameters()), plan)

    assert scores.tolist() == pytest.approx([(1 + 9 + 25) / 3, (4 + 16 + 36) / 3])


@pytest.mark.parametrize("name", DENOISERS)
def test_ranking_is_invariant_to_the_scale_of_all_weights(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args, given.kwargs)
    weights = dict(given.network.named_parameters())

    scores = channel_scores(weights, plan)
    scaled = channel_scores({key: weight * 4 for key, weight in weights.items()}, plan)

    assert torch.equal(scaled, scores * 16)


def test_scores_follow_their_channels_when_these_change_places() -> None:
    network, order = Toy(), torch.tensor([2, 0, 1])
    weights, plan = traced(network)
    moved = {**weights, "first.weight": weights["first.weight"][order], "last.weight": weights["last.weight"][:, order]}

    assert torch.equal(channel_scores(moved, plan), channel_scores(weights, plan)[order])


def test_scores_are_taken_from_the_intact_network_and_leave_it_alone() -> None:
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)
    weights = dict(given.network.named_parameters())
    before = {name: weight.clone() for name, weight in weights.items()}

    first = channel_scores(weights, plan)
    extract(given.network, plan, random_mask(plan, 0))

    assert torch.equal(channel_scores(weights, plan), first)
    assert not first.requires_grad
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_half_precision_weights_are_scored_in_float32() -> None:
    weights, plan = traced(Toy())
    scores = channel_scores({name: (weight * 1e4).half() for name, weight in weights.items()}, plan)

    assert scores.tolist() == pytest.approx([11e8, 27e8, 53e8], rel=1e-3)  # half precision ends at 65504


@pytest.mark.parametrize("name", ["first.weight", "last.weight", "first.bias", "last.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_the_parameters_name(name: str, value: float) -> None:
    network = Toy()
    weights, plan = traced(network)
    with torch.no_grad():
        weights[name].view(-1)[-1] = value

    with pytest.raises(NonFiniteWeightsError, match=rf"parameter '{name}' of the denoiser holds NaN or inf.* \(1 such"):
        channel_scores(weights, plan)


def test_weights_that_are_too_large_to_be_squared_are_refused() -> None:
    weights, plan = traced(Toy())

    with pytest.raises(NonFiniteWeightsError, match=r"the sum of squares \(weights too large for float32\)"):
        channel_scores({name: weight * 1e30 for name, weight in weights.items()}, plan)


def test_random_scores_come_from_the_generator() -> None:
    weights, plan = traced(Toy())

    def draw(seed: int) -> Tensor:
        return channel_scores(weights, plan, "random", torch.Generator().manual_seed(seed))

    assert draw(0).shape == (3,)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
def test_a_criterion_that_weights_alone_do_not_tell_is_refused_with_those_they_do(criterion: Any) -> None:
    message = rf"criterion='{criterion}' cannot be told from weights\. Choose one of magnitude, random\."
    with pytest.raises(ValueError, match=message):
        channel_scores(*traced(Toy()), criterion)


def test_an_unknown_criterion_is_refused_with_the_known_ones() -> None:
    message = r"criterion='l1' must be one of 'magnitude', 'random', 'taylor', 'diff_pruning', or a callable"
    with pytest.raises(ValueError, match=message):
        check_criterion("l1")
    for known in ("magnitude", "random", "taylor", "diff_pruning", custom_scores):
        check_criterion(known)


def taylor(network: nn.Module, plan: ChannelPlan, fallback: float = -1.0) -> tuple[Tensor, list[str]]:
    """Taylor scores from the gradients that the parameters have."""
    weights = dict(network.named_parameters())
    names, gradients = weight_names(weights, plan), {name: weight.grad for name, weight in weights.items()}

    def product(name: str) -> Tensor | None:
        gradient = gradients[name]
        return None if gradient is None else weights[name].detach() * gradient

    def flag(name: str) -> Tensor:
        return torch.full_like(weights[name], float(gradients[name] is not None)).detach()

    sums, reached = slice_sums(plan, names, product), slice_sums(plan, names, flag) > 0
    return taylor_scores(plan, slice_slots(plan, names), sums, reached, torch.full((plan.num_channels,), fallback))


def test_a_taylor_score_is_the_mean_over_the_slices_of_the_absolute_sums_of_weight_times_gradient() -> None:
    network = Toy()
    _, plan = traced(network)
    network.first.weight.grad = torch.tensor([[1.0, -1.0], [0.5, 0.0], [-1.0, -1.0]])
    network.last.weight.grad = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 0.0, -1.0]])

    scores, unreached = taylor(network, plan)

    # (|1 - 2| + |2 - 4|) / 2, (|1.5| + |0|) / 2, (|-5 - 6| + |3 - 6|) / 2
    assert scores.tolist() == [1.5, 0.75, 7.0] and unreached == []


def test_weights_without_a_gradient_contribute_nothing_to_a_taylor_score() -> None:
    network = Toy()
    _, plan = traced(network)
    network.first.weight.grad = torch.tensor([[1.0, -1.0], [0.5, 0.0], [-1.0, -1.0]])

    scores, unreached = taylor(network, plan)

    assert scores.tolist() == [1.0, 1.5, 11.0] and unreached == []


def test_a_group_that_no_gradient_reaches_is_named_and_takes_the_fallback() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    plan = trace_plan(network, (torch.ones(1, 2),))
    network[2].weight.grad = torch.ones(1, 2)

    scores, unreached = taylor(network, plan)

    assert unreached == ["0"]
    by_name = {group.name: scores[group.channels].tolist() for group in plan.groups}
    assert by_name["0"] == [-1.0] * 3
    assert by_name["1"] == network[2].weight[0].abs().tolist()


def test_scores_of_the_callers_own_are_taken_as_they_are_on_the_cpu() -> None:
    network = Toy()
    _, plan = traced(network)
    given = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    scores = custom_scores(lambda denoiser, plan: given if denoiser is network else None, network, plan)

    assert scores.tolist() == [3.0, 1.0, 2.0] and scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([1.0, 2.0, 3.0], "returned a list, but must return a floating-point tensor of shape \\(3,\\)"),
        (torch.ones(2), "returned a torch.float32 tensor of shape \\(2,\\), but must return .* of shape \\(3,\\)"),
        (torch.ones(3, 1), "of shape \\(3, 1\\), but must return a floating-point tensor of shape \\(3,\\)"),
        (torch.arange(3), "returned a torch.int64 tensor of shape \\(3,\\), but must return a floating-point tensor"),
        (torch.tensor([1.0, float("nan"), float("inf")]), "returned 2 scores of shape .* that are NaN or infinite"),
    ],
)
def test_a_function_that_gives_no_scores_is_refused_with_what_it_gave_and_what_is_needed(returned, found) -> None:
    network = Toy()
    _, plan = traced(network)

    def mine(denoiser: nn.Module, plan: ChannelPlan) -> Any:
        return returned

    with pytest.raises(ValueError, match=f"criterion=<function .*mine.* {found}"):
        custom_scores(mine, network, plan)


def test_names_that_are_not_the_plans_are_refused() -> None:
    weights, plan = traced(Toy())

    with pytest.raises(
        ValueError, match=r"tensors=\['model\.first\.weight', .* lack weights of the plan, such as \['fir"
    ):
        channel_scores({f"model.{name}": weight for name, weight in weights.items()}, plan)
