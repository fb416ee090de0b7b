"""Files that are not what their names say: half a download, a web page, a pointer to the real file."""

from __future__ import annotations

import hashlib
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec"


def not_the_data(head: bytes) -> str | None:
    """What a file is instead of data, told from its first bytes; ``None`` if it may well be data.

    Args:
        head: At least the first 64 bytes, or all of the file.
    """
    start = head[:512].lstrip().lower()
    if not head:
        return "it is empty: download or copy it again"
    if head.startswith(_LFS):
        return "it is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "it is a web page, not the file itself: what was asked to download it got a page, as for a log-in"
    if not head.strip(b"\0"):
        return "it begins with zeros only, as half a download does: download it again"
    return None


def head_of(path: Path) -> bytes:
    """The first bytes of a file, as :func:`not_the_data` wants them."""
    with path.open("rb") as file:
        return file.read(512)


def digest_of(path: Path, name: str = "sha256") -> str:
    """Of a file's content, in hex.

    Args:
        path: The file.
        name: The function; ``md5`` only for comparison with what the authors of a data set published.
    """
    digest = hashlib.new(name, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
