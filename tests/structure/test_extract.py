import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DENOISERS, Positions, random_mask, traced
from torch import Tensor, nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, TicketSlicer, attribute_edits, extract, trace_plan


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@pytest.fixture
def channel_local_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalisation that looks at one channel at a time, so that removed channels are not missed in its statistics."""

    def forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        return x.tanh() * self.weight.view(shape) + self.bias.view(shape)

    monkeypatch.setattr(nn.GroupNorm, "forward", forward)


def with_zeros(network: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy of the network with its removed channels set to zero."""
    kept = plan.kept(mask)
    result = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            for dim, ids in plan.ids.get(name, {}).items():
                factor = torch.tensor([1.0 if i < 0 or kept[i] else 0.0 for i in ids.tolist()])
                parameter.mul_(factor.view([-1 if d == dim else 1 for d in range(parameter.dim())]))
    return result


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.usefixtures("channel_local_norms")
def test_a_ticket_computes_what_the_dense_network_does_with_the_removed_channels_at_zero(name: str, seed: int) -> None:
    dense, plan = traced(name)
    mask = random_mask(plan, seed)

    with torch.no_grad():
        expected = dense(with_zeros(dense.network, plan, mask))
        actual = dense(extract(dense.network, plan, mask))

    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_ticket_that_keeps_everything_is_the_dense_network() -> None:
    dense, plan = traced("attention_head_dim=8")
    ticket = extract(dense.network, plan, plan.full_mask())

    assert attribute_edits(dense.network, ticket) == {}
    assert torch.equal(dense(ticket), dense())


@pytest.mark.parametrize("name", DENOISERS)
def test_a_ticket_has_the_shapes_that_its_mask_says_and_trains(name: str) -> None:
    dense, plan = traced(name)
    mask = random_mask(plan, 1)
    ticket = extract(dense.network, plan, mask)
    keep = plan.keep_indices(mask)

    for parameter_name, parameter in ticket.named_parameters():
        shape = list(dense.network.get_parameter(parameter_name).shape)
        for dim, indices in keep.get(parameter_name, {}).items():
            shape[dim] = len(indices)
        assert list(parameter.shape) == shape
    dense(ticket).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in ticket.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", DENOISERS)
def test_attributes_say_the_same_as_the_tensors(name: str) -> None:
    dense, plan = traced(name)
    ticket = extract(dense.network, plan, random_mask(plan, 2))

    for module in ticket.modules():
        kind = type(module).__name__
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Embedding):
            assert (module.num_embeddings, module.embedding_dim) == module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
        elif kind in ("Downsample2D", "Upsample2D"):
            assert (module.channels, module.out_channels) == (module.conv.in_channels, module.conv.out_channels)
        elif kind == "Attention":
            assert (module.inner_dim, module.query_dim) == module.to_q.weight.shape
            assert (module.inner_kv_dim, module.cross_attention_dim) == module.to_k.weight.shape
            assert module.out_dim == module.to_out[0].out_features


def test_norm_groups_are_the_largest_divisor_not_above_the_original() -> None:
    network = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 3, 1))
    plan = trace_plan(network, (torch.ones(1, 3, 2, 2),))

    for kept, groups in {12: 4, 11: 1, 10: 2, 9: 3, 8: 4, 7: 1, 6: 3, 3: 3, 2: 2, 1: 1}.items():
        ticket = extract(network, plan, TicketMask({"0": torch.arange(12) < kept}))
        assert ticket[1].num_groups == groups


def test_the_dense_network_is_bitwise_unchanged_and_shares_no_storage() -> None:
    dense, plan = traced("attention_head_dim=8")
    before = {name: tensor.clone() for name, tensor in tensors(dense.network).items()}
    attributes = {name: dict(vars(module)) for name, module in dense.network.named_modules()}
    # Everything kept is the hardest case: nothing forces a copy.
    tickets = [extract(dense.network, plan, plan.full_mask()), extract(dense.network, plan, random_mask(plan, 3))]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(dense.network).values()}

    for ticket in tickets:
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors(ticket).values()}
        with torch.no_grad():
            for tensor in tensors(ticket).values():
                tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(dense.network).items())
    for name, module in dense.network.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | tuple)}
        assert plain == {key: attributes[name][key] for key in plain}


def test_modes_gradients_and_trainability_carry_over_module_by_module() -> None:
    dense, plan = traced("hand-written")
    network = copy.deepcopy(dense.network).train()
    network.down1.eval()
    network.time1.requires_grad_(False)
    dense(network).square().mean().backward()
    ticket = extract(network, plan, random_mask(plan, 4))

    def modes(model: nn.Module) -> dict[str, bool]:
        return {name: module.training for name, module in model.named_modules()}

    def trainable(model: nn.Module) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    assert modes(ticket) == modes(network)
    assert trainable(ticket) == trainable(network)
    assert all(parameter.grad is None and parameter.is_leaf for parameter in ticket.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_carries_over(dtype: torch.dtype) -> None:
    dense, plan = traced("attention_head_dim=8")
    ticket = extract(copy.deepcopy(dense.network).to(dtype), plan, random_mask(plan, 5))

    assert {tensor.dtype for tensor in tensors(ticket).values()} == {dtype}


def test_the_device_carries_over() -> None:
    dense, plan = traced("attention_head_dim=8")
    # The meta device stands for any other: it has shapes and a name, but no memory.
    ticket = extract(copy.deepcopy(dense.network).to("meta"), plan, random_mask(plan, 5))

    assert {tensor.device.type for tensor in tensors(ticket).values()} == {"meta"}


@pytest.mark.parametrize("volumetric", [False, True])
def test_the_memory_format_carries_over(volumetric: bool) -> None:
    conv, shape = (nn.Conv3d, (1, 3, 4, 4, 4)) if volumetric else (nn.Conv2d, (1, 3, 4, 4))
    last = torch.channels_last_3d if volumetric else torch.channels_last
    network = nn.Sequential(conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1), conv(8, 3, 1))
    plan = trace_plan(network, (torch.ones(shape),))
    mask = TicketMask({"0": torch.arange(8) < 5, "1": torch.arange(8) > 1})

    for memory_format in (torch.contiguous_format, last):
        ticket = extract(network.to(memory_format=memory_format), plan, mask)
        assert all(layer.weight.is_contiguous(memory_format=memory_format) for layer in ticket)
        assert ticket[1].weight.is_contiguous() == (memory_format is torch.contiguous_format)


def test_tied_weights_stay_tied() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    network[2].weight = network[1].weight
    plan = trace_plan(network, (torch.ones(3, 4),))

    ticket = extract(network, plan, TicketMask({"0": torch.arange(8) % 2 == 0}))

    assert ticket[2].weight is ticket[1].weight
    assert ticket[2].weight.shape == (4, 4)
    assert ticket[2].in_features == ticket[2].out_features == 4
    assert list(dict(ticket.named_parameters())) == list(dict(network.named_parameters()))


def test_a_module_used_in_two_places_is_one_module_in_the_ticket() -> None:
    shared = nn.Linear(8, 8)
    network = nn.Sequential(nn.Linear(4, 8), shared, nn.ReLU(), shared, nn.Linear(8, 2))
    plan = trace_plan(network, (torch.ones(3, 4),))

    ticket = extract(network, plan, TicketMask({"0": torch.arange(8) < 3}))

    assert ticket[1] is ticket[3]
    assert ticket(torch.ones(3, 4)).shape == (3, 2)
    assert attribute_edits(network, ticket) == {
        "0": {"out_features": 3},
        "1": {"in_features": 3, "out_features": 3},
        "4": {"in_features": 3},
    }


def test_queries_are_rescaled_so_that_narrower_heads_score_as_before() -> None:
    dense, plan = traced("attention_head_dim=8")
    group = next(group for group in plan.groups if group.name == "mid_block.attentions.0.to_q")
    first_half = (torch.arange(8) < 2).repeat(4)  # 2 of 8 channels in each of 4 heads
    ticket = extract(dense.network, plan, TicketMask({**plan.full_mask().kept, group.name: first_half}))
    index = plan.ids[f"{group.name}.weight"][0]
    rows = torch.isin(index, group.channels[first_half])

    for leaf in ("weight", "bias"):
        old = dense.network.get_parameter(f"{group.name}.{leaf}")
        assert torch.allclose(ticket.get_parameter(f"{group.name}.{leaf}"), old[rows] * (2 / 8) ** 0.5)
    assert torch.equal(
        ticket.get_parameter("mid_block.attentions.0.to_k.weight"),
        dense.network.get_parameter("mid_block.attentions.0.to_k.weight")[rows],
    )


def test_the_factor_of_half_precision_queries_is_not_rounded_first() -> None:
    dense, plan = traced("attention_head_dim=8")
    name = "mid_block.attentions.0.to_q"
    mask = TicketMask({**plan.full_mask().kept, name: (torch.arange(8) < 3).repeat(4)})
    weight = dense.network.get_parameter(f"{name}.weight").detach().bfloat16()
    slicer = TicketSlicer(plan, mask)

    exact = slicer.slice(f"{name}.weight", weight).double() * (3 / 8) ** 0.5

    assert torch.equal(slicer.weight(f"{name}.weight", weight), exact.bfloat16())


def test_slicing_takes_gradients_and_moments_along_without_rescaling() -> None:
    dense, plan = traced("attention_head_dim=8")
    mask = random_mask(plan, 6)
    slicer = TicketSlicer(plan, mask)
    ticket = extract(dense.network, plan, mask)

    for name, parameter in dense.network.named_parameters():
        moment = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
        sliced = slicer.slice(name, moment)
        assert sliced.shape == ticket.get_parameter(name).shape
        expected = moment
        for dim, keep in plan.keep_indices(mask).get(name, {}).items():
            expected = expected.index_select(dim, keep)
        assert torch.equal(sliced, expected)
        assert sliced.untyped_storage().data_ptr() != moment.untyped_storage().data_ptr()


def test_buffers_follow_their_channels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)).eval()
    network[1].running_mean.copy_(torch.arange(8))
    plan = trace_plan(network, (torch.ones(1, 3, 2, 2),))

    ticket = extract(network, plan, TicketMask({"0": torch.arange(8) % 2 == 1}))

    assert ticket[1].running_mean.tolist() == [1, 3, 5, 7]
    assert ticket[1].num_features == 4
    assert ticket[1].num_batches_tracked is not network[1].num_batches_tracked


def test_a_buffer_outside_of_the_state_dict_comes_into_it_once_it_is_cut() -> None:
    network = Positions()
    plan = trace_plan(network, (torch.ones(2, 5, 6),))

    whole = extract(network, plan, plan.full_mask())
    ticket = extract(network, plan, TicketMask({"a": torch.arange(8) < 3}))

    assert set(whole.state_dict()) == set(network.state_dict())
    assert set(ticket.state_dict()) == {*network.state_dict(), "positions"}
    assert torch.equal(ticket.state_dict()["positions"], network.positions[..., :3])


def test_a_foreign_class_of_a_known_name_keeps_the_attributes_that_it_has() -> None:
    class Attention(nn.Module):
        """Not the one of diffusers: its output layer is no list, and ``out_dim`` is no number."""

        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_out = nn.Linear(4, 8), nn.Linear(8, 2)
            self.inner_dim, self.out_dim = 8, "two"

        def forward(self, x: Tensor) -> Tensor:
            return self.to_out(self.to_q(x))

    network = Attention()
    plan = trace_plan(network, (torch.ones(3, 4),))
    ticket: Any = extract(network, plan, TicketMask({"to_q": torch.arange(8) < 3}))

    assert (ticket.inner_dim, ticket.out_dim) == (3, "two")
    assert not hasattr(ticket, "query_dim")


def test_a_mask_of_another_plan_is_refused() -> None:
    dense, plan = traced("hand-written")
    kept = dict(plan.full_mask().kept)

    with pytest.raises(ValueError, match=r"mask does not belong to this plan: groups \['elsewhere'\] are in one"):
        extract(dense.network, plan, TicketMask({**kept, "elsewhere": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(
        ValueError, match=r"mask of group 'conv_in' has 4 channels, the plan has 16\. Draw the mask from"
    ):
        extract(dense.network, plan, TicketMask({**kept, "conv_in": torch.ones(4, dtype=torch.bool)}))


def test_heads_that_keep_different_numbers_are_refused() -> None:
    dense, plan = traced("attention_head_dim=8")
    name = "mid_block.attentions.0.to_q"
    kept = {**plan.full_mask().kept, name: torch.arange(32) != 3}

    with pytest.raises(ValueError, match=r"to_q' keeps different numbers in its 4 heads; every head must keep equally"):
        extract(dense.network, plan, TicketMask(kept))
