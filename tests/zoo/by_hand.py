"""Networks as people write them: PyTorch's own attention, einops, and parameters that are used functionally."""

import math
from collections.abc import Callable

import torch
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from models import Denoiser, PlainUNet, sinusoidal
from torch import Tensor, einsum, nn
from torch.nn import functional

TIMES = (5, 900)


def _images(network: nn.Module) -> Denoiser:
    return Denoiser(network, (torch.randn(2, 3, 8, 8), torch.tensor(TIMES)))


class Patches(nn.Module):
    """(B, 3, 8, 8) to 16 tokens and back, around the blocks of a small transformer."""

    def __init__(self, block: Callable[[int], nn.Module], width: int = 16, batch_first: bool = True) -> None:
        super().__init__()
        self.width, self.batch_first = width, batch_first
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        h = h + self.time(sinusoidal(timesteps, self.width))[:, None]
        h = h if self.batch_first else h.transpose(0, 1)
        for block in self.blocks:
            h = block(h)
        h = h if self.batch_first else h.transpose(0, 1)
        return functional.pixel_shuffle(self.head(self.norm(h)).transpose(1, 2).unflatten(2, (4, 4)), 2)


class AttentionBlock(nn.Module):
    """nn.MultiheadAttention before a feed-forward network, both with residuals."""

    def __init__(self, width: int, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=self.need_weights)[0]
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """nn.MultiheadAttention to a context of another width, which the block makes itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.context = nn.Linear(width, 12)
        self.attention = nn.MultiheadAttention(width, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x).relu()
        return x + self.attention(self.norm(x), context, context)[0]


class TimmBlock(nn.Module):
    """The block of ViT and of the official DiT: widths are read from the input, and residuals have a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma1, self.gamma2 = nn.Parameter(0.1 * torch.ones(width)), nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.gamma1 * self.proj(h.transpose(1, 2).reshape(batch, length, width))
        return x + self.gamma2 * self.fc2(functional.gelu(self.fc1(self.norm2(x))))


# --- einops, after lucidrains


class RMSNorm(nn.Module):
    """Root mean square over channels, by way of the length; the factor is fixed when it is built."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.g * self.scale


class MeanSquareNorm(nn.Module):
    """The same, as it is written where the mean is taken."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6) * self.g


class LayerNorm(nn.Module):
    """Layer norm over the channels of an image, with mean and variance written out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var = torch.var(x, dim=1, unbiased=False, keepdim=True)
        mean = torch.mean(x, dim=1, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.g + self.b


class LinearAttention(nn.Module):
    """Attention that is linear in the number of positions: softmax of queries over features, of keys over positions."""

    def __init__(self, dim: int, heads: int = 2, dim_head: int = 8) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, 4))
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), RMSNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (h c) x y -> b h c (x y)", h=self.heads) for t in qkv)
        mk, mv = (repeat(t, "h c n -> b h c n", b=b) for t in self.mem_kv)
        k, v = torch.cat((mk, k), dim=-1), torch.cat((mv, v), dim=-1)
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = einsum("b h d n, b h e n -> b h d e", k, v)
        out = einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(rearrange(out, "b h c (x y) -> b (h c) x y", h=self.heads, x=height, y=width))


class FullAttention(nn.Module):
    """Attention with learned memory tokens: parameters joined with activations."""

    def __init__(self, dim: int, heads: int = 2, dim_head: int = 8) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, 4, dim_head))
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (h c) x y -> b h (x y) c", h=self.heads) for t in qkv)
        mk, mv = (repeat(t, "h n d -> b h n d", b=b) for t in self.mem_kv)
        k, v = torch.cat((mk, k), dim=-2), torch.cat((mv, v), dim=-2)
        attn = (einsum("b h i d, b h j d -> b h i j", q, k) * self.scale).softmax(dim=-1)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(rearrange(out, "b h (x y) d -> b (h d) x y", x=height, y=width))


class EinopsBlock(nn.Module):
    def __init__(self, dim: int, dim_out: int, time_dim: int, norm: Callable[[int], nn.Module] = RMSNorm) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.proj1, self.norm1 = nn.Conv2d(dim, dim_out, 3, padding=1), norm(dim_out)
        self.proj2, self.norm2 = nn.Conv2d(dim_out, dim_out, 3, padding=1), norm(dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = rearrange(self.mlp(t), "b c -> b c 1 1").chunk(2, dim=1)
        h = functional.silu(self.norm1(self.proj1(x)) * (scale + 1) + shift)
        return functional.silu(self.norm2(self.proj2(h))) + self.res_conv(x)


class EinopsUNet(nn.Module):
    """Rearrange layers for resampling, both attentions, self-conditioning by concatenation, a pooled global token."""

    def __init__(self, dim: int = 16, norm: Callable[[int], nn.Module] = RMSNorm) -> None:
        super().__init__()
        self.dim = dim
        self.init_conv = nn.Conv2d(3, dim, 7, padding=3)
        self.time = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 2 * dim))
        self.down1 = EinopsBlock(dim, dim, 2 * dim, norm)
        self.linear_attention = LinearAttention(dim)
        self.downsample = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2), nn.Conv2d(4 * dim, 2 * dim, 1)
        )
        self.mid = EinopsBlock(2 * dim, 2 * dim, 2 * dim, norm)
        self.pooled = nn.Linear(2 * dim, 2 * dim)
        self.attention = FullAttention(2 * dim)
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(2 * dim, dim, 3, padding=1)
        )
        self.up1 = EinopsBlock(2 * dim, dim, 2 * dim, norm)
        self.final = EinopsBlock(2 * dim, dim, 2 * dim, norm)
        self.final_conv = nn.Conv2d(dim, 3, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        x = self.init_conv(x)
        r = x.clone()
        t = self.time(sinusoidal(timesteps, self.dim))
        x = self.down1(x, t)
        x = self.linear_attention(x) + x
        h = x
        x = self.mid(self.downsample(x), t)
        x = x + rearrange(self.pooled(reduce(x, "b c h w -> b c", "mean")), "b c -> b c 1 1")
        x = self.attention(x) + x
        x = self.up1(torch.cat((self.upsample(x), h), dim=1), t)
        return self.final_conv(self.final(torch.cat((x, r), dim=1), t))


# --- parameters used functionally, shared and tied


class DemodulatedConv(nn.Module):
    """A convolution after StyleGAN2: its weight is modulated by the sample's embedding and normalised by output."""

    def __init__(self, inputs: int, outputs: int, emb: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.style = nn.Linear(emb, inputs)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        style = self.style(emb) + 1
        x = functional.conv2d(x * style[:, :, None, None], self.weight, padding=1)
        demodulation = (style.square() @ self.weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()
        return x * demodulation[:, :, None, None]


class StandardisedConv(nn.Module):
    """A convolution with weight standardisation: zero mean and unit variance over the inputs of each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean(dim=(1, 2, 3), keepdim=True), w.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        return functional.conv2d(x, (w - mean) * (var + 1e-5).rsqrt(), self.bias, padding=1)


class Functional(nn.Module):
    """Custom layers around a block that is used twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Linear(width, 2 * width)
        self.conv_in = StandardisedConv(3, width)
        self.shared = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.modulated = DemodulatedConv(width, width, 2 * width)
        self.standardised = StandardisedConv(width, width)
        self.gain = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))
        self.mix = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time(sinusoidal(timesteps, self.width)).relu()
        h = self.conv_in(x)
        h = h + self.shared(h)
        h = h + self.scale * self.modulated(h, emb)
        h = h + self.shared(functional.avg_pool2d(h, 3, 1, 1)) * (1 + self.gain)
        h = torch.einsum("oc,bchw->bohw", self.mix, self.standardised(h).tanh())
        return self.conv_out(h)


class TokenTransformer(nn.Module):
    """U-ViT: time and class as tokens, learned positions, a long skip connection; one weight for three layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(12, width, bias=False)
        self.time = nn.Linear(12, width, bias=False)
        self.time.weight = self.embed.weight
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.registers = nn.Parameter(torch.randn(2, width))
        self.positions = nn.Parameter(torch.randn(1, 16 + 4, width) * 0.02)
        self.blocks = nn.ModuleList(TimmBlock(width) for _ in range(2))
        self.skip = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        tokens = self.embed(functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        batch = tokens.shape[0]
        time = self.time(sinusoidal(timesteps, 12))[:, None]
        registers = self.registers.unsqueeze(0).expand(batch, -1, -1)
        h = torch.cat([self.cls.expand(batch, -1, -1), time, registers, tokens], dim=1) + self.positions
        first = self.blocks[0](h)
        h = self.skip(torch.cat([self.blocks[1](first), first], dim=-1))
        out = self.norm(h[:, 4:]) @ self.embed.weight
        return functional.pixel_shuffle(out.transpose(1, 2).unflatten(2, (4, 4)), 2)


def _encoder_layer(**settings: bool) -> Callable[[int], nn.Module]:
    return lambda width: nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, **settings)


BY_HAND = {
    "plain U-Net": lambda: _images(PlainUNet()),
    "plain U-Net, scale from width": lambda: _images(PlainUNet(scale="width")),
    "nn.MultiheadAttention": lambda: _images(Patches(lambda width: AttentionBlock(width, True, False))),
    "nn.MultiheadAttention, sequence first": lambda: _images(
        Patches(lambda width: AttentionBlock(width, False, True), batch_first=False)
    ),
    "nn.MultiheadAttention, cross": lambda: _images(Patches(CrossAttentionBlock)),
    "nn.TransformerEncoderLayer": lambda: _images(Patches(_encoder_layer(batch_first=True, norm_first=True))),
    "nn.TransformerEncoderLayer, post-norm": lambda: _images(Patches(_encoder_layer(), batch_first=False)),
    "ViT blocks": lambda: _images(Patches(TimmBlock)),
    "einops U-Net": lambda: _images(EinopsUNet()),
    "einops U-Net, mean square": lambda: _images(EinopsUNet(norm=MeanSquareNorm)),
    "einops U-Net, layer norm": lambda: _images(EinopsUNet(norm=LayerNorm)),
    "functional layers": lambda: _images(Functional()),
    "token transformer": lambda: _images(TokenTransformer()),
}
