"""What a source of images holds, before anything is decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# The bytes of an image file, or pixels of shape (height, width, 3).
RawImage: TypeAlias = bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class ImageListing:
    """The images of one split of a source, in a fixed order.

    Args:
        names: What each image is called in messages.
        labels: The class of each image, ``0 .. len(class_names) - 1``; ``None`` where there are no classes.
        class_names: The names of the classes; empty without classes.
        read: Gives the images of some ascending indices, one after the other.
        notes: Sentences about what was left out or differs from the original data.
    """

    names: Sequence[str]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    read: Callable[[Sequence[int]], Iterator[RawImage]]
    notes: tuple[str, ...] = ()


class ImageSource(ABC):
    """A place where images are.

    Args:
        text: What it is, for messages: "the zip archive '/data/train.zip'".
        location: Where it is: an absolute path or a hub name; names the cached file.
        split: The split that is wanted, in canonical spelling.
    """

    def __init__(self, text: str, location: str, split: str) -> None:
        self.text = text
        self.location = location
        self.split = split

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex text that changes when the content does; cheap compared with decoding."""

    @abstractmethod
    def listing(self) -> ImageListing:
        """The images of the split."""
