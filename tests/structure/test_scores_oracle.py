import pytest
from models import denoiser
from oracle import scores_of_torch_pruning

from lightning_earlybird.importance import channel_scores
from lightning_earlybird.structure import trace_plan


@pytest.mark.parametrize("name", ["without attention", "attention_head_dim=8", "hand-written"])
def test_magnitudes_rank_the_channels_of_a_group_as_torch_pruning_does(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args)
    scores = channel_scores(dict(given.network.named_parameters()), plan)
    group_of = plan.group_of_channel()

    theirs = scores_of_torch_pruning(given.network, given.args, last=given.network.conv_out)

    assert len(theirs) == plan.num_channels
    ratios: dict[int, list[float]] = {}
    for (weight, dim, index), score in theirs.items():
        channel = int(plan.ids[weight][dim][index])
        ratios.setdefault(int(group_of[channel]), []).append(float(scores[channel]) / score)
    # Channels that a layer receives twice (directly and through a skip connection) are two members of our mean and one
    # of theirs: a factor for the group as a whole, which changes no ranking.
    for ratio in ratios.values():
        assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=1e-5)
