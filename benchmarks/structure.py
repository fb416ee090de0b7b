"""What the structure engine costs: time and memory, beside torch-pruning, one forward pass and one epoch.

On the U-Nets of the EB-Diff-Train experiments for CIFAR-10 (35.7M parameters) and CelebA (78.7M), one thread. Rounds of
everything that is compared alternate in one process, so that a busy machine slows all of it; medians are taken.

- Scoring all channels and drawing masks at three sparsities, which a detector does at each check, beside building
  torch-pruning's pruner and pruning once, and beside an epoch of training at batch 128. An epoch is taken to be 390
  times 128 times one sample's share of a forward and backward pass at a small batch: without the optimizer and the
  data, which would only make it longer.
- What a trace holds at its peak, as a multiple of what a forward pass of one sample without gradients holds: bytes of
  tensors made by operations that are alive at the same time, labels included (``memory.py``). Weights and inputs,
  which both need, and workspace inside kernels, are in neither. Beside it the growth of the process.
- Verifying on fewer pixels, beside verifying on all of them.

    python benchmarks/structure.py
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_pruning
from diffusers import UNet2DModel
from memory import live_bytes
from torch import Tensor

from lightning_earlybird.budget import Allocation, Budget
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.structure import ChannelPlan, count_parameters, extract, trace_plan, verify_plan

SPARSITIES = (0.3, 0.6, 0.8)
LIMIT = 0.15
TRACE_LIMIT_S, MEMORY_LIMIT, CHECK_LIMIT_PERCENT, EXTRACT_LIMIT_S = 3, 1.5, 2, 0.5
STEPS_A_EPOCH, BATCH, TIMED_BATCH = 390, 128, 4

Clock = Callable[[], float]
"""Gives seconds: `time.perf_counter`, or `time.process_time`, which a busy machine hardly changes on one thread."""

SCORE_AND_DRAW = f"score, and draw masks at {', '.join(map(str, SPARSITIES))}"
PRUNE = "torch-pruning: build the pruner, prune once"


@dataclass(frozen=True)
class Timings:
    """Seconds by what was done, one a round."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds[name])

    @property
    def ratio(self) -> float:
        """A check of ours as a fraction of pruning once with torch-pruning."""
        return self.median(SCORE_AND_DRAW) / self.median(PRUNE)

    def table(self) -> str:
        """All medians with the range, as fixed-width text."""
        width = max(map(len, self.rounds))
        rows = [f"{'':{width}}  {'median':>8}  {'min':>8}  {'max':>8}"]
        rows += [
            f"{name:{width}}  {self.median(name):7.3f}s  {min(seconds):7.3f}s  {max(seconds):7.3f}s"
            for name, seconds in self.rounds.items()
        ]
        return "\n".join(rows)


def cifar10_unet() -> UNet2DModel:
    """Channels 128/256/256/256, two layers a block, attention at 16x16."""
    return unet(32, (128, 256, 256, 256), attention=1)


def celeba_unet() -> UNet2DModel:
    """Channels 128/256/256/256/512, two layers a block, attention at 16x16."""
    return unet(64, (128, 256, 256, 256, 512), attention=2)


def unet(size: int, channels: tuple[int, ...], attention: int) -> UNet2DModel:
    """Attention at one level, counted from the input, and in the middle."""
    levels = range(len(channels))
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if level == attention else "DownBlock2D" for level in levels),
        up_block_types=tuple("AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(levels)),
        attention_head_dim=None,
    )


NETWORKS: dict[str, tuple[Callable[[], UNet2DModel], int]] = {
    "CIFAR-10 U-Net": (cifar10_unet, 32),
    "CelebA U-Net": (celeba_unet, 64),
}


def prune_with_torch_pruning(network: UNet2DModel, inputs: tuple[Tensor, Tensor], sparsity: float) -> None:
    """Group magnitudes, one ratio for every group, as the authors of EB-Diff-Train use it; changes the network."""
    pruner = torch_pruning.pruner.BasePruner(
        network,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=sparsity,
        ignored_layers=[network.conv_out],
    )
    pruner.step()


def measure(rounds: int, clock: Clock = time.perf_counter) -> Timings:
    """Alternate a check of ours and torch-pruning for so many rounds, after one that does not count."""
    torch.manual_seed(0)
    network = cifar10_unet()
    inputs = (torch.randn(1, 3, 32, 32), torch.tensor([500]))
    budget = Budget(trace_plan(network, inputs), Allocation())
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        doomed = copy.deepcopy(network)
        tasks: dict[str, Callable[[], Any]] = {
            SCORE_AND_DRAW: lambda: score_and_draw(network, budget),
            PRUNE: lambda doomed=doomed: prune_with_torch_pruning(doomed, inputs, SPARSITIES[1]),
        }
        for name, task in tasks.items():
            seconds.setdefault(name, []).append(seconds_of(task, clock))
    return Timings({name: taken[1:] for name, taken in seconds.items()})


def score_and_draw(network: UNet2DModel, budget: Budget) -> list[Any]:
    """What a detector does at a check; it keeps its budget from the first one on."""
    scores = channel_scores(dict(network.named_parameters()), budget.plan)
    return [budget.draw(scores, sparsity) for sparsity in SPARSITIES]


def seconds_of(task: Callable[[], Any], clock: Clock) -> float:
    """Time of one call."""
    start = clock()
    task()
    return clock() - start


@dataclass(frozen=True)
class Claim:
    """A measured value and the most that it may be."""

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is within the limit, if there is one."""
        return self.limit is None or self.value <= self.limit

    def row(self, width: int) -> str:
        """One line of the table."""
        verdict = "" if self.limit is None else f"  {self.limit:8g}{self.unit:4} {'ok' if self.holds else 'MISSED'}"
        return f"{self.name:{width}}  {self.value:8.3g}{self.unit:4}{verdict}"


def claims(build: Callable[[], UNet2DModel], size: int, rounds: int, clock: Clock = time.perf_counter) -> list[Claim]:
    """Everything that is measured of one network."""
    torch.manual_seed(0)
    network = build().eval()
    inputs = (torch.randn(1, 3, size, size), torch.tensor([500]))
    batch = (torch.randn(TIMED_BATCH, 3, size, size), torch.full((TIMED_BATCH,), 500))

    def forward() -> None:
        with torch.no_grad():
            network(*inputs)

    def train() -> None:
        network(*batch).sample.square().mean().backward()
        network.zero_grad()

    plan = verify_plan(network, trace_plan(network, inputs), inputs).plan
    budget = Budget(plan, Allocation())
    mask = score_and_draw(network, budget)[1]
    tasks: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "train": train,
        "check": lambda: score_and_draw(network, budget),
        "trace": lambda: trace_plan(network, inputs),
        "verify": lambda: verify_plan(network, plan, inputs),
        "verify whole": lambda: verify_on_all_pixels(network, plan, inputs),
        "extract": lambda: extract(network, plan, mask),
    }
    rows = [{name: seconds_of(task, clock) for name, task in tasks.items()} for _ in range(rounds + 1)][1:]
    median = {name: statistics.median(row[name] for row in rows) for name in tasks}
    epoch = STEPS_A_EPOCH * BATCH * median["train"] / TIMED_BATCH
    held = live_bytes(forward)
    traced = live_bytes(lambda: trace_plan(network, inputs))
    return [
        Claim("forward pass of one sample", median["forward"], "s"),
        Claim("trace", median["trace"], "s", TRACE_LIMIT_S),
        Claim("tensors alive at the peak of a forward pass", held / 2**20, "MiB"),
        Claim("tensors alive at the peak of a trace", traced / 2**20, "MiB"),
        Claim("a trace as a multiple of the forward pass", traced / held, "", MEMORY_LIMIT),
        Claim("verify", median["verify"], "s"),
        Claim("verify on all pixels", median["verify whole"], "s"),
        Claim("score, and draw three masks", median["check"], "s"),
        Claim(f"epoch of {STEPS_A_EPOCH} steps at batch {BATCH}, scaled from {TIMED_BATCH} samples", epoch, "s"),
        Claim("a check as a share of the epoch", 100 * median["check"] / epoch, "%", CHECK_LIMIT_PERCENT),
        Claim("extract one ticket", median["extract"], "s", EXTRACT_LIMIT_S),
    ]


def verify_on_all_pixels(network: UNet2DModel, plan: ChannelPlan, inputs: tuple[Tensor, Tensor]) -> None:
    """Verification as it is where a network does not run on fewer pixels."""
    with mock.patch("lightning_earlybird.structure.crop.FACTORS", ()):
        verify_plan(network, plan, inputs)


def process_growth(network: str, size: int, traced: bool) -> float | None:
    """MiB by which a fresh process grows in a forward pass of one sample, or in a trace."""
    task = "trace_plan(network, inputs)" if traced else "network(*inputs)"
    code = f"""
import torch
from memory import growth
from structure import {network}, trace_plan, unet
torch.set_num_threads(1)
trace_plan(unet(8, (32, 64), attention=1), (torch.randn(1, 3, 8, 8), torch.tensor([5])))
network, inputs = {network}().eval(), (torch.randn(1, 3, {size}, {size}), torch.tensor([500]))
with torch.no_grad():
    print(growth(lambda: {task}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    found = done.stdout.split()[-1]
    return None if found == "None" else int(found) / 2**20


def main() -> int:
    """Print the tables; fails where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch_pruning")
    print(f"{options.rounds} rounds, {options.threads} thread(s); the last columns are limits and verdicts")

    held = True
    for name, (build, size) in NETWORKS.items():
        print(f"\n{name}, {count_parameters(build()) / 1e6:.1f}M parameters")
        found = claims(build, size, options.rounds)
        for what, traced in (("a forward pass", False), ("a trace", True)):
            grown = process_growth(build.__name__, size, traced)
            if grown is not None:
                found.append(Claim(f"growth of a fresh process in {what}", grown, "MiB"))
        width = max(len(claim.name) for claim in found)
        print("\n".join(claim.row(width) for claim in found))
        held = held and all(claim.holds for claim in found)

    timings = measure(options.rounds)
    print(f"\nCIFAR-10 U-Net, beside torch-pruning\n{timings.table()}")
    print(f"ratio of the two: {timings.ratio:.3f} (limit {LIMIT})")
    return 0 if held and timings.ratio <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
