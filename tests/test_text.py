"""Tables and times as plain text."""

import pytest

from lightning_earlybird.text import aligned, duration


def test_words_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    assert aligned(["name", "n"], [["a", "1"], ["longer", "100"]], left={0}).splitlines() == [
        "name      n",
        "------  ---",
        "a         1",
        "longer  100",
    ]


def test_lines_do_not_end_in_spaces() -> None:
    assert aligned(["n", "word"], [["1", ""]], left={1}).splitlines() == ["n  word", "-  ----", "1"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00035, "0.35 ms"),
        (0.35, "350 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (4.23, "4.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1.0 h"),
        (7560, "2.1 h"),
        (47.9 * 3600, "47.9 h"),
        (47.96 * 3600, "2.0 d"),
        (86400 * 12.5, "12.5 d"),
    ],
)
def test_times_stand_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
