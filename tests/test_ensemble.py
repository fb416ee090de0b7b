import copy
import dataclasses
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.regions import TimestepPartition

REGIONS = [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)]
MIXED = torch.tensor([700, 3, 300, 999, 0, 439, 240, 500])


def small_unet(width, **kwargs):
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (width, 2 * width),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(defaults | kwargs))


class Linear(nn.Module):
    """A plain denoiser whose every ticket is a different affine map; notes the arguments of its calls."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(scale)))
        self.kind = "affine"
        self.note = None
        self.table = torch.arange(3)
        self.calls = []

    def forward(self, x, t=None, *extra, **more):
        self.calls.append((x, t, extra, more))
        return x * self.weight + t.reshape(-1, *[1] * (x.dim() - 1))

    def method(self):
        return self


def affine_ensemble(wrap=None, overlap=0):
    tickets = [Linear(scale) for scale in (2, 3, 5)]
    if wrap is not None:
        for ticket in tickets:
            ticket.forward = lambda x, t, ticket=ticket: wrap(Linear.forward(ticket, x, t))
    return TicketEnsemble(tickets, TimestepPartition.of(REGIONS, overlap), TimestepArgument("t", 1))


@pytest.fixture(scope="module")
def unets():
    torch.manual_seed(0)
    partition = TimestepPartition.of(REGIONS)
    return TicketEnsemble([small_unet(width) for width in (16, 12, 8)], partition, TimestepArgument("timestep", 1))


def by_hand(ensemble, x, t, **kwargs):
    """Each ticket on its rows, rows written back one by one."""
    rows = [torch.tensor([], dtype=torch.long) for _ in ensemble.tickets]
    for row, step in enumerate(t.tolist()):
        number = next(i for i, region in enumerate(ensemble.regions) if region.start <= step < region.stop)
        rows[number] = torch.cat([rows[number], torch.tensor([row])])
    result = torch.zeros(len(x), *x.shape[1:])
    for ticket, index in zip(ensemble.tickets, rows, strict=True):
        if len(index):
            part = ticket(x[index], t[index], **{name: value[index] for name, value in kwargs.items()})
            result[index] = part.sample.to(result.dtype)
    return result


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("keyword", [True, False])
def test_outputs_and_gradients_equal_those_of_calling_each_ticket_by_hand(unets, mode, keyword):
    unets.train(mode)
    x = torch.randn(len(MIXED), 1, 8, 8, requires_grad=True)
    target = torch.randn_like(x)

    unets.zero_grad(set_to_none=True)
    output = unets(x, timestep=MIXED) if keyword else unets(x, MIXED)
    nn.functional.mse_loss(output.sample, target).backward()
    routed, routed_input = gradients(unets), x.grad.clone()

    unets.zero_grad(set_to_none=True)
    x.grad = None
    expected = by_hand(unets, x, MIXED)
    nn.functional.mse_loss(expected, target).backward()

    assert isinstance(output, UNet2DOutput)
    assert torch.equal(output.sample, expected)
    assert torch.equal(routed_input, x.grad)
    hand = gradients(unets)
    assert all(torch.equal(routed[name], hand[name]) for name in hand)
    assert all(value.abs().sum() > 0 for name, value in hand.items() if name.endswith("conv_out.weight"))


def test_tickets_without_rows_get_no_gradient(unets):
    unets.train()
    unets.zero_grad(set_to_none=True)
    unets(torch.randn(3, 1, 8, 8), torch.tensor([0, 900, 10])).sample.sum().backward()
    assert all(p.grad is None for p in unets.tickets[1].parameters())
    assert all(p.grad is not None for p in unets.tickets[2].parameters())


def test_class_labels_are_split_with_the_rows():
    torch.manual_seed(0)
    tickets = [small_unet(width, num_class_embeds=5) for width in (12, 8, 8)]
    ensemble = TicketEnsemble(tickets, TimestepPartition.of(REGIONS), TimestepArgument("timestep", 1)).eval()
    x, labels = torch.randn(len(MIXED), 1, 8, 8), torch.arange(len(MIXED)) % 5
    expected = by_hand(ensemble, x, MIXED, class_labels=labels)
    assert torch.equal(ensemble(x, MIXED, class_labels=labels).sample, expected)
    assert torch.equal(ensemble(x, MIXED, labels, False)[0], expected)


def test_conditioning_is_split_with_the_rows_and_shared_tensors_are_not():
    ensemble = affine_ensemble()
    x, t = torch.randn(4, 2), torch.tensor([0, 500, 1, 501])
    hidden, shared = torch.randn(4, 7, 3), torch.randn(5, 3)
    extra = {"ids": [torch.arange(4), (shared, "text")], "image": UNet2DOutput(sample=torch.arange(4.0))}
    ensemble(x, t, hidden, encoder_hidden_states=hidden, scale=0.5, shared=shared, added=extra)
    for number, rows in ((0, [0, 2]), (2, [1, 3])):
        [(got, steps, (positional,), keywords)] = ensemble.tickets[number].calls
        assert torch.equal(got, x[rows]) and torch.equal(steps, t[rows])
        assert torch.equal(positional, hidden[rows]) and torch.equal(keywords["encoder_hidden_states"], hidden[rows])
        assert keywords["shared"] is shared and keywords["scale"] == 0.5
        assert torch.equal(keywords["added"]["ids"][0], torch.tensor(rows))
        assert keywords["added"]["ids"][1][0] is shared and keywords["added"]["ids"][1][1] == "text"
        assert torch.equal(keywords["added"]["image"].sample, torch.tensor(rows).float())
    assert ensemble.tickets[1].calls == []


def test_with_one_region_in_the_batch_the_ticket_gets_the_very_same_objects():
    ensemble = affine_ensemble()
    x, t, condition = torch.randn(3, 2), torch.tensor([300, 301, 302]), {"ids": torch.arange(3)}
    ensemble(x, t, added=condition)
    [(got, steps, _, keywords)] = ensemble.tickets[1].calls
    assert got is x and steps is t and keywords["added"] is condition


@pytest.mark.parametrize(
    "step", [300, 300.5, torch.tensor(300), torch.tensor([300]), torch.tensor([[300.0]]), torch.tensor(300.5)]
)
def test_one_timestep_for_all_rows_goes_to_one_ticket_untouched(step):
    ensemble = affine_ensemble()
    for ticket in ensemble.tickets:
        ticket.forward = lambda x, t, ticket=ticket: (ticket.calls.append((x, t)), x)[1]
    x = torch.randn(4, 2)
    ensemble(x, step)
    assert [len(ticket.calls) for ticket in ensemble.tickets] == [0, 1, 0]
    assert ensemble.tickets[1].calls[0][0] is x and ensemble.tickets[1].calls[0][1] is step


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_timesteps_may_carry_trailing_axes_of_size_one(shape):
    ensemble = affine_ensemble()
    x, t = torch.randn(8, 1, 2, 2), MIXED.reshape(shape)
    expected = x * torch.tensor([5, 2, 3, 5, 2, 3, 3, 5.0]).reshape(-1, 1, 1, 1) + MIXED.reshape(-1, 1, 1, 1)
    assert torch.equal(ensemble(x, t), expected)


Pair = namedtuple("Pair", ["mean", "variance"])


@dataclasses.dataclass
class Prediction:
    mean: torch.Tensor
    parts: list
    name: str = "prediction"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, y + 1),
        lambda y: [y, {"deep": (y + 1, "text", None)}],
        lambda y: OrderedDict(sample=y, other=y + 1),
        lambda y: Pair(y, y + 1),
        lambda y: Prediction(y, [y + 1, 3]),
        lambda y: UNet2DOutput(sample=y),
    ],
    ids=["tensor", "tuple", "nested", "ordered dict", "named tuple", "dataclass", "diffusers output"],
)
def test_outputs_of_every_structure_come_back_in_order(wrap):
    x = torch.randn(8, 2)
    scales = torch.tensor([5, 2, 3, 5, 2, 3, 3, 5.0]).reshape(-1, 1)
    expected = wrap(x * scales + MIXED.reshape(-1, 1))
    result = affine_ensemble(wrap)(x, MIXED)
    assert type(result) is type(expected)
    leaves = [tree_leaves(vars(each) if isinstance(each, Prediction) else each) for each in (result, expected)]
    assert len(leaves[0]) == len(leaves[1]) > 0
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_an_output_without_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"output\['loss'\] has shape \(\) for 2 rows"):
        affine_ensemble(lambda y: {"sample": y, "loss": y.mean()})(torch.randn(8, 2), MIXED)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([torch.zeros(2), (torch.zeros(3),), torch.zeros(3)], r"output: the tickets return different types"),
        ([{"a": 1}, {"b": 1}, {"a": 1}], r"output: the tickets return different keys"),
        ([[(1, 2)], [(1,)], [(1, 2)]], r"output\[0\]: the tickets return different lengths, \[2, 1, 2\]"),
    ],
)
def test_outputs_of_different_structure_are_refused(outputs, message):
    ensemble = affine_ensemble()
    for ticket, output in zip(ensemble.tickets, outputs, strict=True):
        ticket.forward = lambda x, t, output=output: output
    with pytest.raises(TypeError, match=message):
        ensemble(torch.randn(8, 2), MIXED)


def test_in_training_an_overlap_goes_to_either_neighbour_and_in_evaluation_to_its_own_region():
    ensemble = affine_ensemble(overlap=20)
    x, t = torch.zeros(400, 1), torch.full((400,), 250)
    torch.manual_seed(0)
    ensemble(x, t)
    counts = [len(ticket.calls[0][0]) for ticket in ensemble.tickets[:2]]
    assert sum(counts) == 400 and 150 < counts[0] < 250
    assert ensemble.tickets[2].calls == []

    ensemble.eval()
    ensemble(x, t)
    assert len(ensemble.tickets[0].calls) == 1
    assert ensemble.tickets[1].calls[1][0] is x


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("t", [torch.tensor([0, 1000]), torch.tensor(-1), 1500, float("nan")])
def test_timesteps_outside_the_axis_are_refused(mode, t):
    with pytest.raises(ValueError, match=r"outside the time axis \[0, 1000\)"):
        affine_ensemble().train(mode)(torch.zeros(2, 1), t)


def test_several_timesteps_per_row_are_refused():
    with pytest.raises(ValueError, match=r"timesteps has shape \(2, 3\), expected one timestep per row"):
        affine_ensemble()(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long))


def test_timesteps_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"timesteps is a list, expected a tensor or a number"):
        affine_ensemble()(torch.zeros(2, 3), [1, 2])


def test_an_empty_batch_goes_through():
    assert affine_ensemble()(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 3)


def test_the_traditional_ticket_takes_any_timesteps_untouched():
    ticket = Linear(2)
    ensemble = TicketEnsemble([ticket], TimestepPartition.whole(0.5), TimestepArgument("t", 1))
    x, t = torch.randn(2, 3), torch.tensor([-math.inf, 1e9])
    ensemble(x, t)
    assert ticket.calls[0][0] is x and ticket.calls[0][1] is t


def test_timesteps_are_found_by_keyword_first_then_by_position():
    where = TimestepArgument("t", 1)
    assert where.find((1, 2), {"t": 3}) == 3
    assert where.find((1, 2), {}) == 2
    assert TimestepArgument(None, 0).find((7,), {}) == 7
    with pytest.raises(TypeError, match=r"called without timesteps: expected .*name='t'.*keywords \['x'\]"):
        where.find((1,), {"x": 1})
    with pytest.raises(ValueError, match="at least one must be given"):
        TimestepArgument(None, None)
    with pytest.raises(ValueError, match=r"position=-1\): must be 0 or more"):
        TimestepArgument(None, -1)


def test_the_number_of_tickets_must_be_the_number_of_regions():
    with pytest.raises(ValueError, match=r"tickets has 1 networks, but the partition has 3 regions"):
        TicketEnsemble([Linear(1)], TimestepPartition.of(REGIONS), TimestepArgument("t", 1))


def test_plain_attributes_come_from_the_first_ticket(unets):
    assert unets.config is unets.tickets[0].config
    assert unets.config.sample_size == 8
    assert unets.dtype == torch.float32 and unets.device == torch.device("cpu")
    assert affine_ensemble().kind == "affine"
    assert affine_ensemble().note is None


@pytest.mark.parametrize("name", ["conv_in", "down_blocks", "mid_block", "enable_gradient_checkpointing", "absent"])
def test_modules_and_methods_are_not_answered_for_all_tickets(unets, name):
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'.*`.tickets\[0\].{name}`"):
        getattr(unets, name)


def test_parameters_tensors_and_private_marks_are_not_answered_for_all_tickets():
    ensemble = affine_ensemble()
    for name in ("weight", "table", "method"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(ensemble, name)
    ensemble.tickets[0]._hf_hook = "mark"
    assert not hasattr(ensemble, "_hf_hook")


def test_autocast_gives_what_the_tickets_give_by_hand(unets):
    unets.eval()
    x = torch.randn(len(MIXED), 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = unets(x, MIXED).sample
        expected = by_hand(unets, x, MIXED)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output.float(), expected)


def test_a_deep_copy_routes_alike_and_shares_nothing(unets):
    clone = copy.deepcopy(unets).eval()
    unets.eval()
    x = torch.randn(len(MIXED), 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(clone(x, MIXED).sample, unets(x, MIXED).sample)
        own = {p.data_ptr() for p in unets.parameters()}
        assert own.isdisjoint(p.data_ptr() for p in clone.parameters())


def test_state_dict_names_the_tickets_and_loads_back(unets):
    state = unets.state_dict()
    assert {name.split(".")[0] for name in state} == {"tickets"}
    assert state["tickets.1.conv_in.weight"].shape == (12, 1, 3, 3)
    copy.deepcopy(unets).load_state_dict(state)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_tickets_route_alike(in_place):
    torch.manual_seed(0)
    tickets = [nn.Linear(4, 4) for _ in range(3)]

    class Net(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.kind = "net"

        def forward(self, x, t):
            return self.layer(x) + t.unsqueeze(1)

    networks = [Net(layer) for layer in tickets]
    plain = TicketEnsemble(networks, TimestepPartition.of(REGIONS), TimestepArgument("t", 1))
    x = torch.randn(len(MIXED), 4)
    expected = plain(x, MIXED)
    if in_place:
        for network in networks:
            network.compile(backend="eager")
        compiled = plain
    else:
        wrapped = [torch.compile(network, backend="eager") for network in networks]
        compiled = TicketEnsemble(wrapped, plain.partition, plain.timesteps)
    assert torch.equal(compiled(x, MIXED), expected)
    assert torch.equal(compiled(x[:3], MIXED[:3]), expected[:3])
    assert torch.equal(copy.deepcopy(compiled)(x, MIXED), expected)
    assert compiled.kind == "net"
