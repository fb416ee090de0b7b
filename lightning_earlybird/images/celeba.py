"""CelebA as its authors publish it: aligned faces of 178 x 218 pixels, and a list of splits."""

from __future__ import annotations

from pathlib import Path

from lightning_earlybird.images.errors import ImageDataError

# Left, top, right, bottom: 128 x 128 around (89, 121), the crop of the DDIM experiments (Song et al., 2021), on which
# most 64 x 64 figures rest.
CROP = (25, 57, 153, 185)
SHAPE = (218, 178)  # height, width

PARTITION_FILE = "list_eval_partition.txt"
_SPLITS = {"0": "train", "1": "validation", "2": "test"}


def partition_beside(path: Path) -> dict[str, str] | None:
    """File name -> split, from the list in a folder, beside it, or where the original download keeps it.

    Args:
        path: The folder or archive of the images.

    Returns:
        ``None`` where there is no such list.

    Raises:
        ImageDataError: A line of the list is not "name split".
    """
    places = (path, path.parent, path.parent / "Eval", path.parent.parent, path.parent.parent / "Eval")
    for file in (place / PARTITION_FILE for place in places):
        if not file.is_file():
            continue
        partition = {}
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            parts = line.split()
            if not parts:
                continue
            if len(parts) != 2 or parts[1] not in _SPLITS:
                raise ImageDataError(
                    f"{file}, line {number}: expected a file name and 0 (train), 1 (validation) or 2 (test), found "
                    f"{line[:60]!r}; download the list again."
                )
            partition[parts[0]] = _SPLITS[parts[1]]
        return partition
    return None
