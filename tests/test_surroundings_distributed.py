"""Faults that only one of two processes sees."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from modules import REGIONS, Lit, loader, quiet_trainer
from torch import Tensor

import lightning_earlybird
from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class SpoiledOnOneRank(Lit):
    """The second rank's loss is NaN at two steps; what is bad after the ranks have averaged is left out."""

    def loss(self, samples: Tensor) -> Tensor:
        loss = super().loss(samples)
        return loss * torch.nan if RANK == 1 and self.global_step in (2, 4) else loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            for gradient in gradients:
                gradient.zero_()


class Broken(Logger):
    name, version, save_dir = "broken", 0, None

    def log_metrics(self, metrics, step=None):
        raise ConnectionError("the service is gone")

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Outcome(pl.Callback):
    def __init__(self, detector: EarlyBirdDetector, pruner: TimestepAwarePruner, out: Path) -> None:
        self.detector, self.pruner, self.out = detector, pruner, out

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5 and trainer.is_global_zero:
            (self.out / "tickets" / "switch").write_text("in the way")

    def on_fit_end(self, trainer, pl_module):
        steps = [check.step for check in next(iter(self.detector.distances.values()))]
        numbers = torch.tensor([*steps, self.pruner.switched_at], dtype=torch.float32)
        weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        everywhere = [trainer.strategy.all_gather(each) for each in (numbers, weights)]
        if trainer.is_global_zero:
            torch.save(everywhere, self.out / "outcome.pt")


def run_two_processes(out: Path) -> None:
    torch.manual_seed(100 + RANK)
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=2, window=3, threshold=1.0, criterion="taylor")
    pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=out / "tickets")
    callbacks = [Outcome(detector, pruner, out), detector, pruner]
    trainer = quiet_trainer(*callbacks, strategy="ddp", devices=2, max_epochs=3, logger=Broken())
    module = SpoiledOnOneRank()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(module, 8))
    (out / f"warnings_{RANK}.txt").write_text("\n".join(str(warning.message) for warning in caught))


@pytest.mark.slow
def test_what_one_of_two_processes_suffers_holds_up_neither(tmp_path: Path) -> None:
    (tmp_path / "tickets").mkdir()
    package = Path(lightning_earlybird.__file__).parents[1]
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers, weights = torch.load(tmp_path / "outcome.pt", weights_only=True)
    # Both ranks do without the checks of the steps 2 and 4, and switch with the third that they could make.
    assert numbers.tolist() == [[6, 8, 10, 10]] * 2
    assert torch.equal(*weights) and bool(weights.isfinite().all())
    told = (tmp_path / "warnings_0.txt").read_text()
    for text in (
        "there are no masks of step 2",
        "there are no masks of step 4",
        "Broken failed to log",
        "tickets at the switch could not be written",
    ):
        assert told.count(text) == 1, text
    assert (tmp_path / "tickets" / "ensemble" / "ensemble.json").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
