"""A few batches from the training data, without moving the training loader on."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)


def scoring_batches(trainer: pl.Trainer, count: int) -> list[Any]:
    """Up to ``count`` batches, the same for the same optimizer step, other ones on every rank.

    Datasets with a length are drawn from at random, through a loader of our own with the same batch size and
    ``collate_fn``, in this process. Iterable datasets, and loaders that are no ``DataLoader``, are iterated afresh.
    Combinations of loaders keep their structure and mode.

    Args:
        trainer: A Trainer inside ``fit``.
        count: Number of batches.

    Returns:
        The batches on the CPU, as many on every rank.

    Raises:
        MisconfigurationException: If a loader cannot be iterated a second time, or gives nothing.
    """
    training = trainer.fit_loop._combined_loader
    assert training is not None
    combined = CombinedLoader(training.iterables, training._mode)
    seed = f"{trainer.global_step}/{trainer.global_rank}"
    combined.flattened = [_afresh(loader, count, f"{seed}/{index}") for index, loader in enumerate(training.flattened)]
    batches = [batch for batch, _, _ in itertools.islice(iter(combined), count)]
    # As many on every rank: training steps may wait for each other in collectives of their own.
    lengths = trainer.strategy.all_gather(torch.tensor(len(batches), device=trainer.strategy.root_device))
    fewest = int(lengths.min())
    if fewest == 0:
        raise MisconfigurationException(
            "train_dataloaders gave no batch when they were iterated a second time, to score channels by gradients. "
            "Give a loader that can be iterated again, or use criterion='magnitude'."
        )
    return batches[:fewest]


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Convert and move a batch as the training loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def _afresh(loader: Any, count: int, seed: str) -> Any:
    if not isinstance(loader, DataLoader):
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                f"train_dataloaders hold the iterator {type(loader).__name__}, and batches that score channels by "
                "gradients would be missing in the training. Give a DataLoader or another iterable that starts anew, "
                "or use criterion='magnitude'."
            )
        return loader
    settings: dict[str, Any] = {"collate_fn": loader.collate_fn, "generator": torch.Generator().manual_seed(0)}
    if isinstance(loader.dataset, IterableDataset):
        return DataLoader(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **settings)
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        # Batches of somebody's own making, such as those of images of one size, are not to be mixed.
        own = list(itertools.islice(_copied(loader.batch_sampler, loader), count))
        return DataLoader(loader.dataset, batch_sampler=own, **settings)
    size = loader.batch_size or 1
    if type(loader.sampler) in (RandomSampler, SequentialSampler, DistributedSampler):
        indices = _drawn(len(loader.dataset), count * size, seed)  # type: ignore[arg-type]
    else:
        # A sampler that leaves out or prefers samples has its reasons: a validation split, rare classes.
        indices = list(itertools.islice(_copied(loader.sampler, loader), count * size))
    if loader.batch_size is not None:
        settings["drop_last"] = loader.drop_last
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=indices, **settings)


def _drawn(length: int, wanted: int, seed: str) -> list[int]:
    """Indices at random, none twice before all have come once."""
    generator = random.Random(seed)
    rounds = range(math.ceil(wanted / length)) if length else range(0)
    return [index for _ in rounds for index in generator.sample(range(length), min(length, wanted))][:wanted]


def _copied(sampler: Any, loader: DataLoader[Any]) -> Iterator[Any]:
    """A sampler that can be iterated without moving the original or its generator on; the data set is shared."""
    return iter(copy.deepcopy(sampler, {id(loader.dataset): loader.dataset}))
