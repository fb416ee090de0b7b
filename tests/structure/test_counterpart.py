"""What verification compares with, where a ticket computes something from its own width."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Denoiser
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import member

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, extract, trace_plan, verify_plan
from lightning_earlybird.structure.counterpart import Counterpart, NumberRecord
from lightning_earlybird.structure.plan import ChannelGroup, ChannelStatistic

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)
KEPT = torch.tensor([True, False, True, False])


def one_group(*calls: str) -> tuple[ChannelPlan, TicketMask]:
    """Four channels, the first and third of which stay, along dimension 1 of the first call of each operation."""
    channels = torch.arange(4)
    statistics = tuple(ChannelStatistic((call, 0), 1, channels.view(1, 4)) for call in calls)
    return ChannelPlan({}, (ChannelGroup("a", channels),), statistics=statistics), TicketMask({"a": KEPT})


@pytest.mark.parametrize(
    ("statistic", "call"),
    [
        (lambda x: x.mean(1), "mean"),
        (lambda x: x.sum(1), "sum"),
        (lambda x: x.var(1), "var"),
        (lambda x: x.exp().mean(1, keepdim=True), "mean"),
        (lambda x: torch.linalg.vector_norm(x, dim=1), "linalg_vector_norm"),
        (lambda x: x.logsumexp(1), "logsumexp"),
    ],
)
def test_statistics_are_those_of_the_channels_that_stay(statistic: Any, call: str) -> None:
    x = torch.tensor([[1.0, 0.0, 3.0, 0.0], [5.0, 0.0, 8.0, 0.0]])

    with Counterpart(*one_group(call), {}):
        found = statistic(x)

    assert torch.equal(found, statistic(x[:, KEPT]))


def test_channels_that_are_gone_have_no_share_in_a_softmax() -> None:
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0]])

    with Counterpart(*one_group("_softmax"), {}):
        assert x.softmax(dim=1).tolist() == [[0.5, 0.0, 0.5, 0.0]]


def test_heads_may_keep_different_positions_but_not_different_numbers() -> None:
    ids = torch.arange(4).view(1, 2, 2)
    plan = ChannelPlan({}, (ChannelGroup("a", torch.arange(4), 2),), statistics=(ChannelStatistic(("sum", 0), 2, ids),))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])

    with Counterpart(plan, TicketMask({"a": torch.tensor([True, False, False, True])}), {}):
        assert x.sum(2).tolist() == [[1.0, 4.0]]


def test_only_the_call_that_was_traced_is_replaced() -> None:
    x = torch.tensor([[1.0, 0.0, 3.0, 0.0]])

    with Counterpart(*one_group("mean"), {}):
        assert [x.mean(1).item(), x.mean(1).item()] == [2.0, 1.0]


def test_numbers_come_from_the_ticket_where_the_plan_says_so() -> None:
    plan, mask = one_group()
    x = torch.ones(1)
    with NumberRecord() as record:
        x * 3.0 / 5.0

    with Counterpart(plan, mask, record.numbers):
        assert float(x * 2.0 / 2.0) == 1.0
    with Counterpart(replace(plan, own_numbers=frozenset([("mul", 0)])), mask, record.numbers):
        assert float(x * 2.0 / 2.0) == 1.5


def test_a_number_read_out_of_activations_is_told_from_one_read_out_of_labels() -> None:
    with NumberRecord() as labels:
        functional.one_hot(torch.tensor([0, 2]))
    with NumberRecord() as activations:
        torch.ones(2).sum().item()

    assert not labels.from_data
    assert activations.from_data


class Normalised(nn.Module):
    """A root mean square norm with a gain between two convolutions; ``mixed`` mixes channels up before its use."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.g = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.norm == "mean":
            h = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6)
        elif self.norm == "number":
            h = functional.normalize(h, dim=1) * h.shape[1] ** 0.5
        else:
            h = h.softmax(dim=1)
        return self.c(self.b(h * self.g).tanh())


@pytest.mark.parametrize("norm", ["mean", "number", "softmax"])
@pytest.mark.parametrize("place", [("b.weight", 1), ("g", 1), ("a.weight", 0), ("a.bias", 0)])
def test_a_slice_in_the_wrong_place_beside_a_statistic_shows(norm: str, place: tuple[str, int]) -> None:
    network = Normalised(norm)
    plan = trace_plan(network, (IMAGE,))
    name, dim = place
    ids = {key: dict(dims) for key, dims in plan.ids.items()}
    ids[name][dim] = ids[name][dim].roll(1)

    assert verify_plan(network, plan, (IMAGE,)).failed == {}
    assert set(verify_plan(network, replace(plan, ids=ids), (IMAGE,)).failed) == {"a"}


@pytest.mark.parametrize("norm", ["mean", "number", "softmax"])
def test_a_statistic_over_the_wrong_channels_shows(norm: str) -> None:
    network = Normalised(norm)
    plan = trace_plan(network, (IMAGE,))
    assert len(plan.statistics) == 1
    wrong = replace(plan, statistics=(replace(plan.statistics[0], ids=plan.statistics[0].ids.roll(1, dims=1)),))

    assert set(verify_plan(network, wrong, (IMAGE,)).failed) == {"a"}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("EDM2", ("low.attn_proj.weight", 1)),
        ("EDM2", ("mid.conv_res0.weight", 1)),
        ("einops U-Net", ("linear_attention.to_out.0.weight", 1)),
        ("einops U-Net, mean square", ("mid.norm1.g", 1)),
        ("nn.TransformerEncoderLayer", ("blocks.0.self_attn.in_proj_weight", 1)),
        ("SD3.5, dual attention", ("transformer_blocks.0.attn.norm_q.weight", 0)),
        ("EDM DDPM++", ("low.qkv.weight", 0)),
    ],
)
def test_verification_still_sees_single_mistakes_in_whole_networks(name: str, place: tuple[str, int]) -> None:
    given = member(name)
    plan = trace_plan(given.network, given.args, given.kwargs)
    tensor, dim = place
    ids = {key: dict(dims) for key, dims in plan.ids.items()}
    ids[tensor][dim] = ids[tensor][dim].roll(1)

    found = verify_plan(given.network, replace(plan, ids=ids), given.args, given.kwargs, tolerance=1e9)
    assert found.max_error > 1e-3 or "RuntimeError" in str(found.failed)


def test_widths_that_pass_through_python_couple_layers_at_the_trace() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, width = self.a(x).shape
            return self.c(self.a(x) + 1) + self.c(self.b(x).reshape(batch * length, width).unflatten(0, (-1, length)))

    tokens = torch.randn(2, 5, 6)
    network = Reader()
    plan = trace_plan(network, (tokens,))

    assert [group.size for group in plan.groups] == [8]
    assert verify_plan(network, plan, (tokens,)).failed == {}


@pytest.mark.parametrize("name", ["UNet2D", "ViT blocks"])
def test_plans_do_not_depend_on_the_kernel_that_computes_attention(name: str) -> None:
    given = member(name)
    plan = trace_plan(given.network, given.args, given.kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        spelled_out = trace_plan(given.network, given.args, given.kwargs)

    assert {group.name: group.size for group in spelled_out.groups} == {group.name: group.size for group in plan.groups}
    assert {each.tensor for each in spelled_out.query_scales} == {each.tensor for each in plan.query_scales}
    assert verify_plan(given.network, spelled_out, given.args, given.kwargs).failed == {}


def test_numbers_and_statistics_are_counted_alike_whatever_the_tracer_does_in_between() -> None:
    given = member("SD3.5, dual attention")
    with sdpa_kernel(SDPBackend.MATH):
        plan = trace_plan(given.network, given.args, given.kwargs)
        verification = verify_plan(given.network, plan, given.args, given.kwargs)

    assert plan.statistics
    assert verification.failed == {}


def test_code_that_wants_plain_integers_is_traced_without_them() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(self.b(h * {8: 2.0}[h.shape[-1]]))

    tokens = torch.randn(2, 5, 6)
    network = Table()
    verification = verify_plan(network, trace_plan(network, (tokens,)), (tokens,))

    assert set(verification.failed) == {"a"}  # a KeyError, once the width is another
    assert [group.name for group in verification.plan.groups] == ["b"]


@pytest.mark.parametrize("name", ["nn.MultiheadAttention", "nn.TransformerEncoderLayer"])
def test_the_fused_path_of_a_pruned_attention_computes_the_same(name: str) -> None:
    given = member(name)
    plan = trace_plan(given.network, given.args)
    mask = TicketMask({g.name: (torch.arange(g.size // g.rows) < 3).repeat(g.rows) for g in plan.groups})
    ticket = Denoiser(extract(given.network, plan, mask).eval(), given.args)
    attention = next(module for module in ticket.network.modules() if isinstance(module, nn.MultiheadAttention))

    assert (attention.embed_dim, attention.head_dim, attention.kdim, attention.vdim) == (6, 3, 6, 6)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        fused = ticket()
    assert torch.allclose(fused, ticket(), atol=1e-5)
