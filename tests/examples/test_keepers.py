"""Callbacks of the examples: what outlives the switch, and a restart."""

from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from modules import Tutorial, fit
from shared.keepers import DenseKeeper, LogKeeper

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner


def test_metrics_of_a_resumed_run_hold_every_step_once(tmp_path: Path) -> None:
    def log(keeper: Any, step: int, **metrics: float) -> None:
        keeper.logger.log_metrics(metrics, step)
        keeper.logger.save()

    keeper = LogKeeper(CSVLogger(tmp_path, name="", version=""), "run")
    assert keeper.state_dict() == {"rows": [], "wandb_id": "run"}
    log(keeper, 9, train_loss=0.5)
    log(keeper, 19, train_loss=0.25, step_time=1e-3)
    state = keeper.state_dict()
    log(keeper, 29, train_loss=0.125)  # lost with the process, and logged again
    before = (tmp_path / "metrics.csv").read_text().splitlines()

    with pytest.warns(UserWarning, match="Previous log files in this directory will be deleted"):
        resumed = LogKeeper(CSVLogger(tmp_path, name="", version=""), "other")
        resumed.load_state_dict(state)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before[:3]
    log(resumed, 29, train_loss=0.125)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before


def test_the_dense_denoiser_follows_a_run_that_goes_on_in_another_folder(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, checkpoint: Path | None = None) -> None:
        detector = EarlyBirdDetector([0.5], every_n_train_steps=2, window=2, threshold=1.0)
        pruner = TimestepAwarePruner([(0, 1000, 0.5)], round_to=4, dirpath=folder)
        average = EMAWeightAveraging(decay=0.9)
        keeper = DenseKeeper(average, pruner, folder / "dense", checkpoint)
        trainer = fit(Tutorial(), average, keeper, detector, pruner, max_steps=steps, ckpt_path=checkpoint)
        assert trainer.global_step == steps and pruner.phase == "tickets"
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")

    run(tmp_path / "run", 8)
    weights = (tmp_path / "run" / "dense" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name, steps in (("same step", 8), ("further", 12)):
        run(tmp_path / name, steps, tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert (tmp_path / name / "dense" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    dense = UNet2DModel.from_pretrained(tmp_path / "further" / "dense")
    assert [value.shape for value in dense.parameters()] == [value.shape for value in Tutorial().model.parameters()]
