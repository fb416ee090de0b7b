"""The examples run as their users run them, and leave the files that they promise."""

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_earlybird import TicketEnsembleSampler

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "digits.py"

TINY = [
    "data.batch_size=256",
    "model.channels=[16,32]",
    "detector.every_n_epochs=1",
    "detector.window=2",
    "detector.threshold=0.0",
    "pruner.max_search_steps=15",
    "trainer.max_epochs=5",
    "trainer.accelerator=cpu",
    "sampling.num_images=9",
    "sampling.num_inference_steps=5",
    "sampling.grid=3",
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for needed in ("sklearn", "matplotlib", "wandb"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.mark.slow
def test_a_tiny_run_leaves_every_file_and_both_tables(example: ModuleType, tmp_path: Path) -> None:
    run = run_example(tmp_path, *TINY)

    output = tmp_path / "runs" / "digits"
    for name in ("samples.png", "mask_distance.png", "mask_overlap.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    assert list((output / "wandb").glob("offline-run-*/*.wandb"))
    sampler = TicketEnsembleSampler.from_pretrained(output / "ensemble")
    assert [(region.start, region.stop, region.sparsity) for region in sampler.regions] == [
        (0, 240, 0.3),
        (240, 440, 0.6),
        (440, 1000, 0.8),
    ]

    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    for metric in ("train_loss", "earlybird/distance/0.3", "frechet_distance/ticket ensemble"):
        assert any(row[metric] for row in rows), metric

    for heading in ("[440, 1000)", "training cost", "search (dense)", "Fréchet distance", "dense at the switch"):
        assert heading in run.stdout, heading
    # The progress bar shows both phases, and the distances as long as they matter.
    assert "phase=search" in run.stdout + run.stderr
    assert "phase=tickets" in run.stdout + run.stderr
    assert "distance/0.8=" in run.stdout + run.stderr

    # As after a kill while sampling: everything but the training is done once more, and comes to the same.
    kept = [path for path in output.rglob("*") if path.is_file() and "wandb" not in str(path)]
    whole = {path: path.read_bytes() for path in kept if path.name != "config.yaml"}  # which has the new settings
    (output / "samples.png").unlink()
    shutil.rmtree(output / "ensemble")
    again = run_example(tmp_path, *TINY, "resume=true", "wandb.mode=disabled")
    assert "Restored all states from the checkpoint" in again.stderr
    assert {path: path.read_bytes() for path in whole} == whole
    clock = re.compile(r" +\d+ +\d+%$", re.MULTILINE)  # seconds, which are as many as it took
    tables = [
        clock.sub("", text[text.index("region ") : text.index("Written to")]) for text in (run.stdout, again.stdout)
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_three_processes_leave_what_one_does_and_one_picture_of_all_tickets(
    example: ModuleType, tmp_path: Path
) -> None:
    config = EXAMPLE.parent / "configs" / "digits_parallel.yaml"
    shorter = ["data.batch_size=86", "trainer.max_epochs=-1", "trainer.max_steps=35"]
    run = run_example(tmp_path, str(config), *TINY, *shorter)

    output = tmp_path / "runs" / "digits-parallel"
    assert TicketEnsembleSampler.from_pretrained(output / "ensemble").regions
    assert not (output / "finished").exists()
    (offline,) = (output / "wandb").glob("offline-run-*")  # one run, of the first process
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for ticket in range(3):
        steps = [int(row["step"]) for row in rows if row[f"ticket_{ticket}/train_loss"]]
        assert steps == [19, 29], ticket
        assert f"ticket_{ticket}/train_loss".encode() in (offline / f"run-{offline.name[-8:]}.wandb").read_bytes()
    for heading in ("training cost", "the busiest of 3 processes", "Fréchet distance", "Took "):
        assert run.stdout.count(heading) == 1, heading
    assert "who trains what from step 15 on" in run.stderr
    assert "phase=tickets" in run.stdout + run.stderr


def test_the_split_is_fixed_and_disjoint(example: ModuleType) -> None:
    train, held_out = example.digits(500)
    again, _ = example.digits(500)
    assert torch.equal(train, again)
    assert train.shape == (1297, 1, 8, 8)
    assert held_out.shape == (500, 1, 8, 8)
    assert train.min() == -1
    assert train.max() == 1


def test_the_frechet_distance_is_that_of_two_gaussians(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(400, 1, 8, 8, generator=generator) * 2 - 1
    assert example.frechet_distance(images, images) == pytest.approx(0, abs=1e-6)
    # Equal covariance: the squared distance of the means is left, 64 pixels times 0.5 squared.
    assert example.frechet_distance(images + 0.5, images) == pytest.approx(16.0)
