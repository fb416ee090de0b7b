"""From latents back to images."""

from typing import Any

import torch
from torch import Tensor, nn

from shared.data import Latents


class Decoder:
    """Makes images of what a denoiser of latents samples.

    Args:
        autoencoder: Of diffusers; it goes where the latents are, and stays in evaluation mode.
        latents: The training data, which know by what factors latents were scaled.
    """

    def __init__(self, autoencoder: nn.Module, latents: Latents) -> None:
        self.autoencoder: Any = autoencoder.eval().requires_grad_(False)
        self.scaling_factor = latents.scaling_factor
        self.shift_factor = latents.shift_factor

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images, shape (N, 3, H, W), values in [-1, 1], of scaled latents (N, C, h, w)."""
        network = self.autoencoder.to(latents.device)
        unscaled = latents / self.scaling_factor + self.shift_factor
        return network.decode(unscaled.to(network.dtype)).sample.float().clamp(-1, 1)
