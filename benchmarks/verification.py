"""What verification can tell apart: rounding, and one dimension of one tensor in the wrong order.

The extracted network is compared with the dense one whose removed channels are zero. Where the plan is right they
differ by rounding only; where one dimension's channels are rolled by one place they must differ by much more, however
deep inside. The tolerance of ``verify_plan`` lies between the two.

    python benchmarks/verification.py
"""

import argparse
from dataclasses import replace

import torch
from diffusers import UNet2DModel
from structure import cifar10_unet
from torch import Tensor, nn

from lightning_earlybird.structure import ChannelPlan, trace_plan, verify_plan


def tall_unet(layers_per_block: int) -> UNet2DModel:
    """Five resolutions, attention with heads of 8 at three of them."""
    kinds = ("", "Attn", "Attn", "", "Attn")
    return UNet2DModel(
        sample_size=32,
        layers_per_block=layers_per_block,
        block_out_channels=(32, 32, 64, 64, 64),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=8,
        norm_num_groups=8,
    )


def error(network: nn.Module, plan: ChannelPlan, inputs: tuple[Tensor, Tensor], seed: int = 0) -> float:
    """Relative difference, whatever it is."""
    return verify_plan(network, plan, inputs, seed=seed, tolerance=float("inf")).max_error


def rolled(plan: ChannelPlan, name: str, dim: int) -> ChannelPlan:
    """The plan with the channels of one dimension rolled by one place."""
    dims = plan.ids[name]
    return replace(plan, ids={**plan.ids, name: {**dims, dim: dims[dim].roll(1)}})


def main() -> None:
    """Print both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="roll only every so manieth dimension (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = (torch.randn(1, 3, 32, 32), torch.tensor([500]))

    print("right plans, largest of three seeds")
    networks = {f"{layers} layers a block": tall_unet(layers) for layers in (1, 2, 4, 8)}
    for name, network in {**networks, "CIFAR-10 U-Net": cifar10_unet()}.items():
        convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
        plan = trace_plan(network, inputs)
        largest = max(error(network, plan, inputs, seed) for seed in range(3))
        print(f"  {name:18} {convolutions:4} convolutions  {largest:.1e}")

    network = cifar10_unet()
    plan = trace_plan(network, inputs)
    places = [(name, 1) for name, dims in plan.ids.items() if 1 in dims and bool((dims[1] >= 0).all())][
        :: options.every
    ]
    wrong = sorted((error(network, rolled(plan, *place), inputs), place[0]) for place in places)
    print(f"one input dimension rolled, CIFAR-10 U-Net, {len(places)} plans, smallest first")
    for difference, name in wrong[:5]:
        print(f"  {difference:.1e}  {name}")


if __name__ == "__main__":
    main()
