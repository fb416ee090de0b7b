"""Fits of several processes in which one is killed, interrupted, fails or hangs: some of ``benchmarks/faults.py``."""

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

# Scenario -> the rank that is lost, and what it was at.
LOST = {
    "killed in the search": (1, "searching for tickets, is gone: killed by SIGKILL"),
    "rank 0 killed while it writes tickets": (0, "searching for tickets, is gone: "),
    "killed while rank 0 waits": (2, "training ticket 1 [400, 1000), is gone: killed by SIGKILL"),
    "torchrun: killed in a group of one": (1, "training ticket 1 [400, 1000), is gone: "),
    "error in training_step": (1, "training ticket 1 [400, 1000), failed: ValueError: the weather is bad"),
    "data that never come to a group of one": (1, "training ticket 1 [400, 1000), has not come to another batch for"),
}
STOPPED = ["SIGTERM to rank 2 in ticket training", "Ctrl-C in ticket training"]


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.fixture(scope="module")
def outcomes(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [*LOST, *STOPPED]
    folders = [tmp_path_factory.mktemp("fault") for _ in names]
    with ThreadPoolExecutor(2) as pool:  # most of the time they wait
        played = pool.map(lambda name, out: faults.play(faults.SCENARIOS[name], out), names, folders)
    return dict(zip(names, played, strict=True))


@pytest.mark.parametrize("name", [*LOST, *STOPPED])
def test_no_process_is_left_after_a_minute_and_what_is_on_disk_can_be_used(faults, outcomes, name):
    outcome = outcomes[name]
    assert outcome.seconds is not None and outcome.seconds < 60.0
    assert outcome.exit_code != 0
    assert len(outcome.checkpoints) >= 2
    assert faults.usable(outcome) == []
    left_half_written = [path.name for path in outcome.partial]
    if "writes" in name:  # what nobody looks at, under a name that is never used again
        (half,) = left_half_written
        assert half.startswith(".switch.") and half.endswith(".partial")
        assert not (outcome.out / "tickets" / "switch").exists()
    else:
        assert left_half_written == []


@pytest.mark.parametrize("name", LOST)
def test_every_other_rank_says_which_rank_was_lost_and_what_it_trained(faults, outcomes, name):
    lost, at = LOST[name]
    outcome = outcomes[name]
    for rank in set(range(3)) - {lost}:
        verdicts = [line for line in outcome.said(rank) if line.endswith(f" Rank {rank} stops.")]
        assert len(verdicts) == 1, outcome.stderr[rank]
        assert verdicts[0].startswith(f"MultiTicketStrategy: rank {lost} on ") and f", {at}" in verdicts[0]


def saved(outcome) -> dict[str, int]:
    """Name of each checkpoint that was saved in a hurry -> its step."""
    paths = [path for path in outcome.checkpoints if "interrupted" in path.parts]
    return {path.stem: torch.load(outcome.out / path, weights_only=True)["global_step"] for path in paths}


def test_what_the_ranks_that_are_left_hold_is_saved(outcomes):
    assert saved(outcomes["killed in the search"]).keys() == {"search"}
    # The first rank of the group was lost: the next one saves.
    assert saved(outcomes["rank 0 killed while it writes tickets"]).keys() == {"search"}
    assert saved(outcomes["error in training_step"]).keys() == {"ticket_0", "ticket_1"}
    # The whole group is lost: its last checkpoint is at most four steps old.
    outcome = outcomes["torchrun: killed in a group of one"]
    assert saved(outcome).keys() == {"ticket_0"}
    last = torch.load(outcome.out / "checkpoints" / "ticket_1" / "last.ckpt", weights_only=True)
    assert last["global_step"] >= 8


def test_a_ticket_that_was_trained_to_its_end_outlives_the_others(outcomes):
    outcome = outcomes["killed while rank 0 waits"]
    assert [path.name for path in outcome.finished] == ["ticket_0"]
    assert saved(outcome).keys() == {"ticket_0", "ticket_1"}


def test_sigterm_to_one_rank_has_all_save_and_leave_without_an_error(outcomes):
    outcome = outcomes["SIGTERM to rank 2 in ticket training"]
    assert saved(outcome).keys() == {"ticket_0", "ticket_1"}  # which takes each of them four seconds
    assert outcome.exit_code == 128 + 15
    assert outcome.ended == dict.fromkeys(range(3), "SIGTERMException")
    assert not any("is gone" in line or "failed" in line for rank in range(3) for line in outcome.said(rank))


def test_a_rank_that_hangs_says_where(outcomes):
    stderr = outcomes["data that never come to a group of one"].stderr[1]
    assert "in training_step" in stderr.partition("rank 1 has not left by itself and is ended.")[2]
