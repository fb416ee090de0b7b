"""Zip and tar archives of image files, read in place: nothing is extracted, so that no path in them leads anywhere."""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_earlybird.images.arrangement import arrange
from lightning_earlybird.images.damage import digest_of, head_of, not_the_data
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import ImageListing, ImageSource, RawImage

# No image file is as large as that; what says so of itself was made to fill the memory.
LARGEST_MEMBER_BYTES = 1 << 28

# What reading a damaged archive may raise.
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError)


class ZipSource(ImageSource):
    """A zip archive of folders.

    Args:
        path: The archive.
        split: The split that is wanted, in canonical spelling.
        partition: File name -> split, where a list beside the archive says so.
        notes: Sentences to pass on.

    Raises:
        ImageDataError: It is no whole zip archive.
    """

    def __init__(
        self, path: Path, split: str, partition: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"the zip archive {str(path)!r}", str(path.resolve()), split)
        self.path = path
        self._partition = partition
        self._notes = notes
        try:
            with zipfile.ZipFile(path) as archive:
                files = [info for info in archive.infolist() if not info.is_dir()]
        except _ZIP_ERRORS as error:
            raise _broken(
                path, "zip", "its list of files, which stands at the end, is missing or damaged", error
            ) from error
        self._files = sorted(files, key=lambda info: info.filename)

    def fingerprint(self) -> str:
        """Of the names, sizes and checksums that the archive itself lists."""
        digest = hashlib.sha256(repr(sorted((self._partition or {}).items())).encode())
        for info in self._files:
            digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def listing(self) -> ImageListing:
        """The images of the split, sorted by path."""
        names = [info.filename for info in self._files]
        arranged = arrange(names, self.split, text=self.text, stem=self.path.stem, partition=self._partition)
        chosen = [self._files[position] for position in arranged.positions]

        def read(indices: Sequence[int]) -> Iterator[RawImage]:
            with zipfile.ZipFile(self.path) as archive:
                for index in indices:
                    info = chosen[index]
                    _check_size(f"{self.path}: {info.filename}", info.file_size)
                    try:
                        data = archive.read(info)
                    except _ZIP_ERRORS as error:
                        raise ImageDataError(
                            f"{self.path}: {info.filename} cannot be read out of the archive ({error}): the archive is "
                            "damaged, or its files are encrypted. Download or copy it again."
                        ) from error
                    yield data

        full = [f"{self.path}: {info.filename}" for info in chosen]
        return ImageListing(full, arranged.labels, arranged.class_names, read, (*self._notes, *arranged.notes))


class TarSource(ImageSource):
    """A tar archive of folders, compressed or not; it is read from its beginning to its end, twice.

    Args:
        path: The archive.
        split: The split that is wanted, in canonical spelling.
    """

    def __init__(self, path: Path, split: str) -> None:
        super().__init__(f"the tar archive {str(path)!r}", str(path.resolve()), split)
        self.path = path

    def fingerprint(self) -> str:
        """Of the whole file."""
        return digest_of(self.path)

    def listing(self) -> ImageListing:
        """The images of the split, in the order of the archive."""
        names = [member.name for member, _ in _members(self.path)]
        stem = self.path.name.partition(".")[0]
        arranged = arrange(names, self.split, text=self.text, stem=stem)
        chosen = [names[position] for position in arranged.positions]

        def read(indices: Sequence[int]) -> Iterator[RawImage]:
            wanted = {arranged.positions[index] for index in indices}
            for position, (member, archive) in enumerate(_members(self.path)):
                if position in wanted:
                    yield member_bytes(self.path, archive, member)

        full = [f"{self.path}: {name}" for name in chosen]
        return ImageListing(full, arranged.labels, arranged.class_names, read, arranged.notes)


def member_bytes(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a file in a tar archive that is open.

    Raises:
        ImageDataError: It is larger than any image, or the archive ends before it does.
    """
    _check_size(f"{path}: {member.name}", member.size)
    try:
        file = archive.extractfile(member)
        data = b"" if file is None else file.read()
    except TAR_ERRORS as error:
        raise broken_tar(path, error) from error
    if len(data) != member.size:
        raise broken_tar(path, f"{member.name} ends after {len(data)} of {member.size} bytes")
    return data


def broken_tar(path: Path, error: object) -> ImageDataError:
    """What to say of a tar archive that cannot be read."""
    return _broken(path, "tar", "it ends or breaks off in the middle", error)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files of a tar archive, in its order, while it is open."""
    try:
        archive = tarfile.open(path, "r:*")  # noqa: SIM115  # closed below
    except TAR_ERRORS as error:
        raise broken_tar(path, error) from error
    with archive:
        while True:
            try:
                member = archive.next()
            except TAR_ERRORS as error:
                raise broken_tar(path, error) from error
            if member is None:
                return
            if member.isreg():
                yield member, archive
            archive.members.clear()  # type: ignore[attr-defined]  # or all that has been passed is kept


def _check_size(name: str, size: int) -> None:
    if size > LARGEST_MEMBER_BYTES:
        raise ImageDataError(
            f"{name} would be {size:,} bytes large, more than any image ({LARGEST_MEMBER_BYTES:,}); the archive is "
            "damaged, or was made to fill the memory. Remove that file from it."
        )


def _broken(path: Path, kind: str, what: str, error: object) -> ImageDataError:
    instead = not_the_data(head_of(path))
    reason = instead or f"{what} ({error}), as in half a download: download or copy it again"
    return ImageDataError(f"{str(path)!r} is no whole {kind} archive ({path.stat().st_size:,} bytes): {reason}.")
