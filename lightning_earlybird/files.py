"""Files that nobody vouches for: JSON read with the place of every fault."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# No separators, no drive, no leading dot: such a name cannot lead out of its directory.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

# How the Hugging Face cache names its repositories and files: .../models--USER--NAME/blobs/DIGEST.
_CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces)--[A-Za-z0-9._-]+")
_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# Far beyond what anybody writes: a thousand tickets of a thousand tensors each are some 60 MB.
_LARGEST_DOCUMENT_BYTES = 1 << 26
_DEEPEST_NESTING = 64
_LARGEST_INTEGER = 2**63 - 1
_MOST_VALUES = 500_000

_LINK_REMEDY = (
    "links are not followed but within a Hugging Face cache, as they may lead out of the directory: copy it with "
    "`cp -rL`, or download it with `local_dir=`"
)


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
        raise EnsembleFormatError(f"{self.file}: {presentable(f'{place} {problem}')}")

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
        """The value, which must be an integer of at least ``minimum`` that fits into 64 bits."""
        value = self._typed(int, "an integer")
        if isinstance(self.value, bool) or value < minimum:
            self.fail(f"is {_shortened(self.value)}, expected an integer of at least {minimum}.")
        if value > _LARGEST_INTEGER:
            self.fail(f"is {_shortened(value)}, expected an integer of at most {_LARGEST_INTEGER}.")
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
        """The existing regular file that the value names, directly inside ``directory``; no link but a hub cache's."""
        name = self.text()
        if not _PLAIN_NAME.fullmatch(name):
            self.fail(f"is {name!r}, expected the plain name of a file in the same directory.")
        path = directory / name
        if is_hub_cache_link(path):
            return path
        if os.path.islink(path):
            self.fail(f"names {name!r}, which is a link in {str(directory)!r}; {_LINK_REMEDY}.")
        if not is_plain_file(path):
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

    Stricter than Python's parser: a key may stand in an object once, numbers must be finite.

    Raises:
        EnsembleFormatError: If the file does not exist, is not JSON, or is larger or nested deeper than any real one.
    """
    root = Field(None, str(path))
    cached = is_hub_cache_link(path)
    if os.path.islink(path) and not cached:
        root.fail(f"cannot be read: it is a link; {_LINK_REMEDY}.")
    if not cached and not is_plain_file(path):
        root.fail("cannot be read: there is no such file. Pass the directory that holds it.")
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_DOCUMENT_BYTES + 1)
    except OSError as error:
        root.fail(f"cannot be read: {error}.")
    if len(data) > _LARGEST_DOCUMENT_BYTES:
        root.fail(f"has more than {_LARGEST_DOCUMENT_BYTES:,} bytes; this is something else.")
    try:
        # RecursionError: nesting that is deeper than any real document's.
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_each_key_once,
        )
    except (ValueError, RecursionError) as error:
        root.fail(f"is not valid JSON ({error}); the file is damaged or truncated.")
    if _nesting(value) > _DEEPEST_NESTING:
        root.fail(f"is nested more than {_DEEPEST_NESTING} levels deep; this is something else.")
    return Field(value, str(path))


def plain_copy(value: Any) -> Any:
    """A copy in dicts, lists, strings and numbers, as JSON would carry it; tuples become lists.

    A pickle can hold one list many times over, so that a few bytes would be gigabytes written out.

    Raises:
        ValueError: If there is something else in it, or more than any real document has, or it is nested too deep.
    """
    left = _MOST_VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST_NESTING:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, or more than {_DEEPEST_NESTING} levels")
        if isinstance(value, dict):
            if odd := [key for key in value if type(key) is not str]:
                raise ValueError(f"it has the key {_shortened(odd[0])}, expected strings only")
            return {key: copied(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(inner, depth + 1) for inner in value]
        if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
            return value
        raise ValueError(f"it has a {type(value).__name__} in it, {_shortened(value)}")

    return copied(value, 1)


def is_plain_file(path: Path) -> bool:
    """Whether there is a regular file; a link to one is none, nor is a name that the file system cannot hold."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def is_hub_cache_link(path: Path) -> bool:
    """Whether a file is a link as the Hugging Face cache has them, which leads to a file of the same repository.

    That is ``.../models--USER--NAME/snapshots/REVISION/[sub/]FILE``, a link to the regular file
    ``.../models--USER--NAME/blobs/DIGEST``, in one step, with a digest of 40 or 64 hexadecimal digits.
    """
    try:
        if not path.is_symlink():
            return False
        # The directory itself may be reached by links, as the cache may lie anywhere.
        folder = Path(os.path.realpath(path.parent))
        target = Path(os.path.normpath(folder / os.readlink(path)))
    except (OSError, ValueError):
        return False
    for snapshots in folder.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and _CACHED_REPOSITORY.fullmatch(repository.name):
            blobs = repository / "blobs"
            return (
                target.parent == blobs
                and _BLOB_NAME.fullmatch(target.name) is not None
                and not blobs.is_symlink()
                and is_plain_file(target)
            )
    return False


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _nesting(value: Any) -> int:
    """Levels of arrays and objects; counted without recursion, which deep ones would exhaust."""
    level, depth = [value], 0
    while containers := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _shortened(value: Any) -> str:
    # Not `repr`, which recurses, and writes out all of a value that may be millions of entries long.
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def presentable(text: str) -> str:
    """Text out of a file as it may stand in a message: of bounded length, and nothing that steers a terminal."""
    if len(text) > 2000:
        text = f"{text[:1500]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else " " if c == "\n" else ascii(c)[1:-1] for c in text)
