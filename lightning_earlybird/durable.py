"""Files and directories that appear whole or not at all, at whatever moment the process is killed.

What is being written lies aside, in the same directory, under a hidden name that tells whose it is::

    .NAME.PLACE-PID-TOKEN.partial    being written, or waiting to be removed; never complete as far as others know
    .NAME.PLACE-PID-TOKEN.former     a complete directory whose successor is taking its place at this moment

What a killed process leaves of these, the next one that writes into the directory removes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_ASIDE = re.compile(
    r"\.(?P<name>.+)\.(?P<owner>(?P<place>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{12})\.(?P<kind>partial|former)"
)

# Whether a process of another machine, or of another container, still writes cannot be asked. None pauses for a day in
# writing, nor for a minute between two renames.
_ABANDONED_S = {"partial": 24 * 3600.0, "former": 60.0}

# What this process is writing, in any of its threads.
_writing: set[str] = set()


@contextmanager
def file_written_aside(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write into, which takes the place of ``path`` if and only if the block succeeds.

    Args:
        path: Where the file is to appear; its directory must exist. A file that is there is replaced.

    Yields:
        The file, opened for writing bytes.
    """
    sweep(path.parent)
    # A name that is just short enough for the file system must not become too long.
    label = path.name if len(os.fsencode(path.name)) < 200 else path.name[:40]
    with _ownership() as owner:
        aside = path.parent / f".{label}.{owner}.partial"
        try:
            with aside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync_directory(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Gives an empty directory to write into, which takes the place of ``directory`` if and only if the block succeeds.

    It lies in the same parent, so that the last step is a rename; what was there before is removed after that. There is
    no portable way to exchange two directories at once: a process that is killed between two renames leaves neither in
    place, and :func:`settle` finishes what it began.

    Args:
        directory: Where the files are to appear. Whether it may be replaced is the caller's decision.

    Yields:
        The directory to write into.
    """
    target = directory.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    settle(target)
    sweep(target.parent)
    with _ownership() as owner:
        aside = target.parent / f".{target.name}.{owner}.partial"
        former = target.parent / f".{target.name}.{owner}.former"
        aside.mkdir()
        try:
            yield aside
            for path in aside.iterdir():
                _sync_file(path)
            _sync_directory(aside)
            if target.exists():
                target.rename(former)
            try:
                aside.rename(target)
            except OSError:
                if former.exists():
                    former.rename(target)
                raise
            _sync_directory(target.parent)
            if former.exists():
                former.rename(aside)  # so that what is called "former" is complete, always
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def settle(directory: Path, patience_s: float = 1.0) -> None:
    """Puts a directory in place that was being replaced when the process was killed; without such traces does nothing.

    Call it before a directory of :func:`written_aside` is read or looked at.

    Args:
        directory: The directory, which may be missing.
        patience_s: For how long to wait where its replacement is going on at this moment.
    """
    # Of the path, not of `pathlib`: what cannot even be looked at is the caller's to report.
    target = Path(os.path.realpath(directory))
    if os.path.lexists(target):
        return
    formers = [aside for aside in _asides(target.parent) if aside.kind == "former" and aside.name == target.name]
    for former in sorted(formers, key=lambda aside: aside.touched_s, reverse=True):
        deadline = time.monotonic() + patience_s
        while not former.abandoned and not os.path.lexists(target) and time.monotonic() < deadline:
            time.sleep(0.01)
        if os.path.lexists(target) or not former.abandoned:
            return
        # The successor was complete, and on the disk, before the former one made way for it.
        successor = former.path.with_suffix(".partial")
        with contextlib.suppress(OSError):  # another process does the same, or only reading is allowed here
            (successor if successor.exists() else former.path).rename(target)
            _sync_directory(target.parent)


def sweep(directory: Path) -> None:
    """Removes what killed processes have left aside in a directory.

    Nothing is removed while its process lives. Where that cannot be asked (another machine, another container), what
    has not been touched for a day is removed.

    Args:
        directory: The directory; sub-directories are left alone.
    """
    # What cannot be removed is no reason not to go on.
    with contextlib.suppress(OSError):
        for aside in _asides(directory):
            if aside.kind == "former" and aside.abandoned:
                settle(directory / aside.name)
                if aside.path.exists():
                    aside.path.rename(aside.path.with_suffix(".partial"))
    for aside in _asides(directory):
        if aside.kind == "partial" and aside.abandoned and not aside.path.with_suffix(".former").exists():
            if aside.path.is_dir() and not aside.path.is_symlink():
                shutil.rmtree(aside.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    aside.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Aside:
    """Something that lies aside, as its name tells."""

    path: Path
    name: str
    owner: str
    place: str
    pid: int
    kind: str

    @property
    def touched_s(self) -> float:
        """When it was last written to or, where it is a former directory, given that name."""
        try:
            status = self.path.lstat()
        except OSError:  # removed meanwhile
            return 0.0
        return status.st_ctime if self.kind == "former" else status.st_mtime

    @property
    def abandoned(self) -> bool:
        """Whether surely nobody writes it any more."""
        if self.place == _place() and os.name == "posix":
            # A process may have been given the number that a killed one had, in a container it mostly is.
            alive = self.owner in _writing if self.pid == os.getpid() else _exists(self.pid)
            if not alive:
                return True
        return time.time() - self.touched_s > _ABANDONED_S[self.kind]


def _asides(directory: Path) -> list[_Aside]:
    try:
        paths = sorted(directory.iterdir())
    except OSError:
        return []
    matches = [(path, _ASIDE.fullmatch(path.name)) for path in paths]
    return [
        _Aside(path, match["name"], match["owner"], match["place"], int(match["pid"]), match["kind"])
        for path, match in matches
        if match is not None
    ]


@contextmanager
def _ownership() -> Iterator[str]:
    """The part of a name that tells this process and this act of writing from all others."""
    owner = f"{_place()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    _writing.add(owner)
    try:
        yield owner
    finally:
        _writing.discard(owner)


@functools.cache
def _place() -> str:
    """Within what process numbers mean something: this machine since it was started, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_file(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """Waits until a directory's list of files is on the disk, where there is a way to."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot, and files could be written there all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
