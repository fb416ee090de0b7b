from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_unet
from torch import Tensor, nn

from lightning_earlybird.structure import trace_plan, verify_plan
from lightning_earlybird.structure.crop import OperationLog, crop


class Seen(nn.Module):
    """Two convolutions; the sizes of all samples are written down."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] = lambda net, h: h) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.positions = nn.Parameter(torch.ones(8, 16, 16))
        self.extra = nn.Conv2d(8, 8, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(x.shape[-1])
        return self.b(self.between(self, self.a(x)))


SIZES: list[int] = []
IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).sin().view(1, 3, 16, 16)


def verified_on(network: nn.Module) -> int:
    """The size of the samples that tickets were given while groups were tried; all pixels are given once at the end."""
    plan = trace_plan(network, (IMAGE,))
    SIZES.clear()
    assert verify_plan(network, plan, (IMAGE,)).failed == {}
    assert SIZES[-2:] == [16, 16]
    return SIZES[-3]


def scored(net: Any, h: Tensor) -> Tensor:
    """Of 4 by 4 pixels, pooling would leave one, whose softmax is 1 whatever its score."""
    scores = nn.functional.avg_pool2d(h, 4).softmax(dim=-1)
    return h * nn.functional.interpolate(scores, scale_factor=4.0)


@pytest.mark.parametrize(
    ("between", "size"),
    [
        (lambda net, h: h, 4),
        (lambda net, h: h + net.positions, 16),
        (lambda net, h: net.extra(h) if h.shape[-1] > 8 else h, 16),
        (lambda net, h: h.unflatten(3, (-1, 8)).flatten(3), 16),  # a window of 8 in 8 is no window
        (scored, 8),
    ],
    ids=["any size", "positions", "branch", "windows", "softmax"],
)
def test_a_network_is_verified_on_the_fewest_pixels_that_show_the_same(
    between: Callable[[Any, Tensor], Tensor], size: int
) -> None:
    assert verified_on(Seen(between)) == size


def test_a_unet_keeps_two_pixels_a_side_at_its_lowest_resolution() -> None:
    network = tiny_unet(sample_size=32)
    inputs = (torch.randn(1, 3, 32, 32), torch.tensor([5]))
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda net, args: sizes.append(args[0].shape[-1]))
    hooked = verify_plan(network, trace_plan(network, inputs), inputs)

    assert hooked.failed == {}
    assert len(sizes) > 3
    assert sizes[-3:] == [8, 32, 32]


def test_everything_of_the_samples_height_and_width_is_cropped_and_nothing_else() -> None:
    image, mask, context, timestep = torch.randn(1, 3, 16, 16), torch.ones(16, 16), torch.randn(1, 7, 16), torch.ones(1)

    cropped = crop((image, timestep), {"added": {"mask": mask, "context": context, "scale": 2}}, 4)

    assert cropped is not None
    (sample, time), kwargs = cropped
    assert torch.equal(sample, image[..., :4, :4]) and time is timestep
    assert torch.equal(kwargs["added"]["mask"], mask[:4, :4])
    assert kwargs["added"]["context"] is context and kwargs["added"]["scale"] == 2


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 18, 18), (1, 512)])
def test_calls_that_are_small_or_do_not_divide_are_left_alone(shape: tuple[int, ...]) -> None:
    assert crop((torch.ones(shape),), {}, 4) is None


def test_other_operations_and_other_weights_do_not_stand_for_a_call() -> None:
    layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

    def log(run: Callable[[Tensor], Tensor], size: int) -> OperationLog:
        sample = IMAGE[..., :size, :size].contiguous()
        with torch.no_grad(), OperationLog(layers) as written:
            run(sample)
        return written

    whole = log(layers[0], 16)
    assert log(layers[0], 4).stands_for(whole)
    assert not log(layers[0], 1).stands_for(whole)
    assert not log(layers[1], 4).stands_for(whole)
    assert not log(lambda x: layers[0](x).relu(), 4).stands_for(whole)
    assert whole.read() == {"0.weight", "0.bias"}
