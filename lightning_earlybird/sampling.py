"""The loop from noise to images, with any diffusers scheduler, and which of its steps fall into which region."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.regions import TimestepPartition


def denoise(
    predict: Callable[[int, Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: Any,
    generator: torch.Generator | None,
    clip: bool = True,
) -> Tensor:
    """One batch from noise to images.

    Args:
        predict: What the denoiser says: called with the number of the step, the scaled sample and the timestep.
        noise: Standard normal noise, shape (batch_size, ...).
        scheduler: A scheduler that :func:`prepared` gave, for this batch alone.
        generator: Source of the noise that the scheduler adds.
        clip: Whether to clip what comes out to [-1, 1].

    Returns:
        Images, of the shape of the noise.
    """
    sample = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    step_kwargs = _accepted(scheduler.step, generator=generator)
    for number, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(predict(number, scaled, timestep), timestep, sample, **step_kwargs).prev_sample
    return sample.clamp(-1, 1) if clip else sample


def prepared(scheduler: Any, num_inference_steps: int, device: torch.device | None = None) -> Any:
    """A copy of the scheduler with its timesteps set.

    Raises:
        TypeError: If it is no scheduler.
        ValueError: If the number of steps is below 1.
    """
    check_positive("num_inference_steps", num_inference_steps)
    for method in ("set_timesteps", "step"):
        if not hasattr(scheduler, method):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} without {method}(); pass a diffusers scheduler such as "
                "DDIMScheduler(num_train_timesteps=1000)."
            )
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, **_accepted(scheduler.set_timesteps, device=device))
    return scheduler


def owners_of(partition: TimestepPartition, scheduler: Any) -> list[int]:
    """The region of each of the steps of a prepared scheduler.

    Raises:
        ValueError: If a timestep lies outside the regions; the message names the scheduler and its range.
    """
    timesteps = torch.as_tensor(scheduler.timesteps)
    owners = partition.lookup(timesteps, check=False)
    try:
        partition.check_inside(timesteps, owners)
    except ValueError as error:
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} passes timesteps from {timesteps.max().item():g} down to "
            f"{timesteps.min().item():g}; {error} The denoiser must be called in the same unit in training as by the "
            "scheduler."
        ) from error
    return [int(owner) for owner in owners.tolist()]


def describe_unvisited(partition: TimestepPartition, visits: Sequence[int], scheduler: Any) -> str | None:
    """A sentence about the regions that no step falls into, with the remedy; None where there are none.

    Args:
        partition: The regions.
        visits: Steps that fall into each.
        scheduler: The prepared scheduler.
    """
    if all(visits):
        return None
    timesteps = torch.as_tensor(scheduler.timesteps)
    regions = ", ".join(
        f"{number} [{region.start:g}, {region.stop:g})"
        for number, (region, count) in enumerate(zip(partition, visits, strict=True))
        if not count
    )
    spacing = getattr(getattr(scheduler, "config", None), "timestep_spacing", None)
    spaced = f", timestep_spacing={spacing!r}" if spacing is not None else ""
    return (
        f"{type(scheduler).__name__} with {len(timesteps)} steps from {timesteps.max().item():g} down to "
        f"{timesteps.min().item():g}{spaced}: none of them lies in region {regions}, so that the ticket trained for it "
        "is never called. Take more steps or another spacing; where all steps lie in one region, check that the "
        "scheduler's time unit is that of the regions."
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards every sub-module is in the mode that it was in."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def labels_of(labels: int | Sequence[int] | Tensor, num_images: int) -> Tensor:
    """Class labels, one per image, shape (num_images,).

    Raises:
        ValueError: If there is not one label per image.
    """
    tensor = torch.as_tensor(labels)
    if tensor.dim() == 0:
        return tensor.expand(num_images)
    if len(tensor) != num_images:
        raise ValueError(
            f"class_labels has {len(tensor)} entries for num_images={num_images}; pass one label, or one per image."
        )
    return tensor


def check_positive(name: str, value: int) -> None:
    """Refuses what is no integer of at least 1.

    Raises:
        ValueError: The message names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _accepted(function: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
    """Those keyword arguments that the function has a parameter for: schedulers differ in what they take."""
    return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}
