"""The demo is killed again and again, resumed each time, and must come to the result of the demo left alone.

    python benchmarks/kills.py [--kills 30] [--seed 0] [--signal KILL] [--folder DIR] [KEY=VALUE ...]

First `examples/digits.py` runs undisturbed. Then it runs with `resume=true` in another folder, and SIGKILL ends it and
all its processes `--kills` times: while it starts, at random moments of the training, while a checkpoint, the tickets
at the switch or the trained ensemble are being written (seen by the files that lie aside meanwhile), and while it
samples. After each kill every checkpoint must load with `weights_only=True`, and every directory of tickets must load.
In the end the last checkpoint (weights, averaged weights, optimizer, schedule, masks and distances of the search,
random states), both directories of tickets, all figures and samples and the metrics must be the same, bit for bit.
Times on the clock are not compared, nor is the place of the files.

`--signal TERM` and `--signal INT` end it as schedulers and Ctrl-C do. KEY=VALUE overrides the demo's configuration in
both runs. An undisturbed run in `--folder` is used again if its configuration was the same.

`benchmarks/killed_fits.py` kills small fits before each of their acts upon files, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from killing import differences, files  # noqa: E402 -- shared with the tests

from lightning_earlybird import TicketEnsembleSampler  # noqa: E402 -- as above

# Without W&B, whose start would take most of the time of a kill; its files hold times, and are not compared.
DEFAULTS = ["wandb.mode=disabled", "checkpoint.every_n_epochs=1"]
CLOCK = frozenset({"seconds", "search_s", "wandb_id"})
BEGINS = re.compile(r"Restored all states|the denoiser is '")
ASIDE = {"checkpoint": r"checkpoints/\..*", "tickets": r"\.switch\..*", "ensemble": r"\.ensemble\..*"}
OWNER = re.compile(r"\.[0-9a-f]{8}-(\d+)-[0-9a-f]{12}(?=\.(?:partial|former)$)")
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Kill:
    """One process that was killed.

    Attributes:
        wanted: The moment that was waited for.
        after_s: Seconds since the process was started.
        resumed: Optimizer step of the checkpoint that it had started from; None at the very start.
        step: Of the checkpoint that it left.
        aside: What was being written.
    """

    wanted: str
    after_s: float
    resumed: int | None
    step: int
    aside: tuple[str, ...]

    def row(self, number: int) -> str:
        resumed = "start" if self.resumed is None else str(self.resumed)
        aside = ", ".join(self.aside) or "-"
        return f"| {number} | {self.wanted} | {self.after_s:.1f} | {resumed} | {self.step} | {aside} |"


class Demo:
    """The demo in a folder of its own.

    Args:
        folder: Its output folder.
        overrides: Of its configuration.
    """

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self.overrides = overrides
        self.log = folder.parent / f"{folder.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        """A process that begins, or goes on; its output is in ``log``."""
        command = [sys.executable, str(ROOT / "examples" / "digits.py"), *self.overrides, "resume=true"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*command, f"output={self.folder}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> float:
        """Run to the end; seconds that it took."""
        began = time.monotonic()
        if status := self.start().wait():
            sys.exit(f"the demo ended with status {status}:\n{self.said()[-3000:]}")
        return time.monotonic() - began

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def aside(self, pid: int | None = None) -> list[str]:
        """What lies aside at this moment; of one process only, which writes it, or of all that were killed as well."""
        names = [path for folder in ("", "checkpoints/") for path in _hidden(self.folder, folder)]
        owners = [OWNER.search(name) for name in names]
        return [
            OWNER.sub("", name)
            for name, owner in zip(names, owners, strict=True)
            if pid is None or (owner is not None and int(owner[1]) == pid)
        ]

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def step(self) -> int | None:
        """Of the last checkpoint."""
        return torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else None

    def check(self) -> None:
        """Whatever there is must load."""
        for path in self.folder.rglob("*.ckpt"):
            assert path == self.last, path
            torch.load(path, weights_only=True)
        for name in ("switch", "ensemble"):
            former = list(self.folder.glob(f".{name}.*.former"))
            if former or (self.folder / name).exists():  # a former one is put in place by reading
                assert len(TicketEnsembleSampler.from_pretrained(self.folder / name).tickets) > 0

    def state(self) -> dict[str, Any]:
        """All that must be the same, in the end."""
        checkpoint = torch.load(self.last, weights_only=True)
        callbacks = checkpoint["callbacks"]
        (saving,) = (key for key in callbacks if key.startswith("ModelCheckpoint"))
        del callbacks[saving]  # the names of its files
        del callbacks["LogKeeper"]["rows"]  # those of the file are looked at, instead
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row.pop("earlybird/scoring_seconds", None)
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(steps), steps
        return {
            "checkpoint": checkpoint,
            "metrics.csv": rows,
            "files": {
                name: content
                for name, content in files(self.folder).items()
                if not name.startswith(("checkpoints/", "metrics.csv", "wandb/"))
            },
        }


def _hidden(root: Path, folder: str) -> Iterator[str]:
    try:
        yield from (f"{folder}{entry.name}" for entry in os.scandir(root / folder) if entry.name.startswith("."))
    except OSError:
        return


class Killer:
    """Kills a demo and decides when.

    Args:
        demo: Its victim.
        kills: How often.
        seed: Of the moments.
        by: The signal.
        switch: Optimizer step of the switch in the undisturbed run.
        steps: All optimizer steps of it.
        epoch: Optimizer steps of an epoch.
        seconds: What the training took in it.
    """

    def __init__(
        self,
        demo: Demo,
        kills: int,
        seed: int,
        by: signal.Signals,
        *,
        switch: int,
        steps: int,
        epoch: int,
        seconds: float,
    ) -> None:
        self.demo, self.kills, self.by = demo, kills, by
        self.switch, self.steps, self.epoch, self.seconds = switch, steps, epoch, seconds
        self.random = random.Random(seed)
        self.done: list[Kill] = []

    def choose(self, step: int) -> str:
        """What to wait for: a kill at the switch needs the process to come there, one at the end needs the end."""
        left = self.kills - len(self.done)
        if left <= 4 or step == self.steps:
            return ("sampling", "ensemble")[left % 2]
        at_switch = sum(kill.wanted == "tickets" for kill in self.done)
        # Kills are spread over the training: those behind the switch must not be eaten up before it.
        before = self.kills * self.switch / self.steps
        if step <= self.switch and at_switch < 5 and (len(self.done) >= before or step >= self.switch - 3 * self.epoch):
            return "tickets"
        return self.random.choices(["starting", "training", "checkpoint"], [0.15, 0.4, 0.45])[0]

    def wait(self, process: subprocess.Popen[bytes], wanted: str, step: int) -> bool:
        """Wait for the moment; False if the process ended before."""
        demo, began = self.demo, time.monotonic()
        # On average the share of the training that is this kill's.
        epochs = max(1.0, (self.steps - step) / self.epoch / (self.kills - len(self.done)))
        epoch_s = self.seconds * self.epoch / self.steps
        span_s = self.random.uniform(0, 2 * epochs * epoch_s)
        wait_s = self.random.uniform(0, 8)
        writes = self.random.randint(1, min(max(1, round(2 * epochs)), (self.steps - step) // self.epoch or 1))
        delay_s = self.random.uniform(0, 0.02)
        trained_s, seen = 0.0, False
        while process.poll() is None:
            now = time.monotonic()
            if now - began > PATIENCE_S:
                raise TimeoutError(f"the demo has not come to the moment {wanted!r} in {PATIENCE_S:.0f} s")
            if wanted == "starting":
                if now - began > wait_s:
                    return True
            elif wanted == "training":
                trained_s = trained_s or (now if BEGINS.search(demo.said()) else 0.0)
                if trained_s and now - trained_s > span_s:
                    return True
            elif wanted == "sampling":
                if "sampling: ticket" in demo.said():
                    return True
            else:
                writing = any(re.fullmatch(ASIDE[wanted], name) for name in demo.aside(process.pid))
                writes -= writing and not seen and wanted == "checkpoint"
                seen = writing
                if writing and (wanted != "checkpoint" or writes <= 0):
                    time.sleep(delay_s)
                    return True
            time.sleep(0.001 if wanted in ASIDE else 0.02)
        return False

    def kill(self) -> bool:
        """Start the demo and kill it; False if it came to its end."""
        resumed = self.demo.step()
        wanted = self.choose(resumed or 0)
        began = time.monotonic()
        process = self.demo.start()
        try:
            if not self.wait(process, wanted, resumed or 0):
                if process.returncode:
                    sys.exit(f"the demo ended with status {process.returncode}:\n{self.demo.said()[-3000:]}")
                return False
            os.killpg(process.pid, self.by)
            process.wait(PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        restored = re.findall(r"Restored all states from the checkpoint at (\S+)", self.demo.said())
        assert all(Path(path) == self.demo.last for path in restored), restored
        aside = tuple(self.demo.aside(process.pid))
        after_s = time.monotonic() - began
        self.demo.check()
        step = self.demo.step()
        assert (step or 0) >= (resumed or 0), "the last checkpoint is older than the one before"
        self.done.append(Kill(wanted, after_s, resumed, step or 0, aside))
        print(self.done[-1].row(len(self.done)), flush=True)
        return True


def compare(whole: Demo, killed: Demo) -> list[str]:
    """Where the results differ."""
    left = [f"left aside: {name}" for name in killed.aside()]
    return left + differences(whole.state(), killed.state(), CLOCK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", type=lambda name: signal.Signals[f"SIG{name}"], default=signal.SIGKILL)
    parser.add_argument("--folder", type=Path, help="where both runs are left; a temporary one is removed")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    overrides = [*DEFAULTS, *options.overrides]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        whole, killed = Demo(folder / "whole", overrides), Demo(folder / "killed", overrides)
        if killed.folder.exists():
            sys.exit(f"--folder={folder} holds a run that was killed already; remove {killed.folder}.")
        settings = folder / "settings"
        if not settings.exists() or settings.read_text().splitlines()[1:] != overrides:
            seconds = whole.finish()
            settings.write_text("\n".join([str(seconds), *overrides]))
        end = torch.load(whole.last, weights_only=True)
        switch = end["callbacks"]["TimestepAwarePruner"]["switched_at"]
        epochs, steps = end["epoch"] + 1, end["global_step"]
        trained_s = end["callbacks"]["DenseKeeper"]["seconds"]
        print(
            f"Undisturbed: {steps} steps in {epochs} epochs, switch at step {switch}; {trained_s:.0f} s of training, "
            f"{float(settings.read_text().splitlines()[0]):.0f} s in all.\n\n"
            "| kill | moment | s after start | resumed from step | left step | being written |\n|--|--|--|--|--|--|",
            flush=True,
        )
        moments = {"switch": switch, "steps": steps, "epoch": steps // epochs, "seconds": trained_s}
        killer = Killer(killed, options.kills, options.seed, options.signal, **moments)
        began = time.monotonic()
        while len(killer.done) < options.kills and killer.kill():
            pass
        killed.finish()
        found = compare(whole, killed)
        hit = sum(bool(kill.aside) for kill in killer.done)
        print(
            f"\n{len(killer.done)} kills in {time.monotonic() - began:.0f} s, {hit} of them while something was being "
            f"written. Result: {'the same, bit for bit' if not found else 'another'}."
        )
        print("\n".join(found[:20]))
    return 1 if found or len(killer.done) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
