"""Ranks in real processes that are killed, stopped, blocked, failing, or just leave."""

import ctypes
import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from lightning_earlybird.parallel.exchange import Beat, Exchange
from lightning_earlybird.parallel.liaison import Liaison, RankLostError
from lightning_earlybird.parallel.mail import PIECE, Inbox, Outbox
from lightning_earlybird.parallel.store import StoreClient, StoreGoneError
from lightning_earlybird.parallel.vitals import Card, how_it_ended, state_of

# Processes forked from one that has imported torch begin at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lightning_earlybird.parallel.liaison"])

QUICK = {"beat_s": 0.2, "patience_s": 2.0, "grace_s": 6.0, "leave_s": 5.0}


# A process that keeps a store and does nothing else, as torchrun's agent does.
KEEPER = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class Notes:
    """What a rank wants the test to know, with the time."""

    def __init__(self, out: Path, rank: int) -> None:
        self.path = out / f"{rank}.jsonl"

    def __call__(self, **facts: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"at": time.time(), **facts}) + "\n")


def rank_main(act: Callable[..., None], rank: int, world: int, out: Path, port: int, settings: dict[str, Any]) -> None:
    """One rank: `act` between start and stop, as a strategy would do it."""
    errors = os.open(out / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(errors, 2)
    if port:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    elif rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (out / "port.new").write_text(str(store.port))
        (out / "port.new").rename(out / "port")
    else:
        until(lambda: (out / "port").exists())
        store = TCPStore("127.0.0.1", int((out / "port").read_text()), is_master=False, wait_for_workers=False)
    note = Notes(out, rank)
    liaison = Liaison(dist.PrefixStore("default_pg", store), rank, world, **{**QUICK, **settings})
    liaison.start()
    try:
        act(liaison, rank, note)
    except BaseException as error:
        note(error=type(error).__name__, message=str(error))
        liaison.failed(error)
        raise
    finally:
        liaison.stop()
        note(stopped=True)


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class World:
    """The processes of one test."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.processes: list[Any] = []

    def run(
        self, act: Callable[..., None], world: int = 3, port: int = 0, main: Any = rank_main, **settings: Any
    ) -> None:
        for rank in range(world):
            arguments = (act, rank, world, self.out, port, settings)
            self.processes.append(PROCESSES.Process(target=main, args=arguments, daemon=True))
            self.processes[-1].start()

    def notes(self, rank: int, key: str) -> list[Any]:
        path = self.out / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note[key] for note in map(json.loads, lines) if key in note]

    def stderr(self, rank: int) -> str:
        return (self.out / f"{rank}.stderr").read_text()

    def all_work(self) -> None:
        """Waits until every rank has noted that it works, and all have joined."""
        until(lambda: all(self.notes(rank, "works") for rank in range(len(self.processes))))

    def kill(self, rank: int, sign: int = signal.SIGKILL) -> float:
        os.kill(self.processes[rank].pid, sign)
        return time.time()

    def kill_between_questions(self, rank: int) -> float:
        """Kills a rank while no other one waits for an answer of the store: see :func:`questions_can_be_held_up`."""
        with (self.out / "questions").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            killed_at = self.kill(rank)
            self.processes[rank].join(10)  # its connections are closed
        return killed_at

    def ends(self, *ranks: int, within_s: float = 20.0) -> list[int]:
        """Exit codes of ranks, which must end in time."""
        deadline = time.monotonic() + within_s
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def verdict(self, rank: int) -> tuple[str, float]:
        """The message of the rank's RankLostError, and when it was raised."""
        assert self.notes(rank, "error") == ["RankLostError"], self.stderr(rank)
        ((message, at),) = zip(self.notes(rank, "message"), self.notes(rank, "lost_at"), strict=True)
        return message, at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    for process in world.processes:
        if process.exitcode is None:
            process.kill()  # a stopped one, too
        process.join(5)


def train(liaison: Liaison, note: Notes, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    liaison.mark("works")
    liaison.wait_for_all("works", poll_s=0.05)
    note(works=True)
    while time.monotonic() < end:
        time.sleep(0.02)
        try:
            liaison.check()
        except RankLostError:
            note(lost_at=time.time())
            raise


def questions_can_be_held_up(out: Path) -> None:
    """Has this process ask the store only while nobody holds the file `questions` to itself."""
    ask = StoreClient._call

    def held_up(client: StoreClient, act: Callable[[Any], Any]) -> Any:
        with (out / "questions").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return ask(client, act)

    StoreClient._call = held_up


def train_between_questions(liaison: Liaison, rank: int, note: Notes) -> None:
    questions_can_be_held_up(note.path.parent)
    train_a_ticket(liaison, rank, note)


def train_a_ticket(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.doing(f"training ticket {rank} [{rank}00, {rank}99)")
    train(liaison, note)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_is_named_by_all_others_with_what_it_was_doing(world: World, victim: int) -> None:
    world.run(train_between_questions)
    world.all_work()
    killed_at = world.kill_between_questions(victim)
    others = [rank for rank in range(3) if rank != victim]
    assert world.ends(*others) == [1, 1]
    for rank in others:
        message, at = world.verdict(rank)
        assert message.startswith(f"rank {victim} on ") and "ended" in message
        assert f", training ticket {victim} [{victim}00, {victim}99), is gone" in message
        assert at - killed_at < 3.0
        lines = [line for line in world.stderr(rank).splitlines() if line.startswith("MultiTicketStrategy:")]
        assert lines == [f"MultiTicketStrategy: {message.partition('. Rank')[0]}. Rank {rank} stops."]
    if victim == 0:  # torch's own client would print pages on the store that ended with it
        assert "c10d" not in world.stderr(1) + world.stderr(2)


def test_a_store_that_ends_while_it_is_asked_costs_each_rank_one_page_of_torchs_own(world: World) -> None:
    world.run(train_a_ticket)
    world.all_work()
    world.kill(0, signal.SIGSTOP)
    time.sleep(3 * QUICK["beat_s"])  # now both others wait for an answer
    killed_at = world.kill(0)
    assert world.ends(1, 2) == [1, 1]
    for rank in (1, 2):
        message, at = world.verdict(rank)
        assert message.startswith("rank 0 on ") and ", training ticket 0 [000, 099), is gone" in message
        assert at - killed_at < 3.0
        assert world.stderr(rank).count("[c10d]") == 1  # nothing can be done about this one


def test_rank_0_is_missed_even_where_another_process_keeps_the_store(world: World) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world.run(train_under_torchrun, port=store.port)
    world.all_work()
    killed_at = world.kill(0)
    assert world.ends(1, 2) == [1, 1]
    for rank in (1, 2):
        message, at = world.verdict(rank)
        assert message.startswith("rank 0 on ") and ", training ticket 0, is gone: its process has ended" in message
        assert at - killed_at < 3.0


def train_under_torchrun(liaison: Liaison, rank: int, note: Notes) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    liaison.doing(f"training ticket {rank}")
    train(liaison, note)


def test_the_end_of_the_store_of_torchruns_agent_is_told(world: World) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with agent:
        assert agent.stdout is not None
        world.run(train_under_torchrun, world=2, port=int(agent.stdout.readline()))
        world.all_work()
        agent.kill()
        killed_at = time.time()
    assert world.ends(0, 1) == [1, 1]
    for rank in (0, 1):
        message, at = world.verdict(rank)
        assert message.startswith("the store that torchrun's agent keeps is gone (")
        assert at - killed_at < 5.0


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_lost_after_the_patience(world: World, victim: int) -> None:
    world.run(train_a_ticket)
    world.all_work()
    stopped_at = world.kill(victim, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    assert world.ends(*others) == [1, 1]
    for rank in others:
        message, at = world.verdict(rank)
        reason = "has given no sign of life for" if victim else "is gone: the store that it keeps has not answered for"
        assert message.startswith(f"rank {victim} on ") and reason in message
        assert 1.5 < at - stopped_at < 5.0
    if victim:  # it hears of it when it goes on
        world.kill(victim, signal.SIGCONT)
        assert world.ends(victim) == [1]


def rank_main_in_a_container(*arguments: Any) -> None:
    """A rank whose card names a pid namespace that no other has."""
    own = Card(**{**vars(Card.own()), "namespace": f"pid:[{os.getpid()}]"})
    Card.own = lambda: own  # type: ignore
    rank_main(*arguments)


def test_a_pid_of_another_namespace_says_nothing_and_silence_tells(world: World) -> None:
    world.run(train_a_ticket, main=rank_main_in_a_container)
    world.all_work()
    killed_at = world.kill(1)
    assert world.ends(0, 2) == [1, 1]
    for rank in (0, 2):
        message, at = world.verdict(rank)
        assert ", training ticket 1 [100, 199), has given no sign of life for" in message
        assert 1.5 < at - killed_at < 5.0


def test_cards_are_only_good_for_the_same_host_kernel_and_namespace() -> None:
    own = Card.own()
    assert own.sees(own) and own.pid == os.getpid()
    for field in ("host", "kernel", "namespace"):
        assert not own.sees(Card(**{**vars(own), field: "another"}))


def test_a_process_is_alive_stopped_or_gone() -> None:
    code = (
        "import sys; from lightning_earlybird.parallel.vitals import Card; import json; "
        "print(json.dumps(vars(Card.own())), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        card = Card(**json.loads(process.stdout.readline()))
        assert Card.own().sees(card) and state_of(card) == "alive"
        os.kill(card.pid, signal.SIGSTOP)
        until(lambda: state_of(card) == "stopped")
        os.kill(card.pid, signal.SIGCONT)
        until(lambda: state_of(card) == "alive")
        assert state_of(Card(**{**vars(card), "started": "1"})) == "gone"  # the pid of a later process
        assert state_of(Card(card.host, card.pid)) == "alive"  # where there is no table of processes
        process.kill()
        until(lambda: state_of(card) == "gone")  # a zombie: nobody has waited for it yet
        assert process.wait() == -signal.SIGKILL
    assert state_of(card) == "gone" and state_of(Card(card.host, card.pid)) == "gone"
    assert how_it_ended(-9) == "killed by SIGKILL" and how_it_ended(3) == "exit code 3"
    assert how_it_ended(-200) == "killed by signal 200"


def compute(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    note(works=True)
    if rank == 1:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            sum(range(10_000))
    if rank == 2:
        ctypes.PyDLL(None).usleep(3_000_000)  # and keeps Python's lock, so that no thread can beat
    liaison.mark("end")
    assert liaison.wait_for_all("end")
    liaison.check()
    note(well=True)


def test_a_busy_rank_is_not_lost_even_where_it_keeps_pythons_lock(world: World) -> None:
    world.run(compute, patience_s=1.0)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0)
    assert all(world.notes(rank, "well") for rank in range(3))
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


def test_a_run_that_is_suspended_as_a_whole_goes_on_afterwards(world: World) -> None:
    # Nobody can look at the others' processes, so that only the clocks tell.
    world.run(train_for_a_while, main=rank_main_in_a_container, patience_s=1.5)
    world.all_work()
    for rank in range(3):
        world.kill(rank, signal.SIGSTOP)
    time.sleep(3.5)
    for rank in (1, 2, 0):
        world.kill(rank, signal.SIGCONT)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0)
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


def train_for_a_while(liaison: Liaison, rank: int, note: Notes) -> None:
    train(liaison, note, 5.0)  # on a clock that goes on while the process is suspended
    time.sleep(1.5)
    liaison.mark("end")
    assert liaison.wait_for_all("end")


def block_in_a_barrier(liaison: Liaison, rank: int, note: Notes) -> None:
    dist.init_process_group("gloo", init_method=f"file://{note.path.parent}/group", rank=rank, world_size=3)
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    note(works=True)
    if rank != 1:
        dist.barrier()
    time.sleep(60)


def test_a_rank_that_waits_for_a_lost_one_in_a_collective_is_ended(world: World) -> None:
    world.run(block_in_a_barrier, grace_s=2.0)
    world.all_work()
    world.kill(1, signal.SIGSTOP)
    stopped_at = time.time()
    assert world.ends(0, 2) == [1, 1]
    assert 3.0 < time.time() - stopped_at < 8.0  # patience and grace
    for rank in (0, 2):
        assert world.notes(rank, "stopped") == []  # it did not end by itself
        first, second, *where = world.stderr(rank).splitlines()
        assert first.startswith("MultiTicketStrategy: rank 1 on ") and first.endswith(f". Rank {rank} stops.")
        assert second == f"MultiTicketStrategy: rank {rank} has not left by itself and is ended."
        assert where[0] == "It stood here:" and any("in block_in_a_barrier" in line for line in where)


def die_in_a_barrier(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.doing(f"training ticket {rank}")
    block_in_a_barrier(liaison, rank, note)


def test_the_echo_of_a_death_in_a_collective_is_not_taken_for_its_cause(world: World) -> None:
    world.run(die_in_a_barrier)
    world.all_work()
    time.sleep(0.5)
    world.kill(1)
    assert world.ends(0, 2) == [1, 1]
    for rank in (0, 2):
        assert world.notes(rank, "error") == ["RuntimeError"]  # gloo's: the connection was closed
        (line,) = [line for line in world.stderr(rank).splitlines() if line.startswith("MultiTicketStrategy:")]
        assert ", training ticket 1, is gone" in line


def fail(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.doing(f"training ticket {rank}")
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    if rank == FAILING:
        raise RuntimeError("boom\nand what led to it")
    train(liaison, note)


FAILING = 1


def fail_first(liaison: Liaison, rank: int, note: Notes) -> None:
    global FAILING
    FAILING = 0
    fail(liaison, rank, note)


@pytest.mark.parametrize(("act", "failing"), [(fail, 1), (fail_first, 0)])
def test_a_rank_that_fails_is_named_with_its_error(world: World, act: Callable[..., None], failing: int) -> None:
    world.run(act)
    others = [rank for rank in range(3) if rank != failing]
    assert world.ends(0, 1, 2) == [1, 1, 1]
    for rank in others:
        message, _ = world.verdict(rank)
        assert f", training ticket {failing}, failed: RuntimeError: boom. Rank {rank} cannot go on" in message
    assert "MultiTicketStrategy:" not in world.stderr(failing)  # its own traceback says it


def leave_early(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    if rank != 2:
        return
    time.sleep(3.0)
    liaison.check()
    note(well=True)


def test_who_leaves_early_and_rightly_is_not_missed_and_rank_0_waits(world: World) -> None:
    world.run(leave_early, patience_s=1.0)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(2)
    assert world.notes(2, "well") == [True]
    (first, left, last) = (world.notes(rank, "at")[-1] for rank in (1, 2, 0))
    assert left - first > 2.0 and last > left - 0.5
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


def leave_even_earlier(liaison: Liaison, rank: int, note: Notes) -> None:
    train(liaison, note, 3.0 if rank else 0.0)


def test_rank_0_that_cannot_wait_longer_is_not_missed_either(world: World) -> None:
    world.run(leave_even_earlier, leave_s=0.5)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(1)
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


def send_mail(liaison: Liaison, rank: int, note: Notes) -> None:
    slowest = 0.0
    if rank:
        for number in range(3000):
            before = time.perf_counter()
            liaison.post({"number": number, "loss": 1 / 3, "name": "é" * 20})
            slowest = max(slowest, time.perf_counter() - before)
        liaison.post({"large": "x" * (5 * PIECE)})
        liaison.post({"number": 3000})
        liaison.set_status({"steps": 100 * rank})
        note(slowest=slowest)
        liaison.mark("sent")
        return
    liaison.post({"own": float("inf")})
    received: list[tuple[int, dict[str, Any]]] = []
    end = time.monotonic() + 15
    while time.monotonic() < end and sum("number" in message for _, message in received) < 6002:
        received += liaison.receive()
        time.sleep(0.05)
    for sender in (1, 2):
        messages = [message for rank, message in received if rank == sender]
        assert [message["number"] for message in messages if "number" in message] == list(range(3001))
        assert messages[0] == {"number": 0, "loss": 1 / 3, "name": "é" * 20}
        assert messages[3000] == {"large": "x" * (5 * PIECE)}
    assert received[0] == (0, {"own": float("inf")})
    note(statuses=liaison.statuses())


def test_thousands_of_messages_arrive_in_order_and_large_ones_whole(world: World) -> None:
    world.run(send_mail)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0)
    assert world.notes(0, "statuses") == [{"1": {"steps": 100}, "2": {"steps": 200}}]
    assert max(world.notes(1, "slowest") + world.notes(2, "slowest")) < 0.2


def wait_for_the_slow_one(liaison: Liaison, rank: int, note: Notes) -> None:
    polls = []
    if rank == 1:
        time.sleep(2.5)
        note(reached_at=time.time())
    liaison.mark("end")
    assert liaison.wait_for_all("end", lambda: polls.append(1), poll_s=0.1)
    note(passed_at=time.time(), polls=len(polls))


def test_all_wait_for_the_slowest_however_long(world: World) -> None:
    world.run(wait_for_the_slow_one, patience_s=1.0)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0)
    (reached,) = world.notes(1, "reached_at")
    for rank in range(3):
        assert 0 <= world.notes(rank, "passed_at")[0] - reached < 2.0
        assert (world.notes(rank, "polls")[0] > 15) == (rank != 1)


def wait_for_a_deserter(liaison: Liaison, rank: int, note: Notes) -> None:
    if rank != 2:
        liaison.mark("end")
        liaison.wait_for_all("end")


def test_waiting_for_one_that_has_left_is_an_error(world: World) -> None:
    world.run(wait_for_a_deserter)
    assert world.ends(0, 1, 2)[2] == 0
    messages = world.notes(0, "message") + world.notes(1, "message")
    assert any("rank 2 has left without reaching 'end', for which rank" in message for message in messages)


def stop_on_sigterm(liaison: Liaison, rank: int, note: Notes) -> None:
    signal.signal(signal.SIGTERM, lambda *_: liaison.request_stop())
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    note(works=True)
    if rank == 0:
        assert not liaison.wait_for_all("end")  # returns for the stop
    else:
        until(lambda: liaison.stop_requested)
    note(stop_at=time.time())


def test_a_signal_to_one_rank_stops_all(world: World) -> None:
    world.run(stop_on_sigterm, beat_s=1.0)
    world.all_work()
    sent_at = world.kill(2, signal.SIGTERM)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0)
    for rank in range(3):
        assert world.notes(rank, "stop_at")[0] - sent_at < 2.5


def start_again(liaison: Liaison, rank: int, note: Notes) -> None:
    """A second fit in the same process group, after a first one in which everything was said."""
    liaison.mark("end")
    assert liaison.wait_for_all("end")
    liaison.request_stop()
    liaison.stop()
    again = Liaison(liaison._contact.exchange.client._origin, rank, 3, **QUICK)
    again.start()
    assert not again.stop_requested
    if rank == 1:
        time.sleep(1.0)
        note(reached_at=time.time())
    again.mark("end")
    assert again.wait_for_all("end")
    note(passed_at=time.time())
    again.stop()
    again.stop()


def test_a_second_liaison_on_the_same_store_knows_nothing_of_the_first(world: World) -> None:
    world.run(start_again)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.stderr(0) + world.stderr(1)
    (reached,) = world.notes(1, "reached_at")
    assert all(world.notes(rank, "passed_at")[0] >= reached for rank in range(3))
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


LAUNCHING = """
import os, subprocess, sys, time
from torch.distributed import TCPStore
from lightning_earlybird.parallel.liaison import Liaison

rank = int(os.environ.get("LOCAL_RANK", "0"))
children = []
if rank == 0:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"LOCAL_RANK": "1", "PORT": str(store.port)}
    children.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    print(children[0].pid, flush=True)
else:
    time.sleep(float(sys.argv[1]))
    store = TCPStore("127.0.0.1", int(os.environ["PORT"]), is_master=False, wait_for_workers=False)
liaison = Liaison(store, rank, 2, beat_s=0.2, children=lambda: children)
liaison.start()
liaison.doing("searching")
liaison.mark("joined")
if rank == 0:
    print("started", flush=True)
liaison.wait_for_all("joined")
if rank == 0:
    print("joined", flush=True)
while True:
    time.sleep(0.02)
    liaison.check()
"""


@pytest.mark.parametrize("joined", [True, False])
def test_what_killed_a_launched_process_is_told(tmp_path: Path, joined: bool) -> None:
    script = tmp_path / "train.py"
    script.write_text(LAUNCHING)
    command = [sys.executable, str(script), "0" if joined else "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        child = int(main.stdout.readline())
        assert main.stdout.readline() == "started\n"
        if joined:
            assert main.stdout.readline() == "joined\n"
        os.kill(child, signal.SIGKILL)
        _, errors = main.communicate(timeout=20)
    assert main.returncode == 1  # the script does not stop the liaison: that happens as the interpreter shuts down
    if joined:
        assert ", searching, is gone: killed by SIGKILL. Rank 0 stops." in errors
    else:
        told = f"process {child}, which rank 0 launched, ended before it joined: killed by SIGKILL. Rank 0 stops."
        assert f"MultiTicketStrategy: {told}" in errors


def fork_a_worker(liaison: Liaison, rank: int, note: Notes) -> None:
    if rank == 0 and os.fork() == 0:
        time.sleep(8)
        os._exit(0)
    train_a_ticket(liaison, rank, note)


def test_a_worker_that_holds_the_sockets_of_rank_0_does_not_hide_its_end(world: World) -> None:
    world.run(fork_a_worker, patience_s=20.0)
    world.all_work()
    killed_at = world.kill(0)
    assert world.ends(1, 2) == [1, 1]
    for rank in (1, 2):
        message, at = world.verdict(rank)
        assert "is gone: the store that it keeps has ended with its process" in message
        assert at - killed_at < 5.0


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_store_call_that_fails_is_made_again_over_a_new_connection(server: TCPStore) -> None:
    client = StoreClient(server, give_up_s=1.0)
    client.set("key", "value")
    assert client.get(["key"]) == ["value"]

    class Broken:
        def multi_get(self, keys: list[str]) -> list[bytes]:
            raise dist.DistNetworkError("Connection reset by peer")

    client._client = Broken()  # type: ignore[assignment]
    assert client.get(["key"]) == ["value"]
    assert not isinstance(client._client, Broken) and not client.cut()
    client.close()


def test_stores_of_older_torch_that_cannot_be_cloned_get_a_new_client(server: TCPStore) -> None:
    class Older:
        underlying_store = server

    client = StoreClient(Older())  # type: ignore[arg-type]
    assert isinstance(client._client, TCPStore) and client._client is not server
    client.set("key", "value")
    assert server.get("key") == b"value"
    client.close()


def test_a_store_that_is_gone_is_told_within_seconds() -> None:
    command = [sys.executable, "-c", KEEPER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        client = StoreClient(TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), give_up_s=1.0)
        client.set("key", "value")
        assert not client.cut()
        process.kill()
        process.wait()
        assert until(client.cut)
    began = time.monotonic()
    with pytest.raises(StoreGoneError, match="closed the connection"):
        client.get(["key"])
    assert time.monotonic() - began < 3.0
    client.close()


def test_a_store_without_a_server_serves_too(tmp_path: Path) -> None:
    client = StoreClient(dist.FileStore(str(tmp_path / "store"), 1))
    client.set("key", "value")
    assert client.get(["key"]) == ["value"] and client.has("key") and not client.cut()
    assert client.replace("other", "", "first") == "first" and client.replace("other", "second", "third") == "first"
    client.close()


def test_the_thread_survives_an_error_and_says_it_once(server: TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[Any]:
        raise OSError("too many open files")

    liaison = Liaison(server, 0, 2, **QUICK, children=broken)
    other = Liaison(server, 1, 2, **QUICK)
    liaison.start()
    other.start()
    other.post({"step": 1})
    assert until(liaison.receive) == [(1, {"step": 1})]
    time.sleep(0.5)
    other.stop()
    liaison.stop()
    (record,) = caplog.records
    assert "watching the other ranks failed on rank 0" in record.getMessage()
    assert "too many open files" in str(record.exc_info)


def test_messages_that_pile_up_are_dropped_from_the_oldest_with_one_warning() -> None:
    outbox, inbox = Outbox(limit=100), Inbox()
    with pytest.warns(UserWarning, match="more than 100 characters wait to be sent to rank 0") as caught:
        for number in range(50):
            outbox.put({"number": number})
    assert len(caught) == 1
    while outbox:
        inbox.feed(3, outbox.take())
    assert inbox.take() == [(3, {"number": number}) for number in range(43, 50)]
    assert inbox.take() == []


def test_a_message_may_be_cut_anywhere() -> None:
    outbox, inbox = Outbox(), Inbox()
    messages = [{"text": "é\n" * size} for size in (0, 1, 100)]
    for message in messages:
        outbox.put(message)
    for character in outbox.take():
        inbox.feed(1, character)
    assert [message for _, message in inbox.take()] == messages


def test_what_cannot_be_sent_is_refused_where_it_is_posted(server: TCPStore) -> None:
    liaison = Liaison(server, 1, 2, **QUICK)
    liaison.start()
    with pytest.raises(TypeError, match=r"cannot be sent to another rank.*Pass plain numbers"):
        liaison.post({"loss": object()})
    with pytest.raises(ValueError, match=r"a message of \d+ characters was posted; at most \d+ are carried"):
        liaison.post({"image": "x" * 9_000_000})
    with pytest.raises(ValueError, match=r"a status of \d+ characters was set; at most 8192 are carried"):
        liaison.set_status({"image": "x" * 9_000})
    liaison.stop()


def test_several_ranks_need_a_store() -> None:
    with pytest.raises(ValueError, match="store is None and world_size is 2: pass the store of the process group"):
        Liaison(None, 0, 2)


def test_a_world_of_one_needs_no_store() -> None:
    liaison = Liaison(None, 0, 1, **QUICK)
    liaison.start()
    liaison.set_status({"step": 1})
    liaison.post({"step": 1})
    liaison.mark("end")
    assert liaison.wait_for_all("end", poll_s=0.02)
    assert liaison.receive() == [(0, {"step": 1})] and liaison.statuses() == {0: {"step": 1}}
    liaison.check()
    assert liaison.lost is None and not liaison.stop_requested
    liaison.request_stop()
    assert liaison.stop_requested and not liaison.wait_for_all("never")
    liaison.stop()


def get_nowhere(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.doing(f"training ticket {rank}")
    dist.init_process_group("gloo", init_method=f"file://{note.path.parent}/group", rank=rank, world_size=3)
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    note(works=True)
    since = time.monotonic()
    if rank == 2:
        dist.barrier()  # for which the one that hangs is missing
    time.sleep(0.5)
    liaison.progress()
    while rank == 1 and time.monotonic() < since + 60:
        pass  # an endless loop in a data set, say: the threads go on
    try:
        liaison.wait_for_all("end")  # and whoever waits does get somewhere
    except RankLostError:
        note(lost_at=time.time(), waited_s=time.monotonic() - since)
        raise


def test_a_rank_whose_main_thread_hangs_is_given_up_and_says_where_it_hangs(world: World) -> None:
    world.run(get_nowhere, stall_s=3.0, grace_s=1.0)
    world.all_work()
    assert world.ends(0, 1, 2) == [1, 1, 1]
    message, _ = world.verdict(0)
    assert message.startswith("rank 1 on ") and ", training ticket 1, has not come to another batch for 3 s" in message
    assert 2.5 < world.notes(0, "waited_s")[0] < 8.0
    assert world.stderr(2).startswith(f"MultiTicketStrategy: {message.partition('. Rank')[0]}. Rank 2 stops.")
    assert "in get_nowhere" in world.stderr(1).partition("rank 1 has not left by itself and is ended.")[2]


def come_further_slowly(liaison: Liaison, rank: int, note: Notes) -> None:
    liaison.mark("works")
    assert liaison.wait_for_all("works")
    for _ in range(5 if rank == 1 else 0):
        time.sleep(0.6)
        liaison.progress()
    liaison.mark("end")
    assert liaison.wait_for_all("end")


def test_a_rank_that_comes_further_may_take_any_time_and_so_may_those_that_wait_for_it(world: World) -> None:
    world.run(come_further_slowly, stall_s=1.5)
    assert world.ends(0, 1, 2) == [0, 0, 0]
    assert [world.stderr(rank) for rank in range(3)] == ["", "", ""]


def stop_about_the_time_of_the_end(liaison: Liaison, rank: int, note: Notes) -> None:
    draw = random.Random(rank)
    for attempt in range(12):
        liaison.mark("ready")
        assert liaison.wait_for_all("ready", poll_s=0.02)
        time.sleep(draw.uniform(0, 0.4))
        liaison.mark("end")
        if rank == 1:
            time.sleep(draw.uniform(0, 0.4))
            liaison.request_stop()
        note(all_there=liaison.wait_for_all("end", poll_s=draw.uniform(0.01, 0.1)))
        liaison.stop()
        if attempt < 11:
            liaison = Liaison(liaison._contact.exchange.client._origin, rank, 3, **QUICK)
            liaison.start()
    liaison.stop()


def test_all_ranks_see_the_same_of_a_stop_and_an_end_at_the_same_time(world: World) -> None:
    world.run(stop_about_the_time_of_the_end)
    assert world.ends(0, 1, 2, within_s=60) == [0, 0, 0], world.stderr(0) + world.stderr(1)
    seen = [world.notes(rank, "all_there") for rank in range(3)]
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == 12


def test_what_is_reached_after_a_stop_is_known_counts_for_nobody() -> None:
    store, outbox, inbox = dist.HashStore(), Outbox(), Inbox()
    exchanges = [Exchange(StoreClient(store), rank, 2, "test") for rank in range(2)]
    beats = [Beat(marks=["early"]), Beat(marks=["early", "late"])]
    for exchange, beat in zip(exchanges, beats, strict=True):
        exchange.join()
        exchange.send(beat, outbox)
    for marks in (["early"], ["early", "late"]):
        beats[0].marks = marks
        exchanges[0].send(beats[0], outbox)
        exchanges[0].read(inbox)
        exchanges[1].ask_to_stop()
        exchanges[0].read(inbox)
        exchanges[1].read(inbox)
        bulletin = exchanges[1].bulletin
        assert bulletin.stop and bulletin.agreed == ["early"]
    assert bulletin.missing == {"early": 0, "late": 0}
