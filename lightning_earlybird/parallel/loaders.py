"""Every group of ranks sees the whole data set: loaders are set up anew, for the ranks of the group only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DistributedSampler, IterableDataset


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
            _adapt_all(loop._combined_loader, former, present)


class GroupLoaders:
    """Loaders that are asked for from now on are those of the group.

    While a ``*_dataloader`` hook runs, ``global_rank`` is the position within the group, beside ``world_size``, which
    is its size: hooks make samplers of both. Where loaders with samplers for the whole world come all the same, such as
    those that were given to ``fit``, the samplers are adapted.

    Args:
        trainer: The Trainer of the fit.
        former: The ``distributed_sampler_kwargs`` of the world.
        present: Those of the group.
        numbered: Gives a context in which ``global_rank`` is the position within the group.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        former: dict[str, Any],
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
        former: dict[str, Any],
        present: dict[str, Any],
        numbered: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        with numbered():
            loaders = ask()
        _adapt_all(loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders), former, present)
        return loaders


def _adapt_all(loaders: CombinedLoader, former: dict[str, Any], present: dict[str, Any]) -> None:
    for loader in loaders.flattened:
        samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
        for sampler in {id(sampler): sampler for sampler in samplers}.values():
            if isinstance(sampler, DistributedSampler) and (sampler.num_replicas, sampler.rank) == (
                former["num_replicas"],
                former["rank"],
            ):
                _adapt(sampler, present["num_replicas"], present["rank"])


def _adapt(sampler: DistributedSampler[Any], num_replicas: int, rank: int) -> None:
    size = len(sampler.dataset)  # type: ignore[arg-type]
    sampler.num_replicas, sampler.rank = num_replicas, rank
    if isinstance(sampler, UnrepeatedDistributedSampler):
        sampler.num_samples, sampler.total_size = len(range(rank, size, num_replicas)), size
        return
    even = size // num_replicas if sampler.drop_last else -(-size // num_replicas)
    sampler.num_samples, sampler.total_size = even, even * num_replicas
