import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Denoiser, tiny_unet
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import (
    ChannelGroup,
    ChannelPlan,
    TicketSlicer,
    attribute_edits,
    extract,
    resize_,
    trace_plan,
    verify_plan,
)

STEPS = torch.tensor([5, 900])


def _unet() -> Denoiser:
    return Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), STEPS))


def _conditional() -> Denoiser:
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,  # which diffusers takes for the number of heads
        norm_num_groups=4,
    )
    return Denoiser(network, (torch.randn(2, 3, 8, 8), STEPS, torch.randn(2, 5, 12)))


def _dit() -> Denoiser:
    network = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )
    return Denoiser(network, (torch.randn(2, 4, 8, 8), STEPS), {"class_labels": torch.tensor([1, 2])})


def _sd3() -> Denoiser:
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return Denoiser(network, (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16), STEPS))


class Attention(nn.Module):
    """Attention over (B, N, 12) as people write it, with the number of heads in an attribute of the given name."""

    def __init__(self, count: str = "num_heads", heads: int = 4, head_width: int = 3) -> None:
        super().__init__()
        setattr(self, count, heads)
        self.count = count
        self.q, self.k, self.v = (nn.Linear(12, heads * head_width) for _ in range(3))
        self.out = nn.Linear(heads * head_width, 12)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (getattr(self, self.count), -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Attention layers between two projections, (B, 5, 6) -> (B, 5, 6)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(6, 12), nn.Sequential(*layers), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self.first(x)))


def _by_hand() -> Denoiser:
    return Denoiser(Tokens(Attention(), Attention("heads", heads=2, head_width=4)), (torch.randn(2, 5, 6),))


NETWORKS: dict[str, Callable[[], Denoiser]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "by hand": _by_hand,
}
_verified: dict[str, tuple[Denoiser, ChannelPlan]] = {}


def verified(name: str) -> tuple[Denoiser, ChannelPlan]:
    """One of the networks with weights that hide nothing and its verified plan; shared between tests."""
    if name not in _verified:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = NETWORKS[name]()
            with torch.no_grad():
                for parameter in given.network.parameters():  # some layers start at zero
                    parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() < 2 else 0.15))
        given.network.eval()
        plan = trace_plan(given.network, given.args, given.kwargs)
        _verified[name] = given, verify_plan(given.network, plan, given.args, given.kwargs).plan
    return _verified[name]


def with_heads(plan: ChannelPlan) -> list[ChannelGroup]:
    return [group for group in plan.groups if group.can_lose_rows]


def head_mask(plan: ChannelPlan, kept: dict[str, Tensor]) -> TicketMask:
    """Whole heads only: group -> which of its rows stay, shape (rows,); everything else is kept."""
    rows = {group.name: kept[group.name].repeat_interleave(group.width) for group in plan.groups if group.name in kept}
    return TicketMask({**plan.full_mask().kept, **rows})


def random_heads(plan: ChannelPlan, seed: int) -> TicketMask:
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in with_heads(plan):
        count = int(torch.randint(1, group.rows + 1, (1,), generator=generator))
        kept[group.name] = torch.rand(group.rows, generator=generator).argsort() < count
    return head_mask(plan, kept)


def without(network: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy of the network in which the removed heads contribute nothing: their columns of the output are zero."""
    gone = ~plan.kept(mask)
    result = copy.deepcopy(network)
    parameters = dict(result.named_parameters())
    with torch.no_grad():
        for name in plan.ids.keys() & parameters.keys():
            for dim, ids in plan.ids[name].items():
                lost = ((ids >= 0) & gone[ids.clamp_min(0)]).nonzero().flatten()
                parameters[name].index_fill_(dim, lost, 0.0)
    return result


@pytest.mark.parametrize(
    ("name", "attentions"),
    [
        ("UNet2DModel", 4),
        ("UNet2DConditionModel", 8),
        ("DiTTransformer2DModel", 2),
        ("SD3Transformer2DModel", 2),
        ("by hand", 2),
    ],
)
def test_every_attention_knows_where_its_heads_are_counted(name: str, attentions: int) -> None:
    _, plan = verified(name)
    groups = [group for group in plan.groups if group.rows > 1]

    assert groups == with_heads(plan)
    assert len(groups) == attentions
    for group in groups:
        assert {module for module, _ in group.heads} == {group.name.rpartition(".")[0]}


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", NETWORKS)
def test_without_whole_heads_a_ticket_computes_the_same(name: str, seed: int) -> None:
    given, plan = verified(name)
    mask = random_heads(plan, seed)

    with torch.no_grad():
        expected = given(without(given.network, plan, mask))
        actual = given(extract(given.network, plan, mask))

    # Nothing is normalised over heads and no score changes: what differs is the order of sums.
    assert float((actual - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_heads_are_missed(name: str) -> None:
    given, plan = verified(name)
    one = {group.name: torch.arange(group.rows) == 0 for group in with_heads(plan)}

    with torch.no_grad():
        whole, rest = given(), given(extract(given.network, plan, head_mask(plan, one)))
    assert float((whole - rest).abs().max()) > 1e-3 * float(whole.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_ticket_with_fewer_and_narrower_heads_trains_and_comes_back(name: str) -> None:
    given, plan = verified(name)
    kept = dict(plan.full_mask().kept)
    for group in plan.groups:
        narrow = torch.arange(group.width) < max(1, group.width // 2)
        rows = torch.arange(group.rows) % 2 == (1 if group.can_lose_rows else torch.arange(group.rows) % 2)
        kept[group.name] = (rows[:, None] & narrow).flatten()
    ticket = extract(given.network, plan, TicketMask(kept), norm="exact")
    edits = attribute_edits(given.network, ticket)

    for group in with_heads(plan):
        for module, attribute in group.heads:
            assert getattr(ticket.get_submodule(module), attribute) == group.rows // 2
            assert edits[module][attribute] == group.rows // 2
            assert getattr(given.network.get_submodule(module), attribute) == group.rows
    rebuilt = resize_(copy.deepcopy(given.network), {n: t.shape for n, t in ticket.state_dict().items()}, edits)
    rebuilt.load_state_dict(ticket.state_dict())
    assert torch.equal(given(rebuilt), given(ticket))
    assert attribute_edits(given.network, rebuilt) == edits

    optimizer = torch.optim.SGD(ticket.parameters(), lr=1e-3)
    before = given(ticket).square().mean()
    before.backward()
    assert all(parameter.grad is not None for parameter in ticket.parameters())
    optimizer.step()
    assert given(ticket).square().mean() < before


def test_queries_are_rescaled_for_narrower_heads_only() -> None:
    given, plan = verified("by hand")
    name = "layers.0.q"
    weight = given.network.get_parameter(f"{name}.weight")
    rows = torch.tensor([False, True, False, True])
    whole = head_mask(plan, {name: rows})
    narrow = TicketMask({**whole.kept, name: (rows[:, None] & torch.tensor([True, False, True])).flatten()})

    stays = whole.kept[name]
    assert torch.equal(TicketSlicer(plan, whole).weight(f"{name}.weight", weight), weight[stays])
    stays = narrow.kept[name]
    expected = weight[stays] * (2 / 3) ** 0.5
    assert torch.allclose(TicketSlicer(plan, narrow).weight(f"{name}.weight", weight), expected)


def test_heads_keep_equally_many_or_none() -> None:
    _, plan = verified("by hand")
    name = "layers.0.q"
    kept = (torch.arange(4)[:, None] > torch.tensor([-1, 0, 1])).flatten()  # one, two and three in the heads

    with pytest.raises(ValueError, match=r"layers\.0\.q' keeps different numbers in its 4 heads; .* many, or none\."):
        plan.kept(TicketMask({**plan.full_mask().kept, name: kept}))


def test_a_group_without_a_counter_keeps_every_head() -> None:
    _, plan = verified("by hand")
    mask = head_mask(plan, {"layers.0.q": torch.arange(4) > 0})
    closed = replace(plan, groups=tuple(replace(group, heads=()) for group in plan.groups))

    assert int(plan.kept(mask).logical_not().sum()) == 3
    with pytest.raises(ValueError, match=r"different numbers in its 4 heads; every head must keep equally many\."):
        closed.kept(mask)


@pytest.mark.parametrize("count", ["heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads"])
def test_usual_names_are_understood(count: str) -> None:
    network = Tokens(Attention(count))
    (group,) = (group for group in trace_plan(network, (torch.ones(2, 5, 6),)).groups if group.rows > 1)

    assert group.heads == (("layers.0", count),)


@pytest.mark.parametrize("value", [3, True, 4.0, "4", None])
def test_an_attribute_that_says_something_else_is_no_counter(value: Any) -> None:
    network = Tokens(Attention("parts"))
    network.layers[0].num_heads = value
    (group,) = (group for group in trace_plan(network, (torch.ones(2, 5, 6),)).groups if group.rows > 1)

    assert not group.can_lose_rows


def test_a_counter_of_two_groups_counts_for_neither() -> None:
    class Twice(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.q2, self.k2, self.v2 = (nn.Linear(12, 12) for _ in range(3))
            self.out2 = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            q, k, v = self.split(self.q2(x)), self.split(self.k2(x)), self.split(self.v2(x))
            return x + self.out2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    groups = [group for group in trace_plan(Tokens(Twice()), (torch.ones(2, 5, 6),)).groups if group.rows > 1]
    assert [group.name for group in groups] == ["layers.0.q", "layers.0.q2"]
    assert not any(group.can_lose_rows for group in groups)


def test_heads_that_are_counted_elsewhere_too_lose_the_claim_and_no_channel() -> None:
    class Fixed(Attention):
        """Also knows the number of its heads by heart."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    network, args = Tokens(Fixed(head_width=4), Attention()), (torch.randn(2, 5, 6),)
    plan = trace_plan(network, args)
    result = verify_plan(network, plan, args)

    assert [group.name for group in with_heads(plan)] == ["layers.0.q", "layers.1.q"]
    assert [group.name for group in with_heads(result.plan)] == ["layers.1.q"]
    assert result.failed == {}
    assert result.plan.num_channels == plan.num_channels
    ticket = extract(network, result.plan, TicketMask({g.name: _half(g) for g in result.plan.groups}))
    assert ticket(*args).shape == (2, 5, 6)


def test_heads_that_can_go_alone_but_not_together_all_stay() -> None:
    class Hungry(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            if all(layer.num_heads < 4 for layer in self.layers):
                raise RuntimeError("too few heads")
            return super().forward(x)

    torch.manual_seed(0)
    network, args = Hungry(Attention(), Attention()), (torch.randn(2, 5, 6),)
    plan = trace_plan(network, args)
    result = verify_plan(network, plan, args)

    assert len(with_heads(plan)) == 2
    assert with_heads(result.plan) == []
    assert result.failed == {}


class FixedWidth(Attention):
    """Has the width of a head written down, as many do."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, 3).transpose(1, 2)


def test_heads_of_fixed_width_can_only_go_as_a_whole() -> None:
    torch.manual_seed(0)
    network, args = Tokens(FixedWidth(), Attention(), FixedWidth()), (torch.randn(2, 5, 6),)
    traced = trace_plan(network, args)
    result = verify_plan(network, traced, args)
    plan = result.plan
    sizes = {group.name: (group.size, group.rows, group.width) for group in with_heads(plan)}

    assert result.failed == {}
    assert sizes == {"layers.0.q": (4, 4, 1), "layers.1.q": (12, 4, 3), "layers.2.q": (4, 4, 1)}
    assert plan.num_channels == traced.num_channels - 16
    assert plan.kept(draw_mask(plan, torch.rand(plan.num_channels), 0.5, round_to=4)).any()

    mask = head_mask(plan, {"layers.0.q": torch.arange(4) % 3 == 0, "layers.1.q": torch.arange(4) > 0})
    ticket: Any = extract(network, plan, mask)
    with torch.no_grad():
        expected, actual = without(network, plan, mask)(*args), ticket(*args)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert [layer.num_heads for layer in ticket.layers] == [2, 3, 4]
    assert ticket.layers[0].q.weight.shape == (6, 12)
    # The weights of a head are judged together.
    scores = channel_scores(dict(network.named_parameters()), plan)
    assert scores.shape == (plan.num_channels,)


def test_heads_that_can_neither_narrow_nor_go_are_frozen() -> None:
    class Rigid(Attention):
        def split(self, x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], 4, 3).transpose(1, 2)

    torch.manual_seed(0)
    network, args = Tokens(Rigid(), Attention()), (torch.randn(2, 5, 6),)
    result = verify_plan(network, trace_plan(network, args), args)

    assert set(result.failed) == {"layers.0.q"}
    assert [group.name for group in with_heads(result.plan)] == ["layers.1.q"]


def _half(group: ChannelGroup) -> Tensor:
    return (torch.arange(group.width) < (group.width + 1) // 2).repeat(group.rows)


def test_a_shared_attention_loses_the_same_heads_everywhere() -> None:
    shared = Attention()
    torch.manual_seed(0)
    network, args = Tokens(shared, nn.Tanh(), shared), (torch.randn(2, 5, 6),)
    plan = verify_plan(network, trace_plan(network, args), args).plan
    (group,) = with_heads(plan)
    ticket: Any = extract(network, plan, head_mask(plan, {group.name: torch.arange(4) != 2}))

    assert ticket.layers[0] is ticket.layers[2]
    assert ticket.layers[0].num_heads == 3
    assert ticket(*args).shape == (2, 5, 6)


@pytest.mark.parametrize("value", [0, 5, True, "2", [2], 2.0])
def test_heads_from_a_file_must_be_no_more_than_there_were(value: Any) -> None:
    network = Tokens(Attention())
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}

    with pytest.raises(ValueError, match=r"attribute layers\.0\.num_heads = .* must be positive and at most 4"):
        resize_(network, shapes, {"layers.0": {"num_heads": value}})


def test_heads_from_a_file_must_divide_the_width_where_that_is_known() -> None:
    given, _ = verified("UNet2DModel")
    shapes = {name: tensor.shape for name, tensor in given.network.state_dict().items()}

    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.heads = 3 does not divide its width of 32"):
        resize_(copy.deepcopy(given.network), shapes, {"mid_block.attentions.0": {"heads": 3}})
    with pytest.raises(ValueError, match=r"attribute mid_block\.resnets\.0\.heads is not a width that a ticket may"):
        resize_(copy.deepcopy(given.network), shapes, {"mid_block.resnets.0": {"heads": 1}})


class _WithHeadParameter(nn.Module):
    """Attention with a parameter that has one element (or one table) for each of its four heads."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.num_heads, self.change = 4, change
        self.extra = nn.Parameter(torch.randn(4, *shape))
        self.embed, self.q, self.k, self.v = nn.Linear(5, 16), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (layer(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = self.change(q @ k.transpose(-1, -2) * 0.3, self.extra).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda scores, bias: scores + bias, (6, 6)),
        (lambda scores, gain: scores * gain.exp(), (1, 1)),
        (lambda scores, mixed: torch.einsum("bhnm,hg->bgnm", scores, mixed), (4,)),
    ],
    ids=["relative positions", "gain", "talking heads"],
)
def test_a_parameter_with_an_element_for_each_head_keeps_the_heads_and_not_their_width(
    change: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    network, args = _WithHeadParameter(change, *shape), (torch.randn(2, 6, 5),)

    verification = verify_plan(network, trace_plan(network, args), args)

    assert verification.failed == {}
    groups = {group.name: (group.rows, group.can_lose_rows) for group in verification.plan.groups}
    assert groups["q"] == (4, False)
    assert "k" not in groups
    assert "embed" in groups
