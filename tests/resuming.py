"""Fits that are interrupted at every moment at which a checkpoint can be written, compared with whole ones."""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from modules import REGIONS, TIMESTEPS, ConvNet, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchmetrics import MeanMetric

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.transition import averaged_modules

SCHEDULES = {
    "onecycle": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps),
    "cosine": lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "plateau": lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0),
}


class Natural(pl.LightningModule):
    """As users write them: noise, timesteps and dropout come from the global generators."""

    def __init__(self, schedule: str = "onecycle") -> None:
        super().__init__()
        self.schedule = schedule
        torch.manual_seed(0)
        self.model = ConvNet(16, dropout=0.1)
        self.mean, self.summed, self.val_mean, self.val_summed = (MeanMetric() for _ in range(4))

    def loss(self, samples: Tensor) -> Tensor:
        noise = torch.randn_like(samples) * (1 + 0.1 * np.random.rand())
        steps = torch.randint(TIMESTEPS, (len(samples),))
        share = (steps / TIMESTEPS).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model(samples * (1 - share) + noise * share, steps), noise)

    def on_fit_start(self):
        torch.manual_seed(7 + self.global_rank)

    def training_step(self, batch, batch_idx):
        # Of several loaders each gives a batch of its own.
        loss = self.loss(batch[0] if isinstance(batch[0], Tensor) else torch.cat([part[0] for part in batch]))
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.mean.update(loss.detach())
        self.summed.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        self.log("val_loss", loss, sync_dist=True)
        self.val_mean.update(loss)
        self.log("val_mean", self.val_mean)
        self.val_summed.update(loss)

    def on_validation_epoch_end(self):
        self.log("val_summed", self.val_summed.compute(), sync_dist=True)
        self.val_summed.reset()

    def on_train_epoch_end(self):
        self.log("drawn", torch.rand(()), sync_dist=True)
        self.log("summed", self.summed.compute(), sync_dist=True)
        self.summed.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = SCHEDULES[self.schedule](optimizer, int(self.trainer.estimated_stepping_batches))
        interval = "step" if self.schedule == "onecycle" else "epoch"
        return [optimizer], [{"scheduler": schedule, "interval": interval, "monitor": "val_loss"}]


class Data(pl.LightningDataModule):
    """Loads what it is given; in several processes by a sampler that goes on in an epoch's middle, too."""

    def __init__(self, kind: type[DataLoader], samples: TensorDataset, held_out: TensorDataset, order: Any) -> None:
        super().__init__()
        self.kind, self.samples, self.held_out, self.order = kind, samples, held_out, order

    def train_dataloader(self):
        if self.kind is DataLoader or self.trainer.world_size == 1:
            return self.kind(self.samples, batch_size=8, shuffle=True, generator=self.order)
        place = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return self.kind(self.samples, batch_size=8, sampler=StatefulDistributedSampler(self.samples, **place))

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=8)


class Lines(IterableDataset):
    """Has no length; a stream goes on where it was, others give the same again."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([self.samples[index] for index in range(len(self.samples))])


class Stream(Lines):
    def __init__(self, samples: TensorDataset) -> None:
        super().__init__(samples)
        self.place = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            self.place = (self.place + 1) % len(self.samples)
            yield self.samples[self.place]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def lines(samples: TensorDataset) -> StatefulDataLoader:
    return StatefulDataLoader(Lines(samples), batch_size=8)


def stream(samples: TensorDataset) -> StatefulDataLoader:
    return StatefulDataLoader(Stream(samples), batch_size=7)


def of_two_lengths(samples: TensorDataset) -> CombinedLoader:
    """The second loader is in the middle of another round when the first one ends."""
    short = TensorDataset(samples.tensors[0][:32])
    return CombinedLoader(
        [StatefulDataLoader(each, batch_size=8, shuffle=True) for each in (samples, short)], "max_size_cycle"
    )


class Saving(Checkpoint):
    """Saves checkpoints in the hooks in which ``ModelCheckpoint`` does, named ``hook-batches.ckpt``."""

    def __init__(self, directory: Path, wanted: Sequence[str] = ()) -> None:
        self.directory = directory
        self.wanted = wanted

    def save(self, trainer: pl.Trainer, hook: str) -> None:
        name = f"{hook}-{trainer.fit_loop.total_batch_idx + 1}"
        if not trainer.sanity_checking and name in self.wanted:
            trainer.save_checkpoint(self.directory / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "epoch")


def train(
    out: Path,
    wanted: Sequence[str] = (),
    *,
    ckpt_path: Path | None = None,
    ema: str | None = "before",
    schedule: str = "onecycle",
    stateful: bool = True,
    validation: bool = True,
    detector: dict[str, Any] | None = None,
    generator: int | None = None,
    loaders: Callable[[TensorDataset], Any] | None = None,
    **settings: Any,
) -> tuple[pl.Trainer, dict[str, Any]]:
    """Four epochs of six batches; what is left of them in the end."""
    drawn = torch.Generator().manual_seed(1)
    samples, held_out = (TensorDataset(torch.randn(n, 1, 4, 4, generator=drawn)) for n in (48, 16))
    order = None if generator is None else torch.Generator().manual_seed(generator)
    data = Data(StatefulDataLoader if stateful else DataLoader, samples, held_out, order)
    if loaders is not None:
        data.train_dataloader = lambda: loaders(samples)
    found = EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0, **(detector or {}))
    pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=out / "tickets")
    callbacks: list[pl.Callback] = [found, pruner]
    if ema is not None:
        callbacks.insert({"before": 0, "after": 2}[ema], EMAWeightAveraging(decay=0.8))
    settings = {
        "max_epochs": 4,
        "enable_checkpointing": True,
        "limit_val_batches": 2 if validation else 0,
        "log_every_n_steps": 1,
    } | settings
    logger = CSVLogger(out, name="", version="log")
    trainer = quiet_trainer(*callbacks, Saving(out, wanted), logger=logger, default_root_dir=out, **settings)
    module = Natural(schedule)
    torch.manual_seed(7)
    np.random.seed(7)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, state_of(trainer, module, found, pruner)


def state_of(trainer: pl.Trainer, module: Natural, found: EarlyBirdDetector, pruner: TimestepAwarePruner):
    state: dict[str, Any] = {f"weights.{name}": value for name, value in module.state_dict().items()}
    for average in averaged_modules(trainer):
        state |= {f"average.{name}": value for name, value in average.state_dict().items()}
    (optimizer,) = trainer.optimizers
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    (config,) = trainer.lr_scheduler_configs
    state["rate"] = [group["lr"] for group in optimizer.param_groups]
    state["schedule"] = (config.scheduler.last_epoch, getattr(config.scheduler, "num_bad_epochs", None))
    state |= {"checks": found.distances, "emerged": found.emerged, "switched_at": pruner.switched_at}
    state |= {"masks": [mask.flat() for mask in module.model.record.masks], "facts": pruner.facts}
    state |= {"step": trainer.global_step, "epoch": trainer.current_epoch, "random": torch.get_rng_state()}
    return state


def logged(out: Path) -> set[tuple[int, str, str]]:
    """Step, name and value of everything that was logged, but for wall-clock times."""
    with (out / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        (int(row["step"]), name, value)
        for row in rows
        for name, value in row.items()
        if value and name != "step" and "seconds" not in name
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the last bit."""
    names = sorted(ours.keys() ^ theirs.keys())
    return names + [name for name in ours.keys() & theirs.keys() if not _same(ours[name], theirs[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list) and one and isinstance(one[0], Tensor):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return one == other and not (isinstance(one, float) and math.isnan(one))
