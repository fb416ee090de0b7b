import errno
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from killing import killed_before, killed_in_writing, started
from torch import nn

from lightning_earlybird import durable
from lightning_earlybird.durable import file_written_aside, settle, sweep, written_aside
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.tickets import check_target, load_ensemble, save_ensemble

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are killed by signals")

DAY_S = 24 * 3600


def write(path: Path, content: bytes) -> None:
    with file_written_aside(path) as file:
        file.write(content)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def save(directory: Path, value: float) -> None:
    """An ensemble of two tickets whose weights all have one value."""
    tickets = [network() for _ in range(2)]
    for parameter in nn.ModuleList(tickets).parameters():
        nn.init.constant_(parameter, value)
    ensemble = TicketEnsemble(
        tickets, TimestepPartition.of([(0, 500, 0.0), (500, 1000, 0.0)]), TimestepArgument("t", 1)
    )
    save_ensemble(directory, ensemble, denoiser=None, edits=[{}, {}], masks=None, facts=None, sample_shape=None)


def saved_value(directory: Path) -> float:
    values = {
        float(value)
        for value in torch.cat([p.detach().flatten() for p in load_ensemble(directory, network).parameters()])
    }
    (value,) = values
    return value


def left(folder: Path) -> list[str]:
    """What lies in a folder under hidden names."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("existing", [True, False])
def test_a_file_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path: Path, existing: bool) -> None:
    seen, killed, act = set(), True, 0
    while killed:
        folder = tmp_path / str(act)
        folder.mkdir()
        path = folder / "x.ckpt"
        if existing:
            write(path, b"old")
        killed = killed_before(act, lambda path=path: write(path, b"new"))
        seen.add(path.read_bytes() if path.exists() else None)
        assert set(folder.iterdir()) - {path} == {folder / name for name in left(folder)}
        write(folder / "y.ckpt", b"another")
        assert left(folder) == []
        act += 1
    assert act > 4
    assert seen == {b"old" if existing else None, b"new"}


@pytest.mark.parametrize("existing", [True, False])
def test_an_ensemble_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path: Path, existing: bool) -> None:
    save(tmp_path / "warm", 0.0)  # imports and caches, which would be acts, too
    seen, healed, killed, act = set(), 0, True, 0
    while killed:
        folder = tmp_path / str(act)
        folder.mkdir()
        target = folder / "switch"
        if existing:
            save(target, 1.0)
        killed = killed_before(act, lambda target=target: save(target, 2.0))
        healed += existing and not target.exists()
        if existing or not killed:
            # Reading heals; what is looked at first, before writing, does so, too.
            seen.add(saved_value(target))
        check_target(target)
        save(target, 3.0)
        assert saved_value(target) == 3.0
        assert left(folder) == []
        act += 1
    assert act > 10
    assert seen == ({1.0, 2.0} if existing else {2.0})
    assert healed == existing  # the one moment between two renames


def test_a_process_killed_while_healing_leaves_what_can_be_healed(tmp_path: Path) -> None:
    killed, act = True, 0
    while killed:
        folder = tmp_path / str(act)
        folder.mkdir()
        target = folder / "switch"
        cut_between_renames(target)
        killed = killed_before(act, lambda target=target: settle(target))
        assert (target / "content").read_text() == "new" if target.exists() else True
        settle(target)
        assert (target / "content").read_text() == "new"
        sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["switch"]
        act += 1
    assert act > 2


def cut_between_renames(target: Path) -> None:
    """What a process leaves that is killed when the former directory has gone and the new one has not yet come."""

    def replace(content: str) -> None:
        with written_aside(target) as aside:
            (aside / "content").write_text(content)

    replace("old")
    for act in range(100):
        killed_before(act, lambda: replace("new"))
        if not target.exists():
            return
        sweep(target.parent)
    raise AssertionError("no such moment")


def test_a_file_and_an_ensemble_are_the_old_ones_where_the_process_dies_in_the_middle_of_writing(
    tmp_path: Path,
) -> None:
    write(tmp_path / "x.ckpt", b"old")
    save(tmp_path / "switch", 1.0)
    sizes = [0, 1, 1000, 8192, 16000]
    for size in sizes:  # a ticket has 16,640 bytes of weights
        assert killed_in_writing(size, lambda: write(tmp_path / "x.ckpt", bytes(20000)))
        assert killed_in_writing(size, lambda: save(tmp_path / "switch", 2.0))
        assert (tmp_path / "x.ckpt").read_bytes() == b"old"
        assert saved_value(tmp_path / "switch") == 1.0
    assert not killed_in_writing(30000, lambda: write(tmp_path / "x.ckpt", bytes(20000)))
    assert left(tmp_path) == []


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_aside(tmp_path: Path) -> None:
    write(tmp_path / "x.ckpt", b"old")
    with pytest.raises(ZeroDivisionError), file_written_aside(tmp_path / "x.ckpt") as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert (tmp_path / "x.ckpt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_what_is_written_aside_is_no_checkpoint_by_its_name(tmp_path: Path) -> None:
    with file_written_aside(tmp_path / "last.ckpt"):
        (name,) = left(tmp_path)
    assert not name.endswith(".ckpt")
    assert list(tmp_path.glob("*.ckpt")) == [tmp_path / "last.ckpt"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    write(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_new_file_may_be_read_by_whom_others_may(tmp_path: Path) -> None:
    write(tmp_path / "new", b"new")
    (tmp_path / "plain").write_bytes(b"plain")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_another_thread_or_a_living_process_writes_stays(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def others() -> None:
        with written_aside(tmp_path / "theirs"):
            os.write(writing, b"begun")
            time.sleep(60)

    other = started(others)
    assert os.read(reading, 5) == b"begun"
    with file_written_aside(tmp_path / "mine") as file:
        thread = threading.Thread(target=sweep, args=(tmp_path,))
        thread.start()
        thread.join()
        assert len(left(tmp_path)) == 2
        file.write(b"mine")
    assert len(left(tmp_path)) == 1
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_another_machine_left_goes_after_a_day(tmp_path: Path, kind: str) -> None:
    leftover = tmp_path / ".x.00000000-1-0123456789ab.partial"
    leftover.mkdir() if kind == "directory" else leftover.touch()
    sweep(tmp_path)
    assert leftover.exists()
    os.utime(leftover, (0, time.time() - DAY_S - 60))
    sweep(tmp_path)
    assert not leftover.exists()


def test_what_another_machine_was_replacing_is_put_in_place_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "switch"
    cut_between_renames(target)
    monkeypatch.setattr(durable, "_place", lambda: "00000000")
    settle(target, patience_s=0.01)
    assert not target.exists()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    settle(target)
    assert (target / "content").read_text() == "new"


def test_what_an_earlier_process_of_the_same_number_left_goes_at_once(tmp_path: Path) -> None:
    leftover = tmp_path / f".x.{durable._place()}-{os.getpid()}-0123456789ab.partial"
    leftover.touch()
    sweep(tmp_path)
    assert not leftover.exists()


def test_files_of_others_stay_however_similar_their_names(tmp_path: Path) -> None:
    names = [".x.partial", "x.00000000-1-0123456789ab.partial", ".x.0-1-2.partial", ".x.ckpt", "y.former"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_reader_waits_for_a_replacement_that_goes_on_at_this_moment(tmp_path: Path) -> None:
    target = tmp_path / "switch"
    former = tmp_path / f".switch.{durable._place()}-{os.getppid()}-0123456789ab.former"  # of a process that lives
    former.mkdir()
    timer = threading.Timer(0.2, target.mkdir)
    timer.start()
    settle(target, patience_s=30)
    assert target.exists()
    timer.join()
    target.rmdir()
    settle(target, patience_s=0.05)
    assert not target.exists()
    assert former.exists()


def test_a_place_is_a_machine_since_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    durable._place.cache_clear()
    here = durable._place()
    durable._place.cache_clear()
    assert durable._place() == here
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    durable._place.cache_clear()
    assert durable._place() != here
    durable._place.cache_clear()


def test_a_file_system_that_cannot_sync_directories_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    number = errno.EINVAL

    def refusing(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    write(tmp_path / "x.ckpt", b"new")
    assert (tmp_path / "x.ckpt").read_bytes() == b"new"
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path / "x.ckpt", b"newer")
