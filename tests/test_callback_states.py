"""States of callbacks that nobody vouches for: each is taken over, or refused with an error that says so."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, Repeatable, fit
from torch import Tensor

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.probe import DenoiserCall

ODD = [None, 3, -1, 1.5, True, "x", [], {}, [None], {"x": None}, torch.zeros(3), torch.zeros(0, dtype=torch.bool)]


def detector() -> EarlyBirdDetector:
    return EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0, round_to=4)


def pruner(path: Path) -> TimestepAwarePruner:
    return TimestepAwarePruner(REGIONS, round_to=4, dirpath=path / "tickets", rewind="init")


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of a detector and a pruner within the search, and after the switch."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []

    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step in (4, 8):
                found.append(copy.deepcopy((search.state_dict(), tickets.state_dict())))

    path = tmp_path_factory.mktemp("fit")
    search, tickets = detector(), pruner(path)
    fit(Repeatable(), search, tickets, Copying(), max_epochs=2)
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutations(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in places(state):
        for value in ["missing", *ODD]:
            mutated = copy.deepcopy(state)
            owner: Any = mutated
            for key in path[:-1]:
                owner = owner[key]
            if isinstance(value, str) and value == "missing":
                del owner[path[-1]]
            else:
                owner[path[-1]] = copy.deepcopy(value)
            yield mutated


def take_over(callback: pl.Callback, state: Any) -> bool:
    try:
        callback.load_state_dict(state)
        call = getattr(callback, "_saved_call", None)
        if call is not None:
            DenoiserCall.read(callback, call, torch.device("cpu"))
    except (MisconfigurationException, ValueError) as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("kind", ["detector", "pruner"])
def test_a_damaged_state_is_taken_over_or_refused(kind: str, moment: int, states: list[Any], tmp_path: Path) -> None:
    state = states[moment][["detector", "pruner"].index(kind)]
    outcomes = [
        take_over(detector() if kind == "detector" else pruner(tmp_path), mutated) for mutated in mutations(state)
    ]
    assert outcomes.count(False) > len(outcomes) // 4
    assert take_over(detector() if kind == "detector" else pruner(tmp_path), copy.deepcopy(state))


@pytest.mark.parametrize("state", [[], "x", 3, {}])
def test_what_is_no_state_is_refused(state: Any, tmp_path: Path) -> None:
    for callback in (detector(), pruner(tmp_path)):
        assert not take_over(callback, state)


def test_the_error_says_what_is_damaged(states: list[Any], tmp_path: Path) -> None:
    state = copy.deepcopy(states[0][1])
    state["switched_at"] = "yes"
    message = "the state of TimestepAwarePruner is damaged .*'switched_at' is a str, expected int or None.* Resume from"
    with pytest.raises(MisconfigurationException, match=message):
        pruner(tmp_path).load_state_dict(state)
    assert isinstance(states[0][1]["initial_weights"]["conv_in.weight"], Tensor)
