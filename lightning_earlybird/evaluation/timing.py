"""What sampling costs: calls of each ticket, and seconds against the dense network."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_earlybird.sampler import TicketEnsembleSampler


def calls_per_region(
    sampler: TicketEnsembleSampler, scheduler: Any, num_inference_steps: int
) -> list[dict[str, str | int]]:
    """How often each ticket is called for one image, in region order."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps)
    counts = torch.bincount(sampler.partition.lookup(own.timesteps.cpu()), minlength=len(sampler.regions)).tolist()
    return [
        {"region": f"[{region.start:g}, {region.stop:g})", "calls": count}
        for region, count in zip(sampler.regions, counts, strict=True)
    ]


def sampling_seconds(
    samplers: Mapping[str, TicketEnsembleSampler],
    scheduler: Any,
    num_inference_steps: int,
    num_images: int,
    repeats: int,
    class_labels: Tensor | None = None,
) -> dict[str, list[float]]:
    """Seconds that models take for a batch, turn by turn, so that whatever else the machine does hits all alike.

    Args:
        samplers: Name -> model, all on one device.
        scheduler: A diffusers scheduler.
        num_inference_steps: Its steps.
        num_images: Images of the batch.
        repeats: Turns of each.
        class_labels: Labels of the batch, for class-conditional denoisers.

    Returns:
        Name -> seconds of each turn; without names where there are no turns.
    """
    if repeats < 1:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    # The first turn is no longer than it must be: it warms up.
    for turn in range(-1, repeats):
        for name, sampler in samplers.items():
            steps = num_inference_steps if turn >= 0 else min(num_inference_steps, 10)
            _wait_for(sampler.device)
            started = time.perf_counter()
            sampler.sample(
                num_images,
                scheduler=scheduler,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(max(turn, 0)),
                class_labels=class_labels,
                progress=False,
            )
            _wait_for(sampler.device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
