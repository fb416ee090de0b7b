"""CIFAR-10 and CIFAR-100 as their authors publish them: python or binary, as an archive or extracted."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lightning_earlybird.images.archives import TAR_ERRORS, member_bytes
from lightning_earlybird.images.batch_pickles import read_batch
from lightning_earlybird.images.damage import digest_of, not_the_data
from lightning_earlybird.images.errors import ImageDataError
from lightning_earlybird.images.listing import ImageListing, ImageSource, RawImage

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarFormat:
    """One of the four published archives.

    Args:
        text: What it is called in messages.
        folder: The folder in the archive.
        archive: The archive.
        md5: That of the archive, as published.
        files: Split -> names of its files, in order.
        names_file: The file with the names of the classes.
        names_key: The key of the names, where that file is a pickle.
        labels_key: The key of the labels, where batches are pickles.
        label_bytes: How many bytes stand before the pixels, where batches are binary; the last is the label.
        counts: Split -> number of images of the original.
    """

    text: str
    folder: str
    archive: str
    md5: str
    files: dict[str, tuple[str, ...]]
    names_file: str
    names_key: str
    labels_key: str
    label_bytes: int
    counts: dict[str, int]

    @property
    def is_binary(self) -> bool:
        """Whether batches are records of bytes and not pickles."""
        return self.label_bytes > 0


_COUNTS = {"train": 50_000, "test": 10_000}
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

FORMATS = (
    CifarFormat(
        text="the python version of CIFAR-10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        files={"train": _BATCHES, "test": ("test_batch",)},
        names_file="batches.meta",
        names_key="label_names",
        labels_key="labels",
        label_bytes=0,
        counts=_COUNTS,
    ),
    CifarFormat(
        text="the binary version of CIFAR-10",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        files={"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        names_file="batches.meta.txt",
        names_key="",
        labels_key="",
        label_bytes=1,
        counts=_COUNTS,
    ),
    CifarFormat(
        text="the python version of CIFAR-100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        files={"train": ("train",), "test": ("test",)},
        names_file="meta",
        names_key="fine_label_names",
        labels_key="fine_labels",
        label_bytes=0,
        counts=_COUNTS,
    ),
    CifarFormat(
        text="the binary version of CIFAR-100",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        names_file="fine_label_names.txt",
        names_key="",
        labels_key="",
        label_bytes=2,
        counts=_COUNTS,
    ),
)


def format_of(names: Iterable[str]) -> CifarFormat | None:
    """The format that files of these names belong to, if any; a few of its files are enough to tell."""
    present = set(names)
    for form in FORMATS:
        own = {name for files in form.files.values() for name in files} | {form.names_file}
        # "train" and "test" alone are anybody's; CIFAR-100 in python is told by its "meta".
        if len(own & present) >= 2 and ("cifar-100" not in form.folder or form.names_file in present):
            return form
    return None


class CifarSource(ImageSource):
    """An original archive, or the folder that was extracted from it.

    Args:
        path: The archive or the folder.
        form: Its format.
        split: ``train`` or ``test``.

    Raises:
        ImageDataError: CIFAR has no such split.
    """

    def __init__(self, path: Path, form: CifarFormat, split: str) -> None:
        super().__init__(f"{form.text} in {str(path)!r}", str(path.resolve()), split)
        if split not in form.files:
            raise ImageDataError(f"split={split!r}: {self.text} has the splits 'train' and 'test'.")
        self.path = path
        self.form = form

    def fingerprint(self) -> str:
        """Of the archive, or of the files of the split."""
        if self.path.is_file():
            return digest_of(self.path)
        digest = hashlib.sha256()
        for name, content in sorted(self._contents().items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return digest.hexdigest()

    def listing(self) -> ImageListing:
        """The images of the split in the order of the batches."""
        contents = self._contents()
        missing = [name for name in self.form.files[self.split] if name not in contents]
        if missing:
            raise ImageDataError(
                f"{self.text} lacks {', '.join(missing)} (expected {', '.join(self.form.files[self.split])}): "
                f"{self._remedy()}"
            )
        images: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        names: list[str] = []
        parse = self._binary if self.form.is_binary else self._pickled
        for name in self.form.files[self.split]:
            pixels, own = parse(name, contents[name])
            images.append(pixels)
            labels += own
            names += [f"{self.path}: image {index} of {name}" for index in range(len(pixels))]
        if not names:
            raise ImageDataError(f"{self.text} holds no images in split {self.split!r}: {self._remedy()}")
        together = np.concatenate(images)
        class_names = self._class_names(contents, max(labels) + 1)

        def read(indices: Sequence[int]) -> Iterator[RawImage]:
            for index in indices:
                yield together[index].reshape(3, 32, 32).transpose(1, 2, 0)

        notes: tuple[str, ...] = ()
        if len(names) != self.form.counts[self.split]:
            notes = (f"{len(names):,} images, where the original has {self.form.counts[self.split]:,}.",)
        return ImageListing(names, labels, class_names, read, notes)

    def _contents(self) -> dict[str, bytes]:
        """The files that matter: name -> content."""
        wanted = {*self.form.files[self.split], self.form.names_file}
        if self.path.is_dir():
            return {name: (self.path / name).read_bytes() for name in wanted if (self.path / name).is_file()}
        contents = {}
        try:
            with tarfile.open(self.path, "r:*") as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if member.isreg() and name in wanted and name not in contents:
                        contents[name] = member_bytes(self.path, archive, member)
        except (ImageDataError, *TAR_ERRORS) as error:
            raise ImageDataError(f"{self.text} cannot be read to its end ({error}); {self._remedy()}") from error
        return contents

    def _pickled(self, name: str, content: bytes) -> tuple[NDArray[np.uint8], list[int]]:
        batch = self._read(name, content)
        data, labels = batch.get("data"), batch.get(self.form.labels_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS:
            found = data.shape if isinstance(data, np.ndarray) else type(data).__name__
            self._fail(name, f"expected under 'data' an array of shape (N, {_PIXELS}), found {found}")
        if not isinstance(labels, list) or len(labels) != len(data) or not all(type(each) is int for each in labels):
            self._fail(name, f"expected under {self.form.labels_key!r} as many whole numbers as images ({len(data)})")
        if any(label < 0 or label > 99 for label in labels):
            self._fail(name, f"expected labels from 0 to 99, found {min(labels)} to {max(labels)}")
        return data, labels

    def _binary(self, name: str, content: bytes) -> tuple[NDArray[np.uint8], list[int]]:
        record = self.form.label_bytes + _PIXELS
        if len(content) % record:
            self._fail(name, f"its {len(content):,} bytes are no whole number of records of {record} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, record)
        labels = records[:, self.form.label_bytes - 1]
        if len(labels) and labels.max() > 99:
            self._fail(name, f"expected labels from 0 to 99, found {labels.max()}")
        return records[:, self.form.label_bytes :], [int(label) for label in labels]

    def _class_names(self, contents: dict[str, bytes], count: int) -> tuple[str, ...]:
        """The names, or numbers where the file with the names is missing or too short."""
        content = contents.get(self.form.names_file)
        names: list[Any] = []
        if content is not None and self.form.is_binary:
            names = [line.strip() for line in content.decode("latin1").splitlines() if line.strip()]
        elif content is not None:
            found = self._read(self.form.names_file, content).get(self.form.names_key)
            names = found if isinstance(found, list) else []
        if len(names) < count:
            return tuple(map(str, range(count)))
        return tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)

    def _read(self, name: str, content: bytes) -> dict[str, Any]:
        if instead := not_the_data(content[:512]):
            self._fail(name, instead)
        return read_batch(content, f"{self.path}: {name}")

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise ImageDataError(f"{self.path}: {name}: {problem}; {self._remedy()}")

    def _remedy(self) -> str:
        if self.path.is_dir():
            return f"extract {self.form.archive} again."
        md5 = digest_of(self.path, "md5")
        if md5 == self.form.md5:
            return "the archive is the original, so that the file may have been damaged while it was read; try again."
        return f"its MD5 is {md5}, that of the original is {self.form.md5}: download {self.form.archive} again."
