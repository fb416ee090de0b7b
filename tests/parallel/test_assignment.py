"""Assignments: what a user may write, what is refused, and what ranks read from it."""

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_earlybird.parallel.assignment import Assignment


@pytest.mark.parametrize(
    "value",
    [
        [[0], [1, 2], [3]],
        [[0], [2, 1], [3]],
        ((0,), (1, 2), (3,)),
        [0, [1, 2], 3],
        {0: 0, 1: [1, 2], 2: 3},
        {2: [3], 1: (1, 2), 0: [0]},
        {"0": 0, "1": [1, 2], "2": [3]},
        OmegaConf.create([[0], [1, 2], [3]]),
        OmegaConf.create({"assignment": {0: 0, 1: [1, 2], 2: 3}}).assignment,
        OmegaConf.create("{'0': 0, '1': [1, 2], '2': 3}"),
        Assignment(((0,), (1, 2), (3,)), 4),
    ],
    ids=[
        "lists",
        "unsorted",
        "tuples",
        "mixed",
        "mapping",
        "any order",
        "strings",
        "ListConfig",
        "DictConfig",
        "YAML",
        "itself",
    ],
)
def test_every_way_to_write_an_assignment_gives_the_same(value: Any) -> None:
    assert Assignment.of(value, 3, 4) == Assignment(((0,), (1, 2), (3,)), 4)


def test_one_rank_per_ticket_may_host_several() -> None:
    assert Assignment.of([0, 0, 1], 3, 2).by_ticket == ((0,), (0,), (1,))


def test_every_rank_reads_the_same_groups_and_its_own_tickets() -> None:
    assignment = Assignment.of({0: [3, 2], 1: 0, 2: 1, 3: 0}, 4, 4)
    assert assignment.num_tickets == 4
    assert assignment.groups == ((0,), (1,), (2, 3))
    assert [assignment.hosted(rank) for rank in range(4)] == [(1, 3), (2,), (0,), (0,)]
    assert [assignment.group_of(rank) for rank in range(4)] == [(0,), (1,), (2, 3), (2, 3)]
    assert [assignment.ranks(ticket) for ticket in range(4)] == [(2, 3), (0,), (1,), (0,)]
    assert [assignment.leader(ticket) for ticket in range(4)] == [2, 0, 1, 0]


def test_its_json_form_can_be_read_again() -> None:
    assignment = Assignment.of([[0], [1, 2], [3]], 3, 4)
    assert assignment.to_json() == [[0], [1, 2], [3]]
    assert Assignment.of(assignment.to_json(), 3, 4) == assignment


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_hosts_nothing(rank: int) -> None:
    assignment = Assignment.of([0, 1], 2, 2)
    for method in (assignment.hosted, assignment.group_of):
        with pytest.raises(IndexError, match=f"rank={rank} must be one of the 2 ranks, 0 to 1"):
            method(rank)


@pytest.mark.parametrize(
    ("value", "num_tickets", "world_size", "message"),
    [
        # Not an assignment at all.
        (None, 2, 2, "assignment=None must be a list with an entry per ticket, or a mapping"),
        ("0,1", 2, 2, "assignment='0,1' must be a list with an entry per ticket, or a mapping"),
        (3, 2, 2, "assignment=3 must be a list with an entry per ticket, or a mapping"),
        # Tickets.
        ([], 0, 1, "assignment=[] must hold at least one ticket. Give each ticket its ranks"),
        ([], 2, 2, "assignment=[] misses tickets 0, 1: there are 2, counted from 0 in region order"),
        (
            [0, 1],
            3,
            2,
            "assignment=[0, 1] misses ticket 2: there are 3, counted from 0 in region order, and each must be",
        ),
        ({0: 0, 2: 1}, 3, 2, "assignment={0: 0, 2: 1} misses ticket 1: there are 3"),
        ([0, 1, 2], 2, 3, "has ticket 2, but there are 2, counted from 0 in region order. Remove what has no region"),
        ({0: 0, 7: 1, 5: 1}, 1, 2, "has tickets 5, 7, but there is 1, counted from 0"),
        ({0: 0, "0": 1}, 1, 2, "names ticket 0 twice. Keep one of the two entries"),
        (
            {"first": 0},
            1,
            1,
            "has the key 'first', which must be the index of a ticket: an integer from 0 on, or a string",
        ),
        ({-1: 0}, 1, 1, "has the key -1, which must be the index of a ticket"),
        ({"-1": 0}, 1, 1, "has the key '-1', which must be the index of a ticket"),
        ({"²": 0}, 1, 1, "has the key '²', which must be the index of a ticket"),
        ({True: 0}, 1, 1, "has the key True, which must be the index of a ticket"),
        # Ranks.
        (
            [[0], [1], [2]],
            3,
            2,
            "assignment=[[0], [1], [2]] needs 3 ranks, because it names rank 2, but there are 2. Start 3 processes",
        ),
        ([0, 1], 2, 1, "needs 2 ranks, because it names rank 1, but there is 1. Start 2 processes"),
        ([0, -1], 2, 2, "assignment: ticket 1 has the rank -1, which must be an integer from 0 on. Give each"),
        ([0, [1, -2]], 2, 2, "assignment: ticket 1 has the rank -2, which must be an integer from 0 on"),
        ([True, 0], 2, 2, "assignment: ticket 0 has the rank True, which must be an integer"),
        ([0, 1.0], 2, 2, "assignment: ticket 1 has the rank 1.0, which must be an integer"),
        ([0, "1"], 2, 2, "assignment: ticket 1 has the rank '1', which must be an integer"),
        ({0: 0, 1: None}, 2, 2, "assignment: ticket 1 has the rank None, which must be an integer"),
        ([0, [[1]]], 2, 2, "assignment: ticket 1 has the rank [1], which must be an integer"),
        ([[0], []], 2, 1, "assignment=[[0], []]: ticket 1 has no ranks, and would not be trained. Give each"),
        ([[0, 1, 1]], 1, 2, "assignment=[[0, 1, 1]]: ticket 0 has rank 1 twice. Name each rank once"),
        # Idle ranks.
        (
            [0, 2],
            2,
            3,
            "assignment=[[0], [2]] leaves rank 1 of 3 without a ticket: every rank must train one. Add it to",
        ),
        ([0, 0], 2, 4, "leaves ranks 1, 2, 3 of 4 without a ticket: every rank must train one. Add them to"),
        # Sharing.
        (
            [[0, 1], [1, 2]],
            2,
            3,
            "assignment=[[0, 1], [1, 2]]: tickets 0 and 1 share rank 1, but not all their ranks. A group of",
        ),
        ([[0, 1], [2], [1]], 3, 3, "tickets 0 and 2 share rank 1, but not all their ranks"),
        (
            [[0], [1, 2], [2, 1]],
            3,
            3,
            "tickets 1 and 2 share ranks 1, 2, but a group of several ranks trains exactly one ticket. Divide",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_the_remedy_named(
    value: Any, num_tickets: int, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Assignment.of(value, num_tickets, world_size)


def test_an_assignment_for_another_world_is_checked_again() -> None:
    with pytest.raises(ValueError, match="needs 2 ranks, because it names rank 1, but there is 1"):
        Assignment.of(Assignment(((0,), (1,)), 2), 2, 1)


def test_more_ranks_than_there_are_is_worded_for_the_one_who_starts_the_processes() -> None:
    remedy = (
        "Start 3 processes (devices= and num_nodes= of the Trainer), or name ranks 0 to 1 only; a rank may host several"
    )
    with pytest.raises(ValueError, match=re.escape(remedy)):
        Assignment.of([[0], [1], [2]], 3, 2)
    with pytest.raises(ValueError, match=r"or name rank 0 only; a rank may host several tickets"):
        Assignment.of([0, 1], 2, 1)
