"""Checks of constructor arguments."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_earlybird.arguments import (
    check_choice,
    check_fraction,
    check_positive,
    check_resumed,
    check_state_version,
)


def test_positive_integers_and_none_pass() -> None:
    check_positive(window=1, limit=None, steps=1000)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
def test_what_is_no_positive_integer_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=f"steps={value!r} must be an integer of at least 1"):
        check_positive(window=1, steps=value)  # type: ignore[arg-type]


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    check_choice("weights", "raw", ("raw", "ema"))
    with pytest.raises(ValueError, match="weights='mean' must be one of 'raw', 'ema'"):
        check_choice("weights", "mean", ("raw", "ema"))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_what_is_no_fraction_is_refused_by_name(value: object) -> None:
    check_fraction("threshold", 0, "a distance")
    check_fraction("threshold", 1.0, "a distance")
    with pytest.raises(ValueError, match=rf"threshold={value!r} must lie in \[0, 1\]: it is a distance"):
        check_fraction("threshold", value, "a distance")


def test_only_settings_that_a_checkpoint_knows_otherwise_are_refused() -> None:
    check_resumed({"target": "macs", "norm": "exact"}, {"target": "macs", "round_to": 8})
    message = "target='macs' does not fit the checkpoint, whose .* made with target='params'. Resume with that value"
    with pytest.raises(MisconfigurationException, match=message):
        check_resumed({"norm": "exact", "target": "macs"}, {"target": "params"})


@pytest.mark.parametrize("version", [None, 0, -1, 4, "1", 1.0, True])
def test_the_state_of_a_callback_has_a_known_format(version: object) -> None:
    for known in (1, 2, 3):
        check_state_version(pl.Callback(), {"format_version": known}, newest=3)
    message = rf"ckpt_path: the state of Callback has format_version={version!r}, and this .* reads 1 to 3\. Upgrade"
    with pytest.raises(MisconfigurationException, match=message):
        check_state_version(pl.Callback(), {"format_version": version}, newest=3)
    with pytest.raises(MisconfigurationException, match="format_version=None"):
        check_state_version(pl.Callback(), {}, newest=3)
