"""What a rank goes on with: from one file, or from several, whose tickets are at different places on their way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import quiet_trainer
from test_fit_files import THREE, split
from torch import nn

from lightning_earlybird.parallel.assignment import Assignment
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.fit_files import FitFile
from lightning_earlybird.parallel.fit_record import FitRecord, SplitRecord
from lightning_earlybird.parallel.plan import TicketPlan
from lightning_earlybird.parallel.resumption import Resumption, plan_resumed
from lightning_earlybird.saved_structure import CHECKPOINT_KEY

NAMES = {ticket: f"model.tickets.{ticket}.weight" for ticket in range(3)}


def saved(step: int, record: SplitRecord, *, epochs: int = 0, batches: int = 0) -> tuple[FitFile, dict[str, Any]]:
    """A file, and what is in it: the value of each tensor is its step and its ticket."""
    path = Path(f"{record.hosted}_{step}.ckpt")
    weights = {NAMES[ticket]: torch.tensor([step, ticket]) for ticket in record.hosted}
    weights["other"] = torch.tensor([step])
    states = {index: {"step": step + index} for index in range(len(weights))}
    count = dict.fromkeys(("ready", "started", "processed", "completed"), batches)
    progress = {"ready": epochs + 1, "processed": epochs}
    absent = {str(ticket): {"weight": [2]} for ticket in range(3) if ticket not in record.hosted}
    checkpoint = {
        "global_step": step,
        "state_dict": weights,
        "current_model_state": weights,
        "callbacks": {
            "Averages": {"model": weights, "count": step},
            "Pruner": {"losses_by_ticket": {str(ticket): step for ticket in record.hosted}},
        },
        "optimizer_states": [{"state": states, "param_groups": [{"lr": step, "params": list(states)}]}],
        "loops": {
            "fit_loop": {
                "state_dict": {"combined_loader": [1]},
                "epoch_progress": {"current": progress},
                "epoch_loop.batch_progress": {"total": dict(count), "current": dict(count)},
            }
        },
        CHECKPOINT_KEY: {"denoiser": "model", "absent": absent},
    }
    record = SplitRecord(**{**vars(record), "names": ((tuple(weights),),)})
    return FitFile(path, step, FitRecord("a", 2, (), record), 0.0), checkpoint


def resume(
    assignment: Assignment, rank: int, files: dict[int, tuple[FitFile, dict[str, Any]]], accumulated: int = 1
) -> Resumption:
    found = {ticket: file for ticket, (file, _) in files.items()}
    loads = {file.path: checkpoint for file, checkpoint in files.values()}
    splits = {ticket: file.split for ticket, file in found.items()}
    plan = TicketPlan(assignment, tuple(splits[ticket].load(ticket) for ticket in sorted(splits)))
    return Resumption(found, plan, rank, accumulated, lambda path: loads[path])


def two_groups(**changes: Any) -> dict[int, tuple[FitFile, dict[str, Any]]]:
    """Ticket 0 at step 8, the others at 12."""
    other = saved(12, split((1, 2), **changes))
    return {0: saved(8, split((0,), **changes)), 1: other, 2: other}


ALONE = Assignment(((0,), (0,), (0,)), 1)


def test_who_trained_what_is_kept_on_as_many_ranks_and_planned_anew_on_others():
    files = {ticket: file for ticket, (file, _) in two_groups().items()}
    assert plan_resumed(files, 2, None, None).assignment == THREE
    assert plan_resumed(files, 2, [[0], [0], [1]], None).assignment.by_ticket == ((0,), (0,), (1,))
    fresh = plan_resumed(files, 3, None, None)
    assert fresh.assignment.by_ticket == ((0,), (1,), (2,)) and fresh.steps == (10, 10, 10)


def test_a_group_goes_on_with_its_own_file_as_it_is():
    files = two_groups()
    for rank, step in ((0, 8), (1, 12)):
        own = resume(THREE, rank, files)
        assert own.exact and own.session == 3 and own.fit == "a" and (own.step, own.shift) == (step, 0)
        assert own.checkpoint is files[rank][1]
        assert own.courses == dict.fromkeys(own.hosted, Course(2, 2, None))
        assert not own.load_optimizers(nn.Module(), [])


def test_tickets_of_two_files_are_merged_and_the_more_advanced_wait():
    merged = resume(ALONE, 0, two_groups())
    assert not merged.exact and (merged.step, merged.shift) == (8, 0)
    assert merged.courses == {0: Course(2, 8, None), 1: Course(2, 12, None), 2: Course(2, 12, None)}
    assert [merged.courses[ticket].taken(merged.step) for ticket in range(3)] == [6, 10, 10]
    assert [[t for t in range(3) if merged.courses[t].takes_part(step)] for step in (8, 11, 12)] == [
        [0],
        [0],
        [0, 1, 2],
    ]
    for state in ("state_dict", "current_model_state"):
        values = {name: value.tolist() for name, value in merged.checkpoint[state].items()}
        assert values == {NAMES[0]: [8, 0], NAMES[1]: [12, 1], NAMES[2]: [12, 2], "other": [8]}
    assert merged.checkpoint["callbacks"]["Averages"]["count"] == 8
    assert merged.checkpoint["callbacks"]["Averages"]["model"][NAMES[2]].tolist() == [12, 2]
    assert merged.checkpoint["callbacks"]["Pruner"]["losses_by_ticket"] == {"0": 8, "1": 12, "2": 12}
    assert merged.checkpoint[CHECKPOINT_KEY]["absent"] == {}
    assert merged.checkpoint["global_step"] == 8


def test_what_is_left_out_keeps_its_shapes():
    own = resume(Assignment(((0,), (1,), (2,)), 3), 1, two_groups())
    assert set(own.checkpoint["state_dict"]) == {NAMES[1], "other"}
    assert own.checkpoint[CHECKPOINT_KEY]["absent"] == {"0": {"weight": [2]}, "2": {"weight": [2]}}
    assert own.courses == {1: Course(2, 12, None)}


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.tickets = nn.ModuleDict({str(t): nn.Linear(1, 1, bias=False) for t in range(3)})
        self.other = nn.Parameter(torch.zeros(1))


def test_optimizers_are_restored_by_name_whatever_their_order():
    module = Holder()
    optimizer = torch.optim.SGD([module.other, *reversed(list(module.model.parameters()))], lr=0.5)
    assert resume(ALONE, 0, two_groups()).load_optimizers(module, [optimizer])
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {names[parameter]: state["step"] for parameter, state in optimizer.state.items()}
    # The states were numbered in the order of each file: a ticket or two, then what is no ticket's.
    assert found == {NAMES[0]: 8, "other": 9, NAMES[1]: 12, NAMES[2]: 13}
    assert optimizer.param_groups[0]["lr"] == 8


def test_optimizers_that_keep_more_than_states_of_parameters_are_refused():
    files = two_groups()
    files[0][1]["optimizer_states"][0]["clock"] = 1
    with pytest.raises(MisconfigurationException, match=r"keeps \['clock'\] besides .* Resume with the same number"):
        resume(ALONE, 0, files)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_ticket_that_is_trained_to_its_end_keeps_nobody_waiting(stopped):
    files = two_groups()
    changes = {"stopped": True} if stopped else {"courses": {0: Course(2, 2, 6)}}
    files[0] = saved(8, split((0,), **changes))
    merged = resume(ALONE, 0, files)
    assert merged.step == 12
    assert merged.courses[0].has_ended(12) and merged.courses[0].taken(12) == 6
    assert merged.courses[1] == Course(2, 12, None)
    own = resume(THREE, 0, files)
    assert own.exact and own.courses[0].has_ended(8) and own.courses[0].taken(8) == 6


EPOCHS = {"by_epochs": True, "batches": 12}


def by_epochs(ticket: int, step: int, ranks: int, epochs: int, batches: int) -> tuple[FitFile, dict[str, Any]]:
    assignment = Assignment(((0, 1), (2,), (3,)), 4)
    shared = {"assignment": assignment, "group_size": ranks, "divisible": {ticket: True}, "by_epochs": True}
    return saved(step, split((ticket,), batches=12 // ranks, **shared), epochs=epochs, batches=batches)


def test_places_are_those_in_the_data_where_epochs_are_the_limit():
    # Of two ranks: half-way through its third epoch. Of one: at the beginning of its third, and of its fourth.
    files = {0: by_epochs(0, 17, 2, 2, 3), 1: by_epochs(1, 26, 1, 2, 0), 2: by_epochs(2, 38, 1, 3, 0)}
    merged = resume(ALONE, 0, files)
    assert merged.step == 26 and not merged.resized
    assert merged.courses == {1: Course(2, 26, None), 0: Course(2, 32, None), 2: Course(2, 38, None)}


def test_a_group_of_another_size_is_at_the_same_place_in_its_epoch():
    files = {0: by_epochs(0, 17, 2, 2, 3), 1: by_epochs(1, 26, 1, 2, 0), 2: by_epochs(2, 38, 1, 3, 0)}
    own = resume(Assignment(((0,), (1,), (1,)), 2), 0, files)
    assert own.resized and (own.step, own.shift) == (32, 15)
    assert own.courses == {0: Course(2, 32, None)}
    assert own.checkpoint["loops"]["fit_loop"]["state_dict"] == {}  # the loader's place was among two ranks
    average = EMAWeightAveraging()
    average._latest_update_step = 17
    trainer = quiet_trainer(average)
    trainer.strategy._lightning_module = None
    loop = trainer.fit_loop
    loop.max_batches = 12
    progress = loop.epoch_loop.batch_progress
    progress.load_state_dict(
        {key: dict.fromkeys(("ready", "started", "processed", "completed"), 3) for key in ("total", "current")}
        | {"is_last_batch": False}
    )
    steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = 17

    class Automatic:
        automatic_optimization = True

    trainer.strategy._lightning_module = Automatic()
    own.settle(trainer)
    assert vars(progress.current) == dict.fromkeys(("ready", "started", "processed", "completed"), 6)
    assert steps.completed == trainer.global_step == average._latest_update_step == 32
    assert own.pace(30) is None  # nothing was counted on
    counting = by_epochs(0, 17, 2, 2, 3)[0].split
    own.base = SplitRecord(**{**vars(counting), "schedule_left": 15})
    assert own.pace(30) == (15, 30, ())


def test_a_ticket_begins_anew_at_the_split_with_its_own_part_of_it():
    everything = saved(2, split((0, 1, 2), at_split=True, group_size=2, schedule_left=4, by_epochs=True), batches=2)
    files = {0: saved(8, split((0,))), 1: everything, 2: everything}
    own = resume(THREE, 1, files)
    assert not own.exact and own.step == 2
    assert set(own.checkpoint["state_dict"]) == {NAMES[1], NAMES[2], "other"}
    assert own.checkpoint[CHECKPOINT_KEY]["absent"] == {"0": {"weight": [2]}}
    assert own.pace(12) == (4, 12, ())


def test_checkpoint_callbacks_begin_anew_only_in_a_new_directory(tmp_path):
    callback = ModelCheckpoint(tmp_path, monitor="loss", mode="max")
    trainer = quiet_trainer(callback, enable_checkpointing=True)
    state = callback.state_dict() | {"best_model_path": "old", "best_k_models": {"old": torch.tensor(1.0)}}
    for files, rank, assignment, path in ((two_groups(), 0, THREE, "old"), (two_groups(), 0, ALONE, "")):
        for _, checkpoint in files.values():
            checkpoint["callbacks"][callback.state_key] = dict(state)
        own = resume(assignment, rank, files)
        own.prepare_callbacks(trainer)
        fresh = ModelCheckpoint(tmp_path, monitor="loss", mode="max")
        fresh.load_state_dict(own.checkpoint["callbacks"][callback.state_key])
        assert fresh.best_model_path == path and bool(fresh.best_k_models) == (path == "old")
        assert fresh.kth_value == -torch.inf or path == "old"
