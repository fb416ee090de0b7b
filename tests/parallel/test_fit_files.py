"""Which files a fit goes on from: the newest of each ticket, of one fit, that can be read."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_earlybird.parallel.assignment import Assignment
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.fit_files import describe_files, find_files
from lightning_earlybird.parallel.fit_record import FIT_KEY, FitRecord, SplitRecord
from lightning_earlybird.parallel.loads import TicketLoad

THREE = Assignment(((0,), (1,), (1,)), 2)


def split(hosted: tuple[int, ...], **changes: Any) -> SplitRecord:
    values: dict[str, Any] = {
        "born": "tickets of a",
        "assignment": THREE,
        "hosted": hosted,
        "at_split": False,
        "group_size": 1,
        "laid_out_for": 2,
        "courses": {ticket: Course(2, 2, None) for ticket in hosted},
        "left": dict.fromkeys(hosted, 10),
        "divisible": dict.fromkeys(hosted, False),
        "stopped": False,
        "step_seconds": (0.3, 0.2, 0.1),
        "measured": True,
        "by_epochs": False,
        "schedule_left": None,
        "pace": None,
        "batches": 5,
        "logged_steps": 4,
        "names": (),
        "ensembles": ("model",),
    }
    return SplitRecord(**(values | changes))


def write(
    path: Path,
    step: int,
    record: SplitRecord | None,
    *,
    fit: str = "a",
    session: int = 0,
    places: tuple[str, ...] = (),
    age: int = 0,
) -> Path:
    """A checkpoint as far as the search looks at it, written `age` seconds ago."""
    checkpoint: dict[str, Any] = {"global_step": step, "state_dict": {"weight": torch.zeros(1000)}}
    FitRecord(fit, session, places, record).write(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def whole(hosted: tuple[int, ...] = (0, 1, 2)) -> SplitRecord:
    return split(hosted, at_split=True, group_size=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What a fit leaves: checkpoints of the search and of two groups, and the state at the split elsewhere."""
    places = (str(tmp_path / "checkpoints"), str(tmp_path / "tickets"))
    write(tmp_path / "tickets" / "switch.ckpt", 2, whole(), places=places)
    root = tmp_path / "checkpoints"
    write(root / "epoch=0.ckpt", 1, None, places=places)
    write(root / "last.ckpt", 2, whole(), places=places)
    write(root / "ticket_0" / "step=4.ckpt", 4, split((0,)), places=places)
    write(root / "ticket_0" / "last.ckpt", 6, split((0,)), places=places, age=10)
    write(root / "tickets_1_2" / "last.ckpt", 12, split((1, 2)), places=places)
    return root


def chosen(path: Path, *places: Path) -> dict[int, str]:
    found = find_files(path, places, None)
    assert found.dense is None
    return {ticket: f"{file.path.parent.name}/{file.path.name}" for ticket, file in found.tickets.items()}


NEWEST = {0: "ticket_0/last.ckpt", 1: "tickets_1_2/last.ckpt", 2: "tickets_1_2/last.ckpt"}


def test_a_record_comes_back_from_a_checkpoint_that_loads_without_unpickling(tmp_path):
    record = split(
        (1, 2),
        courses={1: Course(2, 2, 9), 2: Course(-3, 4, None)},
        left={1: 3, 2: None},
        divisible={1: False, 2: True},
        pace=(4, 12, (5, 0)),
        names=((("model.a", "model.b"), ("other",)),),
        batches=None,
    )
    path = write(tmp_path / "file.ckpt", 6, record, session=3, places=("one", "two"))
    assert FitRecord.read(torch.load(path, weights_only=True)) == FitRecord("a", 3, ("one", "two"), record)
    assert record.load(1) == TicketLoad(0.2, 3, False) and record.load(2) == TicketLoad(0.1, None, True)
    assert split((0,), group_size=3, divisible={0: True}).load(0).steps == 30
    assert FitRecord.read({"state_dict": {}}) is None


@pytest.mark.parametrize("damage", [{"split": {}}, {"split": 3}, {"places": None}, {"format_version": "x"}])
def test_a_damaged_record_is_named_as_such(damage, tmp_path):
    path = write(tmp_path / "ticket_0" / "last.ckpt", 6, split((0,)))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[FIT_KEY] |= damage
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match=r"last.ckpt' cannot be read .*of groups of ranks is damaged"):
        find_files(path, [], None)


def test_a_record_of_a_newer_version_is_refused(tmp_path):
    path = write(tmp_path / "ticket_0" / "last.ckpt", 6, split((0,)))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[FIT_KEY]["format_version"] = 2
    torch.save(checkpoint, path)
    with pytest.raises(MisconfigurationException, match="format version 2, and this lightning-earlybird reads up to 1"):
        find_files(path, [], None)


@pytest.mark.parametrize("name", [".", "ticket_0", "ticket_0/last.ckpt", "tickets_1_2/last.ckpt", "last.ckpt"])
def test_each_ticket_goes_on_from_its_most_advanced_file(name, saved):
    assert chosen(saved / name) == NEWEST


def test_what_each_ticket_goes_on_from_is_told(saved):
    found = find_files(saved / "last.ckpt", [], None)
    assert found.remarks == [
        f"{str(saved / 'last.ckpt')!r} is of step 2; the tickets have been trained further since then."
    ]
    assert describe_files(found.tickets).splitlines()[1] == (
        f"ticket 1 goes on after 10 steps of its own, from {str(saved / 'tickets_1_2' / 'last.ckpt')!r}"
    )


def test_the_file_that_is_named_is_taken_and_its_siblings_are_the_newest(saved):
    assert chosen(saved / "ticket_0" / "step=4.ckpt") == NEWEST | {0: "ticket_0/step=4.ckpt"}
    assert set(chosen(saved.parent / "tickets" / "switch.ckpt").values()) == {"tickets/switch.ckpt"}


def test_checkpoints_of_the_search_are_taken_as_they_are_but_for_the_last_one(saved):
    assert find_files(saved / "epoch=0.ckpt", [], None).dense == saved / "epoch=0.ckpt"
    write(saved / "last-v1.ckpt", 1, None)
    assert chosen(saved / "last-v1.ckpt") == NEWEST
    assert find_files(saved / "nothing.ckpt", [], None).dense == saved / "nothing.ckpt"
    torch.save({"global_step": 3}, saved / "other.ckpt")
    assert find_files(saved / "other.ckpt", [], None).dense == saved / "other.ckpt"


def test_a_directory_of_the_search_alone_gives_its_newest(tmp_path):
    for step in (1, 3, 2):
        write(tmp_path / f"step={step}.ckpt", step, None)
    assert find_files(tmp_path, [], None).dense == tmp_path / "step=3.ckpt"


def test_the_last_one_of_another_fit_does_not_go_on_with_the_tickets_beside_it(saved):
    write(saved / "last.ckpt", 1, None, fit="b")
    assert find_files(saved / "last.ckpt", [], None).dense == saved / "last.ckpt"


def test_files_of_two_fits_in_a_directory_are_refused_by_name(saved):
    write(saved / "ticket_0" / "last-v1.ckpt", 8, split((0,)), fit="b")
    with pytest.raises(MisconfigurationException, match=r"checkpoints of 2 different fits: 5 of one, .*last-v1.ckpt'"):
        find_files(saved, [], None)
    assert chosen(saved / "tickets_1_2" / "last.ckpt") == NEWEST
    # Of the other fit there is nothing of the tickets 1 and 2.
    with pytest.raises(MisconfigurationException, match=r"no checkpoint of the tickets \[1, 2\] of 3 was found"):
        find_files(saved / "ticket_0" / "last-v1.ckpt", [], None)


def test_the_latest_of_resumed_fits_counts_more_than_the_step(saved):
    """Someone went back to step 4 of ticket 0, and from there to step 5, when the fit was killed again."""
    write(saved / "ticket_0" / "last-v1.ckpt", 5, split((0,)), session=1)
    assert chosen(saved) == NEWEST | {0: "ticket_0/last-v1.ckpt"}


@pytest.mark.parametrize("name", [".", "last.ckpt"])
def test_tickets_that_were_left_behind_by_going_back_to_the_search_are_left_alone(name, saved):
    write(saved / "last.ckpt", 1, None, session=1)
    assert find_files(saved / name, [], None).dense == saved / "last.ckpt"
    # The search has found other tickets since, and one group has saved its own.
    places = (str(saved.parent / "tickets"),)
    write(saved.parent / "tickets" / "switch.ckpt", 2, replace(whole(), born="others"), session=1)
    write(saved / "ticket_0" / "last-v1.ckpt", 4, split((0,), born="others"), session=1, places=places)
    expected = {0: "ticket_0/last-v1.ckpt", 1: "tickets/switch.ckpt", 2: "tickets/switch.ckpt"}
    assert chosen(saved / name) == expected


def test_steps_of_a_larger_group_count_more_where_epochs_are_the_limit(tmp_path):
    four = Assignment(((0, 1), (2,), (3,)), 4)
    shared = {"assignment": four, "group_size": 2, "divisible": {0: True}}
    write(tmp_path / "ticket_0" / "large.ckpt", 8, split((0,), **shared))
    write(tmp_path / "ticket_0" / "small.ckpt", 12, split((0,), divisible={0: True}))
    write(tmp_path / "tickets_1_2" / "last.ckpt", 12, split((1, 2)))
    assert chosen(tmp_path)[0] == "ticket_0/large.ckpt"


def test_a_ticket_without_a_checkpoint_begins_at_the_split(saved):
    (saved / "tickets_1_2" / "last.ckpt").unlink()
    (saved / "last.ckpt").unlink()
    expected = {0: "ticket_0/last.ckpt", 1: "tickets/switch.ckpt", 2: "tickets/switch.ckpt"}
    assert chosen(saved) == chosen(saved / "ticket_0" / "last.ckpt") == expected


def test_places_are_sought_that_were_moved_with_the_files(saved, tmp_path):
    (saved / "tickets_1_2" / "last.ckpt").unlink()
    (saved / "last.ckpt").unlink()
    moved = (saved.parent / "tickets").rename(tmp_path / "moved")
    with pytest.raises(MisconfigurationException, match=r"no checkpoint of the tickets \[1, 2\] of 3 .*'switch.ckpt'"):
        find_files(saved, [], None)
    assert chosen(saved, moved)[1] == "moved/switch.ckpt"


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_a_damaged_file_is_left_out_with_a_warning_where_there_is_another(saved):
    damage(saved / "ticket_0" / "last.ckpt")
    found = find_files(saved, [], None)
    assert found.tickets[0].path == saved / "ticket_0" / "step=4.ckpt"
    (warning,) = found.warnings
    assert str(saved / "ticket_0" / "last.ckpt") in warning and warning.endswith("it is left out.")


def test_a_damaged_file_is_an_error_where_there_is_no_other(saved):
    (saved / "last.ckpt").unlink()
    (saved.parent / "tickets" / "switch.ckpt").unlink()
    damage(saved / "tickets_1_2" / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"tickets \[1, 2\] of 3 was found; '.*tickets_1_2/last.ckpt'"):
        find_files(saved, [], None)
    with pytest.raises(
        MisconfigurationException, match=r"last.ckpt' cannot be read .* Pass another checkpoint, or the"
    ):
        find_files(saved / "tickets_1_2" / "last.ckpt", [], None)


def test_a_directory_with_nothing_of_ours_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"half")
    with pytest.raises(
        MisconfigurationException, match=r"without checkpoints of a MultiTicketStrategy; '.*broken.ckpt'"
    ):
        find_files(tmp_path, [], None)
