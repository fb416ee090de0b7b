"""How ranks keep in touch while no collective joins them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.distributed import DistError, HashStore, Store

from lightning_earlybird.parallel.contact import Contact
from lightning_earlybird.parallel.exchange import Exchange
from lightning_earlybird.parallel.mail import encode
from lightning_earlybird.parallel.store import StoreClient
from lightning_earlybird.parallel.watch import Watch

_STATUS_LIMIT = 8 * 1024  # characters: rank 0 reads the statuses of all ranks every second
_SETTLE_S = 3.0  # seconds in which the cause of a broken collective is found, if it can be


class RankLostError(RuntimeError):
    """Another rank is gone, silent or has failed; the message names it, what it was doing and why."""


class Liaison:
    """Beats, messages and watch of one rank, in the background.

    Every rank writes a beat about once a second and reads what rank 0 writes. A rank is lost when its process is gone
    (seen at once by a rank of its own host, and by rank 0 of the processes that it launched), when it has been silent
    for `patience_s`, when it says that it has failed or that it gets nowhere, or, being rank 0, when the store that it
    keeps is gone. A process that is seen to live is given ten times the patience: something holds Python's lock in it,
    such as a large file being unpickled. Time in which this process itself was suspended does not count. A rank that
    was never heard of is only missed where it was launched by rank 0.

    A process whose main thread hangs, in a data set or a lock, goes on giving signs of life. Where :meth:`progress` has
    not been called for `stall_s`, it gives itself up.

    Once a rank is lost, every rank writes one line to standard error and :meth:`check` raises. A process that is
    still there `grace_s` later, because it waits in a collective for the lost rank, is ended with exit code 1. Once
    `check` has raised, it has half of `grace_s` from then on, if that is more, to save what it can. :meth:`stop` lifts
    the deadline.

    Args:
        store: Store of the default process group; a connection of its own is opened to it. May be None in a world of
            one.
        rank: This rank.
        world_size: Number of ranks. Each must start a liaison, and equally often where there are several in turn.
        patience_s: Seconds of silence after which a rank is lost.
        grace_s: Seconds that a process has to leave by itself once a rank is lost.
        beat_s: Seconds between beats.
        leave_s: Seconds that :meth:`stop` may take; rank 0, which keeps the store, waits in it for the others to leave.
        stall_s: Seconds without progress after which this rank gives itself up; None lets it take any time.
        children: The processes that this rank launched, each of them a rank.
        prefix: Prefix of the keys in the store.
        label: Who speaks, in the lines on standard error.

    Raises:
        ValueError: If there is no store for several ranks.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        patience_s: float = 30.0,
        grace_s: float = 20.0,
        beat_s: float = 1.0,
        leave_s: float = 10.0,
        stall_s: float | None = None,
        children: Callable[[], Sequence[subprocess.Popen[Any]]] = lambda: (),
        prefix: str = "liaison",
        label: str = "MultiTicketStrategy",
    ) -> None:
        if store is None and world_size > 1:
            raise ValueError(f"store is None and world_size is {world_size}: pass the store of the process group.")
        self.rank = rank
        self.world_size = world_size
        client = StoreClient(HashStore() if store is None else store, give_up_s=min(3.0, patience_s / 2))
        exchange = Exchange(client, rank, world_size, prefix)
        watch = Watch(exchange, patience_s, children)
        self._contact = Contact(
            exchange, watch, grace_s=grace_s, beat_s=beat_s, leave_s=leave_s, stall_s=stall_s, label=label
        )

    def start(self) -> None:
        """Joins the others and returns without waiting for them."""
        self._contact.start()

    def stop(self) -> None:
        """Takes leave: what was posted is sent, and the others do not miss this rank. May be called again.

        Rank 0 waits until the others have left, for `leave_s` at most; when a rank is lost, only until they know.
        Nothing is watched afterwards, and the deadline of a lost rank is lifted.
        """
        self._contact.stop()

    def doing(self, text: str) -> None:
        """Says what this rank is at, for the messages of the others."""
        self._contact.beat.doing = text[:200]
        self._contact.hurry()

    def progress(self) -> None:
        """Says that this rank has come further; while it waits for others by :meth:`wait_for_all`, it has."""
        self._contact.progress()

    def set_status(self, status: dict[str, Any]) -> None:
        """Replaces what :meth:`statuses` shows of this rank on rank 0.

        Raises:
            TypeError: If it is not JSON.
            ValueError: If it is larger than some KiB.
        """
        text = encode(status)
        if len(text) > _STATUS_LIMIT:
            raise ValueError(
                f"a status of {len(text)} characters was set; at most {_STATUS_LIMIT} are carried. Post what is larger."
            )
        self._contact.beat.status = json.loads(text)  # a copy: the caller's may change while it is sent

    def post(self, message: dict[str, Any]) -> None:
        """Sends a message to rank 0 with one of the next beats; never waits.

        Raises:
            TypeError: If it is not JSON.
            ValueError: If it is larger than some MiB.
        """
        if self.rank == 0:
            self._contact.inbox.feed(0, encode(message) + "\n")
        elif self._contact.running:
            self._contact.outbox.put(message)

    def mark(self, event: str) -> None:
        """Says that this rank has reached an event."""
        beat = self._contact.beat
        if event not in beat.marks:
            beat.marks = [*beat.marks, event]
        self._contact.hurry()

    def request_stop(self) -> None:
        """Asks all ranks to stop; may be called from a signal handler."""
        self._contact.stop_wanted = True

    def failed(self, error: BaseException) -> bool:
        """Says that this rank is going down, and waits some seconds at most for the others to hear.

        An error out of a collective is most often the echo of another rank's end: then the watch has a moment to find
        that one first.

        Returns:
            Whether this rank itself is to blame; False where another one's end is the cause.
        """
        contact = self._contact
        if isinstance(error, RankLostError) or contact.verdict is not None:
            return False
        if not contact.running:
            return True
        self.progress()  # a collective that timed out: its cause is found now
        if _from_a_collective(error) and contact.wait(lambda: contact.verdict is not None, _SETTLE_S):
            return False
        what = f"{type(error).__name__}: {error}".partition("\n")[0][:300].rstrip(": ")
        contact.failure = contact.sentence(self.rank, f"failed: {what}")
        contact.hurry()
        if contact.wait(lambda: contact.verdict is not None, _SETTLE_S) and self.rank == 0:
            # The store may end with this process: the others are to read the verdict first.
            contact.wait(contact.others_need_no_store, _SETTLE_S)
        return True

    def settle(self, event: str, seconds: float, ranks: Collection[int]) -> None:
        """Marks an event, and lets others reach it, too, before this process leaves.

        Rank 0 waits for the given ranks, as far as they are still there. The others wait for all, and not at all where
        a rank is lost: only rank 0 can tell who is left.

        Args:
            event: The event.
            seconds: How long to wait at most.
            ranks: Those for whom rank 0 waits. One that may stand in a collective with rank 0 must not be among them.
        """
        contact = self._contact
        if not contact.running:
            return
        self.mark(event)
        contact.extend(seconds + contact.grace_s / 2)
        if self.rank == 0:
            contact.wait(lambda: contact.have_settled(event, ranks), seconds)
            return
        contact.wait(
            lambda: contact.verdict is not None or contact.exchange.bulletin.left or self.reached(event), seconds
        )

    def extend(self, seconds: float) -> None:
        """Ends this process no earlier than in so many seconds, whoever is lost: it is not blocked, it saves."""
        self._contact.extend(seconds)

    @property
    def lost(self) -> str | None:
        """Why the run cannot go on; None while all are well."""
        return self._contact.verdict

    @property
    def lost_rank(self) -> int | None:
        """The rank that is lost; None where there is none, or where it is the store that is gone."""
        found = re.match(r"rank (\d+)", self._contact.verdict or "")
        return None if found is None else int(found[1])

    @property
    def stop_requested(self) -> bool:
        """Whether some rank has asked all to stop."""
        return self._contact.stop_wanted or self._contact.exchange.stop

    def check(self) -> None:
        """Raises once a rank is lost.

        Raises:
            RankLostError: Names the rank, what it was doing, and why it is lost.
        """
        contact = self._contact
        verdict = contact.verdict
        if verdict is not None:
            contact.extend(contact.grace_s / 2)
            raise RankLostError(f"{verdict}. Rank {self.rank} cannot go on without it.")

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """On rank 0: (sender, message) for all that arrived since the last call, in order per sender."""
        return self._contact.inbox.take()

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The latest status of each rank that has set one: of all on rank 0, elsewhere of this rank alone."""
        beats = self._contact.exchange.beats if self.rank == 0 else {}
        latest = {**beats, self.rank: self._contact.beat}
        return {rank: beat.status for rank, beat in latest.items() if beat.status}

    def wait_for_all(self, event: str, meanwhile: Callable[[], None] = lambda: None, poll_s: float = 0.2) -> bool:
        """Waits until every rank has marked an event, however long that takes, without a collective.

        Args:
            event: The event; this rank's own mark is needed, too.
            meanwhile: Called at each poll.
            poll_s: Seconds between polls.

        Returns:
            True; False if a stop was requested first. All ranks are told the same.

        Raises:
            RankLostError: If a rank is lost, or has left without reaching the event.
        """
        while event not in (bulletin := self._contact.exchange.bulletin).agreed:
            self.check()
            if bulletin.stop:
                return False
            self.reached(event)
            self.progress()
            meanwhile()
            time.sleep(poll_s)
        return True

    def reached(self, event: str) -> bool:
        """Whether every rank has marked an event.

        Raises:
            RankLostError: If a rank has left without reaching it.
        """
        bulletin = self._contact.exchange.bulletin
        if bulletin.missing.get(event) == 0:
            return True
        deserter = 0 if bulletin.left else bulletin.deserted.get(event)
        if deserter is not None and self.lost is None:
            raise RankLostError(
                f"rank {deserter} has left without reaching '{event}', for which rank {self.rank} waits."
            )
        return False


def _from_a_collective(error: BaseException) -> bool:
    """Whether an error may come out of a collective: gloo and NCCL raise plain RuntimeErrors, too."""
    return isinstance(error, DistError) or any(sign in str(error) for sign in ("gloo", "NCCL", "Connection closed by"))
