import pytest
import torch_pruning
from models import denoiser
from oracle import Slice, scores_of_torch_pruning
from torch import Tensor

from lightning_earlybird.importance import channel_scores, slice_slots, slice_sums, taylor_scores, weight_names
from lightning_earlybird.structure import ChannelPlan, trace_plan

NAMES = ["without attention", "attention_head_dim=8", "hand-written"]


def ratios_by_group(plan: ChannelPlan, ours: Tensor, theirs: dict[Slice, float]) -> list[list[float]]:
    """Our score over theirs, for every channel of each group."""
    assert len(theirs) == plan.num_channels
    group_of = plan.group_of_channel()
    ratios: dict[int, list[float]] = {}
    for (weight, dim, index), score in theirs.items():
        channel = int(plan.ids[weight][dim][index])
        ratios.setdefault(int(group_of[channel]), []).append(float(ours[channel]) / score)
    return list(ratios.values())


# Channels that a layer receives twice (directly and through a skip connection) are two members of our mean and one of
# theirs: a factor for the group as a whole, which changes no ranking.


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_rank_the_channels_of_a_group_as_torch_pruning_does(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args)
    scores = channel_scores(dict(given.network.named_parameters()), plan)

    theirs = scores_of_torch_pruning(given.network, given.args, last=given.network.conv_out)

    for ratio in ratios_by_group(plan, scores, theirs):
        assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_taylor_scores_are_those_of_torch_pruning(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args)
    given().square().mean().backward()
    weights = dict(given.network.named_parameters())
    names = weight_names(weights, plan)
    slots, sums = (
        slice_slots(plan, names),
        slice_sums(plan, names, lambda key: weights[key].detach() * weights[key].grad),
    )
    scores, unreached = taylor_scores(plan, slots, sums, slots >= 0, sums.new_zeros(plan.num_channels))

    importance = torch_pruning.importance.GroupTaylorImportance(
        multivariable=True, group_reduction="mean", normalizer=None
    )
    theirs = scores_of_torch_pruning(given.network, given.args, given.network.conv_out, importance)

    assert unreached == []
    for ratio in ratios_by_group(plan, scores, theirs):
        assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=1e-3)
