"""The denoiser of a running fit as one model to sample from, be it still dense or tickets already."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
from torch import nn

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import FoundDenoiser, find_ensemble
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.probe import TIMESTEP_NAMES
from lightning_earlybird.records import EnsembleRecord
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.transition import averaged_modules


def current_sampler(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, denoiser: str | None = None
) -> TicketEnsembleSampler:
    """A sampler over the denoiser of this moment: the dense network before the switch, the tickets after it.

    The weights are the averaged ones where a ``WeightAveraging`` callback keeps such. Nothing is copied: sample before
    the next optimizer step, and call no method that changes modes or devices. Between ``on_validation_epoch_start`` and
    ``on_validation_epoch_end`` averaged and live weights are exchanged; call it in hooks of the training.

    Args:
        trainer: The Trainer of the fit.
        pl_module: Its LightningModule.
        denoiser: Dotted name of the denoiser; None is the one that an :class:`EarlyBirdDetector` has found. With a
            name no detector is needed, if the network's ``forward`` names its timesteps as usual.

    Returns:
        The sampler. A dense denoiser is its only ticket, with the whole time axis for a region.

    Raises:
        RuntimeError: If it is not known yet what the denoiser is, or if other ranks train some of its tickets.
        ValueError: If ``denoiser`` is not a sub-module, or does not tell where it takes its timesteps.
    """
    module = (averaged_modules(trainer) or [pl_module])[-1]
    present = find_ensemble(module)
    if present is not None:
        _, ensemble = present
        if len(ensemble.hosted) < len(ensemble.tickets):
            raise RuntimeError(
                f"this rank has the tickets {list(ensemble.hosted)} of {len(ensemble.tickets)}: other ranks train the "
                "rest. They come together at the end of the fit; sample in on_fit_end, or after it."
            )
        sampler = TicketEnsembleSampler(list(ensemble.tickets), ensemble.partition, ensemble.timesteps)
        sampler.record = ensemble.record
        return sampler
    found = _found(trainer, denoiser)
    if found is None and denoiser is None:
        raise RuntimeError(
            "denoiser=None: no EarlyBirdDetector has found the denoiser yet, which it does in the first training "
            "batch. Sample after that, or give the denoiser's name."
        )
    name = denoiser if found is None else found.call.name
    assert name is not None
    dense = _submodule(module, name)
    argument = _timestep_argument(dense, name) if found is None else found.call.timesteps
    sampler = TicketEnsembleSampler([dense], TimestepPartition.whole(0.0), argument)
    if found is not None:
        sampler.record = EnsembleRecord(None, ({},), sample_shape=found.call.sample_shape)
    return sampler


def _found(trainer: pl.Trainer, denoiser: str | None) -> FoundDenoiser | None:
    """What a detector has found; of several, the first that means this denoiser."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        found = getattr(callback, "found", None)
        if isinstance(found, FoundDenoiser) and denoiser in (None, found.call.name):
            return found
    return None


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return unwrap(module.get_submodule(name))
    except AttributeError as error:
        raise ValueError(
            f"denoiser={name!r} is not a sub-module of {type(module).__name__}; give the dotted name of one."
        ) from error


def _timestep_argument(network: nn.Module, name: str) -> TimestepArgument:
    """Where a network takes its timesteps, by the name of the argument."""
    parameters = list(inspect.signature(network.forward).parameters)
    named = [(key, position) for position, key in enumerate(parameters) if key in TIMESTEP_NAMES]
    if len(named) != 1:
        raise ValueError(
            f"denoiser={name!r}: its forward takes {parameters}, of which {len(named)} have a name that timesteps go "
            "by. Call them 'timestep' ('t', 'sigma', ...), or add an EarlyBirdDetector, which watches the calls."
        )
    return TimestepArgument(*named[0])
