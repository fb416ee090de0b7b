"""A folder of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_earlybird.images.arrangement import arrange
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import ImageListing, ImageSource, RawImage


class FolderSource(ImageSource):
    """One folder a class, or all images in one folder; also below folders named after splits.

    Args:
        path: The folder.
        split: The split that is wanted, in canonical spelling.
        partition: File name -> split, where a list beside the folder says so.
        notes: Sentences to pass on.
    """

    def __init__(
        self, path: Path, split: str, partition: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"the folder {str(path)!r}", str(path.resolve()), split)
        self.path = path
        self._partition = partition
        self._notes = notes
        self._files = sorted(_walk(path))

    def fingerprint(self) -> str:
        """Of names, sizes and times of change: to read every file would take as long as to decode it."""
        digest = hashlib.sha256(repr(sorted((self._partition or {}).items())).encode())
        for name, size, changed_ns in self._files:
            digest.update(f"{name}\0{size}\0{changed_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def listing(self) -> ImageListing:
        """The images of the split, sorted by path."""
        names = [name for name, _, _ in self._files]
        arranged = arrange(names, self.split, text=self.text, stem=self.path.name, partition=self._partition)
        chosen = [names[position] for position in arranged.positions]

        def read(indices: Sequence[int]) -> Iterator[RawImage]:
            for index in indices:
                try:
                    yield (self.path / chosen[index]).read_bytes()
                except OSError as error:
                    raise ImageDataError(f"{self.path / chosen[index]}: cannot be read ({error.strerror}).") from error

        full = [str(self.path / name) for name in chosen]
        return ImageListing(full, arranged.labels, arranged.class_names, read, (*self._notes, *arranged.notes))


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Relative path with forward slashes, size in bytes and time of change in ns of each file; links are followed."""
    seen: set[str] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        folder = root / relative
        # A link to a folder above would go on for ever.
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = f"{relative}/{entry.name}" if relative else entry.name
                    if entry.is_dir():
                        waiting.append(path)
                    elif entry.is_file():
                        status = entry.stat()
                        yield path, status.st_size, status.st_mtime_ns
        except OSError as error:
            raise ImageDataError(f"the folder {str(folder)!r} cannot be read ({error.strerror}).") from error
