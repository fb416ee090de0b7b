import pytest
import torch
from models import DENOISERS, PlainUNet, denoiser, tiny_unet
from oracle import partition_of_plan, partition_of_torch_pruning
from torch import Tensor, nn
from zoo import member

from lightning_earlybird.structure import ChannelPlan, StructureError, trace_plan


def sizes(plan: ChannelPlan) -> dict[str, tuple[int, int]]:
    """Group name -> (heads, channels)."""
    return {group.name: (group.rows, group.size) for group in plan.groups}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_partition_is_that_of_torch_pruning_element_by_element(name: str) -> None:
    given = denoiser(name)
    # It takes keyword arguments only as a whole.
    inputs = dict(zip(("sample", "timestep"), given.args, strict=True)) | given.kwargs if given.kwargs else given.args
    plan = trace_plan(given.network, given.args, given.kwargs)

    ours = partition_of_plan(given.network, plan)
    theirs = partition_of_torch_pruning(given.network, inputs, given.network.conv_out)

    assert ours == theirs  # hence also what is in neither: the frozen channels
    assert len(ours) == plan.num_channels
    assert [(entry.name, entry.size) for entry in plan.frozen] == [("conv_out", 3)]
    assert plan.unknown_operations == {}


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("name", ["UNet2D, resnet resampling only", "UNet2D, Fourier time", "UNet1D"])
def test_the_partition_is_that_of_torch_pruning_where_it_traces(name: str) -> None:
    given = member(name)
    plan = trace_plan(given.network, given.args)
    last = [given.network.get_submodule(entry.name) for entry in plan.frozen]

    theirs = partition_of_torch_pruning(given.network, given.args, *last)

    assert partition_of_plan(given.network, plan) == theirs


def test_a_network_that_torch_pruning_gets_wrong_is_traced_all_the_same() -> None:
    # Where one layer makes scale and shift for another, torch-pruning starts a group at that layer, twice as wide, and
    # lists the rows that scale apart from the channels that they scale. Ours couples a row of each with its channel.
    given = denoiser("attention_head_dim=8")
    network = tiny_unet(resnet_time_scale_shift="scale_shift")
    ours = partition_of_plan(network, trace_plan(network, given.args))
    weight = "down_blocks.0.resnets.0.time_emb_proj.weight"

    def rows(partition: set[frozenset[tuple[str, int, int]]]) -> set[tuple[int, ...]]:
        found = (tuple(sorted(i for name, dim, i in slices if (name, dim) == (weight, 0))) for slices in partition)
        return {indices for indices in found if indices}

    assert rows(ours) == {(i, i + 16) for i in range(16)}
    assert rows(partition_of_torch_pruning(network, given.args, network.conv_out)) != rows(ours)


def test_groups_are_named_after_the_layer_that_produces_them_and_ordered_as_in_the_network() -> None:
    given = denoiser("hand-written")

    assert sizes(trace_plan(given.network, given.args)) == {
        "time1": (1, 32),
        "time2": (1, 32),
        "conv_in": (1, 16),
        "down1.conv1": (1, 16),
        "shrink": (1, 16),
        "down2.conv1": (1, 32),
        "down2.conv2": (1, 32),
        "attention.q": (1, 32),
        "up2.conv1": (1, 32),
        "up2.conv2": (1, 32),
        "grow": (1, 16),
        "up1.conv1": (1, 16),
        "up1.conv2": (1, 16),
    }


def test_attention_heads_are_rows_of_their_group() -> None:
    by_name = {}
    for head_dim in (8, None):
        given = denoiser(f"attention_head_dim={head_dim}")
        by_name[head_dim] = sizes(trace_plan(given.network, given.args))

    assert by_name[8]["mid_block.attentions.0.to_q"] == (4, 32)
    assert by_name[None]["mid_block.attentions.0.to_q"] == (1, 32)


def test_channel_ids_number_the_groups_one_after_the_other() -> None:
    given = denoiser("attention_head_dim=8")
    plan = trace_plan(given.network, given.args)

    assert torch.cat([group.channels for group in plan.groups]).sort().values.tolist() == list(range(plan.num_channels))
    assert plan.group_of_channel().bincount().tolist() == [group.size for group in plan.groups]


def test_inputs_are_recorded_for_modules_that_keep_their_width() -> None:
    given = denoiser("attention_head_dim=8")
    plan = trace_plan(given.network, given.args)
    norm = "down_blocks.0.resnets.0.norm1"

    assert torch.equal(plan.inputs[norm], plan.ids[f"{norm}.weight"][0])


@pytest.mark.parametrize("name", ["attention_head_dim=8", "class-conditional", "hand-written"])
def test_the_plan_does_not_depend_on_the_number_of_samples(name: str) -> None:
    given = denoiser(name)
    one = trace_plan(
        given.network,
        tuple(arg[:1] for arg in given.args),
        {key: value[:1] for key, value in given.kwargs.items()},
    )

    assert partition_of_plan(given.network, one) == partition_of_plan(
        given.network, trace_plan(given.network, given.args, given.kwargs)
    )


def test_timesteps_may_come_by_keyword() -> None:
    given = denoiser("attention_head_dim=8")
    by_position = trace_plan(given.network, given.args)
    by_keyword = trace_plan(given.network, given.args[:1], {"timestep": given.args[1], "return_dict": False})

    assert sizes(by_keyword) == sizes(by_position)
    assert partition_of_plan(given.network, by_keyword) == partition_of_plan(given.network, by_position)


def test_a_trace_in_the_midst_of_training_leaves_everything_as_it_was() -> None:
    given = denoiser("hand-written")
    network = PlainUNet(dropout=0.5)
    network.load_state_dict(given.network.state_dict())
    network.train()
    network.down1.eval()
    modes = {name: module.training for name, module in network.named_modules()}
    network(*given.args).square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    random_state = torch.get_rng_state()

    plan = trace_plan(network, given.args)

    assert sizes(plan) == sizes(trace_plan(given.network, given.args))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in network.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), given.network.parameters(), strict=True))


def test_a_network_that_draws_random_numbers_in_evaluation_does_not_disturb_training() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + torch.randn_like(x)))

    random_state = torch.get_rng_state()

    trace_plan(Noisy(), (torch.ones(1, 3, 4, 4),))

    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        Noisy()
        expected = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), expected)


def test_hooks_are_gone_afterwards_even_if_the_network_raises() -> None:
    given = denoiser("attention_head_dim=8")

    with pytest.raises(RuntimeError, match="channels"):
        trace_plan(given.network, (given.args[0][:, :1], given.args[1]))
    trace_plan(given.network, given.args)

    assert not any(module._forward_pre_hooks for module in given.network.modules())


def test_an_operation_without_a_rule_freezes_what_it_touches_and_is_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.logcumsumexp(self.a(x), dim=0).kthvalue(1, dim=0, keepdim=True).values))

    plan = trace_plan(Odd(), (torch.ones(3, 4),))

    assert sizes(plan) == {"b": (1, 6)}
    assert plan.unknown_operations == {"kthvalue": 1}
    assert {entry.name: entry.reason for entry in plan.frozen} == {
        "a": "no rule for the operation kthvalue",
        "c": "the network's output",
    }


def test_parameters_that_the_call_does_not_use_are_left_alone() -> None:
    class Unused(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    network = Unused(nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 8))

    plan = trace_plan(network, (torch.ones(3, 4),))

    assert sizes(plan) == {"0": (1, 8)}
    assert "2.weight" not in plan.ids


def test_a_weight_that_is_tied_is_one_tensor_of_the_plan() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    network[2].weight = network[1].weight

    plan = trace_plan(network, (torch.ones(3, 4),))

    assert sizes(plan) == {"0": (1, 8)}
    assert "2.weight" not in plan.ids


def test_a_network_on_the_meta_device_is_refused() -> None:
    with pytest.raises(StructureError, match=r"'weight' is on the meta device.* Materialise it first"):
        trace_plan(nn.Linear(4, 2, device="meta"), (torch.ones(3, 4),))


def test_a_network_without_channels_to_prune_is_refused_with_the_reasons() -> None:
    with pytest.raises(
        StructureError, match=r"Linear has no channel that can be pruned\. Reasons: the network's output"
    ):
        trace_plan(nn.Linear(4, 2), (torch.ones(3, 4),))


def test_a_network_that_produces_no_channels_at_all_is_refused() -> None:
    with pytest.raises(StructureError, match="Reasons: no layer produces channels"):
        trace_plan(nn.Linear(1, 1), (torch.ones(3, 1),))


def test_the_summary_gathers_what_stays_by_reason() -> None:
    network = nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in range(6)})
    network["last"] = nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        h = network["layer0"](x)
        for i in range(1, 6):
            h = network[f"layer{i}"](h).cumsum(dim=1)
        return network["last"](h)

    network.forward = forward

    assert trace_plan(network, (torch.ones(2, 4),)).summary() == (
        "4 channels in 1 group can be pruned\n"
        "20 stay: cumsum over channels (layer1, layer2, layer3 and 2 more)\n"
        "3 stay: the network's output (last)"
    )


def test_rolling_channels_freezes_them() -> None:
    class Rolled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x).roll(1, dims=1).roll(1, dims=0)))

    plan = trace_plan(Rolled(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)), (torch.ones(3, 4),))

    assert sizes(plan) == {"1": (1, 6)}
    assert {entry.name: entry.reason for entry in plan.frozen}["0"] == "roll over channels"
