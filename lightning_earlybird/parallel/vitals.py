"""Whether another process of this machine lives, told from outside it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["alive", "stopped", "gone"]


@dataclass(frozen=True)
class Card:
    """Who a process is, in words that others on the same machine can check.

    Attributes:
        host: Host name, for people.
        pid: Process id, as the process itself sees it.
        started: Clock ticks from boot to the start of the process: a pid that is given out again starts later.
        kernel: Id of this boot of this machine. Host names repeat ("localhost"), and so does the name of the first pid
            namespace; these ids do not.
        namespace: The pid namespace in which `pid` means something; containers on one machine have their own.
    """

    host: str
    pid: int
    started: str = ""
    kernel: str = ""
    namespace: str = ""

    @classmethod
    def own(cls) -> Card:
        """The card of the calling process."""
        pid = os.getpid()
        stat = _stat(pid)
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux: the host name must do
            kernel = namespace = ""
        return cls(socket.gethostname(), pid, stat[1] if stat else "", kernel, namespace)

    def sees(self, other: Card) -> bool:
        """Whether the pid on the other card can be looked up by the process whose card this is."""
        # Windows has no signal 0: os.kill would end the process that it asks about.
        same = (self.host, self.kernel, self.namespace) == (other.host, other.kernel, other.namespace)
        return same and sys.platform != "win32"


def state_of(card: Card) -> State:
    """State of a process on this machine; only for cards that one's own :meth:`Card.sees`.

    A zombie is gone: it keeps its pid until its parent asks for the exit code, and does nothing any more.
    """
    if card.started:
        stat = _stat(card.pid)
        if stat is None or stat[1] != card.started or stat[0] in "ZXx":
            return "gone"
        return "stopped" if stat[0] in "Tt" else "alive"
    try:
        os.kill(card.pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:  # it exists, under another user
        pass
    return "alive"


def how_it_ended(returncode: int) -> str:
    """An exit code as :class:`subprocess.Popen` gives it, in words."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _stat(pid: int) -> tuple[str, str] | None:
    """State letter and start time from the kernel's table of processes; None where it has no such process."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
    fields = line.rpartition(")")[2].split()
    return fields[0], fields[19]
