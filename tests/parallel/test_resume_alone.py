"""A world of one rank, which hosts all tickets, goes on from its checkpoints."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from modules import ConvNet, OnStep, quiet_trainer
from test_resume import Own
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TimestepAwarePruner
from lightning_earlybird.parallel.fit_record import FitRecord
from lightning_earlybird.transition import averaged_modules

REGIONS = [(0, 300, 0.25, 5), (300, 1000, 0.5)]

# What Lightning says of directories that are there, and of loaders that cannot resume, which these modules do not mind.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


@contextmanager
def world_of_one() -> Iterator[None]:
    """One rank in this process, of which nothing is left afterwards."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with world_of_one():
        yield


def data(batches: int) -> DataLoader:
    """Zeros, of which the order does not matter: the loader cannot resume within an epoch."""
    return DataLoader(TensorDataset(torch.zeros(8 * batches, *ConvNet.sample_shape)), batch_size=8)


def cosine(module: pl.LightningModule) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Six steps an epoch, the world split before the fourth; a checkpoint every other step."""
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = trainer_of(folder, *callbacks, **settings)
    trainer.fit(Own(configure=cosine), data(6), data(1), ckpt_path=ckpt_path)
    return trainer


def trainer_of(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    return quiet_trainer(
        EMAWeightAveraging(decay=0.8),
        EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3, threshold=1.0),
        TimestepAwarePruner(REGIONS, round_to=4, overlap=50, dirpath=folder / "tickets"),
        ModelCheckpoint(
            folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True
        ),
        *callbacks,
        **(
            {"strategy": "multi_ticket", "enable_checkpointing": True, "limit_val_batches": 1, "max_steps": 14}
            | settings
        ),
    )


class Outcome:
    """What a fit ends with."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.held = held(trainer)
        self.losses = trainer.lightning_module.losses
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps = trainer.global_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Outcome]:
    """A fit that is not interrupted, and its directory."""
    folder = tmp_path_factory.mktemp("whole")
    with world_of_one():
        return folder, Outcome(fit(folder))


def held(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    module = trainer.lightning_module
    found = dict(module.state_dict())
    for average in averaged_modules(trainer):
        found |= {f"averaged.{name}": value for name, value in average.state_dict().items()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, state in trainer.optimizers[0].state.items():
        found |= {f"{names[parameter]}.{key}": value for key, value in state.items()}
    return found


def assert_same(trainer: pl.Trainer, expected: Outcome) -> None:
    outcome = Outcome(trainer)
    assert outcome.held.keys() == expected.held.keys() and len(outcome.held) > 80
    assert [name for name, value in outcome.held.items() if not torch.equal(value, expected.held[name])] == []
    assert (outcome.rate, outcome.steps) == (expected.rate, expected.steps)


class Stopping(pl.Callback):
    """Asks to stop at a step, as EarlyStopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class Terminated(OnStep):
    """A scheduler asks to stop at a step."""

    def __init__(self, step: int) -> None:
        def ask(trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        super().__init__(ask)


@pytest.mark.parametrize(
    "name", ["checkpoints/tickets_0_1/step=6.ckpt", "tickets/switch.ckpt", "checkpoints/step=2.ckpt"]
)
def test_a_fit_goes_on_from_any_of_its_checkpoints_as_if_it_had_not_been_interrupted(name, whole, tmp_path):
    folder, outcome = whole
    names = sorted(path.name for path in (folder / "checkpoints" / "tickets_0_1").iterdir())
    assert names == ["last.ckpt", *sorted(f"step={step}.ckpt" for step in range(4, 15, 2))]
    assert_same(fit(tmp_path, ckpt_path=folder / name), outcome)


def test_all_checkpoints_of_a_fit_bear_its_identifier_and_load_without_unpickling(whole, tmp_path):
    folder, _ = whole
    fit(tmp_path / "second", ckpt_path=folder / "checkpoints" / "tickets_0_1" / "step=8.ckpt")
    fit(tmp_path / "other", max_steps=6)
    found = []
    for root in (folder, tmp_path / "second", tmp_path / "other"):
        records = [FitRecord.read(torch.load(path, weights_only=True)) for path in root.rglob("*.ckpt")]
        ((identifier, session),) = {(record.fit, record.session) for record in records}
        found.append((identifier, session))
    first, second, other = found
    assert second == (first[0], 1) and first[1] == other[1] == 0 and other[0] != first[0]


def test_tickets_that_something_had_stopped_stay_as_they_are(tmp_path):
    stopped = Outcome(fit(tmp_path, Stopping(10)))
    resumed = fit(tmp_path, ckpt_path="last")
    assert stopped.steps == 10 and resumed.lightning_module.losses == []
    assert_same(resumed, stopped)


def test_a_raised_limit_lets_tickets_go_on_that_had_come_to_it(whole, tmp_path):
    fit(tmp_path, max_steps=10)
    resumed = fit(tmp_path, ckpt_path="last")
    assert len(resumed.lightning_module.losses) == 4
    assert_same(resumed, whole[1])


def test_a_fit_that_had_ended_is_not_trained_again(whole, tmp_path):
    folder, outcome = whole
    ended = fit(tmp_path, ckpt_path=folder / "checkpoints")
    assert ended.lightning_module.losses == []
    assert_same(ended, outcome)


@pytest.mark.parametrize("step", [7, 12])  # in the middle and at the end of an epoch
def test_a_fit_that_was_asked_to_stop_goes_on_with_the_next_batch(step, whole, tmp_path):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Terminated(step))
    checkpoint = torch.load(tmp_path / "tickets" / "interrupted" / "tickets_0_1.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    resumed = fit(tmp_path, ckpt_path="last")  # which is older, and gives way
    losses = resumed.lightning_module.losses
    assert losses == whole[1].losses[-len(losses) :] and len(losses) == 14 - step + max(0, 8 - step)
    assert_same(resumed, whole[1])


class TerminatedInValidation(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen.append((trainer.global_step, batch_idx))
        if self.seen[-1] == (6, 1) and len(self.seen) > 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_validation_that_was_broken_off_is_done_again(whole, tmp_path):
    def trained(ckpt_path: Any = None) -> pl.Trainer:
        module = Own(configure=cosine)
        trainer = trainer_of(tmp_path, watch, limit_val_batches=3)
        trainer.fit(module, data(6), data(3), ckpt_path=ckpt_path)
        return trainer

    watch = TerminatedInValidation()
    with pytest.raises(SIGTERMException):
        trained()
    assert watch.seen[-2:] == [(6, 0), (6, 1)]  # and not the third
    watch = TerminatedInValidation()
    assert_same(trained(tmp_path / "tickets" / "interrupted"), whole[1])
    assert watch.seen == [(step, number) for step in (6, 12) for number in range(3)]


def test_averages_that_break_off_in_a_validation_are_saved_as_averages(tmp_path):
    class Terminating(Own):
        def validation_step(self, batch, batch_idx):
            if self.global_step > 3:
                os.kill(os.getpid(), signal.SIGTERM)

    module = Terminating(configure=cosine)
    average = EMAWeightAveraging(decay=0.8)
    trainer = quiet_trainer(
        average,
        EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3, threshold=1.0),
        TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path),
        strategy="multi_ticket",
        limit_val_batches=2,
        max_steps=14,
    )
    with pytest.raises(SIGTERMException):
        trainer.fit(module, data(6), data(2))
    checkpoint = torch.load(tmp_path / "interrupted" / "tickets_0_1.ckpt", weights_only=True)
    for name, value in average._average_model.module.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])
    for name, value in module.state_dict().items():
        assert torch.equal(value, checkpoint["current_model_state"][name])
    assert "_swap_models" not in vars(average)


def test_a_full_disk_at_the_split_does_not_end_the_fit(monkeypatch, tmp_path):
    save = MultiTicketStrategy.save_checkpoint

    def full(self: MultiTicketStrategy, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        if Path(filepath).name == "switch.ckpt":
            raise OSError(28, "No space left on device")
        save(self, checkpoint, filepath, storage_options)

    monkeypatch.setattr(MultiTicketStrategy, "save_checkpoint", full)
    with pytest.warns(UserWarning, match=r"switch.ckpt' could not be written \(.*No space left.*Training goes on"):
        trainer = fit(tmp_path, max_steps=5)
    assert trainer.global_step == 5 and not (tmp_path / "tickets" / "switch.ckpt").exists()


@pytest.mark.filterwarnings("ignore:regions. max_steps has no effect with strategy=SingleDeviceStrategy")
def test_another_strategy_says_what_it_cannot_put_together(whole, tmp_path):
    message = (
        "holds the checkpoints of tickets that were trained apart, .*SingleDeviceStrategy.*strategy='multi_ticket'"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, strategy="auto", ckpt_path=whole[0] / "checkpoints")


def test_the_assignment_must_fit_the_tickets_of_the_checkpoint(whole, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"MultiTicketStrategy: assignment=\[0, 0, 0\] has ticket 2"):
        fit(tmp_path, strategy=MultiTicketStrategy([0, 0, 0]), ckpt_path=whole[0] / "checkpoints")
