"""Processes that die at a chosen act upon the file system, or in the middle of writing a file."""

import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ACTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def started(action: Callable[[], object]) -> int:
    """Runs ``action`` in a copy of this process, and does not wait for it; its number."""
    with warnings.catch_warnings():
        # There are idle threads in any process that has used PyTorch; the copy needs none of them.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # What the process of the tests has at exit is not for its copy to run.
        os._exit(status)


def _forked(action: Callable[[], object], prepare: Callable[[], None]) -> int:
    """Runs ``action`` in a copy of this process; its exit status, or the negated signal that killed it."""
    pid = started(lambda: (prepare(), action()))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_before(act: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a copy of this process, which is killed right before its ``act``-th act upon files.

    Acts are opening for writing, renaming, removing, making a directory, and waiting for the disk. It is SIGKILL that
    kills, so that nothing is cleaned up.

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
            if event in ACTS or (event == "open" and arguments[2] & WRITES):
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


def differences(one: Any, other: Any, ignored: frozenset[str] = frozenset(), place: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, are not bit for bit the same.

    Args:
        one: Tensors, numbers, strings and containers of these.
        other: What it is compared with.
        ignored: Keys of mappings that are not looked at.
        place: Of both in the whole, for the result.

    Returns:
        The places, empty if both are the same.
    """
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        keys = [key for key in (one | other) if key not in ignored]
        missing = [f"{place}/{key} in one only" for key in keys if key not in one or key not in other]
        both = [key for key in keys if key in one and key in other]
        return missing + [d for key in both for d in differences(one[key], other[key], ignored, f"{place}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for number, pair in pairs for d in differences(*pair, ignored, f"{place}/{number}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and torch.equal(one, other) else [f"{place}: tensors"]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [f"{place}: arrays"]
    return [] if one == other else [f"{place}: {one!r} and {other!r}"]


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
