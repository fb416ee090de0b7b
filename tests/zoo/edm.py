"""U-Nets in the styles of ADM, EDM and EDM2, reduced to their structure."""

import math

import torch
from models import Denoiser, sinusoidal
from torch import Tensor, nn
from torch.nn import functional


def _call(network: nn.Module, *more: Tensor) -> Denoiser:
    return Denoiser(network, (torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), *more))


# --- ADM (guided diffusion)


class ADMAttention(nn.Module):
    """Queries, keys and values from one 1-d convolution, in the "legacy" order (head by head) or the new one."""

    def __init__(self, channels: int, heads: int, legacy: bool) -> None:
        super().__init__()
        self.heads, self.legacy = heads, legacy
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        width, length = qkv.shape[1], qkv.shape[2]
        ch = width // (3 * self.heads)
        scale = 1 / math.sqrt(math.sqrt(ch))
        if self.legacy:
            q, k, v = qkv.reshape(b * self.heads, ch * 3, length).split(ch, dim=1)
            weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        else:
            q, k, v = qkv.chunk(3, dim=1)
            weight = torch.einsum(
                "bct,bcs->bts",
                (q * scale).view(b * self.heads, ch, length),
                (k * scale).view(b * self.heads, ch, length),
            )
            v = v.reshape(b * self.heads, ch, length)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, length)
        return (x + self.proj_out(h)).reshape(b, c, *spatial)


class ADMBlock(nn.Module):
    """A residual block with scale and shift from the time embedding, which may also halve or double the resolution."""

    def __init__(self, inputs: int, outputs: int, time_width: int, sampling: str = "") -> None:
        super().__init__()
        self.sampling = sampling
        self.in_norm, self.in_conv = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.emb = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * outputs))
        self.out_norm, self.out_conv = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def _sample(self, x: Tensor) -> Tensor:
        if self.sampling == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.sampling == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_conv(self._sample(functional.silu(self.in_norm(x))))
        emb_out = self.emb(emb)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        scale, shift = torch.chunk(emb_out, 2, dim=1)
        h = self.out_conv(functional.silu(self.out_norm(h) * (1 + scale) + shift))
        return self.skip(self._sample(x)) + h


class ADM(nn.Module):
    """ADM with class labels, attention at the low resolution and residual blocks for resampling."""

    def __init__(self, channels: int = 16, legacy: bool = False) -> None:
        super().__init__()
        time_width = 2 * channels
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width))
        self.label = nn.Embedding(10, time_width)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.enc = ADMBlock(channels, channels, time_width)
        self.down = ADMBlock(channels, channels, time_width, "down")
        self.low = ADMBlock(channels, 2 * channels, time_width)
        self.attention = ADMAttention(2 * channels, 4, legacy)
        self.mid = ADMBlock(2 * channels, 2 * channels, time_width)
        self.up = ADMBlock(2 * channels, 2 * channels, time_width, "up")
        self.dec = ADMBlock(3 * channels, channels, time_width)
        self.out = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        emb = self.time(sinusoidal(timesteps, self.channels)) + self.label(labels)
        first = self.enc(self.conv_in(x), emb)
        h = self.mid(self.attention(self.low(self.down(first, emb), emb)), emb)
        return self.out(self.dec(torch.cat([self.up(h, emb), first], dim=1), emb))


# --- EDM (DDPM++ and NCSN++ as the "SongUNet")


class EDMConv(nn.Module):
    """A convolution that resamples with a fixed filter, a buffer applied to every channel by itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down = inputs, outputs, up, down
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) * 0.1) if kernel else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if kernel else None
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        taps = taps.ger(taps).unsqueeze(0).unsqueeze(1) / taps.sum().square()
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype) if self.weight is not None else None
        b = self.bias.to(x.dtype) if self.bias is not None else None
        f = self.resample_filter.to(x.dtype) if self.resample_filter is not None else None
        pad = w.shape[-1] // 2 if w is not None else 0
        if self.up:
            x = functional.conv_transpose2d(
                x, f.mul(4).tile([self.in_channels, 1, 1, 1]), groups=self.in_channels, stride=2, padding=1
            )
        if self.down:
            x = functional.conv2d(x, f.tile([self.in_channels, 1, 1, 1]), groups=self.in_channels, stride=2, padding=1)
        if w is not None:
            x = functional.conv2d(x, w, padding=pad)
        return x if b is None else x.add_(b.reshape(1, -1, 1, 1))


class EDMBlock(nn.Module):
    """The block of EDM, with attention whose width is read from its input."""

    def __init__(
        self, inputs: int, outputs: int, emb: int, heads: int = 0, up: bool = False, down: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.skip_scale = heads, math.sqrt(0.5)
        self.norm0 = nn.GroupNorm(4, inputs)
        self.conv0 = EDMConv(inputs, outputs, 3, up, down)
        self.affine = nn.Linear(emb, 2 * outputs)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.conv1 = EDMConv(outputs, outputs, 3)
        needed = inputs != outputs or up or down
        self.skip = EDMConv(inputs, outputs, 1 if inputs != outputs else 0, up, down) if needed else None
        if heads:
            self.norm2 = nn.GroupNorm(4, outputs)
            self.qkv = EDMConv(outputs, 3 * outputs, 1)
            self.proj = EDMConv(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        orig = x
        x = self.conv0(functional.silu(self.norm0(x)))
        scale, shift = self.affine(emb).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
        x = functional.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        x = self.conv1(x)
        x = x.add_(self.skip(orig) if self.skip is not None else orig)
        x = x * self.skip_scale
        if self.num_heads:
            q, k, v = (
                self.qkv(self.norm2(x))
                .reshape(x.shape[0] * self.num_heads, x.shape[1] // self.num_heads, 3, -1)
                .unbind(2)
            )
            w = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", w, v)
            x = self.proj(a.reshape(*x.shape)).add_(x)
            x = x * self.skip_scale
        return x


class SongUNet(nn.Module):
    """DDPM++ (or, with an image skip and a residual pyramid, NCSN++), at two resolutions."""

    def __init__(self, channels: int = 16, pyramid: bool = False) -> None:
        super().__init__()
        emb = 2 * channels
        self.channels, self.pyramid = channels, pyramid
        self.map_layer0, self.map_layer1 = nn.Linear(channels, emb), nn.Linear(emb, emb)
        self.conv_in = EDMConv(3, channels, 3)
        self.enc = EDMBlock(channels, channels, emb)
        self.down = EDMBlock(channels, channels, emb, down=True)
        if pyramid:
            self.aux_down = EDMConv(3, 3, 0, down=True)
            self.aux_skip = EDMConv(3, channels, 1)
        self.low = EDMBlock(channels, 2 * channels, emb, heads=2)
        self.mid = EDMBlock(2 * channels, 2 * channels, emb, heads=1)
        self.up = EDMBlock(3 * channels, 2 * channels, emb, up=True)
        self.dec = EDMBlock(3 * channels, channels, emb)
        self.norm_out, self.conv_out = nn.GroupNorm(4, channels), EDMConv(channels, 3, 3)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = functional.silu(self.map_layer0(sinusoidal(timesteps, self.channels)))
        emb = functional.silu(self.map_layer1(emb))
        first = self.enc(self.conv_in(x), emb)
        low = self.down(first, emb)
        if self.pyramid:
            low = (low + self.aux_skip(self.aux_down(x))) / math.sqrt(2)
        h = self.mid(self.low(low, emb), emb)
        h = self.up(torch.cat([h, low], dim=1), emb)
        h = self.dec(torch.cat([h, first], dim=1), emb)
        return self.conv_out(functional.silu(self.norm_out(h)))


# --- EDM2: everything preserves magnitudes


def normalize(x: Tensor, dim: int | None = None, eps: float = 1e-4) -> Tensor:
    """Root mean square 1 over ``dim``; over all dimensions but the first without it."""
    dims = list(range(1, x.ndim)) if dim is None else [dim]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    norm = torch.add(eps, norm, alpha=math.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    n_a, n_b = a.shape[dim], b.shape[dim]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale / math.sqrt(n_a) * (1 - t) * a, scale / math.sqrt(n_b) * t * b], dim=dim)


class MPConv(nn.Module):
    """A convolution or linear layer whose weight is normalised where it is used, and in place while training."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.out_channels = outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1) -> Tensor:
        w = self.weight.to(torch.float32)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(w))
        w = normalize(w) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        return functional.conv2d(x, w, padding=(w.shape[-1] // 2,))


class MPFourier(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float().ger(self.freqs) + self.phases).cos().to(torch.float32) * math.sqrt(2)


class EDM2Block(nn.Module):
    """An encoder block (pixel norm on its way in) or a decoder block, with cosine-like attention."""

    def __init__(self, inputs: int, outputs: int, emb: int, flavor: str, heads: int = 0, sampling: str = "") -> None:
        super().__init__()
        self.flavor, self.num_heads, self.sampling, self.out_channels = flavor, heads, sampling, outputs
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outputs if flavor == "enc" else inputs, outputs, (3, 3))
        self.emb_linear = MPConv(emb, outputs)
        self.conv_res1 = MPConv(outputs, outputs, (3, 3))
        self.conv_skip = MPConv(inputs, outputs, (1, 1)) if inputs != outputs else None
        if heads:
            self.attn_qkv = MPConv(outputs, 3 * outputs, (1, 1))
            self.attn_proj = MPConv(outputs, outputs, (1, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.sampling == "up":
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
        elif self.sampling == "down":
            x = functional.avg_pool2d(x, 2)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype))
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=0.3)
        if self.num_heads:
            y = self.attn_qkv(x)
            y = y.reshape(y.shape[0], self.num_heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = normalize(y, dim=2).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            y = self.attn_proj(y.reshape(*x.shape))
            x = mp_sum(x, y, t=0.3)
        return x.clip_(-256, 256)


class EDM2UNet(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        emb = 2 * channels
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier, self.emb_noise = MPFourier(channels), MPConv(channels, emb)
        self.emb_label = MPConv(10, emb)
        self.conv_in = MPConv(4, channels, (3, 3))
        self.enc = EDM2Block(channels, channels, emb, "enc")
        self.down = EDM2Block(channels, channels, emb, "enc", sampling="down")
        self.low = EDM2Block(channels, 2 * channels, emb, "enc", heads=2)
        self.mid = EDM2Block(2 * channels, 2 * channels, emb, "dec", heads=2)
        self.up = EDM2Block(2 * channels, 2 * channels, emb, "dec", sampling="up")
        self.dec = EDM2Block(3 * channels, channels, emb, "dec")
        self.out_conv = MPConv(channels, 3, (3, 3))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(timesteps.float().log1p() / 4))
        one_hot = functional.one_hot(labels, 10).to(emb.dtype)
        emb = mp_silu(mp_sum(emb, self.emb_label(one_hot * math.sqrt(one_hot.shape[1])), t=0.5))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        first = self.enc(self.conv_in(x), emb)
        h = self.mid(self.low(self.down(first, emb), emb), emb)
        h = self.dec(mp_cat(self.up(h, emb), first), emb)
        return self.out_conv(h, gain=self.out_gain)


EDM = {
    "ADM": lambda: _call(ADM(), torch.tensor([3, 1])),
    "ADM, legacy attention": lambda: _call(ADM(legacy=True), torch.tensor([3, 1])),
    "EDM DDPM++": lambda: _call(SongUNet()),
    "EDM NCSN++": lambda: _call(SongUNet(pyramid=True)),
    "EDM2": lambda: _call(EDM2UNet(), torch.tensor([3, 1])),
}
