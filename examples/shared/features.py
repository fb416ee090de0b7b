"""A light stand-in for Inception, where it does not matter what a Fréchet distance is measured in."""

from torch import Tensor, nn


class Pixels(nn.Module):
    """Images scaled down to at most 8x8 pixels, as features: ``evaluation.features=shared.features:Pixels``."""

    def forward(self, images: Tensor) -> Tensor:
        """Features, shape (N, C * 64), of uint8 images (N, C, H, W)."""
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
