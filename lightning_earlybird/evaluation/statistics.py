"""What is kept of the features of a set of images: enough for FID and KID, in a file without pickles."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_earlybird.durable import file_written_aside

FORMAT = "lightning-earlybird statistics"
FORMAT_VERSION = 1

KID_ROWS = 10_000
"""Images of the reference whose features are kept for KID; its subsets are a tenth of that."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over the features of a set of images, and the features of some of them.

    Args:
        count: Number of images.
        total: Sum of the features, float64, shape (num_features,).
        products: Sum of the features' outer products, float64, shape (num_features, num_features).
        rows: Features of at most 10,000 of the images, drawn at random, float32, shape (num_rows, num_features).
        image_shape: (channels, height, width) of the images.
        extractor: Identity of the extractor.
        source: What the images are, for people.

    Raises:
        ValueError: If the shapes do not fit together, or a number is not finite.
    """

    count: int
    total: Tensor
    products: Tensor
    rows: Tensor
    image_shape: tuple[int, ...]
    extractor: str
    source: str

    def __post_init__(self) -> None:
        features = self.total.shape[0] if self.total.dim() == 1 else -1
        fits = self.products.shape == (features, features) and self.rows.shape[1:] == (features,)
        if not fits or self.total.dtype != torch.float64 or self.products.dtype != torch.float64:
            raise ValueError(
                f"total {self.total.dtype} {tuple(self.total.shape)}, products {self.products.dtype} "
                f"{tuple(self.products.shape)} and rows {tuple(self.rows.shape)} do not fit together: expected "
                "float64 (d,), float64 (d, d) and (num_rows, d)."
            )
        if self.count < 2 or len(self.rows) > self.count:
            raise ValueError(f"count={self.count} must be at least 2, and not below the {len(self.rows)} rows.")
        if not all(bool(torch.isfinite(each).all()) for each in (self.total, self.products, self.rows)):
            raise ValueError("the statistics hold numbers that are not finite; measure them again.")

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean of the features, float64, shape (num_features,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance of the features, float64, shape (num_features, num_features)."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, which ``reference=PATH`` reads.

        Args:
            path: The file; replaced where there is one. Its directory is made.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"total": self.total, "products": self.products, "rows": self.rows}
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "count": str(self.count),
            "image_shape": "x".join(map(str, self.image_shape)),
            "extractor": self.extractor,
            "source": self.source,
            "sha256": _digest(tensors),
        }
        with file_written_aside(target) as file:
            file.write(save({name: each.cpu().contiguous() for name, each in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Reads what :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is something else, damaged, or of a newer format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"reference={str(path)!r}: there is no such file.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except Exception as error:  # the library raises anything over a damaged file
            raise ValueError(f"reference={str(path)!r} is not a safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"reference={str(path)!r} holds no statistics of this package, but {metadata.get('format')!r}. Give "
                "the images themselves, or what FeatureStatistics.save wrote."
            )
        try:
            if int(metadata["format_version"]) > FORMAT_VERSION:
                raise ValueError(f"its format version is {metadata['format_version']}, this version reads up to 1")
            tensors = load_file(path)
            if metadata.get("sha256") not in (None, _digest(tensors)):
                raise ValueError("its numbers are not those that were saved")
            return cls(
                count=int(metadata["count"]),
                total=tensors["total"],
                products=tensors["products"],
                rows=tensors["rows"],
                image_shape=tuple(int(side) for side in metadata["image_shape"].split("x")),
                extractor=metadata["extractor"],
                source=metadata["source"],
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"reference={str(path)!r} is damaged or of a newer version: {error}") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the bytes of tensors, by name: a changed bit would give another score, and nothing would show it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class StatisticsMeter:
    """Adds up the features of a set of images that come in batches.

    Args:
        num_images: How many there are in the whole set.
        seed: Of the choice of images whose features are kept.
    """

    def __init__(self, num_images: int, seed: int = 0) -> None:
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
        self.chosen = torch.zeros(num_images, dtype=torch.bool)
        self.chosen[order[:KID_ROWS]] = True
        self.total: Tensor | None = None
        self.products: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, features: Tensor, start: int) -> None:
        """Takes in a batch.

        Args:
            features: Shape (batch_size, num_features).
            start: Index of its first image in the whole set.
        """
        # MPS has no float64, and sums of squares need it.
        exact = (features.cpu() if features.device.type == "mps" else features).double()
        if self.total is None or self.products is None:
            self.total, self.products = torch.zeros_like(exact[0]), exact.new_zeros(exact.shape[1], exact.shape[1])
        self.total += exact.sum(0)
        self.products.addmm_(exact.T, exact)
        self.rows.append(features[self.chosen[start : start + len(features)].to(features.device)].float().cpu())


def measured(
    batches: Iterable[tuple[int, Tensor]],
    num_images: int,
    extract: Callable[[Tensor], Tensor],
    advance: Callable[[int], object] = int,
) -> StatisticsMeter:
    """Adds up the features of batches of images.

    Args:
        batches: Index of the first image, and uint8 images.
        num_images: How many there are in the whole set, other ranks' included.
        extract: Images -> features.
        advance: Called with the number of images of each batch, once it is done.
    """
    meter = StatisticsMeter(num_images)
    for start, images in batches:
        meter.add(extract(images), start)
        advance(len(images))
    return meter
