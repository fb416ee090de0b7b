"""What the structure engine costs, beside torch-pruning.

On the U-Net of the EB-Diff-Train experiments for CIFAR-10 (35.7M parameters), one thread: scoring all channels and
drawing masks at three sparsities, against building torch-pruning's pruner and pruning once. That is what a detector
does at each check. Rounds of both alternate in one process, so that a busy machine slows both; medians are compared.
Tracing, verifying and extracting, which happen once in a fit, are timed as well.

    python benchmarks/structure.py
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from diffusers import UNet2DModel
from torch import Tensor

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.structure import count_parameters, extract, trace_plan, verify_plan

SPARSITIES = (0.3, 0.6, 0.8)
LIMIT = 0.15

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
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    )


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


def measure(rounds: int) -> Timings:
    """Alternate all measurements for so many rounds, after one that does not count."""
    torch.manual_seed(0)
    network = cifar10_unet()
    inputs = (torch.randn(1, 3, 32, 32), torch.tensor([500]))
    plan = trace_plan(network, inputs)
    weights = dict(network.named_parameters())
    seconds: dict[str, list[float]] = {}

    def score_and_draw() -> list[Any]:
        scores = channel_scores(weights, plan)
        return [draw_mask(plan, scores, sparsity) for sparsity in SPARSITIES]

    mask = score_and_draw()[1]
    for _ in range(rounds + 1):
        doomed = copy.deepcopy(network)
        tasks: dict[str, Callable[[], Any]] = {
            SCORE_AND_DRAW: score_and_draw,
            PRUNE: lambda doomed=doomed: prune_with_torch_pruning(doomed, inputs, SPARSITIES[1]),
            "trace (once in a fit)": lambda: trace_plan(network, inputs),
            "verify (once in a fit)": lambda: verify_plan(network, plan, inputs),
            "extract one ticket": lambda: extract(network, plan, mask),
        }
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return Timings({name: taken[1:] for name, taken in seconds.items()})


def main() -> int:
    """Print the table; fails where the ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take medians over (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch_pruning")

    timings = measure(options.rounds)
    size = count_parameters(cifar10_unet())
    print(f"CIFAR-10 U-Net, {size / 1e6:.1f}M parameters; {options.rounds} rounds, {options.threads} thread(s)\n")
    print(timings.table())
    print(f"\nratio of the first two: {timings.ratio:.3f} (limit {LIMIT})")
    return 0 if timings.ratio <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
