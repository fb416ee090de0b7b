"""What a check costs by each criterion, in training steps and as a share of an epoch.

On the CIFAR-10 U-Net of the EB-Diff-Train experiments (35.7M parameters) with its three regions, in a real fit on
random images, one thread. A check scores the channels and draws three masks; by gradients it runs `--score-batches`
batches of the size that is trained with. An epoch is 390 steps of batch 128; steps and scoring batches both cost in
proportion to the batch, so that their ratio is measured with a small one. Checks and steps alternate in one process.

    python benchmarks/scoring.py
"""

import argparse
import statistics
import time
import warnings
from typing import Any, get_args

import lightning as L
import torch
from structure import cifar10_unet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.importance import NamedCriterion

REGIONS = [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)]
STEPS_A_EPOCH, LIMIT_PERCENT = 390, 2


class Denoising(L.LightningModule):
    """The plain loss: noise is predicted from images that are mixed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = cifar10_unet()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        noise, steps = torch.randn_like(images), torch.randint(1000, (len(images),))
        share = (steps / 1000).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model((1 - share) * images + share * noise, steps).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-4)


class Stopwatch(L.Callback):
    """Times steps, from the start of the batch to its optimizer step; stands before the detector, which checks then."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)


class TimedDetector(EarlyBirdDetector):
    """Times its own checks."""

    seconds: list[float]

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = time.perf_counter()
        super().check(trainer, pl_module)
        self.__dict__.setdefault("seconds", []).append(time.perf_counter() - start)


def measure(criterion: NamedCriterion, *, batch_size: int, score_batches: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a step and of a check, after one of each that does not count."""
    torch.manual_seed(0)
    watch = Stopwatch()
    detector = TimedDetector(
        [0.3, 0.6, 0.8], every_n_train_steps=1, criterion=criterion, score_batches=score_batches, threshold=0.0
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=rounds + 1, callbacks=[watch, detector, TimestepAwarePruner(REGIONS)], **quiet)
    images = TensorDataset(torch.randn(batch_size * max(rounds + 1, score_batches), 3, 32, 32))
    trainer.fit(Denoising(), DataLoader(images, batch_size))
    return statistics.median(watch.steps[1:]), statistics.median(detector.seconds[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--score-batches", type=int, default=4, help="the detector's default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'criterion':14}{'step':>9}{'check':>9}{'in steps':>10}{'of an epoch':>13}")
    for criterion in get_args(NamedCriterion):
        step, check = measure(
            criterion, batch_size=options.batch_size, score_batches=options.score_batches, rounds=options.rounds
        )
        share = 100 * check / (STEPS_A_EPOCH * step)
        if criterion in ("magnitude", "random"):  # which do not depend on the batch, while a step does
            share *= options.batch_size / 128
        verdict = "ok" if share < LIMIT_PERCENT else "MISSED"
        print(f"{criterion:14}{step:8.2f}s{check:8.2f}s{check / step:10.2f}{share:12.4f}%  {verdict}")


if __name__ == "__main__":
    main()
