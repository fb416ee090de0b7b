"""From the paths of files to splits, classes and labels: the same for folders, zip and tar archives."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.splits import canonical_split, is_split_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Arrangement:
    """Which of the files are images of the split, and of which classes.

    Args:
        positions: Where each image stands among the paths that were given.
        labels: The class of each; ``None`` where the images lie in no class folders.
        class_names: The names of the class folders, sorted; empty without them.
        notes: Sentences about what was left out.
    """

    positions: tuple[int, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def arrange(
    paths: Iterable[str], split: str, *, text: str, stem: str = "", partition: Mapping[str, str] | None = None
) -> Arrangement:
    """Find the images of a split among files, and their classes.

    Understood are one folder a class, images that all lie in one folder (no classes), either of them in folders named
    after splits, and any number of folders around all of this.

    Args:
        paths: Paths with forward slashes, relative to the source; their order is the order of the images.
        split: The split, in canonical spelling.
        text: The source, for messages.
        stem: The name of the source without its suffix: that of ``test.zip`` says which split it is.
        partition: File name -> split, where a list says so (CelebA's).

    Returns:
        The images of the split.

    Raises:
        ImageDataError: There are no images, none of this split, or images in class folders and beside them.
    """
    found: list[tuple[int, list[str]]] = []
    others = hidden = 0
    for position, path in enumerate(paths):
        parts = path.removeprefix("./").lstrip("/").split("/")
        # What systems leave behind, and paths that lead out of the archive.
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            hidden += 1
        elif posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            found.append((position, parts))
        else:
            others += 1
    if not found:
        raise ImageDataError(
            f"{text} holds no images ({others + hidden} other files); expected files that end with "
            f"{', '.join(IMAGE_SUFFIXES[:3])} or the like, in one folder a class or all in one folder."
        )
    notes = [f"{others} files are no images and were left out."] if others else []
    found, is_split = _enter(found, split, text)
    if partition is not None and any(parts[-1] in partition for _, parts in found):
        found = _partitioned(found, split, partition, text)
    elif not is_split and split != "train" and canonical_split(stem) != split:
        raise ImageDataError(
            f"split={split!r}: {text} is not divided into splits; give the path of the {split} images, or put them "
            f"into folders named 'train' and {split!r}."
        )
    classes = sorted({parts[0] for _, parts in found if len(parts) > 1})
    loose = sum(len(parts) == 1 for _, parts in found)
    if not classes:
        return Arrangement(tuple(position for position, _ in found), None, (), tuple(notes))
    if loose:
        raise ImageDataError(
            f"{text} holds {loose} images beside its folders {', '.join(map(repr, classes[:3]))}"
            f"{', ...' if len(classes) > 3 else ''}; expected one folder a class and no image outside of them, or all "
            "images in one folder. Move or remove those."
        )
    index = {name: label for label, name in enumerate(classes)}
    labels = tuple(index[parts[0]] for _, parts in found)
    return Arrangement(tuple(position for position, _ in found), labels, tuple(classes), tuple(notes))


def _enter(found: list[tuple[int, list[str]]], split: str, text: str) -> tuple[list[tuple[int, list[str]]], bool]:
    """Leave off the folders around the images, and those of splits; whether there were splits comes with it."""
    while True:
        tops = {parts[0] for _, parts in found if len(parts) > 1}
        loose = any(len(parts) == 1 for _, parts in found)
        if not loose and tops and all(map(is_split_name, tops)):
            inside = [(position, parts[1:]) for position, parts in found if canonical_split(parts[0]) == split]
            if not inside:
                raise ImageDataError(
                    f"split={split!r}: {text} has no such part, only {', '.join(map(repr, sorted(tops)))}."
                )
            while len({parts[0] for _, parts in inside if len(parts) > 1}) == 1 and all(len(p) > 1 for _, p in inside):
                inside = [(position, parts[1:]) for position, parts in inside]
            return inside, True
        if loose or len(tops) != 1:
            return found, False
        found = [(position, parts[1:]) for position, parts in found]


def _partitioned(
    found: list[tuple[int, list[str]]], split: str, partition: Mapping[str, str], text: str
) -> list[tuple[int, list[str]]]:
    inside = [(position, parts) for position, parts in found if partition.get(parts[-1]) == split]
    if not inside:
        raise ImageDataError(
            f"split={split!r}: the list of splits beside {text} puts none of its {len(found)} images there; it has "
            f"{', '.join(map(repr, sorted(set(partition.values()))))}."
        )
    return inside
