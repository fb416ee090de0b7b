"""Statistics of the images to compare with: measured once, on all ranks together, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_earlybird.evaluation.drawing import share
from lightning_earlybird.evaluation.features import FeatureExtractor
from lightning_earlybird.evaluation.sources import ImageSource, image_source
from lightning_earlybird.evaluation.statistics import KID_ROWS, FeatureStatistics, measured


def default_cache() -> Path:
    """Where statistics are kept if nobody says; beside the decoded images of :mod:`lightning_earlybird.images`."""
    if own := os.environ.get("LIGHTNING_EARLYBIRD_CACHE"):
        return Path(own).expanduser() / "references"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lightning-earlybird" / "references"


def reference_statistics(
    reference: Any,
    extractor: FeatureExtractor,
    *,
    device: torch.device,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> FeatureStatistics:
    """The statistics of a reference; to be called on all ranks, which share the work.

    Args:
        reference: See :func:`~.sources.image_source`; or the path of saved statistics, or such themselves.
        extractor: What the images are compared by.
        device: Where features are computed; the extractor lies there.
        batch_size: Images at once.
        cache_dir: Where statistics are kept, under the images' fingerprint and the extractor's identity; None takes
            ``$LIGHTNING_EARLYBIRD_CACHE/references``, else ``~/.cache/lightning-earlybird/references``. A directory
            that cannot be written to is warned about.
        progress: Whether to show a progress bar.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: If the reference is none, or the statistics are of another extractor.
    """
    if isinstance(reference, str | os.PathLike) and Path(reference).suffix == ".safetensors":
        reference = FeatureStatistics.load(reference)
    if isinstance(reference, FeatureStatistics):
        if reference.extractor != extractor.identity:
            raise ValueError(
                f"reference: the statistics of {reference.source} were measured with {reference.extractor}, and "
                f"features= means {extractor.identity}. Use the same features, or measure the images again."
            )
        return reference
    source = image_source(reference, progress)
    folder = Path(cache_dir) if cache_dir is not None else default_cache()
    path, kept = folder, None
    if rank == 0:
        key = f"{source.fingerprint()} {source.count} {extractor.identity} {KID_ROWS}"
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
        kept = _cached(path)
    if _agreed(kept is not None, device, world_size):
        # Only the first rank's counts; the others need its shapes, and may not see its disk.
        return kept if kept is not None else _measure(source, extractor, device, batch_size, False, range(0, 2), 1)
    own = share(source.count, batch_size, rank, world_size)
    statistics = _measure(source, extractor, device, batch_size, progress and rank == 0, own, world_size)
    if rank == 0:
        try:
            statistics.save(path)
        except OSError as error:
            rank_zero_warn(
                f"cache_dir: the statistics of {source.name} could not be kept in {str(folder)!r} ({error}), and will "
                "be measured again next time. Give a directory that can be written to."
            )
    return statistics


def _cached(path: Path) -> FeatureStatistics | None:
    if not path.is_file():
        return None
    try:
        return FeatureStatistics.load(path)
    except ValueError as error:
        rank_zero_warn(f"The statistics in {str(path)!r} cannot be used and are measured again ({error}).")
        return None


def _measure(
    source: ImageSource,
    extractor: FeatureExtractor,
    device: torch.device,
    batch_size: int,
    progress: bool,
    own: range,
    world_size: int,
) -> FeatureStatistics:
    """Statistics of a rank's own images, put together with those of the other ranks where there are several."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    shape: list[int] = []

    def extract(images: Tensor) -> Tensor:
        shape[:] = images.shape[1:]
        return extractor(images.to(device))

    with tqdm(total=len(own), desc=f"reference: {source.name}", unit="image", disable=not progress) as bar:
        batches = source.batches(own.start, own.stop, batch_size)
        meter = measured(batches, source.count, extract, bar.update)
        if not shape:  # a rank without a share
            _, first = next(source.batches(0, 1, 1))
            nothing = extract(first)[:0]
            meter.add(nothing, 0)
    assert meter.total is not None and meter.products is not None
    total, products, rows = meter.total, meter.products, torch.cat(meter.rows)
    count = len(own)
    if world_size > 1:
        total, products = (torch.stack(gather_all_tensors(each)).sum(0) for each in (total, products))
        rows = torch.cat(gather_all_tensors(rows.to(device))).cpu()
        count = source.count
    return FeatureStatistics(
        count=count,
        total=total.cpu(),
        products=products.cpu(),
        rows=rows,
        image_shape=tuple(shape),
        extractor=extractor.identity,
        source=source.name,
    )


def _agreed(found: bool, device: torch.device, world_size: int) -> bool:
    """What the first rank has found."""
    if world_size == 1:
        return found
    flag = torch.tensor([int(found)], device=device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())
