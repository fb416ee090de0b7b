"""Sheets of sample images, for loggers and as PNG files, without an imaging library."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.reporting.loggers import logger_step, tolerated

_SMALLEST_TILE = 32


def image_sheet(images: Tensor, columns: int | None = None) -> Tensor:
    """Images side by side, with a frame of one pixel around each.

    Args:
        images: Shape (N, C, H, W) with one or three channels, values in [-1, 1]; what lies outside is clipped.
        columns: Images in a row; None makes the sheet as square as possible.

    Returns:
        The sheet, shape (height, width, 3), uint8, on the CPU. Images smaller than 32 pixels are enlarged.

    Raises:
        ValueError: If the shape is another one.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"images of shape {tuple(images.shape)} cannot be shown: expected (N, C, H, W) with one or three channels. "
            "Latents need decode=FUNCTION, which makes images of them."
        )
    columns = columns or math.ceil(math.sqrt(len(images)))
    tiles = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    factor = math.ceil(_SMALLEST_TILE / min(tiles.shape[2:]))
    tiles = tiles.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = tiles.shape[2] + 1, tiles.shape[3] + 1
    rows = math.ceil(len(tiles) / columns)
    sheet = torch.full((rows * height + 1, columns * width + 1, 3), 255, dtype=torch.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * height + 1, index % columns * width + 1
        sheet[top : top + height - 1, left : left + width - 1] = tile.permute(1, 2, 0)
    return sheet


def save_image(image: Tensor, path: Path) -> None:
    """Writes an image to a PNG file, which appears whole or not at all.

    Args:
        image: Shape (height, width, 3), uint8, on the CPU.
        path: The file; missing folders are made, an existing file is replaced.
    """
    height, width, _ = image.shape
    # Each row begins with the number of its filter: none.
    rows = b"".join(b"\0" + bytes(row.numpy().tobytes()) for row in image.contiguous())
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(path) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def log_image(trainer: pl.Trainer, name: str, image: Tensor, *, caption: str) -> None:
    """Gives an image to W&B and TensorBoard; does nothing on ranks other than the first.

    Args:
        trainer: The Trainer; its loggers of other kinds are passed over.
        name: Key of the image.
        image: Shape (height, width, 3), uint8, on the CPU.
        caption: What W&B writes below it.
    """
    if not trainer.is_global_zero:
        return
    step = logger_step(trainer)
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [image.numpy()], step=step, caption=[caption])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, image.numpy(), step, dataformats="HWC")
