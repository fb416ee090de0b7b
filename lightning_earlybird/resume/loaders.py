"""Where the loaders of the training data were: told to them at the right moment, and counted rightly."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch.utils.data import DataLoader, IterableDataset


class LoaderStates:
    """The states of stateful loaders, on their way into checkpoints and out of them."""

    def __init__(self) -> None:
        self._loaded: list[Any] = []
        self._before_fetch: list[Any] = []

    def take_from(self, loops: dict[str, Any]) -> None:
        """Keep the states of a checkpoint from Lightning, until :meth:`restore`.

        Args:
            loops: The state of the fit loop in the checkpoint; changed in place.
        """
        self._loaded = loops["state_dict"].pop("combined_loader", [])

    def restore(self, trainer: pl.Trainer, at_end: bool) -> None:
        """Tell stateful loaders where they were.

        Lightning would do so when it sets loaders up: before it has told samplers the epoch, whose order they then
        miss, and not at all where asking for ``estimated_stepping_batches`` has set up the loaders earlier.

        Args:
            trainer: The Trainer of the fit.
            at_end: Whether all batches of the epoch had been taken.
        """
        states, self._loaded = self._loaded, []
        fit_loop = trainer.fit_loop
        loaders, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
        if not states or loaders is None or fetcher is None:
            return
        for loader in loaders.flattened:
            _set_sampler_epoch(loader, fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        loaders._load_state_dicts(states)
        if not at_end:
            iter(fetcher)
            return
        for loader, state in zip(filter(_is_stateful, loaders.flattened), states, strict=True):
            # One that has given all begins the next epoch when it is iterated anew; so does one of which a limit, or a
            # longer loader beside it, has left something over. Where this goes by the state of a stream, which now has
            # given a batch, it is told again, and made to iterate once more for its next iteration to be a new one.
            of_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
            if next(iter(loader), None) is not None and of_stream:
                loader.load_state_dict(state)
                if isinstance(loader, DataLoader):
                    iter(loader)

    def note_before_fetches(self, trainer: pl.Trainer) -> None:
        """Have states of loaders taken before they are asked for a batch ahead of time.

        Of data without a length Lightning holds the next batch at hand, to know which is the last one. A loader that
        is told that it has given this batch would leave it out.
        """
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        loaders = trainer.fit_loop._combined_loader
        if not isinstance(fetcher, _PrefetchDataFetcher) or fetcher.length is not None or loaders is None:
            return
        if not any(map(_is_stateful, loaders.flattened)):
            return
        before = loop._on_before_fetch

        def noting() -> None:
            loaders = trainer.fit_loop._combined_loader
            if loaders is not None:
                self._before_fetch = copy.deepcopy(loaders._state_dicts())
            before()

        loop.__dict__["_on_before_fetch"] = noting

    def correct(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Count no batch as given that waits to be taken.

        Args:
            trainer: The Trainer of the fit.
            checkpoint: The checkpoint that is being made; changed in place.
        """
        fetcher, loops = trainer.fit_loop._data_fetcher, checkpoint.get("loops", {}).get("fit_loop", {})
        waiting = isinstance(fetcher, _PrefetchDataFetcher) and fetcher.batches
        if waiting and self._before_fetch and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            state = loops.get("state_dict", {})
            if "combined_loader" in state:
                state["combined_loader"] = self._before_fetch


def _is_stateful(loader: Any) -> bool:
    return isinstance(loader, _Stateful)
