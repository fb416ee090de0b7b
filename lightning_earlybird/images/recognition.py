"""What a path or a name stands for."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

from lightning_earlybird.images import celeba
from lightning_earlybird.images.archives import TAR_ERRORS, TarSource, ZipSource, broken_tar
from lightning_earlybird.images.arrangement import IMAGE_SUFFIXES
from lightning_earlybird.images.cifar import FORMATS, CifarFormat, CifarSource, format_of
from lightning_earlybird.images.damage import head_of, not_the_data
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.folders import FolderSource
from lightning_earlybird.images.hub import HubSource
from lightning_earlybird.images.listing import ImageSource
from lightning_earlybird.images.splits import canonical_split, is_split_name

FORMS = (
    "a folder of images (one folder a class, or all in one), a zip or tar archive of such, an original CIFAR-10 or "
    "CIFAR-100 archive or the folder extracted from it, CelebA's img_align_celeba or img_align_celeba.zip, or a "
    "name on the Hugging Face hub such as 'uoft-cs/cifar10'"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".gz", ".parquet")
_GZIP, _BZIP, _XZ, _ZIP = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04"
_TAR_AT = 257


def find_source(source: str | os.PathLike[str], split: str) -> ImageSource:
    """What stands behind a path or a name on the hub.

    Args:
        source: The path or the name; what exists as a path is taken for one.
        split: The split that is wanted, in any spelling.

    Returns:
        The source of the images.

    Raises:
        ImageDataError: It does not exist, or is none of the forms that are understood.
    """
    split = canonical_split(split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    if path.is_file():
        return _in_file(path, split)
    if isinstance(source, str) and _may_be_on_hub(source):
        return HubSource(source, split)
    present = next(parent for parent in path.absolute().parents if parent.exists())
    inside = sorted(entry.name for entry in present.iterdir()) if os.access(present, os.R_OK) else []
    listed = ", ".join(map(repr, inside[:8])) + (", ..." if len(inside) > 8 else "")
    raise ImageDataError(
        f"{str(source)!r} does not exist; the nearest folder that does is {str(present)!r} (it holds "
        f"{listed or 'nothing'}). Expected {FORMS}."
    )


def _may_be_on_hub(source: str) -> bool:
    """Whether a name that is no path here may be one on the hub; not where its first part is a folder here."""
    first, _, second = source.partition("/")
    return (
        _HUB_NAME.fullmatch(source) is not None
        and not source.lower().endswith((*_ARCHIVE_SUFFIXES, *IMAGE_SUFFIXES))
        and not (second and Path(first).exists())
    )


def _in_folder(path: Path, split: str) -> ImageSource:
    try:
        entries = {entry.name: entry for entry in path.iterdir()}
    except OSError as error:
        raise ImageDataError(f"the folder {str(path)!r} cannot be read ({error.strerror}).") from error
    if form := format_of(entries):
        return CifarSource(path, form, split)
    for form in FORMATS:
        for name in (form.folder, form.archive):
            if name in entries:
                return CifarSource(entries[name], form, split)
    if any(name in entries for name in ("dataset_dict.json", "state.json")) or _has_parquet(path):
        return HubSource(path, split)
    for name in ("img_align_celeba", "img_align_celeba.zip"):
        if name in entries and path.name != name:
            return find_source(entries[name], split)
    archives = {
        canonical_split(entry.stem): entry
        for entry in entries.values()
        if entry.suffix.lower() == ".zip" and is_split_name(entry.stem)
    }
    if archives and split in archives:
        return ZipSource(archives[split], split)
    if archives and not any(entry.is_dir() for entry in entries.values()):
        raise ImageDataError(
            f"split={split!r}: the folder {str(path)!r} has no archive of it, only "
            f"{', '.join(repr(entry.name) for entry in archives.values())}."
        )
    return FolderSource(path, split, *_celeba_facts(path))


def _has_parquet(path: Path) -> bool:
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")) or any(path.glob("*/*.parquet"))


def _celeba_facts(path: Path) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """The splits of CelebA's images, where a list says so; a note where the list is missing."""
    if path.name.partition(".")[0] != "img_align_celeba" and path.parent.name != "img_align_celeba":
        return None, ()
    partition = celeba.partition_beside(path)
    if partition is None:
        return None, (f"No {celeba.PARTITION_FILE} beside the images: all of them are taken as one split.",)
    return partition, ()


def _in_file(path: Path, split: str) -> ImageSource:
    try:
        head = head_of(path)
    except OSError as error:
        raise ImageDataError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    if instead := not_the_data(head):
        raise ImageDataError(f"{str(path)!r} ({path.stat().st_size:,} bytes) holds no images: {instead}.")
    if head.startswith(_ZIP) or path.suffix.lower() == ".zip":
        return ZipSource(path, split, *_celeba_facts(path))
    if head.startswith((_GZIP, _BZIP, _XZ)) or head[_TAR_AT:].startswith(b"ustar"):
        form = next((form for form in FORMATS if path.name == form.archive), None) or _cifar_inside(path)
        return CifarSource(path, form, split) if form else TarSource(path, split)
    if head.startswith(b"PAR1"):
        return HubSource(path, split)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ImageDataError(f"{str(path)!r} is a single image; give the folder that holds the images.")
    raise ImageDataError(f"{str(path)!r} is none of the forms that are understood. Expected {FORMS}.")


def _cifar_inside(path: Path) -> CifarFormat | None:
    """The CIFAR format of a tar archive under another name, told from its first files."""
    names = []
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                names.append(member.name.rpartition("/")[2])
                if len(names) >= 16:
                    break
    except TAR_ERRORS as error:
        raise broken_tar(path, error) from error
    return format_of(names)
