"""The pickled batches of the original CIFAR archives, read without letting the pickle do anything.

A batch is a dictionary with an array of bytes. The few names that such a pickle calls are answered by stand-ins that
only keep what they are given; every other name is refused. No code of NumPy sees what the file says.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_earlybird.images.errors import ImageDataError


def read_batch(data: bytes, name: str) -> dict[str, Any]:
    """The dictionary of a batch.

    Args:
        data: The pickle, as Python 2 or 3 wrote it.
        name: The file, for messages.

    Returns:
        Its keys as text; arrays of bytes as NumPy arrays, texts of Python 2 as ``bytes``.

    Raises:
        ImageDataError: It is damaged, refers to anything but arrays of bytes, or is no dictionary.
    """
    try:
        content = _Reader(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, dict):
            raise ImageDataError(f"{name} holds no batch of CIFAR but one {type(content).__name__}.")
        return {_text(key): value.array() if isinstance(value, _Array) else value for key, value in content.items()}
    except ImageDataError as error:
        raise ImageDataError(f"{name}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ImageDataError(
            f"{name} is damaged or cut off ({type(error).__name__}: {error}): download or copy the archive again."
        ) from error


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise ImageDataError(
                f"its pickle refers to {module}.{name}, which no batch of CIFAR does; it was not loaded, as it could "
                "run code. Download the archive from its authors."
            )
        return stand_in


class _Array:
    """Keeps the state of an array."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = None
        self.kind: Any = None
        self.fortran: Any = False
        self.data: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.kind, self.fortran, self.data = state

    def array(self) -> NDArray[np.uint8]:
        """The array, if it is one of bytes and as large as it says."""
        if not isinstance(self.kind, _Kind) or self.kind.name not in ("u1", "|u1", "uint8"):
            raise ImageDataError("an array in it does not consist of bytes, as those of CIFAR do.")
        if not isinstance(self.data, bytes | bytearray):
            raise ImageDataError("an array in it has no data.")
        shape = tuple(int(size) for size in self.shape)
        if any(size < 0 for size in shape) or math.prod(shape) != len(self.data):
            raise ImageDataError(f"an array in it says that its shape is {shape}, but holds {len(self.data)} bytes.")
        return np.frombuffer(self.data, np.uint8).reshape(shape, order="F" if self.fortran else "C")


class _Kind:
    """Keeps the name of a data type."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = _text(name)

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: nothing for bytes."""


def _from_state(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    array = _Array()
    array.shape, array.kind, array.fortran, array.data = shape, kind, order == "F", data
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How pickles of protocol 2 that Python 3 wrote hold bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ImageDataError("a text in it is encoded as none of CIFAR's is.")
    return text.encode("latin1")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _from_state,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}
