import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import DENOISERS, PlainUNet, Positions, denoiser, random_mask, tiny_unet, traced
from torch import nn

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import attribute_edits, extract, resize_, trace_plan

Shapes = dict[str, tuple[int, ...]]
Edits = dict[str, dict[str, Any]]


def shapes(network: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_resized_network_with_the_tickets_weights_is_the_ticket(name: str) -> None:
    dense, plan = traced(name)
    ticket = extract(dense.network, plan, random_mask(plan, 7))
    edits = attribute_edits(dense.network, ticket)
    fresh = denoiser(name, seed=1).network

    resized = resize_(fresh, shapes(ticket), edits)
    resized.load_state_dict(ticket.state_dict())

    assert resized is fresh
    assert torch.equal(dense(resized), dense(ticket))
    assert attribute_edits(dense.network, resized) == edits


def test_edits_are_plain_json() -> None:
    dense, plan = traced("attention_head_dim=8")
    edits = attribute_edits(dense.network, extract(dense.network, plan, random_mask(plan, 7)))

    values = [value for module in edits.values() for value in module.values()]
    assert all(type(value) is int or (isinstance(value, list) and set(map(type, value)) == {int}) for value in values)


def test_norms_without_parameters_take_their_width_from_the_edits() -> None:
    def build() -> nn.Sequential:
        image = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, affine=False), nn.InstanceNorm2d(8))
        tokens = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3))
        return nn.Sequential(image, nn.Flatten(2), nn.ReLU(), _Transpose(), tokens)

    network, sample = build(), torch.ones(1, 3, 2, 2)
    plan = trace_plan(network, (sample,))
    ticket = extract(network, plan, random_mask(plan, 1))
    edits = attribute_edits(network, ticket)
    resized = resize_(build(), shapes(ticket), edits)
    resized.load_state_dict(ticket.state_dict())

    assert edits["0.1"].keys() >= {"num_channels"}
    assert edits["4.1"] == {"normalized_shape": [ticket[4][1].normalized_shape[0]]}
    assert torch.equal(resized(sample), ticket(sample))


class _Transpose(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def test_tied_tensors_are_resized_together() -> None:
    def build() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        network[2].weight = network[1].weight
        return network

    network = build()
    ticket = extract(network, trace_plan(network, (torch.ones(3, 4),)), TicketMask({"0": torch.arange(8) < 3}))
    resized = resize_(build(), shapes(ticket), attribute_edits(network, ticket))
    assert resized[2].weight is resized[1].weight
    assert resized[2].weight.shape == (3, 3)

    untied = {**shapes(ticket), "2.weight": (8, 8)}
    with pytest.raises(ValueError, match=r"'2\.weight' has shape \(8, 8\), and another one where it is tied to it"):
        resize_(build(), untied, {})


def test_a_cut_buffer_comes_back_although_the_network_does_not_save_it() -> None:
    network, tokens = Positions(), torch.ones(2, 5, 6)
    ticket = extract(network, trace_plan(network, (tokens,)), TicketMask({"a": torch.arange(8) < 3}))

    resized = resize_(Positions(), shapes(ticket), attribute_edits(network, ticket))
    resized.load_state_dict(ticket.state_dict())

    assert torch.equal(resized(tokens), ticket(tokens))


def test_trainability_dtype_and_modes_of_the_dense_network_remain() -> None:
    dense, plan = traced("hand-written")
    ticket = extract(dense.network, plan, random_mask(plan, 8))
    network = PlainUNet().double().train()
    network.conv_in.requires_grad_(False)

    resize_(network, shapes(ticket), attribute_edits(dense.network, ticket))

    assert not network.conv_in.weight.requires_grad
    assert network.conv_out.weight.requires_grad
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}
    assert network.training


def _refused(change: Callable[[Shapes, Edits], None]) -> None:
    dense, plan = traced("attention_head_dim=8")
    mask = TicketMask({group.name: (torch.arange(group.size) % 4 != 3) for group in plan.groups})
    ticket = extract(dense.network, plan, mask)
    given, edits = shapes(ticket), copy.deepcopy(attribute_edits(dense.network, ticket))
    change(given, edits)
    resize_(tiny_unet(), given, edits)


NORM = "down_blocks.0.resnets.0.norm1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, e: s.pop("conv_in.bias"), r"tensor 'conv_in\.bias' is missing from the shapes \(1 such\)"),
        (lambda s, e: s.update(extra=(1,)), r"tensor 'extra' is not a tensor of the network \(1 such\)"),
        (
            lambda s, e: s.update({"conv_in.bias": (17,)}),
            r"'conv_in\.bias' has shape \(17,\), which is no part of the dense network's \(16,\)",
        ),
        (lambda s, e: s.update({"conv_in.bias": (0,)}), r"'conv_in\.bias' has shape \(0,\), which is no part"),
        (lambda s, e: s.update({"conv_in.bias": (4, 4)}), r"'conv_in\.bias' has shape \(4, 4\), which is no part"),
        (lambda s, e: e.update(nowhere={"out_channels": 4}), "module 'nowhere' is not in the network"),
        (lambda s, e: e["conv_in"].update(training=1), r"attribute conv_in\.training is not a width that a ticket may"),
        (lambda s, e: e.update(conv_act={"inplace": 1}), r"attribute conv_act\.inplace is not a width"),
        (
            lambda s, e: e["conv_in"].update(out_channels=0),
            r"conv_in\.out_channels = 0 must be positive and at most 16",
        ),
        (lambda s, e: e["conv_in"].update(out_channels=17), r"conv_in\.out_channels = 17 must be positive and at most"),
        (lambda s, e: e["conv_in"].update(out_channels=True), r"conv_in\.out_channels = True must be positive"),
        (lambda s, e: e["conv_in"].update(out_channels="12"), r"conv_in\.out_channels = '12' must be positive"),
        (lambda s, e: e["conv_in"].update(out_channels=[12]), r"conv_in\.out_channels = \[12\] must be positive"),
        (
            lambda s, e: e["conv_in"].update(out_channels=11),
            r"attribute conv_in\.out_channels = 11 does not fit the tensors, which make it 12",
        ),
        (lambda s, e: e[NORM].update(num_channels=10), rf"{NORM}\.num_channels = 10 does not fit the tensors"),
        (
            lambda s, e: e[NORM].update(num_groups=5),
            rf"attribute {NORM}\.num_groups = 5 does not divide its 12 channels",
        ),
        (lambda s, e: e[NORM].update(num_groups=12), rf"{NORM}\.num_groups = 12 must be positive and at most 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Callable[[Shapes, Edits], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _refused(change)


@pytest.mark.parametrize("value", [[4, 4], 4, [0], [9], ["4"]])
def test_a_normalised_shape_must_be_a_list_of_numbers_of_the_same_length(value: Any) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 6))

    with pytest.raises(ValueError, match=r"1\.normalized_shape = .* must be positive and at most \(8,\)"):
        resize_(network, shapes(network), {"1": {"normalized_shape": value}})
