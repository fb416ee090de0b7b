"""Which ranks are to be taken for lost."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_earlybird.parallel.exchange import Exchange
from lightning_earlybird.parallel.store import kept_by_agent
from lightning_earlybird.parallel.vitals import Card, how_it_ended, state_of

UNKNOWN = -1  # a launched process that ended before it said which rank it is

_LENIENCY = 10  # times the patience for a process that is seen to live
_SETTLE_S = 3.0  # seconds for which a better explanation of a process's end is waited for
_SUSPENDED_S = 2.0  # seconds between two looks, a fraction of a second apart, that tell that this process was suspended


class Watch:
    """Suspicions of one rank; it looks at processes and clocks and never waits for the store.

    Rank 0 watches all ranks. The others watch rank 0, and the ranks of their own host where rank 0 cannot see these.

    Args:
        exchange: What was read from the store; another thread reads it.
        patience_s: Seconds of silence after which a rank is suspected.
        children: The processes that this rank launched.
    """

    def __init__(
        self, exchange: Exchange, patience_s: float, children: Callable[[], Sequence[subprocess.Popen[Any]]]
    ) -> None:
        self.suspects: dict[int, str] = {}  # rank -> why, as the end of a sentence
        self._exchange = exchange
        self._patience_s = patience_s
        self._children = children
        self._own = Card.own()
        self._looked = self._answered = time.monotonic()
        self._pulses: dict[int, tuple[int, float]] = {}  # rank -> number of its last beat, when that was first seen
        self._excused: set[int] = set()
        self._seen: dict[int, float] = {}  # when a launched rank without a return code was first suspected
        self._lock = threading.Lock()

    def note_round(self) -> None:
        """Takes note that the store has just been read."""
        exchange, now = self._exchange, time.monotonic()
        numbers = {rank: beat.number for rank, beat in exchange.beats.items()} if exchange.rank == 0 else {}
        if exchange.rank > 0:
            numbers[0] = exchange.bulletin.number
        with self._lock:
            self._answered = now
            for rank, number in numbers.items():
                if number and self._pulses.get(rank, (0, 0.0))[0] != number:
                    self._pulses[rank] = (number, now)

    def look(self) -> float:
        """Brings the suspicions up to date.

        Returns:
            Seconds for which this process was suspended since the last look: all clocks are put forward by them, since
            the others have most likely been suspended with it (Ctrl-Z, a scheduler's preemption, a laptop's lid).
        """
        now = time.monotonic()
        with self._lock:
            gap = now - self._looked
            self._looked = now
            if gap > _SUSPENDED_S:
                self._answered = min(now, self._answered + gap)
                self._pulses = {rank: (number, min(now, since + gap)) for rank, (number, since) in self._pulses.items()}
        seen = {rank: why for rank in self._watched() if (why := self._why(rank)) is not None}
        ended, unended = self._ask_children()
        # A return code says more than what is seen from outside, and comes later: a process is a zombie as soon as its
        # main thread has ended, and has a code once all have.
        early = {rank for rank in unended & seen.keys() if now - self._seen.setdefault(rank, now) < _SETTLE_S}
        self.suspects = {rank: why for rank, why in seen.items() if rank not in early} | ended
        return gap if gap > _SUSPENDED_S else 0.0

    def excuse(self, rank: int) -> None:
        """Takes note that a rank has left rightly: that its process is gone means nothing."""
        self._excused.add(rank)
        self.suspects.pop(rank, None)

    def cut_off(self) -> str | None:
        """What has become of the store, as the end of a sentence; None while it may still answer."""
        silence = time.monotonic() - self._answered
        if silence > self._patience_s:
            return f"has not answered for {silence:.0f} s"
        # Processes forked by rank 0, such as the workers of a DataLoader, may hold its sockets open for a while.
        closed = self._exchange.client.cut() or silence > _SETTLE_S
        if closed and not kept_by_agent() and self._state(0) == "gone":
            return "has ended with its process"
        return None

    def _watched(self) -> list[int]:
        exchange = self._exchange
        if exchange.rank == 0:
            return [rank for rank in exchange.beats if rank > 0 and not self._has_left(rank)]
        watched = [] if exchange.bulletin.left else [0]
        if self._state(0) is None:
            watched += [rank for rank in exchange.cards if rank not in (0, exchange.rank, *self._excused)]
        return watched

    def _has_left(self, rank: int) -> bool:
        beat = self._exchange.beats.get(rank)
        return rank in self._excused or (beat is not None and beat.left)

    def _why(self, rank: int) -> str | None:
        state = self._state(rank)
        if state == "gone":
            return "is gone: its process has ended"
        silence = self._silence(rank)
        if silence <= self._patience_s * (_LENIENCY if state == "alive" else 1):
            return None
        note = " (its process is stopped)" if state == "stopped" else ""
        return f"has given no sign of life for {silence:.0f} s{note}"

    def _ask_children(self) -> tuple[dict[int, str], set[int]]:
        """How launched processes ended, and the ranks that have not; asking also clears zombies away."""
        ended, unended = {}, set()
        ranks = {card.pid: rank for rank, card in self._exchange.cards.items() if self._own.sees(card)}
        for child in self._children():
            returncode, rank = child.poll(), ranks.get(child.pid)
            if rank is not None and returncode is None:
                unended.add(rank)
            elif rank is not None and returncode is not None and not self._has_left(rank):
                ended[rank] = f"is gone: {how_it_ended(returncode)}"
            elif rank is None and returncode is not None:
                who = f"process {child.pid}, which rank {self._exchange.rank} launched,"
                ended[UNKNOWN] = f"{who} ended before it joined: {how_it_ended(returncode)}"
        return ended, unended

    def _state(self, rank: int) -> str | None:
        card = self._exchange.cards.get(rank)
        return state_of(card) if card is not None and self._own.sees(card) else None

    def _silence(self, rank: int) -> float:
        """Seconds without a new beat, up to the last time that the store was read."""
        with self._lock:
            pulse = self._pulses.get(rank)
            return 0.0 if pulse is None else self._answered - pulse[1]
