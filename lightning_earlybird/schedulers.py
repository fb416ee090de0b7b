"""DDIM with the paper's quadratic spacing, where each step goes to the timestep that really comes next."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from typing_extensions import override

Spacing = Literal["quadratic", "uniform"]

REACH = 0.8
"""Share of the time axis that quadratic spacing covers (DDIM's code for CIFAR-10)."""


def quadratic_timesteps(num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """Timesteps whose square roots are evenly spaced, from 0 to 0.8 of the time axis (arXiv 2010.02502, appendix D.2).

    Differs from the DDIM code, where the first few squares fall on the same integer and those steps change nothing:
    here each goes to the next free timestep. With 100 steps out of 1000 that concerns twelve of them, all below 13.

    Args:
        num_inference_steps: How many, at most ``num_train_timesteps``. A single one is the last.
        num_train_timesteps: Length of the time axis.

    Returns:
        Distinct timesteps, ascending.
    """
    last = REACH * num_train_timesteps
    if num_inference_steps == 1:
        return [math.floor(last)]
    # i^2 / (n - 1)^2 and not the square of a linspace, which is a hair off where the result is an integer.
    squares = [last * i**2 / (num_inference_steps - 1) ** 2 for i in range(num_inference_steps)]
    return [max(index, math.floor(square + 1e-9)) for index, square in enumerate(squares)]


class SpacedDDIMScheduler(DDIMScheduler):  # type: ignore[misc]  # diffusers is not typed
    """DDIM that goes from each timestep to the one after it in ``timesteps``, however they are spaced.

    diffusers' ``DDIMScheduler`` takes ``t - num_train_timesteps // num_inference_steps`` for the timestep that a step
    goes to, which is right only where they are evenly spaced, and it has no quadratic spacing, which the paper (arXiv
    2504.09606) samples CIFAR-10 with. Where timesteps are even, both do the same. Everything else (predictions,
    clipping, ``eta``, the beta schedules) is as in ``DDIMScheduler`` (arXiv 2010.02502, equations 12 and 16).

    Quadratic spacing begins at 0.8 of the time axis, so that a region above it is never asked; ``timestep_spacing`` is
    that of ``"uniform"`` only.

    ``DDPMPipeline`` and ``TicketEnsembleSampler.sample`` take it as it is. ``DDIMPipeline`` puts a plain
    ``DDIMScheduler`` in its place when it is built or loaded: set ``pipeline.scheduler`` after that.

    Args:
        num_train_timesteps: Length of the time axis.
        spacing: ``"quadratic"``, or ``"uniform"`` for diffusers' own timesteps.
        beta_start: As for ``DDIMScheduler``; likewise the rest.
        beta_end: See there.
        beta_schedule: See there.
        trained_betas: See there.
        clip_sample: See there.
        set_alpha_to_one: See there.
        steps_offset: See there.
        prediction_type: See there.
        thresholding: See there.
        dynamic_thresholding_ratio: See there.
        clip_sample_range: See there.
        sample_max_value: See there.
        timestep_spacing: See there.
        rescale_betas_zero_snr: See there.

    Raises:
        ValueError: If ``spacing`` is unknown.

    Example::

        scheduler = SpacedDDIMScheduler(num_train_timesteps=1000)
        images = sampler.sample(64, scheduler=scheduler, num_inference_steps=100)
    """

    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        spacing: Spacing = "quadratic",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray[Any, Any] | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if spacing not in ("quadratic", "uniform"):
            raise ValueError(f"spacing={spacing!r} must be 'quadratic' or 'uniform'.")
        # The registered function of the parent would register its own arguments as this scheduler's configuration.
        super().__init__.__wrapped__(
            self,
            num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._previous = _successors(self.timesteps)

    @override
    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Chooses the timesteps that sampling goes through.

        Args:
            num_inference_steps: How many.
            device: Where ``timesteps`` lies.

        Raises:
            ValueError: If there are more than timesteps in training, or fewer than one.
        """
        length = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= length:
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r} must lie between 1 and num_train_timesteps={length}."
            )
        if self.config.spacing == "quadratic":
            offset = self.config.steps_offset
            steps = quadratic_timesteps(num_inference_steps, length)
            room = range(length - num_inference_steps, length)  # what keeps them distinct below the end of the axis
            steps = [min(step + offset, highest) for step, highest in zip(steps, room, strict=True)]
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.tensor(steps[::-1], device=device)
        else:
            super().set_timesteps(num_inference_steps, device)
        self._previous = _successors(self.timesteps)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from ``timestep`` goes to: the largest one below it; -1 for the clean sample.

        Args:
            timestep: One of ``timesteps``, or any other of the time axis.
        """
        step = int(timestep)
        if step not in self._previous:
            return max((each for each in self._previous if each < step), default=-1)
        return self._previous[step]

    @override
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of denoising, from ``timestep`` to :meth:`previous_timestep`.

        Args:
            model_output: What the denoiser says, in the terms of ``prediction_type``; shape of ``sample``.
            timestep: Where ``sample`` is.
            sample: The noisy samples.
            eta: 0 for DDIM, which adds no noise, up to 1 for DDPM.
            use_clipped_model_output: Whether the noise is derived again from the clipped sample.
            generator: Source of the noise that ``eta`` adds.
            variance_noise: That noise itself; not together with ``generator``.
            return_dict: Whether to return an object, or a tuple.

        Returns:
            ``prev_sample`` and ``pred_original_sample``.

        Raises:
            ValueError: If ``set_timesteps`` was not called, or the noise is given twice.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps=None: call set_timesteps before step.")
        if variance_noise is not None and generator is not None:
            raise ValueError("variance_noise and generator both give the noise; pass one of them.")
        current, previous = int(timestep), self.previous_timestep(timestep)
        alpha = self.alphas_cumprod[current]
        alpha_after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        original, noise = self._read(model_output, sample, alpha)
        if self.config.thresholding:
            original = self._threshold_sample(original)
        elif self.config.clip_sample:
            bound = self.config.clip_sample_range
            original = original.clamp(-bound, bound)
        if use_clipped_model_output:
            noise = (sample - alpha.sqrt() * original) / (1 - alpha).sqrt()
        # Equation 16. With a single timestep for two steps the quotient would be 0/0, but timesteps are distinct.
        sigma = eta * ((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after)).sqrt()
        result = alpha_after.sqrt() * original + (1 - alpha_after - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            result = result + sigma * variance_noise
        if not return_dict:
            return result, original
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=original)

    def _read(self, output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that the denoiser's output stands for."""
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - spread * output) / signal, output
        if kind == "sample":
            return output, (sample - signal * output) / spread
        if kind == "v_prediction":
            return signal * sample - spread * output, signal * output + spread * sample
        raise ValueError(f"prediction_type={kind!r} must be 'epsilon', 'sample' or 'v_prediction'.")


# Pipelines write down the module of their parts, and load only from modules that have been imported: this one need not
# have been, but the package's own name finds it.
SpacedDDIMScheduler.__module__ = "lightning_earlybird"


def _successors(timesteps: Tensor) -> dict[int, int]:
    """Timestep -> the one that sampling goes to from it, -1 from the last."""
    steps = timesteps.tolist()
    return dict(zip(steps, [*steps[1:], -1], strict=True))
