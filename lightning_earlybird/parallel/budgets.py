"""How many steps each ticket has left, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
from torch.utils.data import DistributedSampler

from lightning_earlybird.parallel.plan import TicketLoad
from lightning_earlybird.regions import TimestepRegion


def ticket_loads(
    trainer: pl.Trainer, regions: Sequence[TimestepRegion], step_seconds: Sequence[float], done: int = 0
) -> list[TicketLoad]:
    """What each ticket will cost from now on.

    Args:
        trainer: The Trainer, at the switch, before the world is split.
        regions: The tickets' regions.
        step_seconds: Seconds of one optimizer step of each.
        done: Steps that the tickets have taken already, in a fit that goes on with them.
    """
    left, divisible = steps_left(trainer, alone=True)
    loads = []
    for region, seconds in zip(regions, step_seconds, strict=True):
        own = None if region.max_steps is None else max(0, region.max_steps - done)
        if own is not None and (left is None or own < left):
            loads.append(TicketLoad(seconds, own, divisible=False))
        else:
            loads.append(TicketLoad(seconds, left, divisible))
    return loads


def steps_left(trainer: pl.Trainer, *, alone: bool = False) -> tuple[int | None, bool]:
    """Optimizer steps that the Trainer's own limits leave to this rank, at a batch's start or end.

    Args:
        trainer: The Trainer.
        alone: As if this rank went through all the data alone, instead of sharing it with those of its group.

    Returns:
        The steps, None without a limit; and whether they are counted in epochs, which ranks share.
    """
    limit = trainer.fit_loop.epoch_loop.max_steps
    by_steps = None if limit == -1 else max(0, limit - trainer.global_step)
    by_epochs = None
    batches = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and batches != float("inf"):
        assert trainer.max_epochs is not None
        if alone:
            batches = _batches_alone(trainer, int(batches))
        progress, accumulated = trainer.fit_loop.epoch_progress.current, trainer.accumulate_grad_batches
        # Between two epochs, and before the first, the count of batches is still that of the last epoch.
        batch_progress = trainer.fit_loop.epoch_loop.batch_progress.current
        taken: int = batch_progress.processed if progress.ready > progress.processed else 0  # type: ignore[attr-defined]
        # Lightning takes a step at the end of each epoch, too, however few batches have been accumulated.
        epochs: int = trainer.max_epochs - progress.processed  # type: ignore[attr-defined]
        by_epochs = max(0, epochs * math.ceil(batches / accumulated) - taken // accumulated)
    if by_epochs is not None and (by_steps is None or by_epochs <= by_steps):
        return by_epochs, True
    return by_steps, False


def _batches_alone(trainer: pl.Trainer, batches: int) -> int:
    """Batches of an epoch if one rank went through all the data; ``batches`` are those of each rank at present."""
    combined = trainer.fit_loop._combined_loader
    counts = []
    for loader in combined.flattened if combined is not None else []:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            size = len(sampler.dataset)  # type: ignore[arg-type]
            if loader.batch_size is None:
                counts.append(batches * sampler.num_replicas)
            else:
                counts.append(size // loader.batch_size if loader.drop_last else -(-size // loader.batch_size))
    if not counts:
        return batches
    limit = trainer.limit_train_batches
    # Of several loaders the longest counts, as in Lightning's default mode.
    return min(max(counts), limit) if isinstance(limit, int) else int(max(counts) * limit)
