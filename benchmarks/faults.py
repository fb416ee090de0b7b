"""What happens to a fit of several ranks when one of them is killed, stopped, interrupted or fails.

    python benchmarks/faults.py [NAME ...]

Every scenario trains a small network for real, in processes of Lightning's own launcher or of torchrun, brings the fit
to a given moment, does its damage there, and measures until no process is left. Then it looks at what is on disk: every
checkpoint must load with ``weights_only=True``, and a fresh module must validate with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_earlybird
from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TicketEnsembleSampler, TimestepAwarePruner

REGIONS = {
    2: [(0, 400, 0.25), (400, 1000, 0.5)],
    3: [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.75)],
}
MARK = "EARLYBIRD_FAULTS"  # in the environment of every process of a scenario, however it was started
LIMIT_S = 60.0


@dataclass(frozen=True)
class Scenario:
    """One fit and the damage done to it.

    Attributes:
        moment: When: in ``search``, while tickets are written (``write``), between the creation of the ``groups``, in
            ticket training (``tickets``), in ``validation``, while rank 0 is ``waiting`` for the other ticket, or while
            trained tickets are sent to all ranks (``gather``).
        rank: The rank that the damage is done to; None means all, as a terminal or a scheduler does it.
        damage: A signal; or ``raise``, ``memory``, ``loop`` (a data set that never answers) or ``busy`` (it answers
            late), which the rank does by itself; None leaves the fit to its end.
        launcher: ``lightning`` or ``torchrun``.
        assignment: Ranks of the two or three tickets.
        nodes: Machines with as many ranks each.
        saving_s: Seconds that a checkpoint takes to be written.
        timeout_s: The strategy's ``timeout``, from the time on when all ranks have met.
        strategy: Further arguments of the strategy.
    """

    moment: str
    rank: int | None
    damage: int | str | None
    launcher: str = "lightning"
    assignment: tuple[tuple[int, ...], ...] = ((0,), (1, 2))
    nodes: int = 1
    saving_s: float = 0.0
    timeout_s: float | None = None
    strategy: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return 1 + max(max(group) for group in self.assignment)


KILL, TERM, INT, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP
OTHER = ((0, 2), (1,))

SCENARIOS = {
    "killed in the search": Scenario("search", 1, KILL),
    "rank 0 killed in the search": Scenario("search", 0, KILL),
    "rank 0 killed while it writes tickets": Scenario("write", 0, KILL),
    "killed while groups are made": Scenario("groups", 2, KILL),
    "killed in a group of one": Scenario("tickets", 1, KILL, assignment=OTHER),
    "killed in a group of two": Scenario("tickets", 2, KILL),
    "rank 0 killed in ticket training": Scenario("tickets", 0, KILL),
    "killed while rank 0 waits": Scenario("waiting", 2, KILL),
    "rank 0 killed while it waits": Scenario("waiting", 0, KILL),
    "killed while tickets are gathered": Scenario("gather", 1, KILL),
    "torchrun: killed in the search": Scenario("search", 1, KILL, "torchrun"),
    "torchrun: killed in a group of one": Scenario("tickets", 1, KILL, "torchrun", assignment=OTHER),
    "torchrun: rank 0 killed in ticket training": Scenario("tickets", 0, KILL, "torchrun"),
    "torchrun: killed while rank 0 waits": Scenario("waiting", 2, KILL, "torchrun"),
    "SIGTERM to rank 1 in the search": Scenario("search", 1, TERM, saving_s=4),
    "SIGTERM to rank 0 in the search": Scenario("search", 0, TERM, saving_s=4),
    "SIGTERM to rank 2 in ticket training": Scenario("tickets", 2, TERM, saving_s=4),
    "SIGTERM to rank 0 in ticket training": Scenario("tickets", 0, TERM, saving_s=4),
    "SIGTERM to all in the search": Scenario("search", None, TERM, saving_s=4),
    "SIGTERM to all in ticket training": Scenario("tickets", None, TERM, saving_s=4),
    "SIGTERM to rank 1 while rank 0 waits": Scenario("waiting", 1, TERM, saving_s=4),
    "SIGTERM to rank 0 while it waits": Scenario("waiting", 0, TERM, saving_s=4),
    "SIGTERM to rank 1 in validation": Scenario("validation", 1, TERM, saving_s=4),
    "torchrun: SIGTERM to all in the search": Scenario("search", None, TERM, "torchrun", saving_s=4),
    "torchrun: SIGTERM to all in ticket training": Scenario("tickets", None, TERM, "torchrun", saving_s=4),
    "torchrun: SIGTERM to rank 1 in ticket training": Scenario("tickets", 1, TERM, "torchrun", saving_s=4),
    "Ctrl-C in the search": Scenario("search", None, INT),
    "Ctrl-C in ticket training": Scenario("tickets", None, INT),
    "torchrun: Ctrl-C in ticket training": Scenario("tickets", None, INT, "torchrun"),
    "SIGINT to rank 0 in ticket training": Scenario("tickets", 0, INT),
    "SIGINT to rank 1 in ticket training": Scenario("tickets", 1, INT),
    "error in training_step": Scenario("tickets", 1, "raise"),
    "error in training_step of rank 0": Scenario("tickets", 0, "raise"),
    "error in the search": Scenario("search", 1, "raise"),
    "error in validation": Scenario("validation", 1, "raise"),
    "out of memory": Scenario("tickets", 2, "memory"),
    "torchrun: error in training_step": Scenario("tickets", 1, "raise", "torchrun", assignment=OTHER),
    "stopped": Scenario("tickets", 1, STOP, assignment=OTHER, strategy={"patience_s": 5.0}),
    "rank 0 stopped": Scenario("tickets", 0, STOP, strategy={"patience_s": 5.0}),
    "data that never come": Scenario("tickets", 1, "loop", timeout_s=12),
    "data that never come to a group of one": Scenario("tickets", 1, "loop", assignment=OTHER, timeout_s=12),
    "data that come late": Scenario("tickets", 1, "busy", assignment=OTHER, timeout_s=30, strategy={"patience_s": 3.0}),
}


# --- what every rank runs


class Denoiser(nn.Module):
    """Two channel groups; samples of shape (1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 16, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.norm = nn.GroupNorm(4, 16)
        self.hidden = nn.Conv2d(16, 16, 3, padding=1)
        self.conv_out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Samples of shape (B, 1, 4, 4), timesteps of shape (B,) -> noise of shape (B, 1, 4, 4)."""
        time = self.time(timesteps.to(x.dtype).view(-1, 1) / 1000)
        hidden = nn.functional.silu(self.norm(self.conv_in(x) + time[:, :, None, None]))
        out: Tensor = self.conv_out(nn.functional.silu(self.hidden(hidden)))
        return out


class Diffusion(pl.LightningModule):
    """As a user writes it; `at` is called with the name of each moment that comes."""

    def __init__(self, at: Callable[[str], None] = lambda moment: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Denoiser()
        self.at = at
        self.began = 0.0

    def loss(self, samples: Tensor) -> Tensor:
        """Mean squared error of the noise at random timesteps."""
        noise = torch.randn_like(samples)
        steps = torch.randint(1000, (len(samples),), device=samples.device)
        share = (steps / 1000).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model(samples * (1 - share) + noise * share, steps), noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        split = isinstance(strategy, MultiTicketStrategy) and strategy.is_split
        if split and not self.began:
            self.began = time.monotonic()
        if self.global_step >= (12 if split else 6) and time.monotonic() - self.began > 2.5:
            self.at("tickets" if split else "search")
        time.sleep(0.02 if self.global_step else 2.0)  # until every rank has heard from every other one
        loss = self.loss(batch[0])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step > 20:
            self.at("validation")
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Timeout(pl.Callback):
    """Sets the strategy's timeout late: on a busy machine processes may take longer to start than a hang is to last."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.seconds is not None:
            trainer.strategy._timeout = timedelta(seconds=self.seconds)  # type: ignore[attr-defined]


class SlowIO(TorchCheckpointIO):
    """A disk that takes its time over what is saved in a hurry."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "interrupted" in str(path):
            time.sleep(self.seconds)
        super().save_checkpoint(checkpoint, path, storage_options)


def train(out: Path, scenario: Scenario) -> None:
    """One rank of a scenario."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    os.dup2(os.open(out / f"stderr_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    (out / f"pid_{rank}").write_text(str(os.getpid()))
    came: set[str] = set()

    def at(moment: str, hold: bool = False) -> None:
        here = rank == (0 if scenario.rank is None else scenario.rank)
        if moment != scenario.moment or moment in came or not here:
            return
        came.add(moment)
        (out / "moment").write_text(str(time.time()))
        if scenario.damage == "raise":
            raise ValueError("the weather is bad")
        if scenario.damage == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        end = time.monotonic() + (10.0 if scenario.damage == "busy" else 600.0)
        while scenario.damage in ("loop", "busy") and time.monotonic() < end:
            pass
        if hold:
            time.sleep(600)

    _watch_for_writing(at)
    to_the_end = scenario.damage in (None, "busy") or scenario.moment == "gather"
    steps = [12 if to_the_end or scenario.moment == "waiting" else 10**6]
    steps += [150 if to_the_end else 10**6] * (len(scenario.assignment) - 1)
    regions = [
        {"start": start, "stop": stop, "sparsity": sparsity, "max_steps": limit}
        for (start, stop, sparsity), limit in zip(REGIONS[len(steps)], steps, strict=True)
    ]
    check = 10**6 if scenario.moment == "search" else 1
    trainer = pl.Trainer(
        strategy=MultiTicketStrategy(assignment=scenario.assignment, **scenario.strategy),
        accelerator="cpu",
        devices=scenario.ranks // scenario.nodes,
        num_nodes=scenario.nodes,
        max_epochs=-1,
        callbacks=[
            Timeout(scenario.timeout_s),
            EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=check, window=2, threshold=0.0),
            TimestepAwarePruner(regions, round_to=4, max_search_steps=8 * check, dirpath=out / "tickets"),
            ModelCheckpoint(out / "checkpoints", every_n_train_steps=4, save_last=True, monitor=None),
        ],
        plugins=[SlowIO(scenario.saving_s)],
        logger=False,
        limit_val_batches=4,
        val_check_interval=6,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    data = TensorDataset(torch.randn(8 * 48, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    ended = "nothing"
    try:
        trainer.fit(Diffusion(at), DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8))
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        (out / f"ended_{rank}").write_text(ended)


def _watch_for_writing(at: Callable[..., None]) -> None:
    """Moments that no hook of Lightning tells: the first file of tickets, the second group, the first tensor sent."""
    import torch.distributed as dist

    from lightning_earlybird import tickets
    from lightning_earlybird.parallel import hosting

    write, new_group, send, groups = tickets.save_file, dist.new_group, hosting._send, []

    def save_file(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        at("write", hold=True)

    def counted_group(*args: Any, **kwargs: Any) -> Any:
        groups.append(args)
        if len(groups) == 2:
            at("groups", hold=True)
        return new_group(*args, **kwargs)

    def sent(*args: Any, **kwargs: Any) -> None:
        at("gather", hold=True)
        send(*args, **kwargs)

    hosting._send = sent
    tickets.save_file, dist.new_group = save_file, counted_group  # type: ignore[assignment]


# --- what looks on


@dataclass
class Outcome:
    """What became of a scenario.

    Attributes:
        out: Its directory.
        seconds: From the damage until no process was left; None if some were, and had to be killed.
        exit_code: Of the process that was started: rank 0, or torchrun.
        ended: Rank -> name of the error that ended its fit; those that were ended from outside are missing.
        stderr: Rank -> what it wrote to standard error.
        agent: What torchrun wrote, if it was there.
    """

    out: Path
    seconds: float | None
    exit_code: int | None
    ended: dict[int, str]
    stderr: dict[int, str]
    agent: str

    @property
    def checkpoints(self) -> list[Path]:
        """Everything that Lightning or the strategy has saved, relative to `out`."""
        return sorted(path.relative_to(self.out) for path in self.out.rglob("*.ckpt"))

    @property
    def finished(self) -> list[Path]:
        """Tickets that were trained to their end."""
        return sorted((self.out / "tickets" / "finished").glob("*"))

    @property
    def partial(self) -> list[Path]:
        """Directories and files that were not written to their end."""
        return sorted(path.relative_to(self.out) for path in self.out.rglob(".*") if path.name.startswith("."))

    def said(self, rank: int) -> list[str]:
        """The lines of a rank about lost ranks."""
        lines = self.stderr.get(rank, "").splitlines()
        return [line for line in lines if "MultiTicketStrategy" in line or "RankLostError" in line]


def processes(mark: str) -> list[int]:
    """Processes of a scenario that still do something; what a scenario has stopped does nothing by itself any more."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile; or a zombie, whose environment is empty
            stopped = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "T"
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes() and not stopped:
                found.append(int(folder.name))
    return found


def play(scenario: Scenario, out: Path, start_s: float = 90.0) -> Outcome:
    """Run a scenario to the end of its processes, in an empty directory."""
    mark = uuid.uuid4().hex
    outer = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    root = str(Path(lightning_earlybird.__file__).parents[1])
    environment = {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", MARK: mark}
    command = [sys.executable]
    if scenario.launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={scenario.ranks}"]
    command += [__file__, "--rank", str(out), json.dumps(asdict(scenario))]
    with (out / "stderr").open("w") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            # Shells start background jobs with Ctrl-C ignored, and Python would leave it at that.
            preexec_fn=lambda: signal.signal(INT, signal.SIG_DFL),
        )
    seconds: float | None = None
    try:
        _wait(lambda: _come(scenario, out) or process.poll() is not None, start_s, scenario.moment)
        began = time.monotonic()
        if isinstance(scenario.damage, int):
            _send(scenario, out, process)
        with contextlib.suppress(TimeoutError):
            _wait(lambda: not processes(mark), LIMIT_S + 10, "the end")
            seconds = time.monotonic() - began
    finally:
        for pid in {process.pid, *processes(mark), *_stopped(scenario, out)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)
    ranks = range(scenario.ranks)
    return Outcome(
        out,
        seconds,
        process.returncode,
        {rank: _read(out / f"ended_{rank}") for rank in ranks if (out / f"ended_{rank}").exists()},
        {rank: _read(out / f"stderr_{rank}") for rank in ranks},
        _read(out / "stderr"),
    )


def _stopped(scenario: Scenario, out: Path) -> list[int]:
    return [int(_read(out / f"pid_{scenario.rank}"))] if scenario.damage == STOP else []


def _come(scenario: Scenario, out: Path) -> bool:
    if scenario.moment == "waiting":
        if not (out / "tickets" / "finished" / "ticket_0").exists():
            return False
        time.sleep(1.0)
        return True
    return (out / "moment").exists()


def _send(scenario: Scenario, out: Path, process: subprocess.Popen[Any]) -> None:
    if scenario.rank is None and scenario.damage == INT:
        os.killpg(process.pid, signal.SIGINT)
    elif scenario.rank is None and scenario.launcher == "torchrun":
        process.send_signal(scenario.damage)  # it passes the signal on
    else:
        for rank in range(scenario.ranks) if scenario.rank is None else [scenario.rank]:
            os.kill(int(_read(out / f"pid_{rank}")), int(scenario.damage))


def usable(outcome: Outcome) -> list[str]:
    """Load everything that a scenario has left; what is wrong with it."""
    problems = []
    for path in outcome.checkpoints:
        try:
            torch.load(outcome.out / path, weights_only=True)
            if path.name != "last.ckpt" and "interrupted" not in path.parts:
                continue
            data = DataLoader(TensorDataset(torch.randn(8, 1, 4, 4)), batch_size=8)
            with quiet():
                trainer = pl.Trainer(
                    accelerator="cpu",
                    devices=1,
                    logger=False,
                    limit_val_batches=1,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    enable_checkpointing=False,
                    callbacks=[TimestepAwarePruner(REGIONS[2], dirpath=outcome.out / "unused")],
                )
                trainer.validate(Diffusion(), data, ckpt_path=outcome.out / path, verbose=False, weights_only=True)
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__}: {error}")
    for folder in outcome.finished:
        try:
            TicketEnsembleSampler.from_pretrained(folder, Denoiser)
        except Exception as error:
            problems.append(f"{folder.name}: {type(error).__name__}: {error}")
    return problems


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice about this file's tiny loaders is left out."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def _wait(done: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def main() -> None:
    """Run scenarios and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of scenarios; all by default")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where to leave what the scenarios write")
    parser.add_argument("--jobs", type=int, default=1, help="how many scenarios are played at a time")
    parser.add_argument("--verbose", action="store_true", help="show what each rank said")
    options = parser.parse_args()
    if options.rank:
        given = json.loads(options.rank[1])
        train(Path(options.rank[0]), Scenario(**given))
        return
    names = [name for name in SCENARIOS if not options.names or any(part in name for part in options.names)]
    root = options.out or Path(tempfile.mkdtemp(prefix="faults-"))
    folders = [root / name.replace(" ", "_").replace(":", "") for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
    print("| scenario | seconds until all are gone | exit code | ended by | on disk |")
    print("| --- | --- | --- | --- | --- |")
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(play, [SCENARIOS[name] for name in names], folders)
        for name, outcome in zip(names, outcomes, strict=True):
            print(row(name, outcome), flush=True)
            for rank in range(SCENARIOS[name].ranks) if options.verbose else ():
                print(f"  rank {rank}:", *outcome.said(rank), sep="\n    ", flush=True)


def row(name: str, outcome: Outcome) -> str:
    """A scenario's line of the table."""
    left = []
    for path in outcome.checkpoints:
        if path.name == "last.ckpt" or "interrupted" in path.parts:
            left.append("/".join([*path.parts[-2:-1], path.stem]))
    left += [f"finished/{path.name}" for path in outcome.finished] + [path.name for path in outcome.partial]
    took = "never" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    ended = ", ".join(f"{rank}: {what}" for rank, what in outcome.ended.items())
    shown = "; ".join(usable(outcome)) or ", ".join(left) or "nothing"
    return f"| {name} | {took} | {outcome.exit_code} | {ended} | {shown} |"


if __name__ == "__main__":
    main()
