"""A connection of one's own to the store that a process group met at."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

from torch.distributed import Store, TCPStore

T = TypeVar("T")

_SLICE = 64  # keys read by one call: answers above 8 MiB make the store drop the connection


class StoreGoneError(RuntimeError):
    """The store cannot be reached any more."""


class StoreClient:
    """A connection to the server behind `store`, used by one thread at a time.

    The connection is a new one where the kind of store allows it: on the given one another thread may wait for
    minutes, and every other call waits with it. A call that fails is repeated over a fresh connection; only when that
    has failed for `give_up_s` is the store called gone. A second, plain socket tells when the server closes: torch's
    client answers each call on a closed connection with a page of C++ stack trace, and a connection attempt with half a
    minute's wait.

    Args:
        store: Store of the process group, with its prefixes.
        give_up_s: Seconds of failure after which the store counts as gone.
        timeout_s: Seconds that a call may wait for a key.
    """

    def __init__(self, store: Store, *, give_up_s: float = 3.0, timeout_s: float = 10.0) -> None:
        self.give_up_s = give_up_s
        self._timeout = timedelta(seconds=timeout_s)
        self._origin = store
        server = _server(store)
        self.address = None if server is None else (server.host, server.port)
        self._wire = None if self.address is None else socket.create_connection(self.address, timeout=timeout_s)
        self._client = self._connect()
        self.prefix = ""

    def close(self) -> None:
        """Closes the plain socket; torch closes its own with the object."""
        if self._wire is not None:
            self._wire.close()

    def cut(self) -> bool:
        """Whether the server has closed; never blocks, and any thread may ask."""
        wire = self._wire
        if wire is None:
            return False
        try:
            # The server never speaks on a connection that asked nothing: what can be read is its end.
            poll = select.poll()
            poll.register(wire, select.POLLIN)
            return bool(poll.poll(0))
        except (OSError, ValueError):  # closed on this side
            return True

    def number(self, key: str) -> int:
        """Counts one up at `key` and returns the count."""
        return self._call(lambda client: client.add(self.prefix + key, 1))

    def set(self, key: str, value: str) -> None:
        """Writes a value; does not wait for the server to have read it."""
        self._call(lambda client: client.set(self.prefix + key, value))

    def get(self, keys: Sequence[str]) -> list[str]:
        """Reads keys, all of which must exist."""
        values: list[bytes] = []
        for first in range(0, len(keys), _SLICE):
            part = [self.prefix + key for key in keys[first : first + _SLICE]]
            values += self._call(lambda client, part=part: client.multi_get(part))  # type: ignore[misc]
        return [value.decode() for value in values]

    def has(self, key: str) -> bool:
        """Whether the key exists."""
        return self._call(lambda client: client.check([self.prefix + key]))

    def replace(self, key: str, old: str, new: str) -> str:
        """Writes `new` where `old` stands (the empty string: where nothing stands); returns what stands there then."""
        return self._call(lambda client: client.compare_set(self.prefix + key, old, new)).decode()

    def delete(self, key: str) -> None:
        """Removes a key."""
        self._call(lambda client: client.delete_key(self.prefix + key))

    def _call(self, act: Callable[[Store], T]) -> T:
        since, failures = time.monotonic(), 0
        while True:
            problem: Exception
            try:
                if not self.cut():
                    return act(self._client)
                problem = ConnectionError("the server closed the connection")
            except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
                problem = error
            failures += 1
            # By count too: the clock goes on while a process is suspended.
            if failures > 3 and time.monotonic() - since > self.give_up_s:
                raise StoreGoneError(str(problem).partition("\n")[0]) from problem
            time.sleep(min(0.5, self.give_up_s / 5))
            self._reconnect()

    def _reconnect(self) -> None:
        if self.address is None:
            return
        try:
            wire = socket.create_connection(self.address, timeout=2.0)
        except OSError:
            return  # refused: the old wire stays, cut
        old, self._wire = self._wire, wire
        if old is not None:
            old.close()
        try:
            self._client = self._connect()
        except (RuntimeError, OSError):
            wire.close()  # counts as cut

    def _connect(self) -> Store:
        server = _server(self._origin)
        if hasattr(self._origin, "clone"):
            client = cast("Store", self._origin.clone())
        elif server is not None:  # torch below 2.8; the caller's prefixes are lost
            client = TCPStore(server.host, server.port, None, False, self._timeout, wait_for_workers=False)
        else:
            client = self._origin
        if client is not self._origin:
            client.set_timeout(self._timeout)
        return client


def _server(store: Store) -> TCPStore | None:
    """The store that talks to a server, below all prefixes; None where the store is a file or a dictionary."""
    while not isinstance(store, TCPStore) and hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store if isinstance(store, TCPStore) else None


def kept_by_agent() -> bool:
    """Whether torchrun's agent keeps the store of this run, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
