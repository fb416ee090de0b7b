"""Every group of ranks sees the whole data set: loaders are set up anew, for the ranks of the group only."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DistributedSampler, IterableDataset, Subset


def check_loaders(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse training data that cannot be dealt out anew among the ranks of a group; for ``on_train_start``.

    Raises:
        MisconfigurationException: For data sets that were split by rank when they were made, and for a
            ``training_step`` that takes the iterator itself.
    """
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "training_step(dataloader_iter): MultiTicketStrategy gives each batch to every ticket of a rank, which a "
            "training_step that takes batches by itself does not allow. Let it take `batch`."
        )
    _check_same_everywhere(trainer)
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else []:
        dataset = getattr(loader, "dataset", None)
        # What Hugging Face's split_dataset_by_node leaves on an iterable data set.
        if getattr(dataset, "_distributed", None) is not None:
            raise MisconfigurationException(
                f"train_dataloader: its {type(dataset).__name__} was split by rank when it was made, and after the "
                "switch each ticket's group of ranks would see those parts of the data only. Leave the splitting to "
                "Lightning (use_distributed_sampler=True with a map-style data set), or split in the data set's "
                "__iter__ by torch.distributed.get_rank() and get_world_size(), which follow the group."
            )
        if isinstance(dataset, IterableDataset) and trainer.world_size > 1:
            rank_zero_warn(
                "train_dataloader: the data set is iterable, so that it deals out its samples among ranks by itself, "
                "if at all. After the switch every ticket must see all of them: let its __iter__ go by "
                "torch.distributed.get_rank() and get_world_size(), which then are those of the ticket's group."
            )


def _check_same_everywhere(trainer: pl.Trainer) -> None:
    """Refuse data sets of which every rank was given a part when it started.

    Loaders that a hook makes are left out: it is asked again for the ranks of the group.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None or trainer.world_size == 1 or trainer.fit_loop._data_source.is_module():
        return
    own = [fingerprint(getattr(loader, "dataset", None)) for loader in combined.flattened]
    everywhere: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everywhere, own)
    if any(other != own for other in everywhere):
        raise MisconfigurationException(
            f"train_dataloader: its data set differs from rank to rank ({everywhere[0]} on rank 0, "
            f"{next(other for other in everywhere if other != everywhere[0])} on another one; length, and checksum of "
            "a Subset's indices), so that after the switch each ticket would see a part of the data only. Give every "
            "rank the whole data set and leave the splitting to Lightning (use_distributed_sampler=True), or make the "
            "loader in a train_dataloader hook by trainer.world_size and trainer.global_rank."
        )


def fingerprint(dataset: Any) -> tuple[int | None, int | None]:
    """What tells parts of a data set from each other: its length, and a checksum of the indices of a ``Subset``.

    Args:
        dataset: Any data set; None for what cannot be told of it.
    """
    length = None if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) else len(dataset)
    return length, zlib.crc32(np.asarray(dataset.indices).tobytes()) if isinstance(dataset, Subset) else None


def reshard(trainer: pl.Trainer, former: dict[str, Any]) -> None:
    """Set up the loaders of a running fit anew, after the world has been split.

    The batch under way stays. The epoch under way goes on over the new loader, to as many batches as that has. Where
    the group is the whole world, nothing happens.

    Args:
        trainer: The Trainer, whose strategy knows the new group.
        former: What ``strategy.distributed_sampler_kwargs`` was before.
    """
    fit_loop = trainer.fit_loop
    present: dict[str, Any] = trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
    if present == former:
        return
    adapt_samplers(trainer, former, present)
    for loop in (fit_loop, fit_loop.epoch_loop.val_loop):
        loop._combined_loader = None
    running = fit_loop._data_fetcher
    fit_loop.setup_data()
    fresh = fit_loop._data_fetcher
    epoch: int = fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    if epoch > 0 and fresh is not None and fit_loop._combined_loader is not None:
        # Fresh samplers would begin with the order of the first epoch; Lightning tells them at the start of the next.
        for loader in fit_loop._combined_loader.flattened:
            _set_sampler_epoch(loader, epoch)
        iter(fresh)
    if running is not None and fresh is not None and running is not fresh:
        # The epoch loop holds on to the fetcher that it was started with: it goes on as the new one.
        profilers = running._start_profiler, running._stop_profiler
        running.__dict__.update(fresh.__dict__)
        running._start_profiler, running._stop_profiler = profilers
        fit_loop._data_fetcher = running
    if fit_loop.max_batches != float("inf"):
        # What was the last batch of the old loader need not be the last of the epoch now.
        batches = fit_loop.epoch_loop.batch_progress
        batches.is_last_batch = batches.current.ready >= fit_loop.max_batches


def adapt_samplers(trainer: pl.Trainer, former: dict[str, Any], present: dict[str, Any]) -> None:
    """Have samplers that were made for some ranks deal out the data among others.

    Lightning takes loaders that the user gave as a ``CombinedLoader``, or with distributed samplers of their own, as
    they are.

    Args:
        trainer: The Trainer.
        former: The ``distributed_sampler_kwargs`` that the samplers were made with.
        present: Those that they are to go by.
    """
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        if loop._combined_loader is not None:
            _adapt_all(loop._combined_loader, [former], present)


class GroupLoaders:
    """Loaders that are asked for from now on are those of the group.

    While a ``*_dataloader`` hook runs, ``global_rank`` is the position within the group, beside ``world_size``, which
    is its size: hooks make samplers of both. Where loaders with samplers for the whole world come all the same, such as
    those that were given to ``fit``, the samplers are adapted.

    Args:
        trainer: The Trainer of the fit.
        former: The ``distributed_sampler_kwargs`` of the world, and others that samplers may have been made with.
        present: Those of the group.
        numbered: Gives a context in which ``global_rank`` is the position within the group.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        former: Sequence[dict[str, Any]],
        present: dict[str, Any],
        numbered: Callable[[], AbstractContextManager[None]],
    ) -> None:
        loops = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
        self._sources = [loop._data_source for loop in loops]
        for source in self._sources:
            source.__dict__["dataloader"] = functools.partial(self._ask, source.dataloader, former, present, numbered)

    def undo(self) -> None:
        """Hooks are called as ever."""
        for source in self._sources:
            source.__dict__.pop("dataloader", None)

    @staticmethod
    def _ask(
        ask: Callable[[], Any],
        former: Sequence[dict[str, Any]],
        present: dict[str, Any],
        numbered: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        with numbered():
            loaders = ask()
        _adapt_all(loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders), former, present)
        return loaders


def forget_loaders(trainer: pl.Trainer) -> None:
    """Have loaders set up anew when they are needed next."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        if loop._data_fetcher is not None:
            loop._data_fetcher.teardown()
            loop._data_fetcher = None
        loop._combined_loader = None


def _adapt_all(loaders: CombinedLoader, former: Sequence[dict[str, Any]], present: dict[str, Any]) -> None:
    for loader in loaders.flattened:
        samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
        for sampler in {id(sampler): sampler for sampler in samplers}.values():
            if isinstance(sampler, DistributedSampler) and (sampler.num_replicas, sampler.rank) in [
                (each["num_replicas"], each["rank"]) for each in former
            ]:
                _adapt(sampler, present["num_replicas"], present["rank"])


def _adapt(sampler: DistributedSampler[Any], num_replicas: int, rank: int) -> None:
    size = len(sampler.dataset)  # type: ignore[arg-type]
    sampler.num_replicas, sampler.rank = num_replicas, rank
    if isinstance(sampler, UnrepeatedDistributedSampler):
        sampler.num_samples, sampler.total_size = len(range(rank, size, num_replicas)), size
        return
    even = size // num_replicas if sampler.drop_last else -(-size // num_replicas)
    sampler.num_samples, sampler.total_size = even, even * num_replicas
