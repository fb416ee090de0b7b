"""Many small images as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grid_image(images: Tensor, *, columns: int = 8, gap: int = 2) -> Tensor:
    """Images side by side, row by row, on white.

    Args:
        images: Shape (N, C, H, W) with 1 or 3 channels; uint8 from 0 to 255, or floats in [-1, 1] (clamped; NaN shows
            as black).
        columns: Images in a row; fewer where there are not as many.
        gap: Pixels between images and around them.

    Returns:
        Shape (height, width, 3), uint8, on the CPU; for ``PIL.Image.fromarray(grid.numpy())``.

    Raises:
        ValueError: The images have another shape or type, or there are none; or ``columns`` or ``gap`` is too small.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected (N, C, H, W) with at least one image and 1 or 3 channels."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: expected uint8 (0 to 255) or floats in [-1, 1].")
    if columns < 1 or gap < 0:
        raise ValueError(f"columns={columns}, gap={gap}: expected at least 1 column, and a gap of at least 0 pixels.")
    pixels = images.detach().cpu()
    if pixels.is_floating_point():
        pixels = ((pixels.float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1)
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    missing = rows * columns - len(pixels)
    pixels = functional.pad(pixels, (gap, 0, gap, 0), value=255)
    pixels = functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing), value=255)
    _, _, height, width = pixels.shape
    sheet = pixels.reshape(rows, columns, 3, height, width).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(3, rows * height, columns * width)
    return functional.pad(sheet, (0, gap, 0, gap), value=255).permute(1, 2, 0).contiguous()


def grid_figure(images: Tensor, *, columns: int = 8, title: str | None = None) -> Figure:
    """Images side by side as a figure.

    Args:
        images: As :func:`grid_image` takes them.
        columns: Images in a row.
        title: A line above them; ``None`` for none.

    Returns:
        The figure, made without pyplot.

    Raises:
        ValueError: As :func:`grid_image` does.
    """
    from matplotlib.figure import Figure

    grid = grid_image(images, columns=columns).numpy()
    # Small images are shown large enough to be seen, large ones not larger than a screen.
    inches = min(12.0, max(4.0, grid.shape[1] / 60))
    height = inches * grid.shape[0] / grid.shape[1] + (0.4 if title else 0.0)
    figure = Figure(figsize=(inches, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title)
    return figure
