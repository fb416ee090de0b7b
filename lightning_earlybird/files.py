"""Files that nobody vouches for: JSON read with the place of every fault."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# No separators, no drive, no leading dot: such a name cannot lead out of its directory.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class EnsembleFormatError(ValueError):
    """An ensemble on disk (or its description) is damaged, truncated or foreign; the message names file and field."""


class Field:
    """A value out of a JSON document, which knows its place in it.

    Args:
        value: The value.
        file: Where it was read, for messages.
        path: The field's path in the document, for messages; empty for the whole document.
    """

    def __init__(self, value: Any, file: str, path: str = "") -> None:
        self.value = value
        self.file = file
        self.path = path

    def fail(self, problem: str) -> NoReturn:
        """Raises the error that names this field's file and path."""
        place = f"field '{self.path}'" if self.path else "the document"
        raise EnsembleFormatError(f"{self.file}: {place} {problem}")

    def __getitem__(self, key: str) -> Field:
        """The member of an object; it must exist."""
        member = self._member(key)
        if key not in self.mapping():
            member.fail("is missing.")
        return member

    def mapping(self) -> dict[str, Any]:
        """The value, which must be an object."""
        return self._typed(dict, "an object")

    def members(self) -> dict[str, Field]:
        """The members of an object."""
        return {key: self._member(key) for key in self.mapping()}

    def elements(self) -> list[Field]:
        """The elements of an array."""
        values = self._typed(list, "an array")
        return [Field(value, self.file, f"{self.path}[{index}]") for index, value in enumerate(values)]

    def text(self) -> str:
        """The value, which must be a string."""
        return self._typed(str, "a string")

    def integer(self, minimum: int = 0) -> int:
        """The value, which must be an integer of at least ``minimum``."""
        value = self._typed(int, "an integer")
        if isinstance(self.value, bool) or value < minimum:
            self.fail(f"is {self.value!r}, expected an integer of at least {minimum}.")
        return value

    def boolean(self) -> bool:
        """The value, which must be true or false."""
        return self._typed(bool, "true or false")

    def optional(self, read: Callable[[Field], T]) -> T | None:
        """What ``read`` makes of the field, or None where it is null."""
        return None if self.value is None else read(self)

    def parsed(self, parse: Callable[[Any], T]) -> T:
        """What ``parse`` makes of the value; its ValueError or TypeError is reported with this field's place."""
        try:
            return parse(self.value)
        except (ValueError, TypeError) as error:
            self.fail(f"is not valid: {error}")

    def file_in(self, directory: Path) -> Path:
        """The existing regular file that the value names, directly inside ``directory``."""
        name = self.text()
        if not _PLAIN_NAME.fullmatch(name):
            self.fail(f"is {name!r}, expected the plain name of a file in the same directory.")
        path = directory / name
        if not path.is_file():
            self.fail(f"names the file {name!r}, which is not in {str(directory)!r}; copy the whole directory.")
        return path

    def _member(self, key: str) -> Field:
        return Field(
            self.value.get(key) if isinstance(self.value, dict) else None, self.file, f"{self.path}.{key}".strip(".")
        )

    def _typed(self, kind: type[T], described: str) -> T:
        if not isinstance(self.value, kind):
            self.fail(f"is {_shortened(self.value)}, expected {described}.")
        return self.value


def read_json(path: Path) -> Field:
    """Reads a JSON document.

    Raises:
        EnsembleFormatError: If the file does not exist or is not JSON.
    """
    root = Field(None, str(path))
    if not path.is_file():
        root.fail("cannot be read: there is no such file. Pass the directory that holds it.")
    try:
        # RecursionError: nesting that is deeper than any real document's.
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        root.fail(f"is not valid JSON ({error}); the file is damaged or truncated.")
    return Field(value, str(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
