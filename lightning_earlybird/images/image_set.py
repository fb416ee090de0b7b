"""Decoded images of one shape, mapped from their cache into memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_earlybird.text import aligned

# Enough for a mean to three digits; all of a large set would have to be read from the disk.
_SAMPLED = 2048


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split of a source.

    Args:
        images: Shape (N, C, H, W), uint8; mapped from a file, so that they take memory only where they are looked at,
            and once for all processes. Writing to them changes this process's copy and not the file.
        labels: Shape (N,), long, ``0 .. len(class_names) - 1``; ``None`` where the source has no classes.
        class_names: The names of the classes; empty without classes.
        source: Where they come from, for people.
        fingerprint: Hex text that names the content and what was done to it: equal for equal images.
        notes: Sentences about what was converted or left out.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """A first look: count, shape, values and classes, as lines of text without a trailing newline."""
        count, channels, height, width = self.images.shape
        step = max(1, -(-count // _SAMPLED))
        values = self.images[::step].float()
        mean, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3))
        sampled = "" if step == 1 else f" (of {len(values):,} images, evenly spaced)"
        lines = [
            self.source,
            f"{count:,} images, {channels} x {height} x {width} (channels x height x width), uint8, "
            f"{self.images.numel() / 2**20:,.1f} MiB",
            f"values {int(values.min())} to {int(values.max())}, mean {_listed(mean)}, standard deviation "
            f"{_listed(deviation)}{sampled}",
        ]
        if self.labels is None:
            lines.append("no classes")
        else:
            counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
            rows = [
                [str(label), name, f"{n:,}"]
                for label, (name, n) in enumerate(zip(self.class_names, counts, strict=True))
            ]
            if len(rows) > 20:
                least, most = min(counts), max(counts)
                lines.append(f"{len(rows)} classes of {least:,} to {most:,} images; the first 10:")
                rows = rows[:10]
            lines.append(aligned(["label", "class", "images"], rows, left={1}))
        return "\n".join([*lines, *self.notes])


def _listed(values: Tensor) -> str:
    return " ".join(f"{value:.1f}" for value in values.tolist())
