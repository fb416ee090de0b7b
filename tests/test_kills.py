"""A fit that is killed, at whatever moment, comes to what it would have come to; see also ``benchmarks/kills.py``."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import differences, files
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import REGIONS, Repeatable, fit

import lightning_earlybird
from lightning_earlybird import TimestepAwarePruner


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes are killed by signals")
def test_a_fit_killed_before_any_act_upon_files_comes_to_the_result_of_one_left_alone() -> None:
    # Every ninth of 82 acts; without arguments all are taken.
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "benchmarks" / "killed_fits.py"),
        "--every",
        "9",
        "--first",
        "6",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(lightning_earlybird.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    summary = re.search(r"(\d+) kills, (\d+) of them in the middle of writing.*; 0 fits came to another", run.stdout)
    assert summary is not None, run.stdout
    assert int(summary[1]) >= 8
    assert int(summary[2]) >= 3
    assert set(re.findall(r"resumed at step +(\d+)", run.stdout)) >= {"0", "6", "15"}


def trained(folder: Path, epochs: int, ckpt_path: Path | None = None) -> TimestepAwarePruner:
    pruner = TimestepAwarePruner(REGIONS, dirpath=folder, max_search_steps=2, round_to=4)
    saving = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    fit(
        Repeatable(),
        pruner,
        saving,
        batches=2,
        max_epochs=epochs,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
    )
    return pruner


@pytest.mark.filterwarnings("ignore:max_search_steps=2 reached", "ignore:Checkpoint directory")
def test_a_fit_resumed_at_its_end_writes_the_ensemble_that_the_killed_process_did_not(tmp_path: Path) -> None:
    whole = trained(tmp_path, 3)
    written = files(tmp_path / "ensemble")
    shutil.rmtree(tmp_path / "ensemble")
    resumed = trained(tmp_path, 3, tmp_path / "checkpoints" / "last.ckpt")
    assert files(tmp_path / "ensemble") == written
    assert resumed.facts == whole.facts
    assert resumed.switched_at == whole.switched_at == 2


def test_what_is_compared_bit_for_bit_differs_by_a_bit() -> None:
    state = {"a": [1, torch.tensor([1.0, 2.0])], "b": {"c": "x", "time": 1.0}}
    other = {"a": [1, torch.tensor([1.0, 2.0]).nextafter(torch.tensor(9.0))], "b": {"c": "x", "time": 2.0}}
    assert differences(state, state) == []
    assert differences(state, other) == ["/a/1: tensors", "/b/time: 1.0 and 2.0"]
    assert differences(state, other, frozenset({"time", "a"})) == []
    assert differences(state, {"a": [1]}) == ["/b in one only", "/a: 2 and 1 entries"]
    assert differences({"a": 1}, {"a": 1.0}) == ["/a: int and float"]
