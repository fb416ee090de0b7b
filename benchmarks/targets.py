"""How exactly sparsities are met: nominal against achieved, counted in channels, parameters and MACs.

On the CIFAR-10 U-Net (35.7M parameters) and the CelebA U-Net (78.7M) of the EB-Diff-Train experiments and on a
class-conditional DiT (39.8M, the size of DiT-S/2), with widths in multiples of eight. Masks are drawn from magnitudes
of initial weights. `--extract` also extracts every ticket and counts its parameters, and its MACs with PyTorch's FLOP
counter, instead of trusting the cost model (minutes instead of seconds).

    python benchmarks/targets.py [--extract]
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from diffusers import DiTTransformer2DModel
from structure import celeba_unet, cifar10_unet
from torch import nn

from lightning_earlybird.budget import Allocation, Budget, Scope, Target
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.structure import count_macs, count_parameters, extract, trace_plan

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LIMIT = 0.01  # of the nominal value


@dataclass(frozen=True)
class Row:
    """What one allocation achieves."""

    network: str
    target: str
    scope: str
    achieved: dict[float, float]
    counted: dict[float, float]  # on extracted networks, where asked for

    @property
    def miss(self) -> float:
        """The largest distance from a nominal value, as a fraction of it."""
        return max(abs(value - nominal) / nominal for nominal, value in self.achieved.items())


def dit() -> DiTTransformer2DModel:
    """Twelve blocks of six heads of 64, patches of 2 on 32x32 latents."""
    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def image(size: int, channels: int = 3) -> torch.Tensor:
    """One sample."""
    return torch.randn(1, channels, size, size)


STEP = torch.tensor([500])
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {
    "CIFAR-10 U-Net": lambda: (cifar10_unet(), (image(32), STEP), {}),
    "CelebA U-Net": lambda: (celeba_unet(), (image(64), STEP), {}),
    "DiT": lambda: (dit(), (image(32, 4),), {"timestep": STEP, "class_labels": torch.tensor([3])}),
}


def measure(check: bool = False) -> Iterator[Row]:
    """Every network, target and scope; with ``check`` on extracted networks as well."""
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        network, args, kwargs = build()
        plan = trace_plan(network, args, kwargs)
        scores = channel_scores(dict(network.named_parameters()), plan)
        for target in get_args(Target):
            for scope in get_args(Scope):
                budget = Budget(plan, Allocation(target, scope))
                masks = {sparsity: budget.draw(scores, sparsity) for sparsity in SPARSITIES}
                counted = {}
                if check and target != "channels":
                    tickets = [network, *(extract(network, plan, mask) for mask in masks.values())]
                    dense, *costs = (
                        count_parameters(each) if target == "params" else count_macs(each, args, kwargs)
                        for each in tickets
                    )
                    counted = {s: 1 - cost / dense for s, cost in zip(SPARSITIES, costs, strict=True)}
                achieved = {sparsity: budget.achieved(mask) for sparsity, mask in masks.items()}
                yield Row(name, target, scope, achieved, counted)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", action="store_true", help="count extracted networks, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':16}{'target':10}{'scope':9}" + "".join(f"{s:>9}" for s in SPARSITIES) + "   largest miss")
    for row in measure(options.extract):
        values = "".join(f"{value:9.4f}" for value in row.achieved.values())
        odd = [s for s, value in row.counted.items() if abs(value - row.achieved[s]) > 1e-9]
        note = (" (extracted: the same)" if not odd else f" (extracted: other at {odd})") if row.counted else ""
        print(f"{row.network:16}{row.target:10}{row.scope:9}{values}   {row.miss:.2%} of nominal{note}")


if __name__ == "__main__":
    main()
