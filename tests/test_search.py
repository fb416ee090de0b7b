"""The search for several sparsities at once, on masks drawn by hand."""

import io
import itertools
import math

import pytest
import torch

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepRegion
from lightning_earlybird.search import TicketSearch, check_sparsities, named_metrics, short_name


def mask(*kept: int, size: int = 8) -> TicketMask:
    flags = torch.zeros(size, dtype=torch.bool)
    flags[list(kept)] = True
    return TicketMask({"up": flags})


HALF, OTHER_HALF, ALMOST = mask(0, 1, 2, 3), mask(4, 5, 6, 7), mask(0, 1, 2, 4)
QUARTER = mask(0, 1)


def search(window: int = 2, threshold: float = 0.1) -> TicketSearch:
    return TicketSearch([0.5, 0.75], window=window, threshold=threshold)


def test_starting_gives_the_null_line_of_each_sparsity() -> None:
    found = search()
    assert not found.started
    null = found.start({0.5: HALF, 0.75: QUARTER}, 0)
    assert null == {"earlybird/null_line/0.5": 0.5, "earlybird/null_line/0.75": 2 * 0.75 * 0.25}
    assert found.started and not found.done


def test_pushing_measures_each_sparsity_for_itself_and_decides_nothing() -> None:
    found = search()
    found.start({0.5: HALF, 0.75: QUARTER}, 0)
    found.push({0.5: ALMOST, 0.75: QUARTER}, 4)
    checks = found.push({0.5: OTHER_HALF, 0.75: QUARTER}, 8)
    assert checks[0.5].distance == 6 / 8 and not checks[0.5].converged
    assert checks[0.75].distance == 0.0 and checks[0.75].converged
    assert found.emerged == {} and found.tickets == {}


def test_the_search_is_done_when_every_ticket_has_emerged() -> None:
    found = search()
    found.emerge(0.75, QUARTER, 8)
    assert not found.done and found.emerged == {0.75: 8} and found.tickets == {0.75: QUARTER}
    found.emerge(0.5, HALF, 12)
    assert found.done


def test_metrics_are_named_by_sparsity_and_unknown_ones_are_none() -> None:
    found = search()
    found.start({0.5: HALF, 0.75: QUARTER}, 0)
    metrics = named_metrics(found.push({0.5: ALMOST, 0.75: QUARTER}, 4))
    assert metrics == {
        "earlybird/distance/0.5": None,
        "earlybird/distance_from_init/0.5": 0.25,
        "earlybird/distance_to_half/0.5": 0.25,
        "earlybird/distance/0.75": None,
        "earlybird/distance_from_init/0.75": 0.0,
        "earlybird/distance_to_half/0.75": 0.0,
    }


def test_the_state_survives_a_checkpoint_that_is_loaded_without_unpickling() -> None:
    found = search()
    found.start({0.5: HALF, 0.75: QUARTER}, 0)
    found.push({0.5: ALMOST, 0.75: QUARTER}, 4)
    found.push({0.5: HALF, 0.75: QUARTER}, 8)
    found.emerge(0.75, QUARTER, 8)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    loaded = search()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.started and loaded.emerged == {0.75: 8}
    assert torch.equal(loaded.tickets[0.75].flat(), QUARTER.flat())
    for sparsity, window in found.windows.items():
        assert loaded.windows[sparsity].checks == window.checks
        assert loaded.windows[sparsity].null_distance == window.null_distance
    ours, theirs = (each.push({0.5: OTHER_HALF, 0.75: HALF}, 12) for each in (found, loaded))
    assert ours == theirs


def test_the_state_of_other_sparsities_is_refused() -> None:
    other = TicketSearch([0.5, 0.25], window=2, threshold=0.1)
    message = r"sparsities=\[0.5, 0.25\] differ from the checkpoint's \[0.5, 0.75\]. Resume with the sparsities"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(search().state_dict())


EARLY, LATE, DENSE = TimestepRegion(0, 300, 0.5), TimestepRegion(300, 600, 0.5), TimestepRegion(600, 1000, 0.0)


def by_region(*regions: TimestepRegion) -> TicketSearch:
    return TicketSearch([0.5], window=2, threshold=0.1, regions=regions or (EARLY, LATE, DENSE))


def test_a_search_by_region_has_a_window_for_each_that_loses_channels() -> None:
    found = by_region()
    assert list(found.windows) == [EARLY, LATE]
    assert list(by_region(DENSE).windows) == [0.5]
    assert found.start({EARLY: HALF, LATE: QUARTER}, 0) == {
        "earlybird/null_line/0-300": 0.5,
        "earlybird/null_line/300-600": 0.375,
    }
    checks = found.push({EARLY: ALMOST, LATE: QUARTER}, 4)
    assert named_metrics(checks)["earlybird/distance_from_init/0-300"] == 0.25


def test_names_of_metrics_hold_nothing_that_loggers_refuse() -> None:
    ends = float("-inf"), -0.5, 1e6, float("inf")
    names = [short_name(TimestepRegion(*pair, 0.5)) for pair in itertools.pairwise(ends)]
    assert names == ["-inf--0.5", "-0.5-1e06", "1e06-inf"]


def test_masks_are_asked_for_by_region_or_by_a_sparsity_that_is_that_of_one() -> None:
    assert search().key(0.75) == 0.75 and search().key(TimestepRegion(0, 1, 0.75)) == 0.75
    assert by_region().key(LATE) == LATE and by_region(EARLY, DENSE).key(0.5) == EARLY
    for found, wanted, message in (
        (by_region(), 0.5, r"sparsity=0.5 is that of 2 regions, region \[0, 300\) of sparsity 0.5, .*Ask for one of"),
        (
            by_region(),
            0.3,
            r"sparsity=0.3 is not searched for. This detector has \['region \[0, 300\) of sparsity 0.5'",
        ),
        (by_region(), DENSE, r"region \[600, 1000\) of sparsity 0 is not searched for. There are \['region \[0, 300\)"),
    ):
        with pytest.raises(KeyError, match=message):
            found.key(wanted)


def test_the_state_of_a_search_by_region_survives_and_does_not_fit_another() -> None:
    found = by_region()
    found.start({EARLY: HALF, LATE: QUARTER}, 0)
    found.push({EARLY: ALMOST, LATE: QUARTER}, 4)
    found.emerge(LATE, QUARTER, 4)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    # A budget of steps is no part of what is searched for.
    longer = TimestepRegion(300, 600, 0.5, max_steps=9)
    loaded = by_region(EARLY, longer, DENSE)
    loaded.load_state_dict(state)
    assert loaded.emerged == {longer: 4} and torch.equal(loaded.tickets[longer].flat(), QUARTER.flat())
    assert loaded.windows[EARLY].checks == found.windows[EARLY].checks
    message = r"sparsities=\[0.5\] differ from the checkpoint's \[\[0, 300, 0.5\], .*regions .* and criterion that the"
    with pytest.raises(ValueError, match=message):
        TicketSearch([0.5], window=2, threshold=0.1).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"regions=\[\[0, 300, 0.5\]\] differ from the checkpoint's \[\[0, 300, 0.5\], "
    ):
        by_region(EARLY, DENSE).load_state_dict(state)


def test_a_state_that_was_written_by_sparsity_loads() -> None:
    checks = [{"step": 4, "distance": None, "from_start": 0.25, "from_half": 0.25, "converged": False}]
    window = {"window": 2, "groups": {"up": 8}, "has_start": False, "steps": [4], "masks": HALF.flat()[None]}
    state = {
        "sparsities": [0.5],
        "emerged": [[0.5, 4]],
        "tickets": [[0.5, HALF.state_dict()]],
        "windows": [window | {"checks": checks}],
    }
    loaded = TicketSearch([0.5], window=2, threshold=0.1)
    loaded.load_state_dict(state)
    assert loaded.emerged == {0.5: 4} and torch.equal(loaded.tickets[0.5].flat(), HALF.flat())
    assert [check.step for check in loaded.windows[0.5].checks] == [4]


@pytest.mark.parametrize("value", [[], (), 0.5, "0.5", {0.5: 1}, None])
def test_what_is_no_list_of_sparsities_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"sparsities=.* must be a non-empty list of numbers, for example"):
        check_sparsities(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.1, 1.5, math.nan, True, "0.3", None])
def test_sparsities_outside_of_the_open_unit_interval_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"sparsities=\[0.5, .*\]: .* must lie in \(0, 1\); it is the fraction"):
        check_sparsities([0.5, value])  # type: ignore[list-item]


def test_a_sparsity_that_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsities=\[0.5, 0.3, 0.5\] must not repeat a value"):
        check_sparsities([0.5, 0.3, 0.5])
