"""Decoded images as one file, which is mapped into memory afterwards.

It is a safetensors file with the tensors ``labels`` and ``images`` and, in its metadata, what they are and a checksum.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open

from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.images.decoding import Decoder
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.image_set import ImageSet

CACHE_VARIABLE = "LIGHTNING_EARLYBIRD_CACHE"
_FORMAT = "lightning-earlybird images, version 1"

# What the header may grow by while images are decoded: the notes about what was converted.
_SPARE_BYTES = 4096


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where decoded images are kept.

    Args:
        cache_dir: The folder; ``None`` takes ``$LIGHTNING_EARLYBIRD_CACHE/images``, else
            ``$XDG_CACHE_HOME/lightning-earlybird/images``, else ``~/.cache/lightning-earlybird/images``.

    Returns:
        The folder, which exists.

    Raises:
        ImageDataError: It cannot be made or written to.
    """
    if cache_dir is not None:
        folder = Path(cache_dir).expanduser()
    elif own := os.environ.get(CACHE_VARIABLE):
        folder = Path(own).expanduser() / "images"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-earlybird" / "images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def cache_file(folder: Path, location: str, settings: dict[str, Any]) -> Path:
    """The file of a source under some settings; what its content was is written in it.

    Args:
        folder: The cache's folder.
        location: Where the source is.
        settings: What was done to the images; of plain values.
    """
    key = hashlib.sha256(json.dumps([location, settings], sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9-]+", "-", "-".join(re.split(r"[/\\]", location)[-2:])).strip("-")[:60]
    return folder / f"{name}-{key}.safetensors"


@contextmanager
def only_one_decodes(path: Path) -> Iterator[None]:
    """Lets one process at a time make a cached file; the others wait, and find it made."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    held = False
    try:
        lock.acquire(timeout=0)
        held = True
    except Timeout:
        rank_zero_info(f"Waiting for another process that decodes the same images into {str(path)!r}.")
        lock.acquire()
        held = True
    except (OSError, NotImplementedError):
        pass  # a file system without locks: each process writes the same file, whole
    try:
        yield
    finally:
        if held:
            lock.release()


def load(path: Path, fingerprint: str) -> ImageSet | str:
    """The cached images, if they are whole and of this content.

    Args:
        path: The file.
        fingerprint: What the content must be.

    Returns:
        The images, or why they cannot be used; "" where there is no such file.
    """
    if not path.exists():
        return ""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != _FORMAT:
                return "was written by another version of this package"
            if facts["fingerprint"] != fingerprint:
                return "is of other data: the source has changed since"
            # Mapped, not read.
            labels, images = file.get_tensor("labels"), file.get_tensor("images")
        checksum = zlib.crc32(images.numpy(), zlib.crc32(labels.numpy()))
        if str(checksum) != facts["checksum"]:
            return "is damaged (its checksum differs)"
        return ImageSet(
            images=images,
            labels=labels.clone() if len(labels) else None,
            class_names=tuple(json.loads(facts["class_names"])),
            source=facts["source"],
            fingerprint=fingerprint,
            notes=tuple(json.loads(facts["notes"])),
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        return f"is damaged ({error})"


def write(path: Path, decoder: Decoder, *, source: str, fingerprint: str) -> None:
    """Decode images into a file, which appears whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        decoder: Gives the images.
        source: Where they come from, for people.
        fingerprint: What they are.

    Raises:
        ImageDataError: An image cannot be used, or the disk is full or read-only.
    """
    listing, indices = decoder.listing, decoder.indices
    labels: Sequence[int] = [] if listing.labels is None else [listing.labels[index] for index in indices]
    label_bytes = np.asarray(labels, np.int64).astype("<i8").tobytes()
    chunks = decoder.chunks()
    first = next(chunks)
    shape = (len(indices), *first.shape[1:])
    size = int(np.prod(shape))
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size + (1 << 20):
            raise OSError(f"{size / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB free")
        with file_written_aside(path) as file:
            facts = {
                "format": _FORMAT,
                "source": source,
                "fingerprint": fingerprint,
                "class_names": json.dumps(listing.class_names),
            }
            reserved = len(_header(facts, len(labels), len(label_bytes), shape, size)) + _SPARE_BYTES
            reserved += -reserved % 8
            file.write(b" " * reserved)
            file.write(label_bytes)
            checksum = zlib.crc32(label_bytes)
            for chunk in itertools.chain([first], chunks):
                data = chunk.tobytes()
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            facts["checksum"] = str(checksum)
            facts["notes"] = json.dumps([note[:300] for note in (*listing.notes, *decoder.notes())])
            header = _header(facts, len(labels), len(label_bytes), shape, size)
            file.seek(0)
            # Spaces after the JSON are part of a safetensors header.
            file.write((reserved - 8).to_bytes(8, "little") + header.ljust(reserved - 8))
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _header(facts: dict[str, str], labels: int, label_bytes: int, shape: tuple[int, ...], size: int) -> bytes:
    """The JSON of a safetensors file; labels come first, so that they are aligned."""
    tensors = {
        "labels": {"dtype": "I64", "shape": [labels], "data_offsets": [0, label_bytes]},
        "images": {"dtype": "U8", "shape": list(shape), "data_offsets": [label_bytes, label_bytes + size]},
    }
    return json.dumps({"__metadata__": facts, **tensors}).encode()


def _unwritable(folder: Path, error: OSError) -> ImageDataError:
    return ImageDataError(
        f"cache_dir={str(folder)!r}: decoded images cannot be kept there ({error}); give a cache_dir with room that "
        f"can be written to, or set the environment variable {CACHE_VARIABLE}."
    )
