"""The states of the random number generators that a training draws from, in plain types."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


def capture_random_states(trainer: pl.Trainer) -> dict[str, Any]:
    """The states of this process: torch, its device, NumPy, Python, and generators of the training data.

    Args:
        trainer: The Trainer of the fit.

    Returns:
        Plain containers and tensors, which ``torch.load(weights_only=True)`` reads.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    device = trainer.strategy.root_device
    return {
        "torch": torch.get_rng_state(),
        "device": _device_state(device),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
        "data": [generator.get_state() for generator in _data_generators(trainer)],
    }


def restore_random_states(trainer: pl.Trainer, own: dict[str, Any]) -> None:
    """Inverse of :func:`capture_random_states`, whose result is under ``random``.

    Where the device is of another kind, or the data have other generators, these are left as they are.
    """
    states = own["random"]
    torch.set_rng_state(states["torch"])
    device = trainer.strategy.root_device
    if states["device"] is not None and states["device"][0] == device.type:
        if device.type == "cuda":
            torch.cuda.set_rng_state(states["device"][1], device)
        elif device.type == "mps":
            torch.mps.set_rng_state(states["device"][1])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    generators = list(_data_generators(trainer))
    if len(generators) == len(states["data"]):
        for generator, state in zip(generators, states["data"], strict=True):
            generator.set_state(state)


def _device_state(device: torch.device) -> list[Any] | None:
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_rng_state(device)]
    if device.type == "mps":
        return ["mps", torch.mps.get_rng_state()]
    return None


def _data_generators(trainer: pl.Trainer) -> Iterable[torch.Generator]:
    """Generators that loaders, their samplers and batch samplers were given, each once."""

    def found() -> Iterator[torch.Generator]:
        for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
            for loader in loop._combined_loader.flattened if loop._combined_loader is not None else []:
                batches = getattr(loader, "batch_sampler", None)
                for part in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
                    generator = getattr(part, "generator", None)
                    if isinstance(generator, torch.Generator):
                        yield generator

    return {id(generator): generator for generator in found()}.values()
