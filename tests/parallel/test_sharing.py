"""Sharing ranks out, against all other ways to do it."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_earlybird.parallel.sharing import arrange, pack, share_out

COSTS = st.lists(st.floats(0, 100, allow_subnormal=False) | st.integers(0, 5).map(float), min_size=1, max_size=6)


def sums(costs: Sequence[float], ranks: Sequence[int], num_ranks: int) -> list[float]:
    return [sum(cost for cost, own in zip(costs, ranks, strict=True) if own == rank) for rank in range(num_ranks)]


def test_further_ranks_go_to_the_slowest_and_ties_to_the_lower_index() -> None:
    times = [lambda ranks, cost=cost: cost / ranks for cost in (6.0, 6.0, 3.0)]
    # 6 6 3 -> 3 6 3 -> 3 3 3 -> 2 3 3 -> 2 2 3
    assert [share_out(times, num_ranks) for num_ranks in range(3, 8)] == [
        [1, 1, 1],
        [2, 1, 1],
        [2, 2, 1],
        [3, 2, 1],
        [3, 3, 1],
    ]


def test_packing_by_hand() -> None:
    # Longest first would give 5 + 3 + 3 against 4 + 3: the best is 5 + 4 against 3 + 3 + 3.
    assert pack([5, 4, 3, 3, 3], 2) == [0, 0, 1, 1, 1]
    assert pack([3, 3, 5, 3, 4], 2) == [0, 0, 1, 0, 1]
    assert pack([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert pack([7], 1) == [0]


def test_after_the_largest_sum_the_next_one_is_made_small() -> None:
    # The largest is 10 whatever the others do. They are spread all the same: longest first gives 5 + 3 and 4 + 3 + 3.
    costs = [10, 5, 4, 3, 3, 3]
    assert sorted(sums(costs, pack(costs, 3), 3)) == [9, 9, 10]


def test_many_tickets_are_packed_longest_first() -> None:
    # In the order given, the last would come on top of five others.
    costs = [1] * 10 + [10]
    assert sums(costs, pack(costs, 2), 2) == [10, 10]


def test_tickets_that_cost_nothing_leave_no_rank_empty() -> None:
    assert sorted(pack([0, 0, 0], 3)) == [0, 1, 2]
    assert set(pack([0.0] * 12, 4)) == {0, 1, 2, 3}
    assert pack([1e20, 1.0], 2) == [0, 1]  # next to 1e20, one more is nothing


@given(COSTS, st.data())
def test_no_other_packing_has_a_smaller_largest_sum(costs: list[float], data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, len(costs)))
    ranks = pack(costs, num_ranks)
    # Ranks are numbered by their first tickets, without gaps.
    assert list(dict.fromkeys(ranks)) == list(range(num_ranks))
    least = min(
        max(sums(costs, other, num_ranks))
        for other in itertools.product(range(num_ranks), repeat=len(costs))
        if len(set(other)) == num_ranks
    )
    assert max(sums(costs, ranks, num_ranks)) == pytest.approx(least, rel=1e-12)


@given(st.lists(st.floats(0, 100), min_size=11, max_size=14), st.integers(1, 11))
def test_many_tickets_are_packed_within_the_bound_of_any_list_order(costs: list[float], num_ranks: int) -> None:
    ranks = pack(costs, num_ranks)
    assert set(ranks) == set(range(num_ranks))
    largest = max(sums(costs, ranks, num_ranks))
    # Graham: the rank with the largest sum had at most the mean of all others when its last ticket was put on it.
    assert largest <= sum(costs) / num_ranks + max(costs) * (1 - 1 / num_ranks) + 1e-9


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=4), st.integers(0, 6))
def test_no_other_sharing_has_a_smaller_largest_time(costs: list[float], more: int) -> None:
    num_ranks = len(costs) + more
    counts = share_out([lambda ranks, cost=cost: cost / ranks for cost in costs], num_ranks)
    assert sum(counts) == num_ranks and min(counts) >= 1
    least = min(
        max(cost / count for cost, count in zip(costs, other, strict=True))
        for other in itertools.product(range(1, more + 2), repeat=len(costs))
        if sum(other) == num_ranks
    )
    assert max(cost / count for cost, count in zip(costs, counts, strict=True)) == least


def test_groups_keep_their_order_where_none_needs_to_straddle() -> None:
    assert arrange([2, 2, 4], 4) == [0, 1, 2]
    assert arrange([1, 4, 3], None) == [0, 1, 2]
    assert arrange([5, 3], 4) == [0, 1]  # five ranks need two nodes in any order, and three would then fill the second


def test_groups_change_places_where_one_would_straddle_two_nodes() -> None:
    assert arrange([1, 4, 3], 4) == [0, 2, 1]
    assert arrange([3, 3, 1, 1], 4) == [0, 2, 1, 3]


def test_more_groups_than_orders_can_be_tried_for_keep_their_order() -> None:
    assert arrange([1, 4, 3, 4, 4, 4, 4, 4], 4) == list(range(8))
