"""Checkpoint files that nobody vouches for: read without executing anything, with an error that says what is wrong."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _load
from packaging.version import Version

from lightning_earlybird.files import EnsembleFormatError, Field, presentable


def read_checkpoint(path: str | os.PathLike[str], *, mapped: bool = True, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a Lightning checkpoint, without unpickling objects.

    Args:
        path: The file, or a URL that fsspec knows.
        map_location: As for ``torch.load``.
        mapped: Whether to map the tensors of a local file, so that only those that are used are read. torch compares
            their sizes with those of their records only where they are not mapped.

    Raises:
        EnsembleFormatError: If it is no checkpoint, or damaged.
        OSError: If the file cannot be opened.
    """
    check_intact(path)
    remote = "://" in str(path)
    try:
        if remote:
            document = _load(str(path), map_location=map_location, weights_only=True)
        else:
            mapped = mapped and zipfile.is_zipfile(path)
            document = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damaged files make the unpickler stumble over whatever comes next
        raise unreadable(path, error) from error
    return Field(document, str(path)).mapping()


def check_intact(path: str | os.PathLike[str]) -> None:
    """Compares a local file with its checksums, which torch does not; a no-op for other paths and for old formats.

    Raises:
        EnsembleFormatError: If the file was changed, truncated, or claims to unpack to more than it is.
        OSError: If the file cannot be opened.
    """
    if "://" in str(path):
        return
    root = Field(None, str(path))
    mode = os.stat(path).st_mode
    # Waiting for a queue, or reading a device, would not end. Directories are for torch to refuse.
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        root.fail("is no regular file, and cannot be a checkpoint.")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            # torch stores everything as it is; what is compressed, or stored many times over, was made to fill memory.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
                sum(entry.file_size for entry in entries) > Path(path).stat().st_size
            ):
                root.fail("claims to unpack to more than it holds; it was not written by torch.")
            # Under torch.serialization.set_crc32_options(False) none are computed, and there is nothing to compare.
            damaged = file.testzip() if any(entry.CRC for entry in entries) else None
    except EnsembleFormatError:
        raise
    except Exception as error:  # damaged headers make the library seek and decode wherever they point
        raise unreadable(path, error) from error
    if damaged is not None:
        root.fail(f"is damaged: {damaged!r} in it does not match its checksum. Use another checkpoint.")


def check_form(checkpoint: Any, file: str) -> None:
    """Makes sure that what Lightning takes for granted in a checkpoint is there.

    Raises:
        EnsembleFormatError: The message names the field.
    """
    document = Field(checkpoint, file)
    version = document["pytorch-lightning_version"]
    version.parsed(lambda _: Version(version.text()))
    for key in document["state_dict"].mapping():
        if not isinstance(key, str):
            document["state_dict"].fail(f"has the key {key!r}, expected names of tensors only.")
    parameters = document.mapping().get("hyper_parameters", {})
    if not hasattr(parameters, "update") or not all(isinstance(name, str) for name in parameters):
        document["hyper_parameters"].fail("is not a mapping from names of arguments to their values.")


def unreadable(path: str | os.PathLike[str], error: Exception) -> EnsembleFormatError:
    """The error of a file that torch stumbles over."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return EnsembleFormatError(
        f"{path}: cannot be read as a checkpoint ({presentable(reason)}). It is damaged, or holds objects besides "
        "tensors and plain containers, which are not unpickled."
    )
