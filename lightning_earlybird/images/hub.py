"""Data sets of the Hugging Face hub, and folders in the formats of its library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import ImageListing, ImageSource, RawImage
from lightning_earlybird.images.splits import canonical_split

if TYPE_CHECKING:
    import datasets

_BATCH = 256


class HubSource(ImageSource):
    """A data set that the library ``datasets`` loads.

    Args:
        name: A name on the hub, or a folder with parquet files or with what ``save_to_disk`` wrote.
        split: The split that is wanted, in canonical spelling.

    Raises:
        ImageDataError: It cannot be loaded, has no such split or no images.
    """

    def __init__(self, name: str | Path, split: str) -> None:
        is_local = isinstance(name, Path)
        text = f"the data set in {str(name)!r}" if is_local else f"the data set {name!r} of the Hugging Face hub"
        super().__init__(text, str(name.resolve()) if isinstance(name, Path) else f"hub/{name}", split)
        self.name = name
        self._data = self._load()
        self._column = self._image_column()

    def fingerprint(self) -> str:
        """The library's own, of the content it has cached."""
        return hashlib.sha256(str(self._data._fingerprint).encode()).hexdigest()

    def listing(self) -> ImageListing:
        """The images of the split in the order of the data set."""
        import datasets

        # Undecoded: decoding and its errors are ours.
        data = self._data.cast_column(self._column, datasets.Image(decode=False))
        labels, class_names = self._labels()
        images = data.select_columns([self._column])

        def read(indices: Sequence[int]) -> Iterator[RawImage]:
            for start in range(0, len(indices), _BATCH):
                chunk = list(indices[start : start + _BATCH])
                for index, image in zip(chunk, images[chunk][self._column], strict=True):
                    if image is None:
                        raise ImageDataError(f"{self.text}: row {index} has no image; remove it from the data set.")
                    yield image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

        names = [f"{self.name}: row {index}" for index in range(len(data))]
        return ImageListing(names, labels, class_names, read)

    def _load(self) -> datasets.Dataset:
        try:
            import datasets
        except ImportError as error:
            raise ImageDataError(f"{self.text} needs the library datasets: pip install datasets") from error

        try:
            if isinstance(self.name, Path) and any(
                (self.name / each).is_file() for each in ("dataset_dict.json", "state.json")
            ):
                loaded: Any = datasets.load_from_disk(str(self.name))
            elif isinstance(self.name, Path) and self.name.is_file():
                loaded = datasets.load_dataset("parquet", data_files=str(self.name))
            else:
                loaded = datasets.load_dataset(str(self.name))
        except Exception as error:  # the library and the network may raise anything
            raise self._not_loaded(error) from error
        if isinstance(loaded, datasets.Dataset):
            loaded = {canonical_split(str(loaded.split or "train")): loaded}
        by_split = {canonical_split(str(name)): data for name, data in loaded.items()}
        if self.split not in by_split:
            raise ImageDataError(
                f"split={self.split!r}: {self.text} has no such split, only {', '.join(map(repr, sorted(by_split)))}."
            )
        return by_split[self.split]

    def _not_loaded(self, error: Exception) -> ImageDataError:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(self.name, Path):
            return ImageDataError(f"{self.text} cannot be loaded ({type(error).__name__}: {reason}); copy it again.")
        return ImageDataError(
            f"{self.text} cannot be loaded ({type(error).__name__}: {reason}), and there is no file or folder of that "
            "name here. With a network, look at the name; without one, download it elsewhere (`hf download "
            f"{self.name} --repo-type dataset --local-dir FOLDER`) and give that folder, a folder of images, a zip "
            "archive of folders or the original archive instead. What the library has cached is used with "
            "HF_HUB_OFFLINE=1."
        )

    def _image_column(self) -> str:
        import datasets

        features = self._data.features
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise ImageDataError(f"{self.text} has no column of images, only {', '.join(map(repr, features))}.")
        return str(columns[0])

    def _labels(self) -> tuple[list[int] | None, tuple[str, ...]]:
        """Labels and names of the column of classes; of several (CIFAR-100's) that with the most."""
        import datasets

        features = self._data.features
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if not columns:
            return None, ()
        column = max(columns, key=lambda name: len(features[name].names))
        # -1 stands for "not known" on the hub, as in test splits of competitions.
        labels = [-1 if each is None else int(each) for each in self._data[column]]
        if set(labels) == {-1}:
            return None, ()
        names = tuple(map(str, features[column].names))
        if min(labels) < 0 or max(labels) >= len(names):
            raise ImageDataError(
                f"{self.text}: column {column!r} has labels from {min(labels)} to {max(labels)}, outside of its "
                f"{len(names)} classes; remove the rows without a class, or that column."
            )
        return labels, names
