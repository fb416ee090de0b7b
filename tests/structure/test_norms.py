import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PlainUNet, random_mask, tiny_unet, traced
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import (
    RaggedGroupNorm,
    attribute_edits,
    count_parameters,
    extract,
    resize_,
    trace_plan,
    verify_plan,
)

SIZES = (3, 1, 4, 2)


def ragged(sizes: tuple[int, ...] = SIZES, **settings: Any) -> RaggedGroupNorm:
    """With weights and biases that differ from channel to channel."""
    norm = RaggedGroupNorm(sizes, **settings)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, sum(sizes)))
            norm.bias.copy_(torch.linspace(-1, 1, sum(sizes)))
    return norm


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_hand(norm: RaggedGroupNorm, x: Tensor) -> Tensor:
    """One group after the other, in double precision."""
    parts, start = [], 0
    for size in norm.group_sizes:
        part = x[:, start : start + size].double()
        mean, variance = part.flatten(1).mean(1), part.flatten(1).var(1, correction=0)
        shape = (-1, *(1 for _ in x.shape[1:]))
        part = (part - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
        if norm.affine:
            own = slice(start, start + size)
            shape = (1, -1, *(1 for _ in x.shape[2:]))
            part = part * norm.weight[own].view(shape) + norm.bias[own].view(shape)
        parts.append(part)
        start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 10), (3, 10, 5), (2, 10, 4, 3), (2, 10, 2, 3, 4)])
def test_each_group_is_normalised_by_itself(shape: tuple[int, ...], affine: bool) -> None:
    norm, x = ragged(affine=affine), sample(*shape) * 3 + 1

    assert norm(x).dtype == torch.float32
    assert torch.allclose(norm(x).double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_stays_empty() -> None:
    assert ragged()(sample(0, 10, 4, 4)).shape == (0, 10, 4, 4)


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_any_groups_will_do(sizes: list[int], seed: int) -> None:
    norm = ragged(tuple(sizes)).double()
    x = torch.randn(2, sum(sizes), 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    assert torch.allclose(norm(x), by_hand(norm, x), rtol=1e-9, atol=1e-9)


def test_equal_groups_are_those_of_a_group_norm() -> None:
    norm, plain = ragged((4, 4, 4), eps=1e-3), nn.GroupNorm(3, 12, eps=1e-3)
    plain.load_state_dict(norm.state_dict())
    x = sample(2, 12, 5, 5).requires_grad_()
    y = x.detach().clone().requires_grad_()

    ours, theirs = norm(x), plain(y)
    ours.square().sum().backward()
    theirs.square().sum().backward()

    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert torch.allclose(norm.weight.grad, plain.weight.grad, rtol=1e-4)
    assert torch.allclose(norm.bias.grad, plain.bias.grad, rtol=1e-4)


def test_values_far_from_zero_keep_their_variance() -> None:
    norm = ragged(affine=False)
    x = 1000 + sample(2, 10, 8, 8) / 100

    # The plain formula, mean of squares minus squared mean, would find nothing but rounding here.
    assert torch.allclose(norm(x).double(), by_hand(norm, x), atol=2e-2)
    plain = nn.GroupNorm(2, 10, affine=False)
    errors = [float((each(x) - exact).abs().max()) for each, exact in ((norm, by_hand(norm, x)), (plain, _exact(x)))]
    assert errors[0] <= errors[1]


def _exact(x: Tensor) -> Tensor:
    return F.group_norm(x.double(), 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, on the way to forward mode
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 2, 2)])
def test_gradients_are_right_once_and_twice(shape: tuple[int, ...]) -> None:
    norm = ragged((3, 1) if len(shape) == 2 else (1, 3)).double()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    inputs = [sample(*shape, dtype=torch.float64), norm.weight.detach().clone(), norm.bias.detach().clone()]
    inputs = [each.requires_grad_() for each in inputs]
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_constant_groups_have_finite_gradients() -> None:
    norm, x = ragged(), torch.ones(2, 10, 4, 4, requires_grad=True)
    norm(x).square().sum().backward()

    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    norm = ragged().to(dtype)
    x = sample(2, 10, 4, 4, dtype=dtype) + 3

    out = norm(x)
    assert out.dtype == F.group_norm(x, 2, norm.weight, norm.bias).dtype == dtype
    # In double precision from the same half-precision values: what remains is half a unit in the last place.
    assert torch.allclose(out.double(), by_hand(norm, x), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_it_gives_a_group_norm(dtype: torch.dtype, autocast: torch.dtype) -> None:
    norm, x = ragged(), sample(2, 10, 4, 4, dtype=dtype) + 3
    plain = nn.GroupNorm(2, 10)

    with torch.autocast("cpu", dtype=autocast):
        out, theirs = norm(x), plain(x)
    assert out.dtype == theirs.dtype
    tolerance = torch.finfo(out.dtype).eps
    assert torch.allclose(out.double(), by_hand(norm, x), rtol=tolerance, atol=max(tolerance, 1e-5))


def test_the_memory_format_is_kept() -> None:
    norm = ragged()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = sample(2, 10, 4, 3).to(memory_format=memory_format)
        assert norm(x).is_contiguous(memory_format=memory_format)
        assert norm(x).is_contiguous() == (memory_format is torch.contiguous_format)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_in_one_graph(backend: str) -> None:
    norm, x = ragged(), sample(2, 10, 4, 4)
    compiled = torch.compile(norm, fullgraph=True, backend=backend)

    assert torch.allclose(compiled(x), norm(x), atol=1e-6)
    compiled(x).square().sum().backward()
    first = norm.weight.grad
    norm.weight.grad = None
    norm(x).square().sum().backward()
    assert torch.allclose(first, norm.weight.grad, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x.bfloat16()).dtype == norm(x.bfloat16()).dtype


def test_copies_pickles_and_state_dicts_are_those_of_a_group_norm() -> None:
    norm, x = ragged(), sample(2, 10, 4, 4)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)

    for copied in (copy.deepcopy(norm), torch.load(file, weights_only=False)):
        assert copied.group_sizes == SIZES
        assert torch.equal(copied(x), norm(x))
    assert list(norm.state_dict()) == list(nn.GroupNorm(2, 10).state_dict())
    assert not list(norm.buffers())
    assert isinstance(norm, nn.GroupNorm)


def test_a_module_from_the_meta_device_works_once_it_has_values() -> None:
    norm = RaggedGroupNorm(SIZES, device="meta")
    assert norm(torch.empty(2, 10, 4, device="meta")).shape == (2, 10, 4)
    norm.to_empty(device="cpu").load_state_dict(ragged().state_dict())
    x = sample(2, 10, 4)

    assert torch.equal(norm(x), ragged()(x))
    assert torch.equal(norm.double().float()(x), ragged()(x))


def test_a_default_device_without_memory_does_not_matter() -> None:
    with torch.device("meta"):
        norm = RaggedGroupNorm.adopt_(nn.GroupNorm(2, 10, affine=False, device="cpu"), SIZES)

    assert torch.equal(norm(sample(2, 10, 4)), ragged(affine=False)(sample(2, 10, 4)))


def test_the_number_of_groups_tells_the_truth() -> None:
    norm = ragged()

    assert (norm.num_groups, norm.num_channels, norm.eps, norm.affine) == (4, 10, 1e-5, True)
    assert repr(norm) == "RaggedGroupNorm(group_sizes=(3, 1, 4, 2), num_channels=10, eps=1e-05, affine=True)"
    with pytest.raises(AttributeError, match=r"num_groups=2 cannot be set on a RaggedGroupNorm, whose groups are \(3,"):
        norm.num_groups = 2


@pytest.mark.parametrize("sizes", [(), (3, 0), (3, -1), (2.0, 1), (True, 2)])
def test_groups_without_channels_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"group_sizes=\(.*\) must be positive numbers of channels, one a group"):
        RaggedGroupNorm(sizes)


def test_only_a_plain_group_norm_of_the_right_width_is_made_ragged() -> None:
    class Own(nn.GroupNorm):
        pass

    with pytest.raises(ValueError, match="norm must be a plain GroupNorm, but it is a Own, whose forward pass"):
        RaggedGroupNorm.adopt_(Own(2, 4), (1, 3))
    with pytest.raises(ValueError, match=r"group_sizes=\(1, 2\) add up to 3 channels, but the norm has 4"):
        RaggedGroupNorm.adopt_(nn.GroupNorm(2, 4), (1, 2))


# --- extraction


class Block(nn.Module):
    """A normalised convolution, and (B, 3, H, W) -> (B, 12, H, W) before its last layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = norm
        self.last = nn.Conv2d(12, 3, 1)

    def hidden(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.hidden(x)))


IMAGE = sample(2, 3, 6, 6)


def mask_of(*kept: int) -> TicketMask:
    return TicketMask({"first": torch.isin(torch.arange(12), torch.tensor(kept))})


@pytest.mark.parametrize("affine", [True, False])
def test_whole_groups_that_go_leave_the_others_exactly_as_they_were(affine: bool) -> None:
    network = Block(nn.GroupNorm(4, 12, affine=affine)).double()
    kept = [0, 1, 2, 6, 7, 8]
    ticket = extract(network, trace_plan(network, (IMAGE.double(),)), mask_of(*kept), norm="exact")

    assert type(ticket.norm) is nn.GroupNorm
    assert (ticket.norm.num_groups, ticket.norm.num_channels) == (2, 6)
    with torch.no_grad():
        dense, cut = network.hidden(IMAGE.double())[:, kept], ticket.hidden(IMAGE.double())
    assert torch.allclose(cut, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_what_is_left_of_a_group_is_normalised_by_itself(affine: bool) -> None:
    network = Block(nn.GroupNorm(4, 12, affine=affine)).double()
    kept = [0, 1, 2, 4, 10, 11]  # three, one, none and two of the four groups
    ticket: Any = extract(network, trace_plan(network, (IMAGE.double(),)), mask_of(*kept), norm="exact")

    assert isinstance(ticket.norm, RaggedGroupNorm)
    assert ticket.norm.group_sizes == (3, 1, 2)
    assert ticket.norm.num_groups == 3
    with torch.no_grad():
        dense, cut = network.hidden(IMAGE.double())[:, kept], ticket.hidden(IMAGE.double())
        assert torch.allclose(cut, by_hand(ticket.norm, ticket.first(IMAGE.double())), atol=1e-12)
        # The first group is whole: it cannot tell that anything happened.
        assert torch.allclose(cut[:, :3], dense[:, :3], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(cut[:, 3:], dense[:, 3:], atol=1e-2)


def test_equal_remainders_stay_a_group_norm() -> None:
    network = Block(nn.GroupNorm(4, 12))
    plan = trace_plan(network, (IMAGE,))

    for kept, groups in (((0, 3, 6, 9), 4), ((0, 2, 6, 7), 2), ((3, 4, 5), 1), (range(12), 4)):
        ticket = extract(network, plan, mask_of(*kept), norm="exact")
        assert type(ticket.norm) is nn.GroupNorm
        assert ticket.norm.num_groups == groups


def test_a_class_of_its_own_keeps_the_default() -> None:
    class Own(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    network = Block(Own(4, 12))
    plan, mask = trace_plan(network, (IMAGE,)), mask_of(0, 1, 2, 4, 10, 11)

    exact, shrunk = (extract(network, plan, mask, norm=norm) for norm in ("exact", "shrink"))
    assert type(exact.norm) is Own
    assert exact.norm.num_groups == shrunk.norm.num_groups == 3


def test_a_norm_whose_parameters_are_used_by_hand_keeps_the_default() -> None:
    class ByHand(Block):
        def hidden(self, x: Tensor) -> Tensor:
            return F.group_norm(self.first(x), self.norm.num_groups, self.norm.weight, self.norm.bias)

    network = ByHand(nn.GroupNorm(4, 12))
    ticket = extract(network, trace_plan(network, (IMAGE,)), mask_of(0, 1, 2, 4, 10, 11), norm="exact")

    assert type(ticket.norm) is nn.GroupNorm
    assert ticket(IMAGE).shape == IMAGE.shape


def test_shared_norms_hooks_and_modes_remain() -> None:
    network = Block(nn.GroupNorm(4, 12))
    network.again = network.norm
    network.norm.eval()
    calls: list[int] = []
    network.norm.register_forward_hook(lambda *_: calls.append(1))
    ticket: Any = extract(network, trace_plan(network, (IMAGE,)), mask_of(0, 1, 2, 4, 10, 11), norm="exact")
    calls.clear()
    ticket(IMAGE)

    assert ticket.again is ticket.norm
    assert isinstance(ticket.norm, RaggedGroupNorm)
    assert not ticket.norm.training
    assert calls == [1]
    assert type(network.norm) is nn.GroupNorm


def test_concatenated_inputs_count_by_position() -> None:
    dense, plan = traced("hand-written")
    mask = TicketMask({**plan.full_mask().kept, "up2.conv2": torch.arange(32) % 8 < 3, "shrink": torch.arange(16) > 4})
    ticket: Any = extract(dense.network, plan, mask, norm="exact")
    names = [name for name, dims in plan.ids.items() if name == "up2.norm1.weight" and 0 in dims]
    stays = plan.kept(mask)[plan.ids[names[0]][0]].view(4, -1)

    assert isinstance(ticket.up2.norm1, RaggedGroupNorm)
    assert ticket.up2.norm1.group_sizes == tuple(stays.sum(1).tolist())


def test_an_unknown_way_to_normalise_is_refused() -> None:
    dense, plan = traced("hand-written")
    with pytest.raises(ValueError, match="norm='ragged' must be one of 'shrink', 'exact'"):
        extract(dense.network, plan, plan.full_mask(), norm="ragged")  # type: ignore[arg-type]


# --- what tickets have to survive


@pytest.mark.parametrize("name", ["hand-written", "attention_head_dim=8"])
def test_a_ticket_trains_and_comes_back_from_shapes_and_edits(name: str) -> None:
    dense, plan = traced(name)
    ticket = extract(dense.network, plan, random_mask(plan, 3), norm="exact")
    edits = attribute_edits(dense.network, ticket)
    norms = {name: module for name, module in ticket.named_modules() if isinstance(module, RaggedGroupNorm)}
    assert norms
    assert all(edits[name]["group_sizes"] == list(norm.group_sizes) for name, norm in norms.items())

    rebuilt = resize_(copy.deepcopy(dense.network), {n: t.shape for n, t in ticket.state_dict().items()}, edits)
    rebuilt.load_state_dict(ticket.state_dict())
    assert attribute_edits(dense.network, rebuilt) == edits
    assert torch.equal(dense(rebuilt), dense(ticket))
    dense(ticket).square().mean().backward()
    assert all(parameter.grad is not None for parameter in ticket.parameters())


def test_a_ragged_ticket_can_be_traced_again_and_keeps_its_groups() -> None:
    dense, plan = traced("hand-written")
    ticket = extract(dense.network, plan, random_mask(plan, 3), norm="exact")
    again = verify_plan(ticket, trace_plan(ticket, dense.args), dense.args).plan
    smaller = extract(ticket, again, random_mask(again, 4), norm="exact")

    assert dense(smaller).shape == dense().shape
    for name, norm in ticket.named_modules():
        if isinstance(norm, RaggedGroupNorm):
            same: Any = smaller.get_submodule(name)
            assert same.group_sizes == norm.group_sizes
    assert count_parameters(smaller) < count_parameters(ticket)


def _malformed(change: Callable[[dict[str, Any]], Any]) -> None:
    network = Block(nn.GroupNorm(4, 12))
    ticket = extract(network, trace_plan(network, (IMAGE,)), mask_of(0, 1, 2, 4, 10, 11), norm="exact")
    edits: dict[str, dict[str, Any]] = copy.deepcopy(attribute_edits(network, ticket))
    assert edits["norm"] == {"num_channels": 6, "num_groups": 3, "group_sizes": [3, 1, 2]}
    change(edits["norm"])
    resize_(Block(nn.GroupNorm(4, 12)), {n: t.shape for n, t in ticket.state_dict().items()}, edits)


@pytest.mark.parametrize(
    "sizes", [[], [6], [1, 1, 1, 1, 2], [0, 3, 3], [-1, 3, 3], [3, True, 2], ["3", 1, 2], [3.0, 1, 2], 6, "312", None]
)
def test_groups_that_cannot_be_what_is_left_are_refused(sizes: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"attribute norm\.group_sizes = .* must list at most 4 positive numbers, each at most 3\. Build",
    ):
        _malformed(lambda norm: norm.update(group_sizes=sizes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": [3, 1, 1]}, r"norm\.group_sizes = \[3, 1, 1\] adds up to 5 channels and does not fit"),
        ({"num_groups": 2}, r"attribute norm\.num_groups = 2 does not fit the tensors, which make it 3"),
        ({"num_channels": 5}, r"attribute norm\.num_channels = 5 does not fit the tensors, which make it 6"),
    ],
)
def test_groups_that_contradict_the_rest_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _malformed(lambda norm: norm.update(changes))


def test_only_norms_have_groups() -> None:
    network = PlainUNet()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"attribute conv_in\.group_sizes is not a width that a ticket may change"):
        resize_(network, shapes, {"conv_in": {"group_sizes": [8, 8]}})


def test_a_compiled_ticket_computes_the_same() -> None:
    network = tiny_unet().eval()
    args = (sample(1, 3, 8, 8), torch.tensor([5]))
    plan = trace_plan(network, args)
    ticket = extract(network, plan, random_mask(plan, 3), norm="exact")
    compiled = torch.compile(ticket, backend="eager")

    with torch.no_grad():
        assert torch.allclose(compiled(*args).sample, ticket(*args).sample, atol=1e-5)
