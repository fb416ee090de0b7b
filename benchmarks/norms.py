"""What it costs to keep the original statistics groups (``norm="exact"``), by itself and in a network.

On the U-Net of the EB-Diff-Train experiments for CIFAR-10 (35.7M parameters), one thread: forward passes and training
steps of the tickets of one random mask, with either kind of norm; and of a single norm on the activations of its first
level. Rounds of both alternate in one process, so that a busy machine slows both; medians are compared.

    python benchmarks/norms.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from structure import cifar10_unet
from torch import Tensor, nn

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.structure import RaggedGroupNorm, extract, trace_plan


def ratio(name: str, plain: Callable[[], object], ragged: Callable[[], object], rounds: int, repeats: int = 1) -> None:
    """Print the medians of both and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for call, found in zip((plain, ragged), times, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if number:  # the first round warms up
                found.append((time.perf_counter() - start) / repeats)
    first, second = (statistics.median(found) for found in times)
    print(f"  {name:42} {first * 1e3:9.2f} ms {second * 1e3:9.2f} ms  x{second / first:.2f}")


def main() -> None:
    """Print single norms, then tickets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def forward(network: nn.Module, *inputs: Tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return network(*inputs)

        return call

    def step(network: nn.Module, *inputs: Tensor) -> Callable[[], object]:
        def call() -> None:
            out = network(*inputs)
            (out if isinstance(out, Tensor) else out.sample).square().mean().backward()

        return call

    print(f"  {'':42} {'GroupNorm':>12} {'ragged':>12}")
    sizes = [3 if number % 2 else 5 for number in range(32)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(16, 128, 32, 32).to(memory_format=memory_format).requires_grad_()
        norms = nn.GroupNorm(32, 128), RaggedGroupNorm(sizes)
        kind = str(memory_format).removeprefix("torch.")
        for name, timed in (("forward", forward), ("forward and backward", step)):
            ratio(f"one norm, {kind}, {name}", timed(norms[0], x), timed(norms[1], x), options.rounds, repeats=5)
    network = cifar10_unet()
    plan = trace_plan(network, (torch.randn(1, 3, 32, 32), torch.tensor([500])))
    inputs = torch.randn(4, 3, 32, 32), torch.tensor([5, 300, 600, 900])
    for sparsity in (0.3, 0.6, 0.8):
        mask = draw_mask(plan, torch.rand(plan.num_channels), sparsity)
        tickets = extract(network, plan, mask), extract(network, plan, mask, norm="exact")
        for name, timed in (("forward", forward), ("training step", step)):
            ratio(
                f"ticket at {sparsity}, {name}", timed(tickets[0], *inputs), timed(tickets[1], *inputs), options.rounds
            )


if __name__ == "__main__":
    main()
