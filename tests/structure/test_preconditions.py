from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_earlybird.structure import ChannelPlan, StructureError, trace_plan, verify_plan

IMAGE = torch.linspace(-1, 1, 3 * 8 * 8).sin().view(1, 3, 8, 8)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))


def sizes(plan: ChannelPlan) -> dict[str, int]:
    return {group.name: group.size for group in plan.groups}


class Between(nn.Module):
    """Two layers to choose from between two others."""

    def __init__(self, choose: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.choose = choose

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.d(self.choose(self, self.a(x), t))


TIME = torch.tensor([700])


@pytest.mark.parametrize("name", ["2.weight", "scale"])
def test_a_network_that_is_partly_on_the_meta_device_is_refused(name: str) -> None:
    network = layers()
    if name == "scale":
        network.register_buffer("scale", torch.ones(3, device="meta"))
    else:
        network[2] = network[2].to("meta")

    with pytest.raises(StructureError, match=rf"denoiser: '{name}' is on the meta device.* Materialise it first"):
        trace_plan(network, (IMAGE,))


def test_a_lazy_network_must_have_been_called() -> None:
    network = nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 3, 1))

    with pytest.raises(StructureError, match=r"'0\.weight' is not initialised yet.* Call the network once"):
        trace_plan(network, (IMAGE,))
    network(IMAGE)
    assert sizes(trace_plan(network, (IMAGE,))) == {"0": 8}


def test_types_that_do_not_train_are_refused() -> None:
    with pytest.raises(StructureError, match=r"'0\.weight' is of type torch\.float8_e4m3fn.* convert the tickets"):
        trace_plan(layers().to(torch.float8_e4m3fn), (IMAGE,))


def test_a_network_without_floating_point_parameters_is_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)

    with pytest.raises(StructureError, match=r"Quantised has no floating-point parameters; is it quantised\?"):
        trace_plan(Quantised(), (IMAGE,))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(
        StructureError, match=r"'RecursiveScriptModule' is a TorchScript module.* Use the Python module"
    ):
        trace_plan(torch.jit.script(layers()), (IMAGE,))


def test_complex_numbers_freeze_what_they_touch_with_a_reason() -> None:
    class Fourier(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[3](self[2](torch.fft.irfft2(torch.fft.rfft2(self[0](x)))))

    plan = trace_plan(Fourier(*layers()), (IMAGE,))

    assert sizes(plan) == {"2": 8}
    assert {entry.name: entry.reason for entry in plan.frozen}["0"] == "no rule for the operation _fft_r2c"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_plan_does_not_depend_on_the_precision(dtype: torch.dtype) -> None:
    network = layers().to(dtype)

    verified = verify_plan(network, trace_plan(network, (IMAGE.to(dtype),)), (IMAGE.to(dtype),))

    assert sizes(verified.plan) == {"0": 8, "2": 8}
    assert next(network.parameters()).dtype == dtype


@pytest.mark.parametrize("first_frozen", [0, 3])
def test_parameters_that_are_not_trained_have_channels_as_well(first_frozen: int) -> None:
    network = layers()
    for parameter in list(network.parameters())[first_frozen:]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in network.parameters()]

    verified = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))

    assert sizes(verified.plan) == {"0": 8, "2": 8}
    assert [parameter.requires_grad for parameter in network.parameters()] == flags


def test_integer_and_boolean_parameters_are_passed_over() -> None:
    network = layers()
    network.register_parameter("steps", nn.Parameter(torch.arange(3), requires_grad=False))
    network.register_parameter("flags", nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False))

    assert sizes(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).plan) == {"0": 8, "2": 8}


def test_a_network_made_in_inference_mode_is_traced() -> None:
    with torch.inference_mode():
        network = layers()

    assert sizes(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).plan) == {"0": 8, "2": 8}


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_are_refused_with_the_remedy(normalise: Callable[[nn.Module], nn.Module]) -> None:
    network = layers()
    normalise(network[2])

    with pytest.raises(
        StructureError, match=r"Weights of 2 are computed from other parameters.*remove_parametrizations"
    ):
        verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))


@pytest.mark.parametrize(
    "choose",
    [
        lambda net, h, t: net.b(h) if t.float().mean() > 500 else net.c(h),
        lambda net, h, t: net.b(h) if int(t.max()) > 500 else net.c(h),
        lambda net, h, t: net.b(h) if t.tolist()[0] > 500 else net.c(h),
        lambda net, h, t: net.b(h) if t.numpy()[0] > 500 else net.c(h),
        lambda net, h, t: net.b(h) if len((t > 500).nonzero()) else net.c(h),
    ],
    ids=["bool", "int", "tolist", "numpy", "nonzero"],
)
def test_a_branch_whose_other_side_has_layers_of_its_own_is_refused(choose: Callable[..., Tensor]) -> None:
    message = (
        r"Between decides by the values .* \(Between, test_preconditions\.py:\d+\), and 1 were not .*: c\. Compute"
    )

    with pytest.raises(StructureError, match=message):
        trace_plan(Between(choose), (IMAGE, TIME))


def test_an_expert_that_no_input_tried_has_used_counts_where_its_owner_reads_values() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

        def forward(self, h: Tensor) -> Tensor:
            return self.experts[int(h.isnan().all())](h)

    network = nn.Sequential(nn.Conv2d(3, 8, 1), Mixture(), nn.Conv2d(8, 3, 1))

    with pytest.raises(
        StructureError, match=r"\('1', test_preconditions\.py:\d+\), and 1 were not .*: 1\.experts\.1\."
    ):
        trace_plan(network, (IMAGE,))


def test_reading_values_is_recorded_where_all_layers_are_used_whatever_they_are() -> None:
    def routed(net: Any, h: Tensor, t: Tensor) -> Tensor:
        return net.c(net.b(h)) if int(t) > 500 else net.b(net.c(h))

    network = Between(routed)
    plan = trace_plan(network, (IMAGE, TIME))

    assert len(plan.data_reads) == 1 and plan.data_reads[0].startswith("Between, test_preconditions.py:")
    assert sizes(verify_plan(network, plan, (IMAGE, TIME)).plan) == {"a": 8, "b": 8, "c": 8}


def test_a_check_of_the_inputs_refuses_nothing_though_some_layers_are_not_used() -> None:
    def checked(net: Any, h: Tensor, t: Tensor) -> Tensor:
        if bool((t < 0).any()) or not bool(h.isfinite().all()):
            raise ValueError("t must not be negative")
        return net.b(h)

    network = Between(checked)
    random_state = torch.get_rng_state()
    plan = trace_plan(network, (IMAGE, TIME))
    assert torch.equal(torch.get_rng_state(), random_state)

    assert len(plan.data_reads) == 1
    assert sizes(verify_plan(network, plan, (IMAGE, TIME)).plan) == {"a": 8, "b": 8}


def test_constants_and_shapes_are_not_data() -> None:
    def constant(net: Any, h: Tensor, t: Tensor) -> Tensor:
        return net.b(h) * torch.tensor(2.0).item() * torch.zeros_like(h[:, :1]).add(1).sum().item()

    assert trace_plan(Between(constant), (IMAGE, TIME)).data_reads == ()


def test_channels_that_python_reads_are_frozen_with_the_place() -> None:
    def compared(net: Any, h: Tensor, t: Tensor) -> Tensor:
        return net.b(h) if torch.equal(h, h) else h

    plan = trace_plan(Between(compared), (IMAGE, TIME))

    assert sizes(plan) == {"b": 8}
    assert plan.frozen[0].reason.startswith("Python code reads the values (Between, test_preconditions.py:")


def test_parameters_that_are_views_of_each_other_are_refused_and_neighbours_in_one_memory_are_not() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))

    tied = network()
    tied[2].weight = nn.Parameter(tied[0].weight.t())
    with pytest.raises(StructureError, match=r"'0.weight' and '2.weight' are views of the same memory, .* Use one"):
        trace_plan(tied, (torch.ones(2, 3),))

    flat = network()
    memory = torch.randn(3 * 4 + 4 * 4)
    flat[0].weight, flat[1].weight = (nn.Parameter(part) for part in (memory[:12].view(4, 3), memory[12:].view(4, 4)))
    assert len(trace_plan(flat, (torch.ones(2, 3),)).groups) == 2
