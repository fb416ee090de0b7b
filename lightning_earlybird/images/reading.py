"""Images from wherever they are: found, decoded once, and mapped from the cache ever after."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_earlybird.images import cache
from lightning_earlybird.images.decoding import Decoder
from lightning_earlybird.images.image_set import ImageSet
from lightning_earlybird.images.listing import ImageListing, ImageSource
from lightning_earlybird.images.preparation import Preparation
from lightning_earlybird.images.recognition import find_source


def read_images(
    source: str | os.PathLike[str],
    *,
    size: int | Sequence[int] | None = None,
    crop: int | Sequence[int] | Literal["celeba"] | None = None,
    split: str = "train",
    channels: Literal["RGB", "L"] = "RGB",
    cache_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> ImageSet:
    """The images of a folder, an archive or a data set of the Hugging Face hub.

    The first call decodes all of them into one file of the cache; later calls, and other processes, map that file into
    memory. It is made anew when the source changes, or when it is damaged. Several processes may call this at once: one
    decodes, the others wait for it.

    Understood are

    - a folder with one folder a class, or with all images in it; both also below ``train`` and ``test``;
    - a zip or tar archive of such, read in place; a folder with ``train.zip`` and ``test.zip``;
    - ``cifar-10-python.tar.gz``, ``cifar-10-binary.tar.gz``, those of CIFAR-100, and the folders extracted from them;
    - CelebA's ``img_align_celeba`` or ``img_align_celeba.zip``, with ``list_eval_partition.txt`` for the splits;
    - names on the hub (``uoft-cs/cifar10``), and folders with parquet files.

    Args:
        source: A path, or a name on the hub; what exists as a path is taken for one.
        size: Side of the images in pixels, or (height, width). Where the proportions differ from those of what is left
            after the crop, the largest centred part that has them is taken. ``None`` keeps the size, which all images
            then must share.
        crop: Cut out first: a centred square of this side, a box ``(left, top, right, bottom)`` in pixels, or
            ``"celeba"``, the box (25, 57, 153, 185) of 128 x 128 pixels that the DDIM experiments take from aligned
            CelebA images before they scale them to 64 x 64.
        split: ``train``, ``test``, ``validation`` or another name that the source has; usual spellings are the same. Of
            a source without splits ``train`` is everything.
        channels: ``"RGB"`` or ``"L"`` for grey.
        cache_dir: Where the decoded images are kept; ``None`` takes ``$LIGHTNING_EARLYBIRD_CACHE/images`` or
            ``~/.cache/lightning-earlybird/images``.
        limit: At most so many images, evenly spaced over the source, so that classes keep their shares.
        progress: Show a progress bar while images are decoded.

    Returns:
        The images, with labels where the source has classes.

    Raises:
        ValueError: ``size``, ``crop``, ``channels`` or ``limit`` is no such value.
        ImageDataError: The data are missing, incomplete, damaged or of different sizes, or there is no room for the
            cache. A ``ValueError``, too.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r} must be a number of images, at least 1, or None for all.")
    preparation = Preparation(
        # Configurations give lists of several kinds.
        size=None if size is None else (size, size) if isinstance(size, int) else tuple(size),
        crop=crop if crop is None or isinstance(crop, int | str) else tuple(crop),
        channels=channels,
    )
    found = find_source(source, split)
    settings = {
        "split": found.split,
        "size": preparation.size,
        "crop": preparation.crop,
        "channels": channels,
        "limit": limit,
    }
    fingerprint = hashlib.sha256(json.dumps([1, found.fingerprint(), settings]).encode()).hexdigest()
    path = cache.cache_file(cache.cache_folder(cache_dir), found.location, settings)
    cached = cache.load(path, fingerprint)
    if not isinstance(cached, ImageSet):
        with cache.only_one_decodes(path):
            cached = cache.load(path, fingerprint)
            if not isinstance(cached, ImageSet):
                if cached:
                    rank_zero_info(f"The cached file {str(path)!r} {cached}; it is made anew.")
                cached = _decode(found, preparation, limit, path, fingerprint, progress)
    return cached


def _decode(
    source: ImageSource, preparation: Preparation, limit: int | None, path: Path, fingerprint: str, progress: bool
) -> ImageSet:
    listing = source.listing()
    decoder = Decoder(listing, _chosen(listing, limit), preparation, progress)
    text = f"{source.text[0].upper()}{source.text[1:]}, split {source.split!r}"
    cache.write(path, decoder, source=text, fingerprint=fingerprint)
    written = cache.load(path, fingerprint)
    if not isinstance(written, ImageSet):
        raise OSError(f"The cached file {str(path)!r} {written} right after it was written; look at the disk.")
    return written


def _chosen(listing: ImageListing, limit: int | None) -> list[int]:
    count = len(listing.names)
    if limit is None or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]
