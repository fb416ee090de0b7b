"""Fits that are killed while tickets train apart go on from what each group has saved.

Where they go on on other ranks, the module draws samples, timesteps and noise from generators of its own, seeded by the
number of the batch, so that a fit that was cut short can be compared with a whole one to the last bit, whoever trains
what. On the same ranks it draws from the global generator, and the order of the data matters.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import TIMESTEPS, ConvNet, Lit, OnStep, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from worlds import end, tail
from worlds import start as start_script

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TicketEnsembleSampler, TimestepAwarePruner

REGIONS = [(0, 240, 0.25), (240, 440, 0.5, 9), (440, 1000, 0.75)]


class Own(Lit):
    """Everything random comes from the number of the batch."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.trainer.fit_loop.total_batch_idx)

    def sample_timesteps(self, batch_size: int, start: int = 0, stop: int = TIMESTEPS) -> torch.Tensor:
        return torch.randint(start, stop, (batch_size,), generator=self.generator())

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        generator = self.generator()
        steps = self.sample_timesteps(len(samples))
        drawn, noise = (torch.randn(samples.shape, generator=generator) for _ in range(2))
        samples = samples + drawn  # of zeros, where the order of the data must not matter
        share = (steps / TIMESTEPS).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model(samples * (1 - share) + noise * share, steps), noise)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class FromGlobalState(Lit):
    """Draws from the global generator, as most modules do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class Resumable(DataLoader):
    """Goes on where it was."""

    position = skip = 0

    def __iter__(self):
        skip, self.position, self.skip = self.skip, self.skip, 0
        return self.rest(super().__iter__(), skip)  # at once, since it draws a seed for workers

    def rest(self, batches, skip):
        for number, batch in enumerate(batches):
            if number >= skip:
                self.position = number + 1
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.skip = state["position"]


def one_cycle(module: pl.LightningModule) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    steps = module.trainer.estimated_stepping_batches
    # A closure, which no checkpoint holds.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - min(step, steps) / (steps + 1))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class At(OnStep):
    """One rank acts when it has come to its step; others wait for it at theirs, or have been trained to the end."""

    def __init__(self, out: Path, acts: int, steps: dict[str, int], finished: list[int], act: Callable[[], None]):
        super().__init__(self.look)
        self.out, self.acts, self.finished, self.once_all_are_there = out, acts, finished, act
        self.steps = {int(rank): step for rank, step in steps.items()}

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        rank, strategy = trainer.global_rank, trainer.strategy
        if not strategy.is_split or trainer.global_step < self.steps.get(rank, 10**9) or strategy._asked_to_stop:
            return
        (self.out / f"waits_{rank}").touch()
        until = time.monotonic() + 60
        awaited = [self.out / f"waits_{other}" for other in self.steps]
        awaited += [self.out / "tickets" / "finished" / f"ticket_{ticket}" for ticket in self.finished]
        while not all(path.exists() for path in awaited) and time.monotonic() < until:
            time.sleep(0.05)
        if rank == self.acts:
            self.once_all_are_there()
        while not strategy._asked_to_stop and time.monotonic() < until:
            time.sleep(0.05)


def kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def train(out: str, settings: str) -> None:
    """The scenario."""
    folder, given = Path(out), json.loads(settings)
    stop = given.get("stop")
    module = (FromGlobalState if given.get("stateful") else Own)(configure=one_cycle)
    average = EMAWeightAveraging(decay=0.8)
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_last=True, save_top_k=-1
    )
    callbacks = [
        average,
        TimestepAwarePruner(REGIONS, round_to=4, overlap=50, dirpath=folder / "tickets"),
        EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=1, window=2, threshold=1.0),
        checkpoints,
    ]
    if stop is not None:
        act = kill_all if stop["kills"] else lambda: os.kill(os.getpid(), signal.SIGTERM)
        callbacks.append(At(folder, stop["acts"], stop["steps"], stop.get("finished", []), act))
    trainer = quiet_trainer(
        *callbacks,
        strategy=MultiTicketStrategy(assignment=given.get("assignment")),
        devices=given["ranks"],
        limit_val_batches=1,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_checkpointing=True,
        logger=CSVLogger(folder, name="", version=given["name"]),
        **given["limits"],
    )
    images = torch.zeros(given["samples"], *ConvNet.sample_shape)
    loader = DataLoader(TensorDataset(images), batch_size=4)
    if given.get("stateful"):
        images = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        loader = Resumable(TensorDataset(images), batch_size=4, shuffle=True)
    trainer.fit(module, loader, DataLoader(TensorDataset(images), batch_size=4), ckpt_path=given.get("from"))
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = {
        "weights": module.state_dict(),
        "averaged": average._average_model.module.state_dict(),
        "optimizer": {
            names[parameter]: state for parameter, state in trainer.optimizers[0].state.items() if parameter in names
        },
        "sampler": TicketEnsembleSampler.from_trainer(trainer).state_dict(),
        "steps": trainer.global_step,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "own": list(trainer.strategy.plan.assignment.hosted(trainer.global_rank)),
    }
    torch.save(state, folder / f"{given['name']}_{trainer.global_rank}.pt")


def launch(folder: Path, name: str, **settings: Any) -> None:
    """Run the scenario; one that is to stop must."""
    process = start_script(__file__, folder, json.dumps({"name": name, **settings}))
    try:
        _, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        end(process)
        _, err = process.communicate()
        raise AssertionError(f"{name} took too long:\n{tail(err)}") from None
    for trace in folder.glob("waits_*"):
        trace.unlink()
    stop = settings.get("stop")
    expected = 0 if stop is None else -signal.SIGKILL if stop["kills"] else 128 + signal.SIGTERM
    assert process.returncode == expected, tail(err)


def states(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank held at the end."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{name}_*.pt"))]


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    return {key: each for part, inner in value.items() for key, each in tensors(inner, f"{name}/{part}").items()}


def assert_same(whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    """Every rank ends with what the uninterrupted fit ended with; optimizers are those of each rank's own tickets."""
    for part in ("weights", "averaged", "sampler"):
        expected = tensors(whole[0][part])
        assert len(expected) > 20
        for state in resumed:
            found = tensors(state[part])
            assert found.keys() == expected.keys()
            assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
    expected, found = (
        {name: value for state in fit for name, value in tensors(state["optimizer"]).items()}
        for fit in (whole, resumed)
    )
    assert found.keys() == expected.keys() and len(found) > 60
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def logged(folder: Path, name: str) -> dict[tuple[str, int], float]:
    """(name, step) -> losses of tickets."""
    head, *rows = [line.split(",") for line in (folder / name / "metrics.csv").read_text().splitlines()]
    found = {}
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        for column, value in cells.items():
            if column.startswith("ticket_") and column.endswith(("train_loss", "val_loss")) and value:
                found[column, int(cells["step"])] = float(value)
    return found


# --- limited by steps: killed on two ranks, and again on three

STEPS = {"samples": 40, "limits": {"max_steps": 20}}


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory) -> Path:
    """When all are killed, ticket 0 is at step 8, the others at 12; then ticket 0 has finished, ticket 2 is at 16."""
    folder = tmp_path_factory.mktemp("steps")
    launch(folder / "whole", "whole", ranks=1, **STEPS)
    killed = folder / "killed"
    stop = {"kills": True, "acts": 0, "steps": {"0": 9, "1": 13}}
    launch(killed, "first", ranks=2, assignment=[[0], [1], [1]], stop=stop, **STEPS)
    lost = shutil.copytree(killed, folder / "lost")
    shutil.rmtree(lost / "checkpoints" / "tickets_1_2")
    launch(lost, "last", ranks=1, **STEPS, **{"from": str(lost / "checkpoints")})
    stop = {"kills": True, "acts": 2, "steps": {"2": 17}, "finished": [0, 1]}
    launch(killed, "second", ranks=3, stop=stop, **STEPS, **{"from": "last"})
    # The folder of tickets 1 and 2 together is older than that of each.
    file = killed / "checkpoints" / "ticket_0" / "last.ckpt"
    launch(killed, "third", ranks=3, **STEPS, **{"from": str(file)})
    return folder


@pytest.mark.slow
def test_tickets_go_on_from_where_each_was_on_whatever_ranks_there_are(by_steps):
    whole = states(by_steps / "whole", "whole")
    resumed = states(by_steps / "killed", "third")
    assert [state["own"] for state in resumed] == [[0], [1], [2]]
    assert_same(whole, resumed)
    assert resumed[0]["steps"] == resumed[2]["steps"] == 20
    assert resumed[0]["rate"] == resumed[2]["rate"] == whole[0]["rate"]


@pytest.mark.slow
def test_each_step_of_a_ticket_is_taken_again_only_after_its_last_checkpoint(by_steps):
    whole = logged(by_steps / "whole", "whole")
    second, third = (logged(by_steps / "killed", name) for name in ("second", "third"))
    # What was on its way to the logger is lost with the processes.
    assert {step for name, step in second if name == "ticket_0/train_loss"} <= set(range(8, 20))
    assert {step for name, step in second if name == "ticket_2/train_loss"} <= set(range(12, 17))
    assert {step for name, step in third if name.endswith("train_loss")} == set(range(16, 20))
    assert second and third
    for part in (second, third):
        assert part == {key: whole[key] for key in part}
    assert not (by_steps / "killed" / "tickets" / "finished").exists()


@pytest.mark.slow
def test_a_group_that_was_lost_before_it_saved_begins_anew_at_the_switch_and_the_others_wait(by_steps):
    whole, resumed = states(by_steps / "whole", "whole"), states(by_steps / "lost", "last")
    assert_same(whole, resumed)
    assert resumed[0]["rate"] == whole[0]["rate"] and resumed[0]["steps"] == 20
    losses, expected = logged(by_steps / "lost", "last"), logged(by_steps / "whole", "whole")
    assert losses == {key: expected[key] for key in losses}
    assert {step for name, step in losses if name == "ticket_0/train_loss"} == set(range(8, 20))
    assert {step for name, step in losses if name == "ticket_2/train_loss"} == set(range(2, 20))
    # The epoch's end before which ticket 0 waited is not evaluated again with what it has become since.
    assert {step for name, step in losses if name == "ticket_0/val_loss"} == {9, 19}


# --- limited by epochs: asked to stop

EPOCHS = {
    "samples": 72,
    "stateful": True,
    "ranks": 3,
    "assignment": [[0, 1], [2], [2]],
    "limits": {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
}


@pytest.fixture(scope="module")
def by_epochs(tmp_path_factory) -> Path:
    """All are asked to stop in the middle of the epoch in which the world was split."""
    folder = tmp_path_factory.mktemp("epochs")
    launch(folder / "whole", "whole", **EPOCHS)
    stop = {"kills": False, "acts": 0, "steps": {"0": 4, "1": 4, "2": 8}}
    launch(folder / "stopped", "first", stop=stop, **EPOCHS)
    launch(folder / "stopped", "second", **EPOCHS, **{"from": str(folder / "stopped" / "tickets" / "interrupted")})
    return folder


@pytest.mark.slow
def test_schedules_and_data_go_on_in_the_middle_of_an_epoch(by_epochs):
    whole, resumed = states(by_epochs / "whole", "whole"), states(by_epochs / "stopped", "second")
    assert_same(whole, resumed)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert all(ours[part] == theirs[part] for part in ("steps", "rate", "scheduler", "own"))
    losses, expected = logged(by_epochs / "stopped", "second"), logged(by_epochs / "whole", "whole")
    assert losses == {key: expected[key] for key in losses}
    assert {step for name, step in expected if name == "ticket_1/train_loss"} == set(range(2, 11))  # its own limit
    assert {step for name, step in losses if name == "ticket_1/train_loss"} == set(range(8, 11))
    assert {step for name, step in losses if name == "ticket_0/train_loss"} == set(range(4, 15))
    assert {step for name, step in losses if name == "ticket_2/train_loss"} == set(range(8, 27))


if __name__ == "__main__":
    train(*sys.argv[1:])
