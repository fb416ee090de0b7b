"""A fit that goes on from a checkpoint ends where it would have ended without the interruption, to the last bit."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from modules import REGIONS, ConvNet, Lit, loader, quiet_trainer
from resuming import Natural, Saving, differences, lines, logged, of_two_lengths, stream, train
from torchmetrics import CatMetric

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.resume import CONTINUATION_KEY
from lightning_earlybird.resume.continuation import have_agreed
from lightning_earlybird.tickets import load_ensemble

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")

# What a checkpoint can be written at: before the switch (step 12), at it, after it; a batch's end, in an epoch's middle
# or at its end; a validation's end; an epoch's end.
MOMENTS = "batch-3 batch-6 validation-6 epoch-6 batch-12 validation-12 epoch-12 batch-15 batch-18 validation-24"
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "averages before, one cycle": (MOMENTS, {}),
    "averages after, validation within epochs": (
        "batch-3 validation-6 batch-16",
        {"ema": "after", "val_check_interval": 3},
    ),
    "accumulation": (
        "batch-8 batch-9 batch-18 epoch-18",
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
    ),
    "accumulation of more batches than one": (
        "batch-13 epoch-12",
        {"accumulate_grad_batches": 4, "validation": False},
    ),
    "bf16, gradients, cosine": (
        "batch-3 epoch-6 batch-13",
        {
            "ema": None,
            "precision": "bf16-mixed",
            "schedule": "cosine",
            "detector": {"criterion": "taylor", "every_n_train_steps": 4},
        },
    ),
    "plateau": ("batch-6 validation-6 epoch-6 epoch-18", {"schedule": "plateau"}),
    "own generator of the data, no validation": ("batch-5 batch-6 epoch-12", {"generator": 3, "validation": False}),
    "part of the data in each epoch": ("batch-2 batch-3 epoch-3 validation-6", {"limit_train_batches": 3}),
    "data without a length": ("batch-3 batch-6 epoch-6 batch-14", {"loaders": lines, "max_steps": 24, "ema": None}),
    "a stream of data": (
        "batch-3 epoch-6 batch-18",
        {"loaders": stream, "max_steps": 24, "ema": None, "limit_train_batches": 6},
    ),
    "two loaders": ("batch-5 batch-6 epoch-6 validation-12", {"loaders": of_two_lengths, "ema": None}),
    "steps instead of epochs": ("batch-3 batch-6 validation-6 epoch-6 epoch-12", {"max_epochs": -1, "max_steps": 22}),
    "plain loader, steps, no validation": (
        "batch-6 epoch-6 epoch-12",
        {"max_steps": 22, "stateful": False, "validation": False},
    ),
    "plain loader at the end of an epoch": ("epoch-6 validation-12 batch-18", {"stateful": False}),
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_resumed_fit_ends_like_a_whole_one(configuration: str, tmp_path: Path) -> None:
    names, settings = CONFIGURATIONS[configuration]
    moments = names.split()
    settings = {"schedule": "cosine" if "max_steps" in settings else "onecycle"} | settings
    _, whole = train(tmp_path / "whole", moments, **settings)
    rows = logged(tmp_path / "whole")
    for moment in moments:
        path = tmp_path / "whole" / f"{moment}.ckpt"
        step = torch.load(path, weights_only=True)["global_step"]
        _, resumed = train(tmp_path / moment, ckpt_path=path, **settings)
        assert differences(resumed, whole) == [], moment
        own = logged(tmp_path / moment)
        assert own <= rows, (moment, own - rows)
        # Step `n` of a logger is the one that makes `n + 1`; validations of a step bear its number, too.
        missing = {row for row in rows - own if row[0] > step or (row[0] == step and row[1] == "train_loss_step")}
        assert not missing, moment
        if moment.startswith("epoch"):
            assert {(step - 1, name) for name in ("train_loss_epoch", "mean", "drawn")} <= {row[:2] for row in own}


def test_what_the_comparison_would_notice(tmp_path: Path) -> None:
    """Without the random states a fit ends elsewhere."""
    _, whole = train(tmp_path / "whole", ["epoch-18"])
    path = tmp_path / "whole" / "epoch-18.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[CONTINUATION_KEY]
    torch.save(checkpoint, path)
    _, resumed = train(tmp_path / "resumed", ckpt_path=path)
    different = differences(resumed, whole)
    assert "random" in different and any(name.startswith("weights.") for name in different)


def test_a_fit_that_was_killed_before_it_wrote_its_ensemble_writes_it_when_resumed(tmp_path: Path) -> None:
    train(tmp_path / "whole", ["epoch-24"])
    trainer, _ = train(tmp_path / "again", ckpt_path=tmp_path / "whole" / "epoch-24.ckpt")
    assert trainer.global_step == 24
    ours, theirs = (load_ensemble(tmp_path / name / "tickets" / "ensemble", ConvNet) for name in ("again", "whole"))
    assert differences(ours.state_dict(), theirs.state_dict()) == []


def test_a_finished_fit_goes_on_with_the_next_epoch_where_steps_limit_it(tmp_path: Path) -> None:
    def fit(steps: int, ckpt_path: Path | None = None) -> pl.Trainer:
        trainer, _ = train(
            tmp_path / str(steps), ckpt_path=ckpt_path, schedule="plateau", max_epochs=-1, max_steps=steps
        )
        return trainer

    fit(18).save_checkpoint(tmp_path / "finished.ckpt")
    again = fit(24, tmp_path / "finished.ckpt")
    assert (again.global_step, again.current_epoch) == (24, 4)


def test_a_search_that_had_stopped_the_fit_stops_it_again(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> pl.Trainer:
        detector = EarlyBirdDetector([0.5], window=2, threshold=1.0, on_emergence="stop", round_to=4)
        trainer = quiet_trainer(detector, Saving(tmp_path, ["epoch-8"]), max_epochs=9, enable_checkpointing=True)
        module = Lit()
        trainer.fit(module, loader(module), loader(module, 1), ckpt_path=ckpt_path)
        return trainer

    assert fit().global_step == 8
    assert fit(tmp_path / "epoch-8.ckpt").global_step == 8


def test_checkpoints_of_the_last_and_of_the_best_step_resume_alike(tmp_path: Path) -> None:
    def run(ckpt_path: str | None, last_epoch: int) -> tuple[pl.Trainer, ModelCheckpoint, Natural]:
        best = ModelCheckpoint(tmp_path, filename="best-{step}", monitor="val_loss", save_last=True, save_top_k=1)
        module = Natural()
        pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "tickets")
        detector = EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0)
        callbacks = [detector, pruner, best]
        trainer = pl.Trainer(
            callbacks=callbacks, max_epochs=last_epoch, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        torch.manual_seed(7)
        samples = torch.utils.data.TensorDataset(torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
        data = torch.utils.data.DataLoader(samples, batch_size=8, shuffle=True)
        trainer.fit(module, data, torch.utils.data.DataLoader(samples, batch_size=24), ckpt_path=ckpt_path)
        return trainer, best, module

    _, whole, module = run(None, 4)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    scores = whole.best_model_score, whole.best_model_path
    for path in (str(tmp_path / "last.ckpt"), whole.best_model_path):
        start = torch.load(path, weights_only=True)["epoch"]
        assert start < 4
        _, again, module = run(path, 4)
        assert differences(module.state_dict(), weights) == []
        assert (again.best_model_score, again.best_model_path) == scores


def test_a_checkpoint_of_another_version_of_the_continuation_is_read_without_it(tmp_path: Path) -> None:
    train(tmp_path / "whole", ["epoch-6"], stateful=False)
    path = tmp_path / "whole" / "epoch-6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CONTINUATION_KEY]["format_version"] = 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="random states have format version 2, and this lightning-earlybird reads 1"):
        trainer, _ = train(tmp_path / "again", ckpt_path=path, stateful=False)
    assert trainer.global_step == 24


def test_what_no_longer_fits_is_left_out_and_said(tmp_path: Path) -> None:
    train(tmp_path / "whole", ["batch-8"])
    path = tmp_path / "whole" / "batch-8.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (own,) = checkpoint[CONTINUATION_KEY]["ranks"]
    own["random"]["torch"] = own["random"]["torch"][:100]
    own["means"]["metrics"]["renamed"] = own["means"]["metrics"].pop("mean")
    checkpoint[CONTINUATION_KEY]["gradients"] = {"model.gone": torch.zeros(1)}
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = train(tmp_path / "again", ckpt_path=path)
    said = "".join(str(warning.message) for warning in caught)
    for what in ("random states", "metric objects", "pending gradients"):
        assert f"ckpt_path: the {what} of the checkpoint cannot be restored (" in said
    assert trainer.global_step == 24


def test_ranks_wait_for_each_other_only_where_they_have_agreed_to_stop() -> None:
    def _broadcast_sigterm_tensor() -> None:  # where Lightning's loop raises for all ranks at once
        raise SIGTERMException

    def on_advance_end() -> None:
        raise SIGTERMException

    for leave, agreed in ((_broadcast_sigterm_tensor, True), (on_advance_end, False)):
        with pytest.raises(SIGTERMException) as caught:
            leave()
        assert have_agreed(caught.value) == agreed
    assert "_broadcast_sigterm_tensor" in vars(type(pl.Trainer(logger=False).fit_loop.epoch_loop))


def test_a_metric_of_many_megabytes_is_left_out_of_checkpoints_and_that_is_said(tmp_path: Path) -> None:
    class Gathering(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.all = CatMetric()

        def training_step(self, batch, batch_idx):
            self.all.update(torch.zeros(5_000_000))
            return super().training_step(batch, batch_idx)

    module = Gathering()
    trainer = quiet_trainer(EarlyBirdDetector([0.5]), max_epochs=1)
    trainer.fit(module, loader(module, 1), loader(module))
    with pytest.warns(UserWarning, match="The metric 'all' holds more than 16 MiB, and checkpoints leave out"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").stat().st_size < 1 << 20


def test_nothing_is_left_behind_in_the_loops(tmp_path: Path) -> None:
    train(tmp_path / "whole", ["batch-15", "epoch-6"])
    for moment in ("batch-15", "epoch-6"):
        trainer, _ = train(tmp_path / moment, ckpt_path=tmp_path / "whole" / f"{moment}.ckpt")
        loop = trainer.fit_loop
        assert "on_advance_start" not in vars(loop) and "on_run_start" not in vars(loop.epoch_loop)
        assert "update_metrics" not in vars(loop.epoch_loop._results)
