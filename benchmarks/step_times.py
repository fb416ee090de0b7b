"""Seconds of a training step: the dense network, the ensemble on a mixed batch, and each ticket on whole batches.

    python benchmarks/step_times.py                          # DDPM's U-Net for CIFAR-10, 35.7 million parameters
    python benchmarks/step_times.py --model cpu --batch 32   # that of examples/cifar10.py recipe=cpu

A step is a forward and a backward pass and an update by Adam. Networks take turns, so that whatever else the machine
does hits all alike; medians and ranges are over the turns, and "of dense" compares turn by turn. Beside them stand the
MACs, likewise of dense. Masks are those of random weights: widths, and with them times, depend on the sparsity alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from shared.module import build_unet
from shared.settings import CONFIGS, ImageSettings, merge_settings

from lightning_earlybird.budget import Allocation, Budget
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import count_macs, extract, trace_plan, verify_plan


class Step:
    """Training steps of one network on timesteps of an interval."""

    def __init__(self, network: nn.Module, bounds: tuple[float, float], options: argparse.Namespace) -> None:
        self.network = network.train()
        self.bounds = (int(bounds[0]), int(bounds[1]))
        self.options = options
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-4)
        self.seconds: list[float] = []

    def run(self) -> None:
        options = self.options
        images = torch.randn(options.batch, 3, 32, 32, device=options.device)
        noise = torch.randn_like(images)
        steps = torch.randint(*self.bounds, (options.batch,), device=options.device)
        wait(options.device)
        started = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            prediction = self.network(images, steps).sample
        nn.functional.mse_loss(prediction.float(), noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(options.device)
        self.seconds.append(time.perf_counter() - started)


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("paper", "cpu"), default="paper")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recipe = [] if options.model == "paper" else ["recipe=cpu"]
    config = merge_settings(CONFIGS / "cifar10.yaml", recipe, ImageSettings)
    dense = build_unet(config.model, size=32, channels=3)
    regions = [region[:3] for region in OmegaConf.to_container(config.pruner.regions)]
    partition = TimestepPartition.of(regions)
    call = (torch.randn(2, 3, 32, 32), torch.randint(0, 1000, (2,)))
    plan = trace_plan(dense, call)
    verify_plan(dense, plan, call)
    scores, budget = channel_scores(dict(dense.named_parameters()), plan), Budget(plan, Allocation())
    tickets = [extract(dense, plan, budget.draw(scores, region.sparsity)) for region in partition]
    networks = {"dense": (dense, (0, 1000)), "routed": (TicketEnsemble(tickets, partition, ARGUMENT), (0, 1000))}
    networks |= {
        f"ticket {k}, sparsity {region.sparsity:g}": (tickets[k], (region.start, region.stop))
        for k, region in enumerate(partition)
    }
    for network, _ in networks.values():
        network.to(options.device)
        if not options.contiguous:
            network.to(memory_format=torch.channels_last)
    steps = {name: Step(network, bounds, options) for name, (network, bounds) in networks.items()}
    for turn in range(options.turns + 1):
        for step in steps.values():
            step.run()
            if turn == 0:
                step.seconds.clear()  # it warms up
    print(
        f"{options.model}: batch {options.batch}, {'bf16' if options.bf16 else 'float32'}, "
        f"{'contiguous' if options.contiguous else 'channels_last'}, {options.threads} thread(s), {options.device}, "
        f"{options.turns} turns"
    )
    print(f"{'':<22}{'median s':>10}{'min':>8}{'max':>8}{'of dense':>10}{'MACs of dense':>15}")
    sample = (torch.randn(1, 3, 32, 32, device=options.device), torch.zeros(1, dtype=torch.long, device=options.device))
    macs = [count_macs(network, sample) for network in (dense, *tickets)]
    shares = [(region.stop - region.start) / 1000 for region in partition]
    routed = sum(share * each for share, each in zip(shares, macs[1:], strict=True))
    for (name, step), each in zip(steps.items(), [macs[0], routed, *macs[1:]], strict=True):
        ratio = statistics.median(a / b for a, b in zip(step.seconds, steps["dense"].seconds, strict=True))
        print(
            f"{name:<22}{statistics.median(step.seconds):>10.3f}{min(step.seconds):>8.3f}{max(step.seconds):>8.3f}"
            f"{ratio:>10.2f}{each / macs[0]:>15.3f}"
        )


ARGUMENT = TimestepArgument("timestep", 1)

if __name__ == "__main__":
    main()
