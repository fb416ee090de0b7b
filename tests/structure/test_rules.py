"""Single operations in the smallest networks that hold them.

Each network is traced and verified: its groups, as width or (heads, width), are what the operation allows, and none of
them fails. Networks whose channels cannot be pruned say why.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_earlybird.structure import StructureError, trace_plan, verify_plan

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)
TOKENS = torch.linspace(-1, 1, 2 * 5 * 6).cos().view(2, 5, 6)


class Network(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def conv(inputs: int, outputs: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


def widths(network: nn.Module, *args: Tensor) -> list[int | tuple[int, int]]:
    """Group sizes of a network after verification, which nothing may fail."""
    torch.manual_seed(0)
    verified = verify_plan(network, trace_plan(network, args), args)
    assert verified.failed == {}
    return [group.size if group.rows == 1 else (group.rows, group.size // group.rows) for group in verified.plan.groups]


def between(function: Callable[[Tensor], Tensor], widen: int = 1) -> Network:
    """The function between two convolutions with 8 channels; it may widen them."""
    return Network(lambda net, x: net.b(function(net.a(x))), a=conv(3, 8), b=conv(8 * widen, 3))


def test_a_gate_goes_with_what_it_opens() -> None:
    network = Network(lambda net, x: net.b(functional.glu(net.a(x), dim=1)), a=conv(3, 16), b=conv(8, 3))

    assert widths(network, IMAGE) == [8]


def attention(split: str) -> Network:
    """Two heads of 8 channels each, written in one of many ways."""

    def function(net: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = net.qkv(x)
        if split == "unbind":
            q, k, v = packed.view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = packed.chunk(3, dim=-1) if split == "chunk" else packed.split(packed.shape[-1] // 3, dim=-1)
            q, k, v = (part.view(batch, length, 2, -1).transpose(1, 2) for part in parts)
        h = functional.scaled_dot_product_attention(q, k, v)
        return net.out(h.transpose(1, 2).flatten(2))

    return Network(function, qkv=nn.Linear(6, 48), out=nn.Linear(16, 6))


@pytest.mark.parametrize("split", ["unbind", "chunk", "split"])
def test_heads_of_a_packed_projection_keep_equally_many_however_it_is_split(split: str) -> None:
    assert widths(attention(split), TOKENS) == [(2, 8)]


def test_attention_without_a_head_dimension_is_rescaled_too() -> None:
    network = Network(
        lambda net, x: net.out(functional.scaled_dot_product_attention(*net.qkv(x).chunk(3, dim=-1))),
        qkv=nn.Linear(6, 48),
        out=nn.Linear(16, 6),
    )

    assert widths(network, TOKENS) == [16]


def _written_out(net: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in net.qkv(x).chunk(3, dim=-1))
    return net.out(((q @ k.transpose(-1, -2) * 0.3).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def test_attention_written_with_matrix_products_couples_values_for_any_batch_size() -> None:
    network = Network(_written_out, qkv=nn.Linear(6, 48), out=nn.Linear(16, 6))

    assert widths(network, TOKENS) == [(2, 8)]
    assert widths(network, TOKENS[:1]) == [(2, 8)]


@pytest.mark.parametrize("tokens", [7, 8])
def test_values_are_not_taken_for_scores_where_there_are_as_many_tokens_as_channels(tokens: int) -> None:
    network = Network(
        lambda net, x: net.out(net.mid((net.q(x) @ net.k(x).transpose(1, 2) * 0.3).softmax(dim=-1) @ net.v(x))),
        **{name: nn.Linear(6, 8) for name in "qkv"},
        mid=nn.Linear(8, 8),
        out=nn.Linear(8, 6),
    )

    assert widths(network, torch.randn(2, tokens, 6)) == [8, 8]


@pytest.mark.parametrize(
    ("function", "widen"),
    [
        (lambda h: h.flip(3), 1),
        (lambda h: h.flip(1), 1),
        (lambda h: h.roll(2, dims=2), 1),
        (lambda h: h.repeat(1, 2, 1, 1), 2),
        (lambda h: h.repeat_interleave(2, dim=1), 2),
        (lambda h: torch.cat([h, h.abs()], dim=1), 2),
        (lambda h: functional.pad(h, (1, 1, 0, 2)), 1),
        (lambda h: functional.pad(h, (1, 1, 1, 1), mode="reflect"), 1),
        (lambda h: functional.interpolate(h, scale_factor=2.0, mode="bilinear"), 1),
        (lambda h: functional.max_pool2d(h, 2), 1),
        (lambda h: functional.avg_pool2d(h, 2), 1),
        (lambda h: functional.adaptive_avg_pool2d(h, 1), 1),
        (lambda h: h * h.mean(dim=(2, 3), keepdim=True).sigmoid(), 1),
        (lambda h: h / h.square().sum(dim=1, keepdim=True).add(1).sqrt(), 1),
        (lambda h: h.softmax(dim=1), 1),
        (lambda h: h - h.mean(dim=1, keepdim=True), 1),
        (lambda h: (h - h.mean(dim=1, keepdim=True)) / (h.var(dim=1, keepdim=True) + 1e-5).sqrt(), 1),
        (lambda h: h * h.exp().mean(dim=1, keepdim=True), 1),
        (lambda h: functional.normalize(h, dim=1) * torch.ones(1) * h.shape[1] ** 0.5, 1),
        (lambda h: h.sum(dim=1, keepdim=True) / h.shape[1] + h, 1),
        (lambda h: h - h.logsumexp(dim=1, keepdim=True), 1),
        (lambda h: h * h.amax(dim=1, keepdim=True), 1),
        (lambda h: functional.normalize(h, dim=1), 1),
        (lambda h: functional.conv2d(h, torch.ones(1, 1, 3, 3).repeat(h.shape[1], 1, 1, 1), groups=h.shape[1]), 1),
        (lambda h: functional.conv2d(h, torch.eye(h.shape[1])[:, :, None, None]), 1),
        (lambda h: h.amax(dim=(2, 3), keepdim=True), 1),
        (lambda h: h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 1),
        (lambda h: h[:, :, ::2, 1:], 1),
        (lambda h: h + torch.ones(1), 1),
        (lambda h: torch.where(h > 0, h, 0.1 * h), 1),
        (lambda h: functional.pixel_unshuffle(h, 2), 4),
        (lambda h: functional.unfold(h, 2, stride=2).unflatten(2, (4, 4)), 4),
        (lambda h: functional.conv2d(h.reshape(-1, 1, 8, 8), torch.ones(1, 1, 3, 3)).view(2, -1, 6, 6), 1),
    ],
)
def test_movement_and_arithmetic_leave_the_channels_free(function: Callable[[Tensor], Tensor], widen: int) -> None:
    assert widths(between(function, widen), IMAGE) == [8]


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(4, 8),
        nn.GroupNorm(4, 8, affine=False),
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.PReLU(8),
        conv(8, 8, groups=8),
        nn.Dropout(0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_on_their_way_follow_the_channels(layer: nn.Module) -> None:
    assert widths(nn.Sequential(conv(3, 8), layer, conv(8, 3)), IMAGE) == [8]


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_follows_the_last_dimension(affine: bool) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(8, 6))

    assert widths(network, TOKENS) == [8]


def test_transposed_and_volumetric_convolutions_have_channels_too() -> None:
    assert widths(nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, stride=2), conv(12, 3)), IMAGE) == [8, 12]
    volume = nn.Sequential(nn.Conv3d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv3d(8, 3, 1))
    assert widths(volume, torch.randn(1, 3, 4, 4, 4)) == [8]


def test_pixel_shuffle_removes_the_positions_of_a_channel_together() -> None:
    network = Network(lambda net, x: net.b(functional.pixel_shuffle(net.a(x), 2)), a=conv(3, 32), b=conv(8, 3))

    assert widths(network, IMAGE) == [8]


def test_scale_and_shift_from_one_layer_are_removed_together() -> None:
    def function(net: Any, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = net.time(t)[:, :, None, None].chunk(2, dim=1)
        return net.b(net.a(x) * (1 + scale) + shift)

    network = Network(function, a=conv(3, 8), time=nn.Linear(4, 16), b=conv(8, 3))

    assert widths(network, IMAGE, torch.randn(2, 4)) == [8]


def test_stacked_tensors_stay_equally_wide() -> None:
    network = Network(
        lambda net, x: net.b(torch.stack([net.a(x), net.c(x)], dim=2).flatten(1, 2)),
        a=conv(3, 8),
        c=conv(3, 8),
        b=conv(16, 3),
    )

    assert widths(network, IMAGE) == [8]


def test_tensors_joined_along_the_sequence_stay_equally_wide() -> None:
    network = Network(
        lambda net, x: net.b(torch.cat([net.a(x), net.c(x)], dim=1).relu()),
        a=nn.Linear(6, 8),
        c=nn.Linear(6, 8),
        b=nn.Linear(8, 6),
    )

    assert widths(network, TOKENS) == [8]


def test_a_weight_used_both_ways_is_one_set_of_channels() -> None:
    network = Network(
        lambda net, x: functional.linear(functional.linear(x, net.w).relu(), net.w.t()),
        w=nn.Parameter(torch.randn(8, 6)),
    )

    assert widths(network, TOKENS) == [8]


def test_a_saved_buffer_with_the_width_of_the_channels_follows_them() -> None:
    network = Network(lambda net, x: net.b(net.a(x) + net.position), a=nn.Linear(6, 8), b=nn.Linear(8, 6))
    network.register_buffer("position", torch.randn(1, 5, 8))

    assert widths(network, TOKENS) == [8]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: h + torch.linspace(0, 1, 8).view(1, 8, 1, 1), "fixed width that carries no channels"),
        (lambda h: h.cumsum(dim=1), "cumsum over channels"),
        (lambda h: h + h[:, [1, 2, 3, 4, 5, 6, 7, 0]], "all channels of a layer depend on each other"),
        (lambda h: h + h.roll(1, dims=1), "roll over channels"),
        (lambda h: h * h[:, 2:3], "one channel is picked by its position"),
        (lambda h: torch.zeros_like(h).copy_(h), "written into another tensor"),
        (lambda h: h.flatten(2).sort(dim=2).values.view_as(h), "no rule for the operation sort"),
        (lambda h: torch.cat([h, torch.ones(2, 8, 1, 8)], dim=2), "joined with a tensor that has no such channels"),
        (lambda h: functional.conv2d(h, torch.ones(8, 8, 1, 1)), "a kernel that is not a parameter"),
        (lambda h: functional.conv2d(h, torch.ones(8, 4, 1, 1), groups=2), "grouped convolution"),
    ],
)
def test_channels_that_an_operation_pins_down_are_frozen_with_the_reason(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(StructureError, match=reason):
        trace_plan(between(function), (IMAGE,))


def test_to_look_at_the_shape_of_a_picked_channel_is_no_use_of_it() -> None:
    assert widths(between(lambda h: h * h[:, 2:3].shape[2]), IMAGE) == [8]


def test_channels_that_turn_into_positions_are_frozen() -> None:
    network = Network(lambda net, x: net.b(net.a(x.flatten(1)).view(2, 1, 8, 8)), a=nn.Linear(192, 64), b=conv(1, 3))

    with pytest.raises(StructureError, match="convolution across channels"):
        trace_plan(network, (IMAGE,))


def test_queries_that_several_layers_make_are_all_rescaled() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.cat([net.image(x), net.text(x)], dim=1).chunk(3, dim=-1)[i] for i in range(3))
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
        return net.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    network = Network(function, image=nn.Linear(6, 48), text=nn.Linear(6, 48), out=nn.Linear(16, 6))

    assert widths(network, TOKENS) == [(2, 8)]


def test_learned_positions_pass_through_attention() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in net.qkv(net.a(x) + net.p).chunk(3, dim=-1))
        return net.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    layers = {"a": nn.Linear(6, 8), "qkv": nn.Linear(8, 48), "out": nn.Linear(16, 6)}
    network = Network(function, **layers, p=nn.Parameter(torch.randn(1, 5, 8)))

    assert widths(network, TOKENS) == [8, (2, 8)]


def test_channels_that_end_in_an_attention_mask_are_frozen() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in net.qkv(x).chunk(3, dim=-1))
        bias = net.bias(x).transpose(1, 2)[:, :, None]
        h = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, -1, x.shape[1], -1))
        return net.out(h.transpose(1, 2).flatten(2)) + net.d(net.c(x))

    layers = {"qkv": nn.Linear(6, 48), "out": nn.Linear(16, 6), "bias": nn.Linear(6, 2)}
    network = Network(function, **layers, c=nn.Linear(6, 8), d=nn.Linear(8, 6))
    plan = trace_plan(network, (TOKENS,))

    assert "bias" not in [group.name for group in plan.groups]
    assert verify_plan(network, plan, (TOKENS,)).failed == {}
