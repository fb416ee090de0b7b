"""Random networks: steps that real denoisers are made of, and some that they should not be, in any order.

Nothing here knows the structure engine. Widths are read from tensors at run time where people do so, and written into
the code where people do that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING, CONTEXT, LENGTH, SIZE = 6, 5, 3, 4
WIDTHS = (4, 6, 8, 12)


@dataclass
class Flow:
    """What travels beside the activation: conditioning and skip connections."""

    embedding: Tensor
    context: Tensor
    skips: list[Tensor] = field(default_factory=list)


@dataclass
class Shape:
    """Width and height of the activation while a network is being built, and those of its skip connections."""

    width: int
    size: int
    skips: list[tuple[int, int]] = field(default_factory=list)


class Step(nn.Module):
    """A function of itself, the activation (B, C, H, W) and the flow; with the layers and tensors that it needs."""

    def __init__(self, function: Callable[[Any, Tensor, Flow], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, h: Tensor, flow: Flow) -> Tensor:
        return self.function(self, h, flow)


class RandomNetwork(nn.Module):
    """(B, 3, 4, 4) samples, timesteps (B,) and a context (B, 3, 5) -> (B, 3, H, W).

    Args:
        random: Decides on everything but the weights.
        steps: How many steps there are between the first and the last convolution.
    """

    def __init__(self, random: Random, steps: int) -> None:
        super().__init__()
        shape = Shape(random.choice(WIDTHS), SIZE)
        self.time = nn.Linear(4, EMBEDDING)
        self.first = nn.Conv2d(3, shape.width, 3, padding=1)
        chosen: list[nn.Module] = []
        self.names: list[str] = []
        while len(chosen) < steps:
            name = random.choice(sorted(BUILDERS))
            made = BUILDERS[name](random, shape)
            if made is not None:
                chosen.append(made)
                self.names.append(name)
            else:
                chosen.append(conv(random, shape))
                self.names.append("conv")
        self.steps = nn.ModuleList(chosen)
        self.last = nn.Conv2d(shape.width, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        angles = timesteps[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=x.dtype)
        flow = Flow(F.silu(self.time(angles.sin())), context)
        h = self.first(x)
        for step in self.steps:
            h = step(h, flow)
        return self.last(h)


Builder = Callable[[Random, Shape], nn.Module | None]  # changes the shape; None where it does not fit
BUILDERS: dict[str, Builder] = {}


def builder(function: Builder) -> Builder:
    BUILDERS[function.__name__] = function
    return function


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(1 + 0.3 * torch.randn(*shape))


# --- layers


@builder
def conv(random: Random, shape: Shape) -> nn.Module:
    width, shape.width = shape.width, random.choice(WIDTHS)
    kernel = random.choice([1, 3])
    mode = random.choice(["zeros", "zeros", "reflect", "circular", "replicate"])
    layer = nn.Conv2d(width, shape.width, kernel, padding=kernel // 2, bias=random.random() < 0.7, padding_mode=mode)
    return Step(lambda s, h, f: s.layer(h), layer=layer)


@builder
def transposed(random: Random, shape: Shape) -> nn.Module:
    width, shape.width = shape.width, random.choice(WIDTHS)
    layer = nn.ConvTranspose2d(width, shape.width, 3, padding=1)
    return Step(lambda s, h, f: s.layer(h), layer=layer)


@builder
def depthwise(random: Random, shape: Shape) -> nn.Module:
    return Step(lambda s, h, f: s.layer(h), layer=nn.Conv2d(shape.width, shape.width, 3, padding=1, groups=shape.width))


@builder
def grouped(random: Random, shape: Shape) -> nn.Module:
    groups = random.choice([1 + (shape.width % 2 == 0), shape.width])
    width, shape.width = shape.width, shape.width * random.choice([1, 2] if shape.width < 12 else [1])
    return Step(lambda s, h, f: s.layer(h), layer=nn.Conv2d(width, shape.width, 1, groups=groups))


@builder
def linear(random: Random, shape: Shape) -> nn.Module:
    width, shape.width = shape.width, random.choice(WIDTHS)
    layer = nn.Linear(width, shape.width, bias=random.random() < 0.7)
    if random.random() < 0.5:
        return Step(lambda s, h, f: s.layer(h.movedim(1, -1)).movedim(-1, 1), layer=layer)
    return Step(
        lambda s, h, f: s.layer(h.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, h.shape[2:]), layer=layer
    )


@builder
def sequence_conv(random: Random, shape: Shape) -> nn.Module:
    width, shape.width = shape.width, random.choice(WIDTHS)
    return Step(lambda s, h, f: s.layer(h.flatten(2)).unflatten(2, h.shape[2:]), layer=nn.Conv1d(width, shape.width, 1))


@builder
def norm(random: Random, shape: Shape) -> nn.Module:
    affine = random.random() < 0.7
    kind = random.choice(["group", "group", "layer", "batch", "instance", "rms"])
    if kind in ("layer", "rms"):
        layer = nn.LayerNorm(shape.width, elementwise_affine=affine) if kind == "layer" else nn.RMSNorm(shape.width)
        return Step(lambda s, h, f: s.layer(h.movedim(1, -1)).movedim(-1, 1), layer=layer)
    layers: dict[str, Callable[[], nn.Module]] = {
        "group": lambda: nn.GroupNorm(random.choice([1, 1 + (shape.width % 2 == 0)]), shape.width, affine=affine),
        "batch": lambda: nn.BatchNorm2d(shape.width, affine=affine),
        "instance": lambda: nn.InstanceNorm2d(shape.width, affine=affine),
    }
    return Step(lambda s, h, f: s.layer(h), layer=layers[kind]())


@builder
def activation(random: Random, shape: Shape) -> nn.Module:
    function = random.choice([F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid, lambda h: F.leaky_relu(h, 0.1)])
    return Step(lambda s, h, f: function(h))


@builder
def prelu(random: Random, shape: Shape) -> nn.Module:
    return Step(lambda s, h, f: s.layer(h), layer=nn.PReLU(shape.width))


# --- connections


@builder
def residual(random: Random, shape: Shape) -> nn.Module:
    width, size = shape.width, shape.size
    inner = [builders(random, shape) for builders in random.choices([conv, norm, activation, depthwise], k=2)]
    back = nn.Conv2d(shape.width, width, 1)
    shape.width, shape.size = width, size

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        inside = h
        for step in s.inner:
            inside = step(inside, f)
        return h + s.back(inside)

    return Step(function, inner=nn.ModuleList(inner), back=back)


@builder
def save(random: Random, shape: Shape) -> nn.Module:
    shape.skips.append((shape.width, shape.size))

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        f.skips.append(h)
        return h

    return Step(function)


@builder
def join(random: Random, shape: Shape) -> nn.Module | None:
    if not shape.skips or shape.skips[-1][1] != shape.size or shape.width + shape.skips[-1][0] > 24:
        return None
    shape.width += shape.skips.pop()[0]
    if random.random() < 0.5:
        return Step(lambda s, h, f: torch.cat([h, f.skips.pop()], dim=1))
    return Step(lambda s, h, f: torch.cat([f.skips.pop(), h], dim=1))


@builder
def add_skip(random: Random, shape: Shape) -> nn.Module | None:
    if (shape.width, shape.size) not in shape.skips:
        return None
    index = shape.skips.index((shape.width, shape.size))
    weight = random.choice([1.0, 0.7])
    return Step(lambda s, h, f: h + weight * f.skips[index] if weight != 1 else h + f.skips[index])


@builder
def shared(random: Random, shape: Shape) -> nn.Module:
    return Step(lambda s, h, f: s.layer(F.silu(s.layer(h))), layer=nn.Conv2d(shape.width, shape.width, 1))


@builder
def tied(random: Random, shape: Shape) -> nn.Module:
    other = random.choice(WIDTHS)
    first, second = nn.Linear(shape.width, other), nn.Linear(shape.width, other)
    second.weight = first.weight
    shape.width = other

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        last = h.movedim(1, -1)
        return (s.first(last) * torch.tanh(s.second(last))).movedim(-1, 1)

    return Step(function, first=first, second=second)


@builder
def autoencoder(random: Random, shape: Shape) -> nn.Module:
    return Step(
        lambda s, h, f: torch.einsum("bohw,oc->bchw", torch.einsum("bchw,oc->bohw", h, s.weight).relu(), s.weight),
        weight=nn.Parameter(torch.randn(random.choice(WIDTHS), shape.width)),
    )


# --- gates and conditioning


@builder
def gate(random: Random, shape: Shape) -> nn.Module:
    width = shape.width
    kind = random.choice(["chunk", "split", "interleaved", "glu", "unflatten"])
    layer = nn.Conv2d(width, 2 * width, 1)

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        both = s.layer(h)
        if kind == "glu":
            return F.glu(both, dim=1)
        if kind == "interleaved":
            return both[:, ::2] * both[:, 1::2].sigmoid()
        if kind == "split":
            a, b = both.split(width, dim=1)
        elif kind == "unflatten":
            a, b = both.view(h.shape[0], 2, -1, *h.shape[2:]).unbind(1)
        else:
            a, b = both.chunk(2, dim=1)
        return a * F.gelu(b)

    return Step(function, layer=layer)


@builder
def modulation(random: Random, shape: Shape) -> nn.Module:
    kind = random.choice(["add", "scale and shift", "rows", "scale only"])
    rows = 2 if kind in ("scale and shift", "rows") else 1

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        made = s.layer(f.embedding)
        if kind == "add":
            return h + made[:, :, None, None]
        if kind == "scale only":
            return h * made.view(h.shape[0], -1, 1, 1)
        if kind == "rows":
            scale, shift = made.view(h.shape[0], 2, -1, 1, 1).unbind(1)
        else:
            scale, shift = made[:, :, None, None].chunk(2, dim=1)
        return h * (1 + scale) + shift

    return Step(function, layer=nn.Linear(EMBEDDING, rows * shape.width))


@builder
def squeeze_excite(random: Random, shape: Shape) -> nn.Module:
    hidden = random.choice(WIDTHS)
    return Step(
        lambda s, h, f: h * s.up(F.relu(s.down(h.mean(dim=(2, 3))))).sigmoid()[:, :, None, None],
        down=nn.Linear(shape.width, hidden),
        up=nn.Linear(hidden, shape.width),
    )


@builder
def table(random: Random, shape: Shape) -> nn.Module:
    return Step(
        lambda s, h, f: h + s.layer(f.context[:, 0, 0].abs().long() % 4)[..., None, None],
        layer=nn.Embedding(4, shape.width),
    )


# --- attention


@builder
def attention(random: Random, shape: Shape) -> nn.Module:
    heads, width = random.choice([1, 2, 4]), random.choice([2, 4])
    fused, packed = random.random() < 0.5, random.choice(["no", "rows", "columns", "chunk"])
    scale = random.choice(["fixed", "fixed", "width"])
    crossed = packed == "no" and random.random() < 0.5
    inner, channels = heads * width, shape.width
    source = CONTEXT if crossed else channels

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        batch, length = tokens.shape[:2]
        if packed == "rows":
            q, k, v = s.qkv(tokens).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        elif packed == "columns":
            q, k, v = s.qkv(tokens).view(batch, length, heads, -1).transpose(1, 2).chunk(3, dim=-1)
        else:
            other = f.context if crossed else tokens
            made = s.qkv(tokens).chunk(3, dim=-1) if packed == "chunk" else (s.q(tokens), s.k(other), s.v(other))
            q, k, v = (part.view(batch, part.shape[1], heads, -1).transpose(1, 2) for part in made)
        if fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            factor = width**-0.5 if scale == "fixed" else q.shape[-1] ** -0.5
            out = (q @ k.transpose(-2, -1) * factor).softmax(dim=-1) @ v
        return h + s.out(out.transpose(1, 2).reshape(batch, length, -1)).transpose(1, 2).reshape(h.shape)

    layers = (
        {"q": nn.Linear(channels, inner), "k": nn.Linear(source, inner), "v": nn.Linear(source, inner)}
        if packed == "no"
        else {"qkv": nn.Linear(channels, 3 * inner)}
    )
    return Step(function, **layers, out=nn.Linear(inner, channels))


@builder
def channel_attention(random: Random, shape: Shape) -> nn.Module:
    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        flat = h.flatten(2)
        return h + s.out((torch.bmm(flat, flat.transpose(1, 2)) / 16).softmax(dim=-1).bmm(flat).view_as(h))

    return Step(function, out=nn.Conv2d(shape.width, shape.width, 1))


# --- movement


@builder
def folded_blur(random: Random, shape: Shape) -> nn.Module:
    return Step(
        lambda s, h, f: F.conv2d(h.reshape(-1, 1, *h.shape[2:]), s.kernel, padding=1).view(h.shape),
        kernel=torch.rand(1, 1, 3, 3),
    )


@builder
def resample(random: Random, shape: Shape) -> nn.Module | None:
    if shape.size >= 8 or (shape.size > 2 and random.random() < 0.5):
        shape.size //= 2
        kind = random.choice(["pool", "stride", "unshuffle", "max"])
        if kind == "unshuffle":
            layer = nn.Conv2d(4 * shape.width, shape.width, 1)
            return Step(lambda s, h, f: s.layer(F.pixel_unshuffle(h, 2)), layer=layer)
        if kind == "stride":
            layer = nn.Conv2d(shape.width, shape.width, 3, stride=2, padding=1)
            return Step(lambda s, h, f: s.layer(h), layer=layer)
        return Step(lambda s, h, f: F.avg_pool2d(h, 2) if kind == "pool" else F.max_pool2d(h, 2))
    shape.size *= 2
    kind = random.choice(["nearest", "bilinear", "shuffle", "transposed"])
    if kind == "shuffle":
        layer = nn.Conv2d(shape.width, 4 * shape.width, 1)
        return Step(lambda s, h, f: F.pixel_shuffle(s.layer(h), 2), layer=layer)
    if kind == "transposed":
        layer = nn.ConvTranspose2d(shape.width, shape.width, 4, stride=2, padding=1)
        return Step(lambda s, h, f: s.layer(h), layer=layer)
    return Step(lambda s, h, f: F.interpolate(h, scale_factor=2.0, mode=kind))


@builder
def positions(random: Random, shape: Shape) -> nn.Module | None:
    """Something is done to channels by their position."""
    if shape.width < 2:
        return None
    at = random.randrange(1, shape.width)
    kind = random.choice(["flip", "roll", "swap", "shuffle", "picked", "spatial flip", "part", "two parts", "in place"])
    if kind == "part":
        shape.width = at
        return Step(lambda s, h, f: h[:, :at])
    if kind == "two parts":
        layer = nn.Conv2d(at, at, 1)
        return Step(lambda s, h, f: torch.cat([s.layer(h[:, :at]), h[:, at:]], dim=1), layer=layer)
    if kind == "picked":
        order = torch.tensor(random.sample(range(shape.width), shape.width))
        return Step(lambda s, h, f: h[:, s.order], order=order)

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        if kind == "shuffle":
            return h.view(h.shape[0], 2, -1, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        if kind == "swap":
            return torch.cat([h[:, at:], h[:, :at]], dim=1)
        if kind == "in place":
            h = h.clone()
            h[:, :at] *= 2
            return h
        return h.roll(1, dims=1) if kind == "roll" else h.flip(1 if kind == "flip" else 3)

    return Step(function)


@builder
def repeated(random: Random, shape: Shape) -> nn.Module:
    interleaved = random.random() < 0.5
    layer = nn.Conv2d(2 * shape.width, shape.width, 1)
    return Step(
        lambda s, h, f: s.layer(h.repeat_interleave(2, dim=1) if interleaved else h.repeat(1, 2, 1, 1)), layer=layer
    )


@builder
def flattened(random: Random, shape: Shape) -> nn.Module:
    """Spatial dimensions become features, channels first or last; the result is one vector a sample."""
    last = random.random() < 0.5
    return Step(
        lambda s, h, f: h + s.layer((h.movedim(1, -1) if last else h).flatten(1))[:, :, None, None],
        layer=nn.Linear(shape.width * shape.size**2, shape.width),
    )


@builder
def patches(random: Random, shape: Shape) -> nn.Module:
    layer = nn.Linear(9 * shape.width, shape.width)
    return Step(
        lambda s, h, f: s.layer(F.unfold(h, 3, padding=1).transpose(1, 2)).transpose(1, 2).unflatten(2, h.shape[2:]),
        layer=layer,
    )


@builder
def written(random: Random, shape: Shape) -> nn.Module:
    """A width is written into the code, or an output is filled in place."""
    width = shape.width
    kind = random.choice(["view", "expand", "constant", "filled", "coordinates"])
    if kind == "coordinates":
        shape.width += 1
        return Step(lambda s, h, f: torch.cat([h, torch.ones_like(h[:, :1])], dim=1))

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        if kind == "view":
            return h.view(h.shape[0], width, *h.shape[2:]) * 2
        if kind == "expand":
            return h.mean(dim=1, keepdim=True).expand(-1, width, -1, -1)
        if kind == "constant":
            return h * torch.linspace(1, 2, width, dtype=h.dtype).view(1, -1, 1, 1)
        out = torch.zeros_like(h)
        out[:, : width // 2] = h[:, width // 2 :][:, : width // 2]
        out[:, width // 2 :].add_(1)
        return out

    return Step(function)


# --- parameters used as functions


@builder
def scaled(random: Random, shape: Shape) -> nn.Module:
    c, n = shape.width, shape.size
    sizes = random.choice([(1, c, 1, 1), (c, 1, 1), (1, c, n, n), (1, 1, n, n), (1,)])
    add = random.random() < 0.5
    return Step(lambda s, h, f: h + s.factor if add else h * s.factor, factor=parameter(*sizes))


@builder
def functional(random: Random, shape: Shape) -> nn.Module:
    width, shape.width = shape.width, random.choice(WIDTHS)
    kind = random.choice(["gain", "standardised", "normalised", "einsum", "matmul"])

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        if kind == "einsum":
            return torch.einsum("bchw,oc->bohw", h, s.weight)
        if kind == "matmul":
            return (s.weight @ h.flatten(2)).unflatten(2, h.shape[2:])
        weight = s.weight
        if kind == "gain":
            weight = weight * s.gain[:, None]
        elif kind == "standardised":
            weight = (weight - weight.mean(dim=1, keepdim=True)) * s.gain[:, None]
        else:
            weight = F.normalize(weight, dim=1) * s.gain[:, None]
        return F.conv2d(h, weight[:, :, None, None])

    return Step(function, weight=nn.Parameter(torch.randn(shape.width, width)), gain=parameter(shape.width))


@builder
def across(random: Random, shape: Shape) -> nn.Module:
    """Channels influence each other by name: statistics, orders, sums."""
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda h: h.softmax(dim=1),
        lambda h: h - h.mean(dim=1, keepdim=True),
        lambda h: h * h.sum(dim=1, keepdim=True),
        lambda h: h * h.amax(dim=1, keepdim=True),
        lambda h: h.cumsum(dim=1),
        lambda h: F.normalize(h, dim=1),
        lambda h: h / math.sqrt(h.shape[1]),
        lambda h: h.sort(dim=1).values,
        lambda h: h * h.std(dim=1, keepdim=True),
    ]
    function = random.choice(functions)
    return Step(lambda s, h, f: function(h))


@builder
def blended(random: Random, shape: Shape) -> nn.Module | None:
    kind = random.choice(["where", "lerp", "outer", "addcmul"])

    def function(s: Any, h: Tensor, f: Flow) -> Tensor:
        other = s.layer(h)
        if kind == "where":
            return torch.where(h > 0, h, other)
        if kind == "lerp":
            return torch.lerp(h, other, s.alpha)
        if kind == "addcmul":
            return torch.addcmul(h, other, s.alpha)
        return h * other.mean(dim=1, keepdim=True)

    return Step(function, layer=nn.Conv2d(shape.width, shape.width, 1), alpha=parameter(shape.width, 1, 1))


def random_network(random: Random, steps: int = 6, seed: int = 0) -> RandomNetwork:
    """A network in evaluation mode whose activations neither vanish nor grow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RandomNetwork(random, steps).eval()
        for name, tensor in network.named_parameters():
            if tensor.dim() > 1 and not name.endswith("factor"):
                nn.init.normal_(tensor, std=1.2 / math.sqrt(tensor[0].numel()))
            else:
                nn.init.normal_(tensor, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.2)
            elif name.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 2.0)
    return network


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, timesteps and a context for a random network."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 3, SIZE, SIZE, generator=generator),
        torch.rand(batch, generator=generator) * 1000,
        torch.randn(batch, LENGTH, CONTEXT, generator=generator),
    )
