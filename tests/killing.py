"""Processes that die at a chosen act upon the file system, or in the middle of writing a file."""

import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

ACTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def _forked(action: Callable[[], object], prepare: Callable[[], None]) -> int:
    """Runs ``action`` in a copy of this process; its exit status, or the negated signal that killed it."""
    with warnings.catch_warnings():
        # There are idle threads in any process that has used PyTorch; the copy needs none of them.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        prepare()
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # What the process of the tests has at exit is not for its copy to run.
        os._exit(status)


def killed_before(act: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a copy of this process, which is killed right before its ``act``-th act upon files.

    Acts are opening, renaming, removing, making a directory, and waiting for the disk. SIGKILL: nothing is cleaned up.

    Returns:
        Whether it was killed: False if there are fewer acts than that.
    """

    def prepare() -> None:
        done = 0

        def count() -> None:
            nonlocal done
            if done == act:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

        sync = os.fsync

        def counted_sync(descriptor: int) -> None:
            count()
            sync(descriptor)

        os.fsync = counted_sync

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ACTS:
                count()

        sys.addaudithook(hook)

    status = _forked(action, prepare)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def killed_in_writing(size: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a copy of this process, which dies when a file that it writes has ``size`` bytes.

    Returns:
        Whether it died: False if no file grows to that size.
    """

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    status = _forked(action, prepare)
    assert status in (0, -signal.SIGXFSZ), status
    return status != 0
