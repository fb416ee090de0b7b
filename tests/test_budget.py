import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import denoiser

from lightning_earlybird.budget import draw_mask, kept_per_row
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelGroup, ChannelPlan, trace_plan

SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.6, 0.8, 0.95)


def plan_of(*groups: tuple[str, int, int]) -> ChannelPlan:
    """A plan of groups (name, rows, width of a row) without tensors."""
    made, count = [], 0
    for name, rows, width in groups:
        made.append(ChannelGroup(name, torch.arange(count, count + rows * width), rows))
        count += rows * width
    return ChannelPlan(ids={}, groups=tuple(made))


GROUPS = plan_of(("stem", 1, 24), ("heads", 4, 8), ("narrow", 1, 5), ("body", 1, 64))


def kept(mask: TicketMask) -> dict[str, int]:
    return {name: int(group.sum()) for name, group in mask.kept.items()}


def scores_of(plan: ChannelPlan, seed: int = 0) -> torch.Tensor:
    return torch.rand(plan.num_channels, generator=torch.Generator().manual_seed(seed))


def test_the_highest_scores_are_kept_by_exact_count() -> None:
    plan = plan_of(("a", 1, 5), ("b", 1, 4))
    scores = torch.tensor([3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0, 8.0])

    mask = draw_mask(plan, scores, 0.4, round_to=1)

    assert mask.kept["a"].tolist() == [True, False, True, False, True]
    assert mask.kept["b"].tolist() == [True, False, False, True]


def test_channels_are_ranked_within_their_group_wherever_their_ids_are() -> None:
    plan = ChannelPlan(
        ids={}, groups=(ChannelGroup("a", torch.tensor([3, 0])), ChannelGroup("b", torch.tensor([2, 1])))
    )

    mask = draw_mask(plan, torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.5, round_to=1)

    assert {name: group.tolist() for name, group in mask.kept.items()} == {"a": [False, True], "b": [False, True]}


@pytest.mark.parametrize(
    ("width", "sparsity", "round_to", "expected"),
    [
        (10, 0.3, 1, 7),
        (10, 0.25, 1, 8),  # 7.5: a half goes up
        (128, 0.3, 8, 88),  # 89.6
        (128, 0.6, 8, 48),  # 51.2
        (128, 0.8, 8, 24),  # 25.6
        (128, 0.99, 8, 8),  # never less than one multiple
        (64, 0.01, 8, 64),
        (20, 0.5, 8, 8),  # 10 lies nearer to 8 than to 16
        (20, 0.0, 8, 20),  # nothing is removed, multiple or not
        (5, 0.9, 8, 5),  # narrower than one multiple: whole
        (1, 0.9, 1, 1),
    ],
)
def test_a_width_is_the_nearest_multiple(width: int, sparsity: float, round_to: int, expected: int) -> None:
    assert kept_per_row(ChannelGroup("a", torch.arange(width)), sparsity, round_to) == expected


@pytest.mark.parametrize(
    ("rows", "width", "sparsity", "round_to", "expected"),
    [
        (4, 8, 0.5, 8, 4),  # 4 heads of 4: 16
        (4, 8, 0.3, 8, 6),  # 4 heads of 6: 24
        (2, 8, 0.5, 8, 4),  # 2 heads of 4: 8, as narrow as it gets
        (2, 8, 0.9, 8, 4),
        (8, 8, 0.9, 8, 1),
        (3, 8, 0.5, 8, 8),  # only 3 heads of 8 are a multiple of 8
        (3, 8, 0.5, 1, 4),
    ],
)
def test_all_heads_together_are_a_multiple(
    rows: int, width: int, sparsity: float, round_to: int, expected: int
) -> None:
    assert kept_per_row(ChannelGroup("a", torch.arange(rows * width), rows), sparsity, round_to) == expected


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 16), st.integers(0, 100))
def test_widths_are_multiples_and_heads_keep_equally_many(sparsity: float, round_to: int, seed: int) -> None:
    mask = draw_mask(GROUPS, scores_of(GROUPS, seed), sparsity, round_to=round_to)

    for group in GROUPS.groups:
        per_row = mask.kept[group.name].view(group.rows, -1).sum(dim=1)
        assert len(set(per_row.tolist())) == 1
        count = int(per_row.sum())
        assert count >= 1
        assert count % round_to == 0 or count == group.size


@given(st.integers(1, 16), st.integers(0, 100))
def test_masks_nest_as_sparsity_grows(round_to: int, seed: int) -> None:
    masks = [draw_mask(GROUPS, scores_of(GROUPS, seed), s, round_to=round_to).flat() for s in SPARSITIES]

    for denser, sparser in itertools.pairwise(masks):
        assert bool((denser | ~sparser).all())


@given(st.sampled_from(SPARSITIES), st.integers(0, 100))
def test_survivors_outrank_the_pruned(sparsity: float, seed: int) -> None:
    scores = scores_of(GROUPS, seed)
    mask = draw_mask(GROUPS, scores, sparsity, round_to=4)

    for group in GROUPS.groups:
        for row, stays in zip(
            scores[group.channels].view(group.rows, -1), mask.kept[group.name].view(group.rows, -1), strict=True
        ):
            if not bool(stays.all()):
                assert float(row[stays].min()) >= float(row[~stays].max())


def test_ties_go_to_the_lower_index() -> None:
    mask = draw_mask(GROUPS, torch.zeros(GROUPS.num_channels), 0.5, round_to=1)

    for group in GROUPS.groups:
        for row in mask.kept[group.name].view(group.rows, -1):
            assert torch.equal(row, row.sort(descending=True).values)


def test_sparsity_zero_keeps_everything() -> None:
    assert draw_mask(GROUPS, scores_of(GROUPS), 0.0, round_to=8).sparsity == 0


def test_the_same_scores_give_the_same_mask() -> None:
    first, second = (draw_mask(GROUPS, scores_of(GROUPS), 0.5) for _ in range(2))

    assert first.distance(second) == 0


def test_counts_are_exact_where_multiples_allow() -> None:
    assert kept(draw_mask(GROUPS, scores_of(GROUPS), 0.5, round_to=1)) == {
        "stem": 12,
        "heads": 16,
        "narrow": 3,
        "body": 32,
    }
    assert kept(draw_mask(GROUPS, scores_of(GROUPS), 0.5)) == {"stem": 16, "heads": 16, "narrow": 5, "body": 32}


@pytest.mark.parametrize("name", ["attention_head_dim=8", "hand-written"])
def test_a_real_networks_masks_fit_its_plan(name: str) -> None:
    dense = denoiser(name)
    plan = trace_plan(dense.network, dense.args, dense.kwargs)
    scores = channel_scores(dict(dense.network.named_parameters()), plan)

    for sparsity in SPARSITIES:
        mask = draw_mask(plan, scores, sparsity, round_to=1)
        assert int(plan.kept(mask).sum()) == mask.num_kept
        assert mask.sparsity == pytest.approx(sparsity, abs=0.05)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_of_zero_and_one_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity=.* must lie in \[0, 1\): it is the fraction of channels to remove"):
        draw_mask(GROUPS, scores_of(GROUPS), sparsity)


def test_rounding_to_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"round_to=0 must be at least 1\. Use 8 for widths that tensor cores like"):
        draw_mask(GROUPS, scores_of(GROUPS), 0.5, round_to=0)


def test_scores_of_another_plan_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scores of shape \(3,\) do not fit the plan: one score a channel is needed, \(125"
    ):
        draw_mask(GROUPS, torch.zeros(3), 0.5)
