"""Messages to rank 0, cut into pieces that a store can carry."""

from __future__ import annotations

import json
import threading
import warnings
from collections import deque
from typing import Any

PIECE = 256 * 1024  # characters in one piece: stores drop connections over values above a few MiB


class Outbox:
    """Messages that wait to be sent, in order.

    Args:
        limit: Characters that may wait. When more pile up, because rank 0 does not read, the oldest messages are
            dropped, with one warning.
    """

    def __init__(self, limit: int = 8 * 1024 * 1024) -> None:
        self.limit = limit
        self._lines: deque[str] = deque()
        self._waiting = 0
        self._rest = ""  # of a message of which a piece was sent already
        self._warned = False
        self._lock = threading.Lock()

    def put(self, message: dict[str, Any]) -> None:
        """Adds a message; later changes to it do not count.

        Raises:
            TypeError: If it is not JSON.
            ValueError: If it alone is larger than the box.
        """
        line = encode(message) + "\n"
        if len(line) > self.limit:
            raise ValueError(
                f"a message of {len(line)} characters was posted; at most {self.limit} are carried. Write large data "
                "to a file and post its path."
            )
        with self._lock:
            self._lines.append(line)
            self._waiting += len(line)
            dropped = 0
            while self._waiting > self.limit:
                self._waiting -= len(self._lines.popleft())
                dropped += 1
            warn = dropped > 0 and not self._warned
            self._warned |= warn
        if warn:
            warnings.warn(
                f"more than {self.limit} characters wait to be sent to rank 0, which does not read them fast enough: "
                "the oldest messages are dropped, now and from now on.",
                stacklevel=3,
            )

    def take(self) -> str:
        """The next piece, of at most `PIECE` characters; empty when nothing waits."""
        with self._lock:
            parts, size = [self._rest], len(self._rest)
            while self._lines and size < PIECE:
                line = self._lines.popleft()
                self._waiting -= len(line)
                parts.append(line)
                size += len(line)
            text = "".join(parts)
            self._rest = text[PIECE:]
        return text[:PIECE]

    def clear(self) -> None:
        """Forgets what waits."""
        with self._lock:
            self._lines.clear()
            self._waiting, self._rest = 0, ""

    def __bool__(self) -> bool:
        return bool(self._lines or self._rest)


class Inbox:
    """What has arrived on rank 0, in order per sender."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, dict[str, Any]]] = []
        self._rest: dict[int, str] = {}
        self._lock = threading.Lock()

    def feed(self, rank: int, piece: str) -> None:
        """Takes the next piece from a rank."""
        *lines, self._rest[rank] = (self._rest.get(rank, "") + piece).split("\n")
        messages = [(rank, json.loads(line)) for line in lines]
        with self._lock:
            self._messages += messages

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """All messages that have arrived since the last call."""
        with self._lock:
            messages, self._messages = self._messages, []
        return messages


def encode(message: dict[str, Any]) -> str:
    """A message as one line of ASCII, so that it can be cut anywhere."""
    try:
        return json.dumps(message, separators=(",", ":"))
    except TypeError as error:
        raise TypeError(
            f"{repr(message)[:200]} cannot be sent to another rank: {error}. Pass plain numbers and strings, "
            "e.g. .item() of a tensor."
        ) from None
