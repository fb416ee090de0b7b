"""How well the planner foresees the time of ticket training: three tickets on one, two and three processes.

Every world is a real fit of `MultiTicketStrategy` on the CPU, one thread a process: a short search in which nothing is
learned, so that the tickets are the same in all of them, then `--steps` optimizer steps of each ticket. Worlds take
turns, `--rounds` times; medians are compared. `x` is how many times faster than one process. Printed are

- the time on the clock from the split to the end of the last ticket, and the critical path that the planner gives for
  it: from the step times that each world measured at its switch (what the strategy prints before it trains), from those
  that the world of one process took in training, and from the latter on no more cores than this machine has;
- the time that processes spent computing, the largest of each world. Where there are more processes than free cores,
  the clock says little about devices that do not share cores, and this is the critical path to look at, although
  neighbours who share caches and memory make computing slower, too. `busy` is the share of it of the mean process;
- what a step of each ticket was planned to take, and took on the clock and computing.

    python benchmarks/parallel.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_earlybird import TicketLoad, TimestepAwarePruner, plan_tickets

SEARCH_STEPS = 16
BOUNDS = [(0, 240), (240, 440), (440, 1000)]


@dataclass(frozen=True)
class Work:
    """What every world does.

    Args:
        size: Height and width of the images.
        channels: Widths of the U-Net's two levels, multiples of 16.
        batch_size: Images in a batch.
        steps: Optimizer steps of each ticket.
        sparsities: Of the tickets, from little noise to much.
    """

    size: int = 16
    channels: tuple[int, int] = (64, 128)
    batch_size: int = 16
    steps: int = 60
    sparsities: tuple[float, float, float] = (0.3, 0.4, 0.5)


class Denoising(L.LightningModule):
    """The plain loss: noise is predicted from images that are mixed with it. Nothing is learned before the switch."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        kinds = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
        self.model = UNet2DModel(
            sample_size=work.size,
            block_out_channels=work.channels,
            layers_per_block=1,
            down_block_types=kinds[0],
            up_block_types=kinds[1],
            norm_num_groups=16,
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        noise, steps = torch.randn_like(images), torch.randint(1000, (len(images),))
        share = (steps / 1000).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model((1 - share) * images + share * noise, steps).sample, noise)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= SEARCH_STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Stopwatch(L.Callback):
    """Times the training of this rank's tickets; stands behind the pruner, which switches when a batch begins."""

    def __init__(self) -> None:
        self.began = self.ended = (0.0, 0.0)
        self.turns: dict[int, tuple[float, float]] = {}
        self._turn_began = (0.0, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.strategy.is_split and not self.began[0]:
            self.began = _now()

    def on_before_turn(self) -> None:
        """The denoiser is about to be called."""
        self._turn_began = _now()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        turn = pl_module.model.turn if trainer.strategy.is_split else None
        if turn is not None:
            parts = zip(self.turns.get(turn.ticket, (0.0, 0.0)), _now(), self._turn_began, strict=True)
            self.turns[turn.ticket] = tuple(total + now - then for total, now, then in parts)

    def on_train_end(self, *args: Any) -> None:
        self.ended = _now()  # the strategy waits for other ranks after that


def _now() -> tuple[float, float]:
    """Seconds on a clock that all processes of the machine share, and seconds that this process has computed."""
    return time.monotonic(), time.process_time()


def train(work: Work, processes: int, folder: Path) -> None:
    """One world; called in each of its processes, which leaves `rank_N.json`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    watch = Stopwatch()
    module = Denoising(work)
    step = module.training_step

    def timed(*args: Any) -> Tensor:
        watch.on_before_turn()
        return step(*args)

    module.training_step = timed  # type: ignore[method-assign]
    regions = [(*bounds, sparsity) for bounds, sparsity in zip(BOUNDS, work.sparsities, strict=True)]
    pruner = TimestepAwarePruner(regions, max_search_steps=SEARCH_STEPS, dirpath=folder)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="multi_ticket",
        max_steps=SEARCH_STEPS + work.steps,
        callbacks=[pruner, watch],
        **quiet,
    )
    # An epoch that is longer than the fit in every world.
    count = work.batch_size * processes * (SEARCH_STEPS + work.steps + 1)
    images = torch.randn(64, 3, work.size, work.size)
    data = TensorDataset(images.repeat(-(-count // len(images)), 1, 1, 1)[:count])
    trainer.fit(module, DataLoader(data, work.batch_size))
    plan = trainer.strategy.plan
    (folder / f"rank_{trainer.global_rank}.json").write_text(
        json.dumps(
            {
                "began": watch.began,
                "ended": watch.ended,
                "turns": watch.turns,
                "hosted": plan.assignment.hosted(trainer.global_rank),
                "planned_step_s": [load.step_seconds for load in plan.loads],
            }
        )
    )


@dataclass(frozen=True)
class Rank:
    """What one process took for its tickets; every pair is seconds on the clock, and seconds that it computed.

    Args:
        began: When its tickets began.
        ended: When they ended.
        turns: Ticket -> the time of all its forward and backward passes.
    """

    began: tuple[float, float]
    ended: tuple[float, float]
    turns: dict[int, tuple[float, float]]

    def seconds(self, kind: int) -> float:
        """Seconds on the clock (0) or computed (1)."""
        return self.ended[kind] - self.began[kind]

    def of_tickets(self, kind: int) -> dict[int, float]:
        """Ticket -> the seconds of its passes, and an equal share of what the process did besides."""
        passes = {ticket: pair[kind] for ticket, pair in self.turns.items()}
        besides = (self.seconds(kind) - sum(passes.values())) / len(passes)
        return {ticket: seconds + besides for ticket, seconds in passes.items()}


@dataclass(frozen=True)
class World:
    """What one world took.

    Args:
        steps: Optimizer steps of each ticket.
        ranks: Its processes.
        planned_step_s: Seconds of a step of each ticket, as measured at the switch.
    """

    steps: int
    ranks: tuple[Rank, ...]
    planned_step_s: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path, steps: int) -> "World":
        """From the files that its processes left."""
        told = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
        ranks = [
            Rank(rank["began"], rank["ended"], {int(ticket): pair for ticket, pair in rank["turns"].items()})
            for rank in told
        ]
        return cls(steps, tuple(ranks), tuple(told[0]["planned_step_s"]))

    @property
    def wall_s(self) -> float:
        """From the split to the end of the last ticket."""
        return max(rank.ended[0] for rank in self.ranks) - min(rank.began[0] for rank in self.ranks)

    @property
    def computed_s(self) -> float:
        """The most that a process computed: the critical path if each had a core for itself."""
        return max(rank.seconds(1) for rank in self.ranks)

    @property
    def busy(self) -> float:
        """Share of the processes' time until the end in which they would compute, had each a core for itself."""
        return sum(rank.seconds(1) for rank in self.ranks) / (len(self.ranks) * self.computed_s)

    def step_s(self, kind: int) -> tuple[float, ...]:
        """Seconds that a step of each ticket took, on the clock (0) or computed (1)."""
        found = {ticket: seconds for rank in self.ranks for ticket, seconds in rank.of_tickets(kind).items()}
        return tuple(found[ticket] / self.steps for ticket in sorted(found))


def critical_path(step_seconds: Sequence[float], steps: int, processes: int) -> float:
    """The planner's seconds until the last process is done."""
    path = plan_tickets([TicketLoad(seconds, steps, False) for seconds in step_seconds], processes).critical_path_s
    assert path is not None
    return path


def run(work: Work, processes: int, folder: Path) -> World:
    """Start the processes of a world and wait for them."""
    folder.mkdir(parents=True)
    outer = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    arguments = [__file__, *_arguments(work), "--world", str(processes), "--folder", str(folder)]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-3000:]}")
    return World.read(folder, work.steps)


def measure(work: Work, worlds: Sequence[int], rounds: int) -> dict[int, list[World]]:
    """Processes -> one world a round."""
    found: dict[int, list[World]] = {processes: [] for processes in worlds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for processes, results in found.items():
                results.append(run(work, processes, Path(folder) / f"{number}_{processes}"))
    return found


def report(found: dict[int, list[World]], cores: int) -> str:
    """Three tables: time on the clock, time computed, and the steps of each ticket.

    Args:
        found: As from :func:`measure`; the world of one process must be there.
        cores: Of this machine.
    """
    steps = found[1][0].steps
    clock, computed = (medians([world.step_s(kind) for world in found[1]]) for kind in (0, 1))
    by_clock, by_computing, by_ticket = [], [], []
    for processes, worlds in found.items():
        planned = medians([world.planned_step_s for world in worlds])
        taken = statistics.median(world.wall_s for world in worlds)
        path = statistics.median(world.computed_s for world in worlds)
        # However it is planned, so many seconds of computing take that long on the cores that there are.
        shared = max(critical_path(clock, steps, processes), sum(clock) * steps / min(cores, processes))
        by_clock.append(
            (taken, critical_path(planned, steps, processes), critical_path(clock, steps, processes), shared)
        )
        by_computing.append((path, critical_path(computed, steps, processes)))
        taken_steps = [medians([world.step_s(kind) for world in worlds]) for kind in (0, 1)]
        by_ticket.append(list(zip(planned, *taken_steps, strict=True)))
    busy = [statistics.median(world.busy for world in worlds) for worlds in found.values()]
    heads = ["on the clock", "planned at the switch", "from 1 process", f"same, {cores} cores"]
    lines = [_head(heads)]
    lines += [_row(processes, row, by_clock[0]) for processes, row in zip(found, by_clock, strict=True)]
    lines += ["", _head(["computed, longest", "from 1 process"]) + f"{'busy':>8}"]
    lines += [
        _row(processes, row, by_computing[0]) + f"{share:>8.0%}"
        for processes, row, share in zip(found, by_computing, busy, strict=True)
    ]
    lines += ["", f"{'ms a step':<10}" + "".join(f"{f'ticket {t}: planned, clock, CPU':>34}" for t in range(3))]
    for processes, row in zip(found, by_ticket, strict=True):
        cells = "".join(f"{p * 1e3:>20.0f}{c * 1e3:>7.0f}{u * 1e3:>7.0f}" for p, c, u in row)
        lines.append(f"{processes:<10}{cells}")
    return "\n".join(lines)


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _head(names: Sequence[str]) -> str:
    return f"{'processes':<10}" + "".join(f"{name:>22}{'x':>6}" for name in names)


def _row(processes: int, seconds: Sequence[float], alone: Sequence[float]) -> str:
    """Seconds, and how many times less that is than with one process."""
    cells = (f"{each:>21.1f}s{first / each:>6.2f}" for each, first in zip(seconds, alone, strict=True))
    return f"{processes:<10}" + "".join(cells)


def _arguments(work: Work) -> list[str]:
    return [
        *("--size", str(work.size), "--batch-size", str(work.batch_size), "--steps", str(work.steps)),
        *("--channels", *map(str, work.channels), "--sparsities", *map(str, work.sparsities)),
    ]


def main() -> None:
    """Print both tables, or be one of the processes of a world."""
    default = Work()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=default.size)
    parser.add_argument("--channels", type=int, nargs=2, default=default.channels)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps of each ticket")
    parser.add_argument("--sparsities", type=float, nargs=3, default=default.sparsities)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = Work(options.size, tuple(options.channels), options.batch_size, options.steps, tuple(options.sparsities))
    if options.world is not None:
        train(work, options.world, options.folder)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(report(measure(work, (1, 2, 3), options.rounds), cores))
    print(f"\n{cores} cores; in the last five minutes this and other work asked for {os.getloadavg()[1]:.1f}")


if __name__ == "__main__":
    main()
