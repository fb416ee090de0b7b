"""The two threads of a rank: one talks to the store, the other watches."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection

from lightning_earlybird.parallel.exchange import Beat, Exchange
from lightning_earlybird.parallel.mail import Inbox, Outbox
from lightning_earlybird.parallel.store import StoreGoneError, kept_by_agent
from lightning_earlybird.parallel.watch import UNKNOWN, Watch

_log = logging.getLogger(__name__)


class Contact:
    """What a rank says, and what it hears.

    A call to the store may hang for as long as the host that keeps it is unreachable or stopped. So one thread makes
    the calls, and another one, which waits for nothing, watches and ends the process where it must.

    Args:
        exchange: Rounds through the store.
        watch: Suspicions.
        grace_s: Seconds from a verdict to the end of the process.
        beat_s: Seconds between rounds.
        leave_s: Seconds that a leave may take.
        stall_s: Seconds without progress of the main thread after which this rank gives itself up; None: never.
        label: Who speaks, in the lines on standard error.

    Attributes:
        beat: What this rank says of itself.
        outbox: Its messages.
        inbox: On rank 0: messages of all.
        verdict: Why the run cannot go on.
        failure: The same, where it is this rank that fails.
        stalled: The same, where this rank gets nowhere.
        stop_wanted: Whether this rank asks all to stop. A plain attribute: a signal handler sets it, and must not wait
            for a lock that the thread it interrupts may hold.
    """

    def __init__(
        self,
        exchange: Exchange,
        watch: Watch,
        *,
        grace_s: float,
        beat_s: float,
        leave_s: float,
        stall_s: float | None,
        label: str,
    ) -> None:
        self.exchange = exchange
        self.watch = watch
        self.grace_s = grace_s
        self.beat_s = beat_s
        self.leave_s = leave_s
        self.stall_s = stall_s
        self.label = label
        self.rank = exchange.rank
        self.beat = Beat()
        self.outbox = Outbox()
        self.inbox = Inbox()
        self.verdict: str | None = None
        self.failure: str | None = None
        self.stalled: str | None = None
        self.stop_wanted = False
        self._pid = 0
        self._deadline = 0.0
        self._progressed = 0.0
        self._leaving = False
        self._storeless = False
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._round = threading.Condition()  # notified after each round
        self._lock = threading.Lock()
        self._reported: set[str] = set()
        self._talking = threading.Thread(target=self._talk, daemon=True, name="liaison-store")
        self._watching = threading.Thread(target=self._keep_watch, daemon=True, name="liaison-watch")

    @property
    def running(self) -> bool:
        """Whether the threads run, in this process: one forked from it has no part in them."""
        return self._pid == os.getpid()

    def start(self) -> None:
        """Joins the others."""
        self.exchange.join()
        self.exchange.send(self.beat, self.outbox)
        self._pid = os.getpid()
        self.progress()
        self._talking.start()
        self._watching.start()
        # A daemon thread that comes out of a store call while the interpreter shuts down aborts the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Leaves."""
        if not self.running:
            return
        self._leaving = True
        self._wake.set()
        if not self._storeless:
            self._talking.join(self.leave_s + 5.0)  # not for ever: the store may not answer
        self._ended.set()
        self._watching.join(5.0)
        self._pid = 0
        self.exchange.client.close()
        atexit.unregister(self.stop)

    def hurry(self) -> None:
        """Has the next round begin at once."""
        self._wake.set()

    def wait(self, until: Callable[[], bool], timeout_s: float) -> bool:
        """Waits for what a round may bring; whether it has."""
        with self._round:
            return self._round.wait_for(until, timeout_s)

    def extend(self, seconds: float) -> None:
        """Ends the process no earlier than in so many seconds: it is not blocked."""
        with self._lock:
            self._deadline = max(self._deadline, time.monotonic() + seconds)

    def progress(self) -> None:
        """Takes note that the main thread has come further."""
        with self._lock:
            self._progressed = time.monotonic()

    def others_need_no_store(self) -> bool:
        """On rank 0: whether all others have left, or are lost, or know that another one is."""
        knowing = self.verdict is not None
        return all(
            beat.left or rank in self.watch.suspects or (knowing and (beat.heard or not beat.number))
            for rank, beat in self.exchange.beats.items()
            if rank > 0
        )

    def have_settled(self, event: str, ranks: Collection[int]) -> bool:
        """On rank 0: whether other ranks have reached an event, or are gone."""
        return all(
            beat.left or event in beat.marks or rank in self.watch.suspects or not beat.number
            for rank, beat in self.exchange.beats.items()
            if rank > 0 and rank in ranks
        )

    def sentence(self, rank: int, why: str) -> str:
        """What is wrong with a rank, as all ranks will read it."""
        card, beat = self.exchange.cards.get(rank), self.exchange.beats.get(rank)
        beat = self.beat if rank == self.rank else beat
        host = "" if card is None else f" on {card.host}"
        doing = beat.doing if beat is not None else self.exchange.bulletin.doing if rank == 0 else ""
        return f"rank {rank}{host}, {doing}, {why}" if doing else f"rank {rank}{host} {why}"

    def _talk(self) -> None:
        leave_by = float("inf")
        while True:
            if self._leaving:
                leave_by = min(leave_by, time.monotonic() + self.leave_s)
            late = time.monotonic() >= leave_by
            try:
                self._one_round(late)
            except StoreGoneError as error:
                if not (self._leaving or self.exchange.bulletin.left):
                    self._without_store(f"is gone ({error})")
                late = True
            except Exception:  # whatever it is, the others must not take this rank for lost because of it
                self._report("keeping in touch with the other ranks")
            with self._round:
                self._round.notify_all()
            if self.beat.left or late:
                break
            self._wake.wait(min(0.2, self.beat_s) if self._leaving else self.beat_s)
            self._wake.clear()
        if self.rank == 0 and not self.others_need_no_store():
            time.sleep(2 * self.beat_s)  # they are to read that rank 0 leaves before its store is gone

    def _one_round(self, late: bool) -> None:
        exchange = self.exchange
        # Suspicions first, then the beats: one that has left rightly said so before its process ended.
        suspects = list(self.watch.suspects.items())
        if self.stop_wanted and not exchange.stop:
            exchange.ask_to_stop()
        if late and self.outbox:
            _log.warning("rank 0 did not read the last messages of rank %d: they are lost.", self.rank)
            self.outbox.clear()
        self.beat.heard = self.verdict is not None
        exchange.send(self.beat, self.outbox, self._leaving and (late or self.rank > 0 or self.others_need_no_store()))
        exchange.read(self.inbox)
        self.watch.note_round()
        verdict = exchange.verdict
        own = self.failure or self.stalled
        if verdict is None and own is not None:
            verdict = exchange.judge(own)
        if verdict is None and not (self._leaving and self.rank > 0):
            for rank, why in suspects:
                if rank != UNKNOWN and exchange.beat_of(rank).left:
                    self.watch.excuse(rank)
                    continue
                verdict = exchange.judge(why if rank == UNKNOWN else self.sentence(rank, why))
                break
        if verdict is not None:
            self._condemn(verdict)

    def _keep_watch(self) -> None:
        while not self._ended.wait(min(0.25, self.beat_s / 2)):
            try:
                self._one_look()
            except Exception:
                self._report("watching the other ranks")
            if self.verdict and not self._leaving and time.monotonic() > self._deadline:
                self._say(f"rank {self.rank} has not left by itself and is ended", f"It stood here:\n{_where()}\n")
                os._exit(1)

    def _one_look(self) -> None:
        suspended_s = self.watch.look()
        if suspended_s:
            with self._lock:
                self._deadline += suspended_s
                self._progressed += suspended_s
        still_s = time.monotonic() - self._progressed
        if not (self.stalled or self.verdict or self._leaving) and self._stalls(still_s):
            self.stalled = self.sentence(self.rank, f"has not come to another batch for {still_s:.0f} s")
            self.hurry()
        if self.verdict is None and (self.watch.suspects or (self.stop_wanted and not self.exchange.stop)):
            self.hurry()
        why = None if self._leaving or self.exchange.bulletin.left else self.watch.cut_off()
        if why is not None:
            self._without_store(why)

    def _stalls(self, still_s: float) -> bool:
        if self.stall_s is None or still_s <= self.stall_s:
            return False
        # One that waits in a collective most likely waits for the one that hangs, which is to be named.
        return still_s > 1.5 * self.stall_s or not _in_collective()

    def _without_store(self, why: str) -> None:
        self._storeless = True
        if kept_by_agent():
            self._condemn(f"the store that torchrun's agent keeps {why}")
        else:
            self._condemn(self.sentence(0, f"is gone: the store that it keeps {why}"))

    def _condemn(self, verdict: str) -> None:
        """Takes note of a verdict, once."""
        with self._lock:
            if self.verdict is not None:
                return
            self._deadline = time.monotonic() + self.grace_s
            self.verdict = verdict
        if verdict != self.failure:  # else this rank's own traceback says it better
            self._say(f"{verdict}. Rank {self.rank} stops")

    def _say(self, what: str, more: str = "") -> None:
        """Writes a line to standard error, and more below, and does not wait for ever where nobody reads it."""

        def write() -> None:
            # On a terminal a progress bar may stand on the line.
            sys.stderr.write(f"{chr(10) if sys.stderr.isatty() else ''}{self.label}: {what}.\n{more}")
            sys.stderr.flush()

        writer = threading.Thread(target=write, daemon=True, name="liaison-line")
        writer.start()
        writer.join(1.0)

    def _report(self, what: str) -> None:
        """Says once what went wrong in a thread that must go on."""
        if what not in self._reported:
            self._reported.add(what)
            _log.exception("%s failed on rank %d; it goes on and says so only once.", what, self.rank)


def _where() -> str:
    """Where the main thread is, as in a traceback."""
    return "".join(traceback.format_list(_main_stack())).rstrip()


def _in_collective() -> bool:
    """Whether the main thread is in a call to `torch.distributed`, or in a backward pass, which may hold one."""
    calls = os.path.join("torch", "distributed", "")
    return any(calls in frame.filename or frame.name == "_engine_run_backward" for frame in _main_stack())


def _main_stack() -> traceback.StackSummary:
    return traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
