"""Plans of ticket training: worked out by hand, and against all other plans."""

import itertools
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_earlybird.parallel.plan import Assignment, TicketLoad, TicketPlan, plan_tickets

LOADS = st.builds(TicketLoad, st.floats(1e-3, 10), st.integers(0, 2000), st.booleans())
DIVISIBLE = st.builds(TicketLoad, st.floats(1e-3, 10), st.integers(0, 2000), st.just(True))


def epochs(*costs: tuple[float, int]) -> list[TicketLoad]:
    return [TicketLoad(seconds, steps, divisible=True) for seconds, steps in costs]


def path(plan: TicketPlan) -> float:
    assert plan.critical_path_s is not None
    return plan.critical_path_s


def test_one_rank_works_through_all_tickets() -> None:
    plan = plan_tickets(epochs((0.5, 100), (0.25, 100)), 1)
    assert plan.assignment.by_ticket == ((0,), (0,))
    assert plan.steps == (100, 100)
    assert plan.seconds == (50.0, 25.0)
    assert plan.rank_seconds == (75.0,)
    assert (plan.critical_path_s, plan.total_s, plan.efficiency, plan.speedup) == (75.0, 75.0, 1.0, 1.0)


def test_with_fewer_ranks_than_tickets_the_largest_sum_is_smallest() -> None:
    plan = plan_tickets(epochs((1, 50), (1, 30), (1, 30)), 2)
    assert plan.assignment.by_ticket == ((0,), (1,), (1,))
    assert plan.rank_seconds == (50.0, 60.0)
    assert (plan.critical_path_s, plan.total_s) == (60.0, 110.0)
    assert plan.efficiency == pytest.approx(110 / 120)
    assert plan.speedup == pytest.approx(110 / 60)


def test_with_a_rank_per_ticket_the_longest_is_the_critical_path() -> None:
    plan = plan_tickets(epochs((1, 50), (1, 30), (1, 20)), 3)
    assert plan.assignment.by_ticket == ((0,), (1,), (2,))
    assert (plan.critical_path_s, plan.total_s, plan.efficiency, plan.speedup) == (50.0, 100.0, 100 / 150, 2.0)


def test_further_ranks_join_the_largest_cost_and_groups_are_consecutive() -> None:
    # 40 60 10 -> 40 30 10 -> 20 30 10 -> 20 20 10
    plan = plan_tickets(epochs((2, 20), (1, 60), (0.5, 20)), 6)
    assert plan.assignment.by_ticket == ((0, 1), (2, 3, 4), (5,))
    assert plan.steps == (10, 20, 20)
    assert plan.rank_seconds == (20.0, 20.0, 20.0, 20.0, 20.0, 10.0)
    assert plan.efficiency == pytest.approx(110 / 120)


def test_steps_that_do_not_divide_are_rounded_up() -> None:
    plan = plan_tickets(epochs((1, 10)), 3)
    assert (plan.steps, plan.critical_path_s, plan.total_s) == ((4,), 4.0, 12.0)


def test_a_further_rank_goes_by_whole_steps() -> None:
    # On two ranks ticket 0 takes two of its three steps, 20 s and not 15 s: it is still the slowest.
    plan = plan_tickets(epochs((10, 3), (0.1, 180)), 4)
    assert plan.assignment.by_ticket == ((0, 1, 2), (3,))
    assert plan.critical_path_s == pytest.approx(18)


def test_ranks_do_not_shorten_a_fixed_number_of_steps_and_the_table_says_so() -> None:
    plan = plan_tickets([TicketLoad(1, 40, divisible=False), TicketLoad(1, 10, divisible=True)], 4)
    assert plan.assignment.by_ticket == ((0, 1, 2), (3,))
    assert plan.steps == (40, 10)
    assert plan.rank_seconds == (40.0, 40.0, 40.0, 10.0)
    assert plan.speedup == 50 / 40
    assert plan.table().splitlines()[-1] == (
        "ticket 0: the number of steps is fixed, so that several ranks make the batches larger, not the time shorter"
    )
    assert "the number of steps is fixed" not in plan_tickets(plan.loads, 2).table()


def test_a_fixed_number_of_steps_takes_no_rank_that_a_longer_ticket_can_use() -> None:
    # Ticket 1 is the slowest until it has three ranks: 90 45 30, beside the 40 of ticket 0.
    loads = [TicketLoad(1, 40, divisible=False), TicketLoad(1, 90, divisible=True)]
    assert [len(plan_tickets(loads, ranks).assignment.ranks(1)) for ranks in (2, 3, 4)] == [1, 2, 3]


def test_without_budgets_tickets_count_by_their_step_times() -> None:
    loads = [TicketLoad(seconds, None, divisible=False) for seconds in (3.0, 1.0, 1.0)]
    assert plan_tickets(loads, 2).assignment.by_ticket == ((0,), (1,), (1,))
    assert plan_tickets(loads, 5).assignment.by_ticket == ((0, 1, 2), (3,), (4,))
    plan = plan_tickets(loads, 3)
    assert plan.steps == plan.seconds == plan.rank_seconds == (None, None, None)
    assert (plan.critical_path_s, plan.total_s, plan.efficiency, plan.speedup) == (None,) * 4
    assert "no limit" in plan.table() and "open" in plan.table()
    assert plan_tickets(loads, 5).table().splitlines()[-1] == (
        "critical path open: a ticket without a limit of steps trains until something else ends the training"
    )


def test_a_ticket_without_a_budget_counts_like_the_longest_of_the_others() -> None:
    loads = [TicketLoad(1, 100, divisible=True), TicketLoad(2, None, divisible=True), TicketLoad(1, 10, divisible=True)]
    # 100 200 10: costs by the largest budget. By equal shares of nothing, ticket 1 would be the smallest.
    assert plan_tickets(loads, 4).assignment.by_ticket == ((0,), (1, 2), (3,))
    assert plan_tickets(loads, 2).rank_seconds == (110.0, None)
    assert plan_tickets(loads, 2).critical_path_s is None


def test_nothing_left_to_train_is_a_plan_too() -> None:
    plan = plan_tickets(epochs((1, 0), (1, 0)), 3)
    assert (plan.critical_path_s, plan.efficiency, plan.speedup) == (0.0, 1.0, 1.0)
    assert plan.table().splitlines()[-1] == "critical path 0 s, device time 0 s, 0 of 3 ranks' time idle"


def test_an_assignment_of_the_users_is_taken_as_it_is() -> None:
    plan = plan_tickets(epochs((1, 50), (1, 30), (1, 20)), 3, [[1, 2], [0], [0]])
    assert plan.assignment.by_ticket == ((1, 2), (0,), (0,))
    assert plan.rank_seconds == (50.0, 25.0, 25.0)
    with pytest.raises(ValueError, match=r"assignment=\[0, 1\] misses ticket 2"):
        plan_tickets(plan.loads, 3, [0, 1])


def test_groups_stay_within_nodes_where_they_can() -> None:
    loads = epochs((1, 10), (1, 40), (1, 30))
    assert plan_tickets(loads, 8).assignment.by_ticket == ((0,), (1, 2, 3, 4), (5, 6, 7))
    assert plan_tickets(loads, 8, ranks_per_node=4).assignment.by_ticket == ((0,), (4, 5, 6, 7), (1, 2, 3))


def test_the_table_shows_every_ticket_and_the_sums() -> None:
    loads = epochs((0.1, 20_000), (0.05, 80_000), (0.0123, 4_000))
    assert plan_tickets(loads, 6).table(["[0, 240)", "[240, 440)", "[440, 1000)"]).splitlines() == [
        "ticket  region       ranks  steps  ms a step         time  of the critical path",
        "------  -----------  -----  -----  ---------  -----------  --------------------",
        "     0  [0, 240)     0, 1   10000      100.0  16 min 40 s                   75%",
        "     1  [240, 440)   2-4    26667       50.0  22 min 13 s                  100%",
        "     2  [440, 1000)  5       4000       12.3         49 s                    4%",
        "critical path 22 min 13 s, device time 1.7 h, 1.46 of 6 ranks' time idle",
    ]


def test_the_table_does_without_regions() -> None:
    assert plan_tickets(epochs((0.5, 100)), 1).table().splitlines() == [
        "ticket  ranks  steps  ms a step  time  of the critical path",
        "------  -----  -----  ---------  ----  --------------------",
        "     0  0        100      500.0  50 s                  100%",
        "critical path 50 s, device time 50 s, 0 of 1 rank's time idle",
    ]
    with pytest.raises(ValueError, match=r"regions has 2 entries, but there are 1 tickets. Give one label per"):
        plan_tickets(epochs((0.5, 100)), 1).table(["a", "b"])


def test_metrics_and_json_hold_the_same_plan() -> None:
    plan = plan_tickets([TicketLoad(0.5, 100, divisible=True), TicketLoad(0.1, 100, divisible=False)], 3)
    assert plan.metrics() == {
        "earlybird/plan/critical_path_s": 25.0,
        "earlybird/plan/total_s": 60.0,
        "earlybird/plan/efficiency": 0.8,
        "earlybird/plan/speedup": 2.4,
        "earlybird/plan/ticket_0/ranks": 2,
        "earlybird/plan/ticket_0/steps": 50,
        "earlybird/plan/ticket_0/step_seconds": 0.5,
        "earlybird/plan/ticket_0/expected_s": 25.0,
        "earlybird/plan/ticket_1/ranks": 1,
        "earlybird/plan/ticket_1/steps": 100,
        "earlybird/plan/ticket_1/step_seconds": 0.1,
        "earlybird/plan/ticket_1/expected_s": 10.0,
    }
    assert json.loads(json.dumps(plan.to_json(), allow_nan=False)) == {
        "world_size": 3,
        "critical_path_s": 25.0,
        "total_s": 60.0,
        "efficiency": 0.8,
        "speedup": 2.4,
        "rank_seconds": [25.0, 25.0, 10.0],
        "tickets": [
            {"ranks": [0, 1], "steps": 50, "step_seconds": 0.5, "divisible": True, "expected_s": 25.0},
            {"ranks": [2], "steps": 100, "step_seconds": 0.1, "divisible": False, "expected_s": 10.0},
        ],
    }


def test_a_plan_without_budgets_is_json_too() -> None:
    plan = plan_tickets([TicketLoad(0.5, None, divisible=True)], 2)
    data = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert data["critical_path_s"] is None and data["tickets"][0]["steps"] is None
    assert plan.metrics()["earlybird/plan/critical_path_s"] is None


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "0.1", None])
def test_a_step_time_that_cannot_be_is_refused(value: Any) -> None:
    message = re.escape(f"TicketLoad(step_seconds={value!r}) must be a positive finite number")
    with pytest.raises(ValueError, match=message):
        TicketLoad(value, 10, divisible=True)


@pytest.mark.parametrize("value", [-1, 1.5, True, "10", math.inf])
def test_a_budget_that_cannot_be_is_refused(value: Any) -> None:
    message = re.escape(f"TicketLoad(steps={value!r}) must be an integer of at least 0, or None")
    with pytest.raises(ValueError, match=message):
        TicketLoad(0.1, value, divisible=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_divisible_must_be_said_plainly(value: Any) -> None:
    message = re.escape(f"TicketLoad(divisible={value!r}) must be True (limited by epochs) or False (limited by steps)")
    with pytest.raises(ValueError, match=message):
        TicketLoad(0.1, 10, value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None])
def test_a_world_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"world_size={value!r} must be an integer of at least 1"):
        plan_tickets(epochs((1, 1)), value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_nodes_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"ranks_per_node={value!r} must be an integer of at least 1"):
        plan_tickets(epochs((1, 1)), 1, ranks_per_node=value)


def test_no_loads_and_loads_of_other_tickets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads=\[\] must hold at least one ticket"):
        plan_tickets([], 1)
    with pytest.raises(ValueError, match=r"loads has 1 entries, but the assignment 2 tickets. Give one TicketLoad per"):
        TicketPlan(Assignment(((0,), (1,)), 2), tuple(epochs((1, 1))))


@given(st.lists(LOADS, min_size=1, max_size=6), st.integers(1, 12), st.none() | st.integers(1, 4))
def test_every_rank_is_used_and_the_sums_agree(loads: list[TicketLoad], ranks: int, node: int | None) -> None:
    plan = plan_tickets(loads, ranks, ranks_per_node=node)
    assert sorted({rank for own in plan.assignment.by_ticket for rank in own}) == list(range(ranks))
    for own in plan.assignment.groups:
        assert own == tuple(range(own[0], own[-1] + 1))
        assert len(own) == 1 or plan.assignment.by_ticket.count(own) == 1
    busy = [seconds for seconds in plan.rank_seconds if seconds is not None]
    assert len(busy) == ranks
    assert path(plan) == max(busy)
    assert plan.total_s == pytest.approx(sum(busy))
    assert plan.efficiency is not None and 0 < plan.efficiency <= 1


@given(st.lists(LOADS, min_size=1, max_size=4), st.integers(1, 8))
def test_no_other_plan_of_its_kind_is_done_earlier(loads: list[TicketLoad], ranks: int) -> None:
    """All ways to give each ticket ranks of its own, or, with too few, to put each on one rank."""
    if ranks >= len(loads):
        sizes = itertools.product(range(1, ranks + 1), repeat=len(loads))
        least = min(
            max(load.seconds_on(size) or 0.0 for load, size in zip(loads, own, strict=True))
            for own in sizes
            if sum(own) == ranks
        )
    else:
        least = min(
            path(plan_tickets(loads, ranks, list(own)))
            for own in itertools.product(range(ranks), repeat=len(loads))
            if len(set(own)) == ranks
        )
    assert path(plan_tickets(loads, ranks)) == pytest.approx(least, rel=1e-12)


@given(st.lists(LOADS, min_size=1, max_size=5))
def test_more_ranks_are_never_slower(loads: list[TicketLoad]) -> None:
    paths = [path(plan_tickets(loads, ranks)) for ranks in range(1, 12)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(paths))


@given(st.lists(DIVISIBLE, min_size=1, max_size=5), st.integers(1, 12))
def test_divisible_tickets_are_done_no_sooner_than_if_all_ranks_were_busy(loads: list[TicketLoad], ranks: int) -> None:
    alone = math.fsum(load.seconds_on(1) or 0.0 for load in loads)
    assert path(plan_tickets(loads, ranks)) >= alone / ranks * (1 - 1e-12)


@given(st.lists(LOADS, min_size=1, max_size=5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_the_tickets_does_not_change_the_times(loads: list[TicketLoad], ranks: int, random: Any) -> None:
    shuffled = random.sample(loads, len(loads))
    first, second = plan_tickets(loads, ranks), plan_tickets(shuffled, ranks)
    assert path(first) == pytest.approx(path(second), rel=1e-12)
    busy = [sorted(seconds or 0.0 for seconds in plan.rank_seconds) for plan in (first, second)]
    if len({load.step_seconds * (load.steps or 0) for load in loads}) == len(loads):  # no ties to be broken by index
        assert busy[0] == pytest.approx(busy[1], rel=1e-9)


def test_a_rank_is_busy_as_long_in_any_order_of_its_tickets() -> None:
    loads = epochs((0.1, 1), (0.2, 1), (0.3, 1))
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert plan_tickets(loads, 1).rank_seconds == plan_tickets(loads[::-1], 1).rank_seconds


@given(st.lists(LOADS, min_size=1, max_size=5), st.integers(1, 9))
def test_the_same_loads_give_the_same_plan(loads: list[TicketLoad], ranks: int) -> None:
    assert plan_tickets(list(loads), ranks) == plan_tickets(tuple(loads), ranks)
