import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import DENOISERS, denoiser, traced
from torch import Tensor, nn

from lightning_earlybird.budget import Allocation, Budget, draw_mask
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import (
    ChannelGroup,
    ChannelPlan,
    Product,
    count_macs,
    count_parameters,
    extract,
    trace_plan,
)

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
    plan = plan_of(("a", 1, width))

    assert kept(draw_mask(plan, scores_of(plan), sparsity, round_to=round_to)) == {"a": expected}


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
    plan = plan_of(("a", rows, width))

    assert kept(draw_mask(plan, scores_of(plan), sparsity, round_to=round_to)) == {"a": rows * expected}


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 16), st.integers(0, 100))
def test_widths_are_multiples_and_heads_keep_equally_many(sparsity: float, round_to: int, seed: int) -> None:
    mask = draw_mask(GROUPS, scores_of(GROUPS, seed), sparsity, round_to=round_to)

    for group in GROUPS.groups:
        per_row = mask.kept[group.name].view(group.rows, -1).sum(dim=1)
        assert len(set(per_row.tolist())) == 1
        count = int(per_row.sum())
        assert count >= 1
        assert count % round_to == 0 or count == group.size


@given(st.sampled_from(["uniform", "global"]), st.integers(0, 100))
def test_masks_nest_as_sparsity_grows(scope: str, seed: int) -> None:
    plan = plan_of(("stem", 1, 128), ("heads", 4, 64), ("body", 1, 512))
    masks = [draw_mask(plan, scores_of(plan, seed), s, scope=scope).flat() for s in SPARSITIES]

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


def test_every_group_loses_the_same_fraction_up_to_one_step() -> None:
    for sparsity in SPARSITIES[1:-1]:
        mask = draw_mask(GROUPS, scores_of(GROUPS), sparsity, round_to=1)
        for group in GROUPS.groups:
            width = group.size // group.rows
            assert abs(kept(mask)[group.name] / group.rows - (1 - sparsity) * width) <= 1


def test_the_sum_over_groups_is_exact_where_steps_allow() -> None:
    # 125 channels; single ones can go from three of the groups.
    for sparsity in SPARSITIES[:-1]:
        mask = draw_mask(GROUPS, scores_of(GROUPS), sparsity, round_to=1)
        assert mask.num_kept == pytest.approx(125 * (1 - sparsity), abs=0.5)
    # 6.25 would stay, but for the one that every group and every head keeps.
    assert draw_mask(GROUPS, scores_of(GROUPS), SPARSITIES[-1], round_to=1).num_kept == 1 + 4 + 1 + 1


def test_groups_of_equal_width_lose_their_odd_steps_evenly_over_the_depth() -> None:
    # 0.3 of 10 layers of 32 channels in eights: 28 of 40 steps stay, 3 in eight layers and 2 in two.
    plan = plan_of(*((f"layer{index}", 1, 32) for index in range(10)))

    counts = list(kept(draw_mask(plan, scores_of(plan), 0.3)).values())

    assert sorted(counts) == [16] * 2 + [24] * 8
    narrow = [index for index, count in enumerate(counts) if count == 16]
    assert narrow[1] - narrow[0] > 1


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_to": 0}, "round_to=0 must be an integer of at least 1"),
        ({"target": "flops"}, "target='flops' must be one of 'channels', 'params', 'macs'"),
        ({"scope": "local"}, "scope='local' must be one of 'uniform', 'global'"),
        ({"heads": "half"}, "heads='half' must be one of 'equal', 'whole'"),
        ({"min_width": 0}, r"min_width=0 must be an integer of at least 1 \(channels\), or a float in \(0, 1\)"),
        ({"min_width": 1.5}, "min_width=1.5 must be an integer"),
        ({"min_width": True}, "min_width=True must be an integer"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_mask(GROUPS, scores_of(GROUPS), 0.5, **settings)


def test_scores_of_another_plan_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"scores of shape \(3,\) do not fit the plan: one score a channel is needed, \(125"
    ):
        draw_mask(GROUPS, torch.zeros(3), 0.5)


# --- targets: what the sparsity counts --------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Two groups of unlike cost: a channel of "wide" has 12 parameters, one of "mid" has 18."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mid, self.thin = nn.Linear(4, 16, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.thin(self.mid(self.wide(x)))


def costs_by_hand(wide: int, mid: int, samples: int) -> dict[str, int]:
    products = 4 * wide + wide * mid + 2 * mid
    return {"channels": wide + mid, "params": products + 2, "macs": products * samples}


@pytest.mark.parametrize("target", ["channels", "params", "macs"])
def test_a_budget_counts_what_it_is_told_to(target: str) -> None:
    plan = trace_plan(Uneven(), (torch.ones(3, 4),))
    budget = Budget(plan, Allocation(target, round_to=1))
    for wide, mid in ((16, 8), (16, 1), (3, 5), (1, 1)):
        mask = TicketMask({"wide": torch.arange(16) < wide, "mid": torch.arange(8) < mid})
        dense = costs_by_hand(16, 8, 3)[target]
        assert budget.achieved(mask) == pytest.approx(1 - costs_by_hand(wide, mid, 3)[target] / dense, abs=1e-12)


@pytest.mark.parametrize("target", ["channels", "params", "macs"])
@pytest.mark.parametrize("sparsity", SPARSITIES[1:-1])
def test_no_single_step_would_come_nearer_to_a_target_that_is_missed(target: str, sparsity: float) -> None:
    plan = trace_plan(Uneven(), (torch.ones(1, 4),))
    budget = Budget(plan, Allocation(target, round_to=1))
    counts = kept(budget.draw(scores_of(plan), sparsity))
    dense = costs_by_hand(16, 8, 1)[target]

    def miss(wide: int, mid: int) -> float:
        return abs(1 - costs_by_hand(wide, mid, 1)[target] / dense - sparsity)

    here = miss(counts["wide"], counts["mid"])
    for wide, mid in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        if 1 <= counts["wide"] + wide <= 16 and 1 <= counts["mid"] + mid <= 8:
            assert here <= max(0.01 * sparsity, miss(counts["wide"] + wide, counts["mid"] + mid))


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("target", ["params", "macs"])
def test_what_is_achieved_is_what_the_extracted_network_has(name: str, scope: str, target: str) -> None:
    dense, plan = traced(name)
    budget = Budget(plan, Allocation(target, scope, round_to=1))

    def count(network: nn.Module) -> int:
        return count_parameters(network) if target == "params" else count_macs(network, dense.args, dense.kwargs)

    for sparsity in (0.3, 0.5, 0.8):
        mask = budget.draw(scores_of(plan), sparsity)
        removed = 1 - count(extract(dense.network, plan, mask)) / count(dense.network)
        assert budget.achieved(mask) == pytest.approx(removed, abs=1e-12)
        assert removed == pytest.approx(sparsity, rel=0.02)


def test_channels_that_a_layer_sees_twice_count_twice() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 6, bias=False), nn.Linear(12, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.cat([h, h.tanh()], dim=1))

    plan = trace_plan(Doubled(), (torch.ones(1, 2),))

    assert Budget(plan, Allocation("params")).achieved(TicketMask({"a": torch.arange(6) < 3})) == 0.5
    assert [(product.constant, [len(ids) for ids in product.factors]) for product in plan.parameters()] == [
        (2, [6]),
        (1, [12]),
    ]


def test_what_cannot_be_met_is_explained() -> None:
    plan = plan_of(("a", 1, 64), ("narrow", 1, 4))
    budget = Budget(plan, Allocation(min_width=32))
    mask = budget.draw(scores_of(plan), 0.9)

    assert kept(mask) == {"a": 32, "narrow": 4}
    message = budget.explain_miss(mask, 0.9)
    assert message is not None
    assert message.startswith("sparsity=0.9 of the channels cannot be met: 0.4706 is what steps of round_to=8 channels")
    assert "0.4706 is the most that can be removed, with every layer at its minimum. 1 of 2 layers have no" in message
    assert budget.explain_miss(budget.draw(scores_of(plan), 16 / 68), 16 / 68) is None


def test_a_group_narrower_than_a_step_stays_whole() -> None:
    plan = plan_of(("a", 1, 64), ("narrow", 1, 7))

    assert kept(draw_mask(plan, scores_of(plan), 0.9)) == {"a": 8, "narrow": 7}


@pytest.mark.parametrize(("least", "expected"), [(1, 8), (9, 16), (16, 16), (0.3, 24), (0.25, 16), (64, 64), (100, 64)])
def test_a_minimum_is_kept_in_whole_steps(least: float, expected: int) -> None:
    plan = plan_of(("a", 1, 64))

    assert kept(draw_mask(plan, scores_of(plan), 0.99, min_width=least)) == {"a": expected}


# --- global allocation ------------------------------------------------------------------------------------------------


def test_weak_channels_go_first_wherever_they_are_and_whatever_the_scale_of_their_group() -> None:
    plan = plan_of(("a", 1, 4), ("b", 1, 4))
    # Over the mean of their group: 2, 1.6, 0.2, 0.2 and 1.2, 1, 1, 0.8.
    scores = torch.tensor([10.0, 8.0, 1.0, 1.0, 600.0, 500.0, 500.0, 400.0])

    def counts(sparsity: float) -> dict[str, int]:
        return kept(draw_mask(plan, scores, sparsity, scope="global", round_to=1))

    assert counts(0.25) == {"a": 2, "b": 4}
    assert counts(0.375) == {"a": 2, "b": 3}
    assert counts(0.625) == {"a": 2, "b": 1}
    assert counts(0.75) == {"a": 1, "b": 1}  # the last of a group stays, be it as weak as it may


@given(st.integers(0, 200))
def test_global_survivors_outrank_the_pruned_within_and_between_groups(seed: int) -> None:
    plan = plan_of(("a", 1, 64), ("b", 1, 128), ("c", 1, 32))
    scores = scores_of(plan, seed) ** 3
    mask = draw_mask(plan, scores, 0.5, scope="global", round_to=1)

    assert mask.num_kept == 112
    own = [scores[group.channels] / scores[group.channels].mean() for group in plan.groups]
    stays = [mask.kept[group.name] for group in plan.groups]
    weakest = min(float(values[keep].min()) for values, keep in zip(own, stays, strict=True))
    strongest = max(float(values[~keep].max()) for values, keep in zip(own, stays, strict=True))
    assert weakest >= strongest * (1 - 1e-6)


def test_scores_of_nothing_but_zeros_are_no_obstacle() -> None:
    mask = draw_mask(GROUPS, torch.zeros(GROUPS.num_channels), 0.5, scope="global", round_to=1)

    assert mask.num_kept == pytest.approx(62.5, abs=2)


def test_groups_of_equal_scores_are_narrowed_alike_by_global_ranking() -> None:
    scores = torch.ones(GROUPS.num_channels)
    ranked, uniform = (draw_mask(GROUPS, scores, 0.5, scope=scope, round_to=1) for scope in ("global", "uniform"))
    assert ranked.distance(uniform) == 0


# --- heads ------------------------------------------------------------------------------------------------------------


def test_whole_heads_go_where_the_module_can_be_told() -> None:
    heads = ChannelGroup("heads", torch.arange(32), rows=4, heads=(("attention", "heads"),))
    fixed = ChannelGroup("fixed", 32 + torch.arange(32), rows=4)
    plan = ChannelPlan(ids={}, groups=(heads, fixed))
    scores = torch.cat([torch.tensor([1.0, 4.0, 2.0, 3.0]).repeat_interleave(8), torch.rand(32)])

    whole = draw_mask(plan, scores, 0.5, heads="whole")
    equal = draw_mask(plan, scores, 0.5)

    assert whole.kept["heads"].view(4, 8).all(dim=1).tolist() == [False, True, False, True]
    assert whole.num_kept == equal.num_kept == 32
    for mask in (whole.kept["fixed"], equal.kept["heads"], equal.kept["fixed"]):
        assert mask.view(4, 8).sum(dim=1).tolist() == [4, 4, 4, 4]


def test_whole_heads_go_in_multiples_that_the_rounding_allows() -> None:
    def counts(rows: int, width: int, sparsity: float) -> int:
        group = ChannelGroup("heads", torch.arange(rows * width), rows, heads=(("attention", "heads"),))
        plan = ChannelPlan(ids={}, groups=(group,))
        return kept(draw_mask(plan, scores_of(plan), sparsity, heads="whole"))["heads"]

    assert counts(8, 4, 0.5) == 16  # two heads of 4 at a time
    assert counts(8, 4, 0.99) == 8
    assert counts(4, 16, 0.7) == 16
    assert counts(3, 4, 0.5) == 8  # two heads; the third makes the width no multiple


def test_heads_of_fixed_width_go_as_a_whole_whatever_is_asked_and_count_with_their_width() -> None:
    # Eight heads of four positions each, which verification has found to go together: two make a multiple of eight.
    group = ChannelGroup("heads", torch.arange(8), rows=8, heads=(("attention", "num_heads"),))
    ids = {"q.weight": {0: torch.arange(8).repeat_interleave(4)}}
    plan = ChannelPlan(ids=ids, groups=(group,))

    for heads in ("equal", "whole"):
        assert kept(draw_mask(plan, scores_of(plan), 0.6, heads=heads)) == {"heads": 4}
        assert kept(draw_mask(plan, scores_of(plan), 0.99, heads=heads)) == {"heads": 2}


def test_a_real_plans_products_are_affine_in_every_width() -> None:
    dense, plan = traced("attention_head_dim=8")

    assert all(isinstance(product, Product) for product in plan.macs)
    total = sum(product.constant * math.prod(len(ids) for ids in product.factors) for product in plan.macs)
    assert total == count_macs(dense.network, dense.args)
