"""What a denoiser's configuration says about class labels."""

from __future__ import annotations

import inspect

from torch import nn

from lightning_earlybird.compilation import unwrap

CLASS_SETTINGS = ("num_class_embeds", "num_embeds_ada_norm")
"""A U-Net's in diffusers, and a DiT's, which always takes labels."""


def takes_labels(denoiser: nn.Module) -> bool | None:
    """Whether a denoiser takes ``class_labels``; None where nothing tells."""
    denoiser = unwrap(denoiser)
    parameters = inspect.signature(denoiser.forward).parameters
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "class_labels" not in parameters and not open_ended:
        return False
    config = getattr(denoiser, "config", None)
    if configured_classes(denoiser) is not None or getattr(config, "class_embed_type", None) is not None:
        return True
    return False if any(hasattr(config, name) for name in CLASS_SETTINGS) else None


def configured_classes(denoiser: nn.Module) -> tuple[str, int] | None:
    """The setting of a denoiser's configuration that tells how many classes it has, and the number.

    One of them may stand for no class, so that labels of fewer are fine.

    Args:
        denoiser: The network.

    Returns:
        Name and number; None where there is no such setting.
    """
    config = getattr(unwrap(denoiser), "config", None)
    told = ((name, getattr(config, name, None)) for name in CLASS_SETTINGS)
    return next(((name, int(count)) for name, count in told if count is not None), None)
