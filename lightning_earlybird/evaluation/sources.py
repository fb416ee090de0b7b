"""Images to compare with, from wherever they are, in batches of uint8."""

from __future__ import annotations

import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from typing_extensions import override

from lightning_earlybird.untouched import isolated_rng

RANGE_SLACK = 0.05
"""How far beyond [-1, 1] training images may reach: resizing overshoots."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, the way they would be written to a file: rounded, and clipped at both ends."""
    return (images.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


class ImageSource(ABC):
    """A set of images that can be read in any part.

    Args:
        count: How many images there are.
        name: What they are, for people.
    """

    def __init__(self, count: int, name: str) -> None:
        if count < 2:
            raise ValueError(f"reference: {name} has {count} image(s); give at least two, better as many as there are.")
        self.count = count
        self.name = name

    @abstractmethod
    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Index of the first image, and uint8 images (batch_size, C, H, W), for the images from start to stop."""

    def fingerprint(self) -> str:
        """Names the content: the same for the same images, wherever they lie."""
        digest = hashlib.sha256()
        for _, images in self.batches(0, self.count, 1024):
            digest.update(f"{tuple(images.shape[1:])}".encode())
            digest.update(images.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


class TensorImages(ImageSource):
    """Images that lie in memory or in a mapped file.

    Args:
        images: Shape (num_images, C, H, W): uint8, or floating in [-1, 1].
        name: What they are.
        fingerprint: Names their content; None reads them all for it.
    """

    def __init__(self, images: Tensor, name: str, fingerprint: str | None = None) -> None:
        if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"reference: {name} is {images.dtype} of shape {tuple(images.shape)}, expected images of shape "
                "(num_images, C, H, W), uint8 or floating in [-1, 1]."
            )
        super().__init__(len(images), name)
        self._images = images
        self._known = fingerprint
        if images.is_floating_point():
            _check_range(float(images.min()), float(images.max()), name)

    @override
    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(start, stop, size):
            part = self._images[first : min(first + size, stop)].cpu()
            yield first, part if part.dtype == torch.uint8 else to_uint8(part)

    @override
    def fingerprint(self) -> str:
        return self._known if self._known is not None else super().fingerprint()


class DatasetImages(ImageSource):
    """The images of a training data set, in its own order; labels and whatever else it gives are left out.

    What is drawn at random for an image (flips, crops) is the same each time, so that its statistics are found again.

    Args:
        dataset: Gives floating images in [-1, 1], or uint8 ones, alone or first among other things.
        collate: Makes a batch of samples.
        name: What they are.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None, name: str) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"reference: {name} is a {type(dataset).__name__}, which cannot be read by index. Give the images "
                "themselves, reference=IMAGES, or statistics that were saved."
            )
        super().__init__(len(dataset), name)
        self._dataset = dataset
        self._collate = collate

    @override
    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor]]:
        loader = DataLoader(
            _Reproducible(self._dataset, range(start, stop)), batch_size=size, shuffle=False, collate_fn=self._collate
        )
        for batch in loader:
            images = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
            if images is None:
                raise ValueError(
                    f"reference: {self.name} gives batches without a tensor of images (batch_size, C, H, W). Give the "
                    "images themselves, reference=IMAGES."
                )
            if images.is_floating_point():
                _check_range(float(images.min()), float(images.max()), self.name, whole=False)
                images = to_uint8(images)
            yield start, images.cpu()
            start += len(images)


class _Reproducible(Subset[Any]):
    """Some samples of a data set, with random numbers that depend on the sample's index only."""

    @override
    def __getitems__(self, indices: list[int]) -> list[Any]:
        samples = []
        # Of the CPU alone, and set aside once for a batch: more would take longer than reading the images.
        with isolated_rng():
            for index in indices:
                own = self.indices[index]
                torch.default_generator.manual_seed(own)
                np.random.seed(own)
                random.seed(own)
                samples.append(self.dataset[own])
        return samples


def image_source(reference: Any, progress: bool = True) -> ImageSource:
    """The images that an argument ``reference`` means.

    Args:
        reference: An ``ImageSet``, a tensor of images, a ``DataLoader``, a ``LightningDataModule`` (its training set),
            a data set, or a path for :func:`lightning_earlybird.images.read_images`.
        progress: Whether reading shows a progress bar.

    Raises:
        ValueError: If it is something else, or images cannot be read from it.
    """
    images = getattr(reference, "images", None)
    if isinstance(images, Tensor) and hasattr(reference, "fingerprint"):
        return TensorImages(images, str(getattr(reference, "source", "images")), str(reference.fingerprint))
    if isinstance(reference, Tensor):
        return TensorImages(reference, f"a tensor of {len(reference)} images")
    if isinstance(reference, str | os.PathLike):
        from lightning_earlybird.images import read_images

        return image_source(read_images(reference, progress=progress))
    if callable(getattr(reference, "train_dataloader", None)):
        reference.prepare_data()
        reference.setup("fit")
        return image_source(reference.train_dataloader(), progress)
    if isinstance(reference, DataLoader):
        if reference.batch_size is None and reference.batch_sampler is None:
            raise ValueError(
                "reference: the data loader has batch_size=None, so that its data set makes the batches. Give the "
                "images themselves, reference=IMAGES."
            )
        return DatasetImages(reference.dataset, reference.collate_fn, _described(reference.dataset))
    if isinstance(reference, Dataset):
        return DatasetImages(reference, None, _described(reference))
    raise ValueError(
        f"reference is a {type(reference).__name__}, expected images (an ImageSet, a tensor, a path), a DataLoader, a "
        "LightningDataModule, or the path of saved statistics (.safetensors)."
    )


def _described(dataset: Any) -> str:
    count = f"{len(dataset)} images" if hasattr(dataset, "__len__") else "images"
    return f"{count} of {type(dataset).__name__}"


def _check_range(low: float, high: float, name: str, whole: bool = True) -> None:
    """Refuses values that are not those of images in [-1, 1]; NaN as well, which compares false with everything."""
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise ValueError(
            f"reference: {name} has values from {low:.4g} to {high:.4g}, and floating images lie in [-1, 1], as "
            "samples do. Scale them (x / 127.5 - 1), or give uint8."
        )
    if whole and low >= 0:
        raise ValueError(
            f"reference: {name} has values from {low:.4g} to {high:.4g}, as images in [0, 1] have, and samples lie in "
            "[-1, 1]. Scale them (2 * x - 1), or give uint8."
        )
