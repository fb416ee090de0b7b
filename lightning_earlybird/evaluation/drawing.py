"""Samples that are the same whatever the number of ranks that draw them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.evaluation.sources import to_uint8
from lightning_earlybird.records import EnsembleRecord
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.sampler import TicketEnsembleSampler

Decode = Callable[[Tensor], Tensor]
"""Latents (batch_size, ...) -> images (batch_size, C, H, W) in [-1, 1]."""


def share(count: int, size: int, rank: int, world_size: int) -> range:
    """A rank's part of so many images: whole batches, in order, so that what ranks have, in their order, is the whole.

    Args:
        count: Images in all.
        size: Images in a batch; the last batch may be smaller.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        Indices of the images; empty where there are fewer batches than ranks.
    """
    batches = -(-count // size)
    first, last = (min(count, edge * batches // world_size * size) for edge in (rank, rank + 1))
    return range(first, last)


def dense_sampler(
    denoiser: nn.Module, timesteps: TimestepArgument, sample_shape: Sequence[int] | None
) -> TicketEnsembleSampler:
    """A dense denoiser as a sampler of one region over the whole time axis; the network is not copied.

    Args:
        denoiser: The network.
        timesteps: Where it takes its timesteps.
        sample_shape: Shape of one sample; None takes that of the network's configuration.
    """
    sampler = TicketEnsembleSampler([denoiser], TimestepPartition.whole(0.0), timesteps)
    shape = None if sample_shape is None else tuple(sample_shape)
    sampler.record = EnsembleRecord(None, ({},), sample_shape=shape)
    return sampler


def ensemble_sampler(ensemble: TicketEnsemble) -> TicketEnsembleSampler:
    """The tickets of an ensemble as a sampler; they are not copied, and stay in the mode that they are in."""
    sampler = TicketEnsembleSampler(list(ensemble.tickets), ensemble.partition, ensemble.timesteps)
    sampler.record = ensemble.record
    return sampler.train(ensemble.training)


def drawn(
    sampler: TicketEnsembleSampler,
    indices: range,
    *,
    scheduler: Any,
    num_inference_steps: int,
    batch_size: int,
    seed: int,
    num_classes: int | None = None,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """Draws the samples of some indices, one batch at a time.

    The noise of a batch depends on the seed and the index of its first sample only, and is drawn on the CPU. With
    another ``batch_size`` it is other noise.

    Args:
        sampler: The network or networks.
        indices: Consecutive indices, beginning at a multiple of ``batch_size``: see :func:`share`.
        scheduler: See :meth:`TicketEnsembleSampler.sample`.
        num_inference_steps: See there.
        batch_size: Samples drawn at once.
        seed: Of all noise.
        num_classes: For class-conditional denoisers: sample number ``i`` is of class ``i % num_classes``.
        decode: Makes images of what is sampled.

    Yields:
        Images in [-1, 1], shape (batch_size, C, H, W); they may hold NaN.

    Raises:
        ValueError: If ``decode`` returns something else.
    """
    for start in range(indices.start, indices.stop, batch_size):
        stop = min(start + batch_size, indices.stop)
        # A prime apart, so that no two seeds that people choose share batches.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + start) % (1 << 63))
        labels = None if num_classes is None else torch.arange(start, stop) % num_classes
        samples = sampler.sample(
            stop - start,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            generator=generator,
            class_labels=labels,
            clip=decode is None,
            progress=False,
        )
        yield decoded(samples, decode)


@torch.no_grad()
def decoded(samples: Tensor, decode: Decode | None) -> Tensor:
    """Samples as images.

    Raises:
        ValueError: If they are no images of shape (batch_size, C, H, W).
    """
    images = samples if decode is None else decode(samples)
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) != len(samples):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        source = "samples" if decode is None else "decode(samples)"
        raise ValueError(
            f"{source}: {found} for {len(samples)} samples, expected images (batch_size, C, H, W) in [-1, 1]. Give "
            "decode=, a function that makes such of what the denoiser samples."
        )
    return images


def finite_uint8(images: Tensor) -> tuple[Tensor, int]:
    """Images as bytes, without those that hold a number that is not finite, and the number of these."""
    finite = torch.isfinite(images).flatten(1).all(1)
    return to_uint8(images[finite]), int((~finite).sum())


def default_scheduler(module: nn.Module | None = None) -> Any:
    """What is sampled with if nobody says: DDIM with quadratic spacing, as the paper does (arXiv 2504.09606).

    Args:
        module: Where this has a diffusers scheduler as an attribute, its betas and kind of prediction are taken; one
            without betas, as flows have, is taken as it is.
    """
    from diffusers import SchedulerMixin

    from lightning_earlybird.schedulers import SpacedDDIMScheduler

    attributes = vars(module).values() if module is not None else ()
    found: Any = next((each for each in attributes if isinstance(each, SchedulerMixin)), None)
    if found is None:
        return SpacedDDIMScheduler()
    if not hasattr(found, "betas"):
        return copy.deepcopy(found)
    # diffusers takes arguments that were given by position for defaults, and would leave them out.
    return SpacedDDIMScheduler.from_config({k: v for k, v in found.config.items() if k != "_use_default_values"})
