"""Small denoisers for the tests: each takes noisy samples and timesteps, and is traced and pruned in no time."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, trace_plan


def tiny_unet(**overrides: Any) -> UNet2DModel:
    """A UNet2DModel for (B, 3, 8, 8) samples: 16 and 32 channels, attention with heads of 8 at the lower resolution."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DModel(**{**settings, **overrides})


def sinusoidal(timesteps: Tensor, width: int) -> Tensor:
    """The usual time embedding, (B,) -> (B, width)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=timesteps.device) / (width // 2))
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Residual(nn.Module):
    """Two normalised convolutions with the time embedding added between them."""

    def __init__(self, inputs: int, outputs: int, time_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = h + self.time(nn.functional.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(nn.functional.silu(self.norm2(h))))
        return self.skip(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over positions, written out with matrix products.

    ``scale`` says where the factor of the scores comes from: "fixed" at construction, or "width" of the queries at run
    time (so that a narrower query changes it).
    """

    def __init__(self, channels: int, scale: str) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.scale = channels**-0.5 if scale == "fixed" else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = self.q(normed).flatten(2), self.k(normed).flatten(2), self.v(normed).flatten(2)
        scores = torch.bmm(q.transpose(1, 2), k) * (self.scale or q.shape[1] ** -0.5)
        h = torch.bmm(v, scores.softmax(dim=2).transpose(1, 2))
        return x + self.out(h.view(x.shape[0], -1, *x.shape[2:]))


class PlainUNet(nn.Module):
    """A U-Net as people write it by hand: GroupNorm, skip connections, one attention, sinusoidal time embedding."""

    def __init__(self, channels: int = 16, dropout: float = 0.0, scale: str = "fixed") -> None:
        super().__init__()
        time_width = 2 * channels
        self.time_width = time_width
        self.time1 = nn.Linear(time_width, time_width)
        self.time2 = nn.Linear(time_width, time_width)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down1 = Residual(channels, channels, time_width, dropout)
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.down2 = Residual(channels, 2 * channels, time_width, dropout)
        self.attention = SpatialAttention(2 * channels, scale)
        self.up2 = Residual(3 * channels, 2 * channels, time_width, dropout)
        self.grow = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.up1 = Residual(2 * channels, channels, time_width, dropout)
        self.norm_out = nn.GroupNorm(4, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time2(nn.functional.silu(self.time1(sinusoidal(timesteps, self.time_width))))
        first = self.down1(self.conv_in(x), emb)
        low = self.shrink(first)
        h = self.attention(self.down2(low, emb))
        h = self.up2(torch.cat([h, low], dim=1), emb)
        h = self.grow(nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up1(torch.cat([h, first], dim=1), emb)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))


class Positions(nn.Module):
    """Adds position embeddings that its constructor computes and that are not saved, (B, 5, 6) -> (B, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("positions", torch.arange(40.0).view(1, 5, 8), persistent=False)
        self.register_buffer("unrelated", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.positions)


@dataclass
class Denoiser:
    """A network with one call of it."""

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, network: nn.Module | None = None) -> Tensor:
        """The output of the call, for the network itself or for another one."""
        out = (self.network if network is None else network)(*self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out.sample


def _unet(**overrides: Any) -> Denoiser:
    kwargs = {"class_labels": torch.tensor([3, 1])} if "num_class_embeds" in overrides else {}
    return Denoiser(tiny_unet(**overrides), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), kwargs)


_PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}

DENOISERS: dict[str, Callable[[], Denoiser]] = {
    "without attention": lambda: _unet(**_PLAIN),
    "attention_head_dim=8": _unet,
    "attention_head_dim=None": lambda: _unet(attention_head_dim=None),
    "class-conditional": lambda: _unet(num_class_embeds=10),
    "hand-written": lambda: Denoiser(PlainUNet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900]))),
}


def denoiser(name: str, seed: int = 0) -> Denoiser:
    """One of ``DENOISERS`` with reproducible weights and inputs, in evaluation mode; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = DENOISERS[name]()
    found.network.eval()
    return found


@functools.cache
def traced(name: str) -> tuple[Denoiser, ChannelPlan]:
    """One of ``DENOISERS`` with its plan; shared between tests, which must not change it."""
    found = denoiser(name)
    return found, trace_plan(found.network, found.args, found.kwargs)


def random_mask(plan: ChannelPlan, seed: int) -> TicketMask:
    """A random share of every group's channels at random positions; every head of a group keeps equally many."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in plan.groups:
        width = group.size // group.rows
        count = int(torch.randint(1, width + 1, (1,), generator=generator))
        kept[group.name] = (torch.rand(group.rows, width, generator=generator).argsort(dim=1) < count).flatten()
    return TicketMask(kept)
