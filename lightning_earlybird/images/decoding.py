"""Every image of a listing decoded and prepared, in order, with several threads."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import ImageListing
from lightning_earlybird.images.preparation import Preparation

# Images held at a time: enough for the threads, and little memory.
_CHUNK = 256


class Decoder:
    """Decodes the chosen images of a listing.

    Args:
        listing: What the source holds.
        indices: Which of them, ascending.
        preparation: What is done to each.
        progress: Whether a progress bar is shown.
    """

    def __init__(self, listing: ImageListing, indices: Sequence[int], preparation: Preparation, progress: bool) -> None:
        self.listing = listing
        self.indices = indices
        self.preparation = preparation
        self.progress = progress
        self._conversions: collections.Counter[str] = collections.Counter()

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """Prepared images, shape (n, C, H, W), all of one C, H and W.

        Raises:
            ImageDataError: One cannot be decoded, or differs in size from the first.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        names = [self.listing.names[index] for index in self.indices]
        pairs = zip(self.listing.read(self.indices), names, strict=True)
        shape: tuple[int, ...] | None = None
        # Pillow lets other threads run while it decodes.
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            tqdm(total=len(names), desc="decoding", unit=" images", mininterval=0.5, disable=not self.progress) as bar,
        ):
            while chunk := list(islice(pairs, _CHUNK)):
                results = list(pool.map(lambda pair: self.preparation.apply(*pair), chunk))
                for (pixels, converted), (_, name) in zip(results, chunk, strict=True):
                    shape = shape or pixels.shape
                    if pixels.shape != shape:
                        raise ImageDataError(
                            f"{name} is {pixels.shape[2]} x {pixels.shape[1]} pixels large (width x height), and "
                            f"{names[0]} {shape[2]} x {shape[1]}: give size= to have all of one size."
                        )
                    if converted:
                        self._conversions[converted] += 1
                yield np.stack([pixels for pixels, _ in results])
                bar.update(len(chunk))

    def notes(self) -> tuple[str, ...]:
        """Sentences about what was converted; complete after the last chunk."""
        return tuple(
            f"{count:,} images were converted to {self.preparation.channels} (mode {mode})."
            for mode, count in sorted(self._conversions.items())
        )
