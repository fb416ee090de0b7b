import copy

import pytest
import torch

from lightning_earlybird.convergence import MaskCheck, MaskWindow
from lightning_earlybird.masks import TicketMask


def toy_mask(*removed: int, size: int = 10) -> TicketMask:
    """A mask over one group that removes the channels named."""
    return TicketMask({"g": ~torch.isin(torch.arange(size), torch.tensor(removed, dtype=torch.long))})


def random_mask(seed: int) -> TicketMask:
    generator = torch.Generator().manual_seed(seed)
    return TicketMask(
        {"a": torch.randperm(12, generator=generator) < 6, "b": torch.randperm(30, generator=generator) < 9}
    )


def filled(window: MaskWindow, pushes: int) -> MaskWindow:
    window.start(random_mask(0))
    for push in range(1, pushes + 1):
        window.push(random_mask(push), step=10 * push)
    return window


@pytest.mark.parametrize("window", [2, 3, 5])
def test_the_earliest_converged_check_is_number_window(window):
    masks = MaskWindow(window=window, threshold=0.1)
    converged = [masks.push(toy_mask(0), step).converged for step in range(1, window + 3)]
    assert converged == [False] * (window - 1) + [True] * 3


def test_the_mask_at_initialisation_does_not_enter_the_fifo():
    masks = MaskWindow(window=2)
    masks.start(toy_mask(0))
    first = masks.push(toy_mask(0), step=1)
    assert (first.distance, first.from_start, first.converged) == (None, 0.0, False)


def test_the_distance_is_the_largest_from_the_newest_to_each_other_mask_in_the_fifo():
    masks = MaskWindow(window=3, threshold=0.2)
    masks.push(toy_mask(0, 1), step=1)
    masks.push(toy_mask(0, 2), step=2)
    # To step 1: channels 1 and 3 differ; to step 2: 2 and 3 differ; a third channel (4) differs from both.
    assert masks.push(toy_mask(0, 3, 4), step=3).distance == 0.3
    # Step 1 has left: to step 2 nothing differs, to step 3 channels 2, 3 and 4 do.
    check = masks.push(toy_mask(0, 2), step=4)
    assert (check.distance, check.converged) == (0.3, False)


def test_distances_among_the_older_masks_do_not_matter():
    masks = MaskWindow(window=3, threshold=0.1)
    masks.push(toy_mask(0), step=1)
    masks.push(toy_mask(1), step=2)
    # The older two are 0.2 apart, but the newest removes both channels and is 0.1 from each.
    check = masks.push(toy_mask(0, 1), step=3)
    assert (check.distance, check.converged) == (0.1, True)


def test_one_far_mask_in_the_fifo_is_enough_to_refuse():
    masks = MaskWindow(window=4, threshold=0.1)
    for step, removed in enumerate([(0, 1, 2), (0,), (0,), (0,), (0,)], start=1):
        check = masks.push(toy_mask(*removed), step)
        assert check.converged == (step == 5)


def test_a_distance_equal_to_the_threshold_converges_and_one_above_does_not():
    for removed, converged in [((0,), True), ((0, 1), False)]:
        masks = MaskWindow(window=2, threshold=0.1)
        masks.push(toy_mask(), step=1)
        assert masks.push(toy_mask(*removed), step=2).converged is converged


def test_a_threshold_of_zero_asks_for_identical_masks():
    masks = MaskWindow(window=2, threshold=0)
    assert [masks.push(toy_mask(*r), s).converged for s, r in enumerate([(0,), (1,), (1,)])] == [False, False, True]


def test_the_verdict_of_a_check_is_not_sticky():
    masks = MaskWindow(window=2, threshold=0.1)
    verdicts = [masks.push(toy_mask(*r), s).converged for s, r in enumerate([(0,), (0,), (5, 6)])]
    assert verdicts == [False, True, False]
    assert [check.converged for check in masks.checks] == verdicts


def test_distances_from_the_start_and_from_half_the_training_so_far():
    masks = MaskWindow(window=2)
    masks.start(toy_mask(0), step=0)
    # Half of step 1 is 0.5, equally far from a mask at 0 and one at 1; only the initial one is stored yet.
    assert masks.push(toy_mask(1), step=1).from_half == 0.2
    check = masks.push(toy_mask(1, 2), step=2)
    assert check == MaskCheck(step=2, distance=0.1, from_start=0.3, from_half=0.1, converged=True)
    # Half of step 6 is 3: the closest is step 2.
    assert masks.push(toy_mask(1, 2, 3), step=6).from_half == 0.1
    # Half of step 8 is 4, as far from 2 as from 6: the earlier one.
    assert masks.push(toy_mask(1, 2, 3), step=8).from_half == 0.1


def test_without_a_mask_at_initialisation_there_is_no_distance_from_it():
    masks = MaskWindow(window=2)
    first, second = (masks.push(toy_mask(step), step) for step in (4, 5))
    assert (first.from_start, first.from_half) == (None, None)
    assert (second.from_start, second.from_half) == (None, 0.2)


def test_newest_and_null_distance_follow_the_pushes():
    masks = MaskWindow()
    assert masks.newest is None
    assert masks.null_distance is None
    masks.start(toy_mask(0))
    assert masks.newest is None
    assert masks.null_distance == pytest.approx(0.18, abs=1e-15)
    newest = toy_mask(0, 1, 2, 3, 4)
    masks.push(newest, step=1)
    assert masks.newest is newest
    assert masks.null_distance == 0.5


def test_pairwise_distances_are_exact_symmetric_and_include_the_start():
    masks = filled(MaskWindow(window=3), pushes=6)
    steps, distances = masks.pairwise()
    assert steps == [0, 10, 20, 30, 40, 50, 60]
    expected = [[random_mask(i).distance(random_mask(j)) for j in range(7)] for i in range(7)]
    assert torch.equal(distances, torch.tensor(expected, dtype=torch.float64))


def test_pairwise_of_nothing_is_empty():
    steps, distances = MaskWindow().pairwise()
    assert steps == []
    assert distances.shape == (0, 0)


def test_pairwise_pairs_groups_by_name_not_by_order():
    masks = MaskWindow()
    mask = random_mask(1)
    masks.push(mask, step=1)
    masks.push(TicketMask(dict(reversed(mask.kept.items()))), step=2)
    assert masks.pairwise()[1].tolist() == [[0, 0], [0, 0]]


def test_history_beyond_the_limit_is_thinned_but_for_the_start_and_the_fifo():
    masks = MaskWindow(window=3, history_limit=8)
    masks.start(random_mask(0))
    for step in range(1, 200):
        masks.push(random_mask(step), step)
        steps = masks.pairwise()[0]
        assert len(steps) <= 8 + 1
        assert steps[0] == 0
        assert steps[1:] == sorted(steps[1:])
        assert steps[-3:] == [s for s in range(step - 2, step + 1) if s >= 0][-3:]
    assert len(masks.checks) == 199


def test_thinning_leaves_the_fifo_distance_alone():
    def distances(limit):
        return [check.distance for check in filled(MaskWindow(window=4, history_limit=limit), pushes=40).checks]

    assert distances(5) == distances(1000)


def test_thinning_keeps_every_second_old_mask():
    masks = filled(MaskWindow(window=2, history_limit=6), pushes=7)
    assert masks.pairwise()[0] == [0, 20, 40, 60, 70]


@pytest.mark.parametrize("pushes", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("started", [True, False])
def test_a_window_resumed_from_a_weights_only_checkpoint_goes_on_as_if_never_stopped(tmp_path, pushes, started):
    original = MaskWindow(window=5, history_limit=9)
    if started:
        original.start(random_mask(100), step=3)
    for push in range(1, pushes + 1):
        original.push(random_mask(push), step=10 * push)

    torch.save(original.state_dict(), tmp_path / "window.pt")
    resumed = MaskWindow(window=5, history_limit=9)
    resumed.load_state_dict(torch.load(tmp_path / "window.pt", weights_only=True))

    assert resumed.checks == original.checks
    for push in range(pushes + 1, pushes + 12):
        assert resumed.push(random_mask(push % 3), 10 * push) == original.push(random_mask(push % 3), 10 * push)
    assert resumed.pairwise()[0] == original.pairwise()[0]
    assert torch.equal(resumed.pairwise()[1], original.pairwise()[1])
    assert list(resumed.newest.kept) == list(original.newest.kept)


def test_a_state_is_a_snapshot_and_loading_shares_nothing_with_it():
    masks = filled(MaskWindow(window=3), pushes=4)
    state = masks.state_dict()
    snapshot = copy.deepcopy(state)
    masks.push(random_mask(9), step=99)
    resumed = MaskWindow(window=3)
    resumed.load_state_dict(state)
    state["masks"].fill_(True)
    assert resumed.newest.distance(random_mask(4)) == 0
    assert state["steps"] == snapshot["steps"]
    assert state["checks"] == snapshot["checks"]


def test_loading_replaces_what_the_window_held():
    resumed = filled(MaskWindow(window=3), pushes=7)
    resumed.load_state_dict(MaskWindow(window=3).state_dict())
    assert (resumed.newest, resumed.checks, resumed.pairwise()[0]) == (None, [], [])


def test_a_state_of_another_window_size_is_refused():
    with pytest.raises(ValueError, match="window=4 does not match the saved state, which has window=3"):
        MaskWindow(window=4).load_state_dict(MaskWindow(window=3).state_dict())


@pytest.mark.parametrize("window", [1, 0, -5])
def test_a_window_of_fewer_than_two_masks_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window} must be at least 2"):
        MaskWindow(window=window)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_distance_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold={threshold} must lie in \[0, 1\]"):
        MaskWindow(threshold=threshold)


def test_a_history_that_cannot_hold_the_fifo_is_refused():
    with pytest.raises(ValueError, match="history_limit=5 must be above window=5"):
        MaskWindow(window=5, history_limit=5)


@pytest.mark.parametrize("step", [7, 6])
def test_steps_must_ascend(step):
    masks = MaskWindow()
    masks.push(toy_mask(0), step=7)
    with pytest.raises(ValueError, match=f"step={step} must be above that of the mask pushed before, 7"):
        masks.push(toy_mask(0), step=step)


def test_the_start_comes_first_and_once():
    started, pushed = MaskWindow(), MaskWindow()
    started.start(toy_mask(0))
    pushed.push(toy_mask(0), step=1)
    for masks in (started, pushed):
        with pytest.raises(RuntimeError, match=r"start\(step=5\) must come first and once"):
            masks.start(toy_mask(0), step=5)


def test_a_mask_over_other_groups_is_refused_and_leaves_the_window_unchanged():
    masks = MaskWindow(window=2)
    masks.start(toy_mask(0))
    with pytest.raises(ValueError, match="The masks differ in group 'g': 11 channels against 10"):
        masks.push(toy_mask(0, size=11), step=1)
    assert masks.newest is None
    assert masks.checks == []
    assert masks.push(toy_mask(0), step=1).from_start == 0
