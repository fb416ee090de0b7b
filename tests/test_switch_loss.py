"""The training loss on both sides of the switch."""

import pytest
import torch

from lightning_earlybird.switch_loss import SwitchLoss


def test_the_means_before_and_after_and_the_first_loss_are_told_once() -> None:
    losses = SwitchLoss(steps=4)
    for value in (9.0, 4.0, 3.0, 2.0, 1.0):  # the oldest has left the window
        assert losses.add({"loss": torch.tensor(value)}) == {}
    losses.switch()
    first = {"earlybird/loss_before_switch": 2.5, "earlybird/loss_at_switch": 8.0}
    assert losses.add({"loss": torch.tensor(8.0)}) == first
    for value in (7.0, 6.0):
        assert losses.add(torch.tensor(value)) == {}
    assert losses.add({"loss": torch.tensor(5.0)}) == {"earlybird/loss_after_switch": 5.5}
    assert losses.add({"loss": torch.tensor(5.0)}) == {} and losses.end() == {}


def test_a_fit_that_ends_early_tells_what_the_tickets_had_won_back() -> None:
    losses = SwitchLoss(steps=10)
    assert losses.end() == {}
    losses.switch()
    for value in (8.0, 6.0, 4.0):
        losses.add(torch.tensor(value))
    assert losses.end() == {"earlybird/loss_after_switch": 5.0}


def test_a_switch_before_any_loss_has_no_mean_to_compare_with() -> None:
    losses = SwitchLoss(steps=1)
    losses.switch()
    told = losses.add(torch.tensor(1.0))
    assert told["earlybird/loss_before_switch"] is None and told["earlybird/loss_at_switch"] == 1.0


@pytest.mark.parametrize("outputs", [None, {}, {"prediction": torch.ones(1)}, 3.0])
def test_steps_without_a_loss_do_not_count(outputs: object) -> None:
    losses = SwitchLoss(steps=1)
    losses.switch()
    assert losses.add(outputs) == {}
    assert losses.add(torch.tensor(1.0)) != {}


def test_losses_are_kept_without_their_graph() -> None:
    losses = SwitchLoss(steps=2)
    losses.add(torch.ones(1, requires_grad=True).sum())
    assert not losses._before[0].requires_grad
