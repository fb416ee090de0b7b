"""One round of what ranks tell each other through the store.

Each rank writes a beat of its own. Rank 0 reads all beats and writes one bulletin that everybody reads: the traffic
grows with the number of ranks, not with its square. Two notes that any rank may write stand beside it: the verdict that
a rank is lost, and the request to stop.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_earlybird.parallel.mail import Inbox, Outbox
from lightning_earlybird.parallel.store import StoreClient
from lightning_earlybird.parallel.vitals import Card

_PIECES_A_ROUND = 8
_UNREAD_PIECES = 16  # per rank; what is not read yet takes memory on the host that keeps the store
_NO_VERDICT = "-"


@dataclass
class Beat:
    """What a rank says of itself.

    Attributes:
        number: Counts up from one; zero until the first beat.
        doing: What the rank is at, for the messages of others.
        status: Whatever the rank wants to be shown of it.
        marks: The events that it has reached.
        pieces: Pieces of mail that it has sent.
        heard: Whether it has read the verdict.
        left: Whether it has taken its leave: its silence means nothing any more.
    """

    number: int = 0
    doing: str = "starting"
    status: dict[str, Any] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    pieces: int = 0
    heard: bool = False
    left: bool = False


@dataclass
class Bulletin:
    """What rank 0 tells everybody.

    Attributes:
        number: Counts up.
        joined: Whether every rank has been heard of.
        missing: For each event that a rank has reached, how many have not.
        deserted: Events that cannot be reached by all any more, and the first rank that left without.
        stop: Whether a stop was requested.
        agreed: Events that all ranks had reached before that. Both stand in the same note, so that all ranks that wait
            for an event come to the same end, whenever they read it.
        doing: What rank 0 is at.
        left: Whether rank 0 has taken its leave.
    """

    number: int = 0
    joined: bool = False
    missing: dict[str, int] = field(default_factory=dict)
    deserted: dict[str, int] = field(default_factory=dict)
    stop: bool = False
    agreed: list[str] = field(default_factory=list)
    doing: str = "starting"
    left: bool = False


class Exchange:
    """The rounds of one rank.

    Args:
        client: Connection to the store.
        rank: This rank.
        world_size: Number of ranks.
        prefix: Prefix of all keys.
    """

    def __init__(self, client: StoreClient, rank: int, world_size: int, prefix: str) -> None:
        self.client = client
        self.rank = rank
        self.ranks = range(world_size)
        self.beats: dict[int, Beat] = {}  # as last read: of all ranks on rank 0, elsewhere of suspects
        self.cards: dict[int, Card] = {}  # of those who have joined on rank 0; elsewhere of all, once all have
        self.bulletin = Bulletin()
        self.verdict: str | None = None
        self.stop = False
        self._prefix = prefix
        self._marks: list[str] = []  # as last sent
        self._read = dict.fromkeys(self.ranks, 0)  # pieces of mail read, by sender

    def join(self) -> None:
        """Says who one is; rank 0 lays out the keys, since reading one that does not exist blocks."""
        # Ranks join equally often, so that counting one's own times gives all the same number without asking anyone.
        # torchrun may start ranks anew on the same store: they begin to count again.
        attempt = f"{self._prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.client.prefix = f"{attempt}.{self.client.number(f'{attempt}/joined/{self.rank}')}/"
        self.client.set(f"card/{self.rank}", json.dumps(asdict(Card.own())))
        if self.rank == 0:
            for rank in self.ranks:
                self.client.replace(f"beat/{rank}", "", json.dumps(asdict(Beat())))
            self.client.replace("verdict", "", _NO_VERDICT)
            self.client.replace("stop", "", "0")

    def send(self, beat: Beat, outbox: Outbox, leaving: bool = False) -> None:
        """Writes this rank's beat, after as much of its mail as may go; it leaves when none is left.

        An event is marked once all is sent that was posted before it: who waits for all to mark it has their mail.
        """
        marks = beat.marks  # before the mail, to which something may be added meanwhile
        for _ in range(_PIECES_A_ROUND):
            unread = beat.pieces - _UNREAD_PIECES
            if not outbox or (unread >= 0 and self.client.has(f"mail/{self.rank}/{unread}")):
                break
            self.client.set(f"mail/{self.rank}/{beat.pieces}", outbox.take())
            beat.pieces += 1
        beat.left = leaving and not outbox
        beat.number += 1
        if not outbox:
            self._marks = marks
        self.client.set(f"beat/{self.rank}", json.dumps({**asdict(beat), "marks": self._marks}))

    def read(self, inbox: Inbox) -> None:
        """Reads what the others say; on rank 0 their mail too, and the bulletin is written."""
        if self.rank == 0:
            *beats, verdict, stop = self.client.get([*(f"beat/{rank}" for rank in self.ranks), "verdict", "stop"])
            self.beats = {rank: Beat(**json.loads(beat)) for rank, beat in zip(self.ranks, beats, strict=True)}
            self._read_cards([rank for rank, beat in self.beats.items() if beat.number and rank not in self.cards])
            for rank, beat in self.beats.items():
                self._fetch(rank, beat.pieces, inbox)
            self.stop = self.stop or stop == "1"
            self._write_bulletin()
        elif self.bulletin.number or self.client.has("bulletin"):
            bulletin, verdict, stop = self.client.get(["bulletin", "verdict", "stop"])
            self.bulletin = Bulletin(**json.loads(bulletin))
            if self.bulletin.joined and not self.cards:
                self._read_cards(self.ranks)
        else:
            return
        self.verdict = None if verdict == _NO_VERDICT else verdict
        self.stop = self.stop or stop == "1"

    def beat_of(self, rank: int) -> Beat:
        """The latest beat of a rank that has joined."""
        if self.rank > 0:
            self.beats = self.beats | {rank: Beat(**json.loads(self.client.get([f"beat/{rank}"])[0]))}
        return self.beats[rank]

    def judge(self, verdict: str) -> str:
        """Publishes a verdict, unless there is one; returns the one that stands."""
        self.client.replace("verdict", "", _NO_VERDICT)
        self.verdict = self.client.replace("verdict", _NO_VERDICT, verdict)
        return self.verdict

    def ask_to_stop(self) -> None:
        """Publishes the request to stop."""
        self.client.set("stop", "1")
        self.stop = True

    def _read_cards(self, ranks: Sequence[int]) -> None:
        cards = self.client.get([f"card/{rank}" for rank in ranks])
        # A new dictionary: the other thread goes through the old one.
        self.cards = self.cards | {rank: Card(**json.loads(card)) for rank, card in zip(ranks, cards, strict=True)}

    def _fetch(self, rank: int, pieces: int, inbox: Inbox) -> None:
        for piece in range(self._read[rank], pieces):  # one by one: a piece is large, an answer must not be
            key = f"mail/{rank}/{piece}"
            inbox.feed(rank, self.client.get([key])[0])
            self.client.delete(key)
            self._read[rank] = piece + 1

    def _write_bulletin(self) -> None:
        marked = {rank: set(beat.marks) for rank, beat in self.beats.items()}
        bulletin = Bulletin(self.bulletin.number + 1, len(self.cards) == len(self.ranks))
        for event in set().union(*marked.values()):
            without = [rank for rank in self.ranks if event not in marked[rank]]
            bulletin.missing[event] = len(without)
            deserters = [rank for rank in without if self.beats[rank].left]
            if deserters:
                bulletin.deserted[event] = deserters[0]
        bulletin.stop = self.stop
        bulletin.agreed = [
            event
            for event, missing in bulletin.missing.items()
            if missing == 0 and (event in self.bulletin.agreed or not self.bulletin.stop)
        ]
        bulletin.doing, bulletin.left = self.beats[0].doing, self.beats[0].left
        self.client.set("bulletin", json.dumps(asdict(bulletin)))
        self.bulletin = bulletin
