from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from models import DENOISERS, PlainUNet, denoiser
from torch import Tensor, nn

from lightning_earlybird.structure import (
    ChannelGroup,
    ChannelPlan,
    StructureError,
    trace_plan,
    verify_plan,
)

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)


class TwoLayers(nn.Module):
    """Two prunable groups, "a" and "b", and Python code between the layers."""

    def __init__(self, between: Callable[["TwoLayers", Tensor], Tensor] = lambda net, h: h) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 3, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self, self.a(x))))


def names(plan: ChannelPlan) -> set[str]:
    return {group.name for group in plan.groups}


def with_ids(plan: ChannelPlan, changed: Mapping[tuple[str, int], Tensor], *groups: ChannelGroup) -> ChannelPlan:
    """The plan with other channel ids in some places, and further groups."""
    ids = {name: {dim: changed.get((name, dim), old) for dim, old in dims.items()} for name, dims in plan.ids.items()}
    return replace(plan, ids=ids, groups=(*plan.groups, *groups))


@pytest.mark.parametrize("name", DENOISERS)
def test_a_traced_plan_passes_whole(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args, given.kwargs)

    verified = verify_plan(given.network, plan, given.args, given.kwargs)

    assert verified.plan.verified and not plan.verified
    assert (verified.plan.ids, verified.plan.groups) == (plan.ids, plan.groups)
    assert verified.failed == {}
    assert 0 < verified.max_error < 1e-5


def test_a_dimension_whose_channels_are_mixed_up_freezes_its_group_and_no_other() -> None:
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)
    place = ("down1.conv2.weight", 1)
    wrong = with_ids(plan, {place: plan.ids[place[0]][place[1]].roll(1)})

    verified = verify_plan(given.network, wrong, given.args)

    assert set(verified.failed) == {"down1.conv1"}
    assert "the output differs by" in verified.failed["down1.conv1"]
    assert names(verified.plan) == names(plan) - {"down1.conv1"}
    assert "down1.conv1" in [entry.name for entry in verified.plan.frozen]


@pytest.mark.parametrize("name", ["without attention", "attention_head_dim=8", "hand-written"])
def test_no_single_dimension_in_the_wrong_order_drowns_on_its_way_to_the_output(name: str) -> None:
    given = denoiser(name)
    plan = trace_plan(given.network, given.args)
    places = [(name, 1) for name, dims in plan.ids.items() if 1 in dims and bool((dims[1] >= 0).all())]

    for place in places[::4]:
        wrong = with_ids(plan, {place: plan.ids[place[0]][1].roll(1)})
        assert verify_plan(given.network, wrong, given.args, tolerance=1e9).max_error > 1e-3


def test_channels_that_were_not_coupled_freeze_both_groups() -> None:
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)
    new = plan.num_channels + torch.arange(16)
    wrong = with_ids(plan, {("down1.conv2.weight", 1): new}, ChannelGroup("apart", new))

    verified = verify_plan(given.network, wrong, given.args)

    assert set(verified.failed) == {"down1.conv1", "apart"}
    assert names(verified.plan) == names(plan) - {"down1.conv1"}


def test_freezing_renumbers_the_channels_that_remain() -> None:
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)
    first = plan.groups[0].name
    place = next(
        (name, dim) for name, dims in plan.ids.items() for dim, ids in dims.items() if ids[0] == 0 and dim == 1
    )
    reduced = verify_plan(given.network, with_ids(plan, {place: plan.ids[place[0]][1].roll(1)}), given.args).plan

    assert first not in names(reduced)
    assert torch.cat([group.channels for group in reduced.groups]).tolist() == list(range(reduced.num_channels))
    for group in reduced.groups:
        old = next(other for other in plan.groups if other.name == group.name)
        for name, dims in reduced.ids.items():
            for dim, ids in dims.items():
                assert torch.equal(torch.isin(ids, group.channels), torch.isin(plan.ids[name][dim], old.channels))


def test_a_zero_output_layer_hides_nothing() -> None:
    given = denoiser("hand-written")
    assert isinstance(given.network, PlainUNet)
    nn.init.zeros_(given.network.conv_out.weight)
    nn.init.zeros_(given.network.conv_out.bias)
    plan = trace_plan(given.network, given.args)
    place = ("up1.conv2.weight", 1)

    assert verify_plan(given.network, plan, given.args).failed == {}
    wrong = with_ids(plan, {place: plan.ids[place[0]][place[1]].roll(1)})
    assert set(verify_plan(given.network, wrong, given.args).failed) == {"up1.conv1"}


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_factor_computed_from_the_width_freezes_its_group_outside_norms(power: float) -> None:
    network = TwoLayers(lambda net, h: h / h.shape[1] ** power)

    assert set(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).failed) == {"a"}


def test_a_factor_computed_from_the_width_counts_where_these_inputs_do_not_show_it() -> None:
    network = TwoLayers(lambda net, h: torch.where(h.mean() > 1e6, h / h.shape[1] ** 0.5, h))

    failed = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).failed
    assert set(failed) == {"a"}
    assert failed["a"].startswith("a number depends on its width (div with ")


@pytest.mark.parametrize(
    "beyond",
    [
        lambda h: h * (h.shape[1] ** -0.5 if h.shape[-1] > 8 else 1.0),
        lambda h: torch.cat([h[:, :4] * (torch.arange(h.shape[-1]) < 8), h[:, 4:]], dim=1),
    ],
    ids=["factor", "positions"],
)
def test_what_only_shows_with_all_pixels_freezes_its_group(beyond: Any) -> None:
    image = torch.randn(1, 3, 16, 16)
    network = TwoLayers(lambda net, h: beyond(h))

    assert set(verify_plan(network, trace_plan(network, (image,)), (image,)).failed) == {"a"}


@pytest.mark.parametrize(
    "between",
    [
        lambda h: nn.functional.silu(h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)),
        lambda h: h * torch.sigmoid(h.mean(1, keepdim=True)),
        lambda h: h - h.mean(1, keepdim=True),
    ],
    ids=["activation after a norm", "gate", "centred"],
)
def test_a_factor_is_no_norms_own_because_there_is_a_statistic_before_it(between: Any) -> None:
    network = TwoLayers(lambda net, h: between(h) * h.shape[1] ** -0.5)

    assert set(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).failed) == {"a"}


def test_a_factor_weighs_a_piece_of_a_concatenation_only_right_before_it() -> None:
    class Joined(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.act = act
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(torch.cat([self.act(h * h.shape[1] ** -0.5), self.b(x)], dim=1))

    for act, frozen in ((nn.Identity(), set()), (nn.SiLU(), {"a"})):
        network = Joined(act)
        assert set(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).failed) == frozen


def test_a_width_written_into_the_code_freezes_its_group() -> None:
    network = TwoLayers(lambda net, h: h.view(2, 8, 8, 8))

    verified = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))

    assert set(verified.failed) == {"a"}
    assert "RuntimeError: shape" in verified.failed["a"]
    assert names(verified.plan) == {"b"}


@pytest.mark.parametrize("scale", ["fixed", "width"])
def test_attention_scales_by_what_it_did_however_the_factor_comes_about(scale: str) -> None:
    given = denoiser("hand-written")
    network = PlainUNet(scale=scale).eval()
    plan = trace_plan(network, given.args)

    assert [each.tensor for each in plan.query_scales] == (
        ["attention.q.weight", "attention.q.bias"] if scale == "width" else []
    )
    assert verify_plan(network, plan, given.args).failed == {}
    # Neither of the two answers fits the other network.
    other = trace_plan(PlainUNet(scale="fixed" if scale == "width" else "width").eval(), given.args)
    wrong = replace(plan, query_scales=other.query_scales)
    assert set(verify_plan(network, wrong, given.args).failed) == {"attention.q"}


@pytest.mark.parametrize("seed", range(8))
def test_code_that_depends_on_positions_is_caught_whichever_channels_are_drawn(seed: int) -> None:
    # Moving the first two to the end is right as long as both are among the channels that are left.
    network = TwoLayers(lambda net, h: torch.cat([h[:, 2:], h[:, :2]], dim=1))

    verified = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,), seed=seed)

    assert set(verified.failed) == {"a"}


@pytest.mark.parametrize("seed", range(8))
def test_code_that_needs_equal_widths_is_caught_whichever_numbers_are_drawn(seed: int) -> None:
    def check(net: TwoLayers, h: Tensor) -> Tensor:
        if net.a.out_channels != net.b.out_channels:
            raise ValueError("a and b must be equally wide")
        return h

    network = TwoLayers(check)

    with pytest.raises(StructureError, match=r"every channel group fails.* ValueError: a and b must be equally wide"):
        verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,), seed=seed)


def test_groups_that_fail_only_together_are_an_error() -> None:
    def check(net: TwoLayers, h: Tensor) -> Tensor:
        if net.a.out_channels < 8 and net.b.out_channels < 8:
            raise ValueError("not both")
        return h

    network = TwoLayers(check)

    with pytest.raises(
        StructureError, match=r"2 channel groups pass verification alone but not together \(ValueError: not"
    ):
        verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))


def test_two_of_four_groups_that_fail_only_together_are_frozen_together() -> None:
    class Pair(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self[0].out_channels < 8 and self[1].out_channels < 8:
                raise ValueError("not both")
            return super().forward(x)

    network = Pair(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(3)), nn.Conv2d(8, 3, 1))

    verified = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))

    assert names(verified.plan) == {"2", "3"}
    assert verified.failed["0"] == verified.failed["1"] == "with the others of 2 groups, ValueError: not both"


@pytest.mark.parametrize("width", range(2, 7))
def test_a_failure_that_the_search_does_not_meet_again_is_not_forgotten(width: int) -> None:
    raised = []

    def check(net: TwoLayers, h: Tensor) -> Tensor:
        if net.a.out_channels == width:
            raised.append(width)
            raise ValueError("any width but this")
        return h

    network = TwoLayers(check)
    plan = trace_plan(network, (IMAGE,))

    try:
        failed = verify_plan(network, plan, (IMAGE,)).failed
    except StructureError as error:
        assert "pass verification alone but not together (ValueError: any width but this)" in str(error)
    else:
        assert ("a" in failed) == bool(raised)


def test_a_branch_that_only_training_takes_must_fit_as_well() -> None:
    def auxiliary(net: Any, h: Tensor) -> Tensor:
        if net.training:
            net.extra(h)
        return h

    network = TwoLayers(auxiliary)
    network.extra = nn.Conv2d(8, 1, 1)
    plan = trace_plan(network.train(), (IMAGE,))

    assert set(verify_plan(network, plan, (IMAGE,)).failed) == {"a"}
    assert verify_plan(network.eval(), plan, (IMAGE,)).failed == {}


@pytest.mark.parametrize(
    "branch",
    [
        lambda h: h * h.shape[1] ** -0.5,
        lambda h: h.roll(1, dims=1),
        lambda h: torch.cat([h[:, :4] / 2, h[:, 4:]], dim=1),
    ],
    ids=["factor", "positions", "part"],
)
def test_what_only_training_computes_from_widths_or_positions_freezes_its_group(branch: Any) -> None:
    network = TwoLayers(lambda net, h: branch(h) if net.training else h)
    plan = trace_plan(network, (IMAGE,))

    found = verify_plan(network.train(), plan, (IMAGE,)).failed
    assert found["a"].startswith("in training, the output differs")
    assert set(found) == {"a"}


def test_chance_and_norms_of_training_are_held_against_no_group() -> None:
    def between(net: Any, h: Tensor) -> Tensor:
        h = net.norm(h)
        if net.training:  # further operations of the kinds that come after, so that those are counted otherwise
            h = h + torch.rand_like(h) * torch.empty(len(h), 1, 1, 1).bernoulli_(0.5).div_(0.5)
        h = nn.functional.dropout2d(h, 0.5, net.training)
        h = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6)
        return nn.functional.normalize(h.softmax(dim=1), dim=1) * h.shape[1] ** 0.5

    network = TwoLayers(between)
    network.norm = nn.BatchNorm2d(8)
    plan = trace_plan(network, (IMAGE,))

    assert verify_plan(network.train(), plan, (IMAGE,)).failed == {}


def test_dropout_in_fused_attention_is_no_difference() -> None:
    def between(net: Any, h: Tensor) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
        attend, p = partial(nn.functional.scaled_dot_product_attention, tokens, tokens, tokens), 0.5 * net.training
        dropped = attend(None, p, scale=1.0) + attend(dropout_p=p, scale=1.0)
        return dropped.transpose(1, 2).flatten(2).transpose(1, 2).reshape(h.shape) + h.relu() * (2 - net.training)

    network = TwoLayers(between)
    plan = trace_plan(network, (IMAGE,))

    assert verify_plan(network.train(), plan, (IMAGE,)).failed == {}


def test_a_large_output_does_not_hide_a_small_one() -> None:
    class Two(TwoLayers):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), 1e6 * x

    network = Two(lambda net, h: h / h.shape[1] ** 0.5)

    assert set(verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,), tolerance=1e-6).failed) == {"a"}


def test_a_copy_that_would_share_tensors_with_its_original_is_refused() -> None:
    network = TwoLayers()
    network.d = nn.Conv2d(3, 3, 1)
    network.between = lambda net, h: h + network.d(IMAGE).mean().to(h)
    plan = trace_plan(network, (IMAGE,))

    with pytest.raises(StructureError, match=r"2 tensors of the original \(d.bias, d.weight\), and so would tickets"):
        verify_plan(network, plan, (IMAGE,))


def test_a_network_that_cannot_train_on_one_sample_runs_backward_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)).train()
    sample = IMAGE[:1]

    assert verify_plan(network, trace_plan(network, (sample,)), (sample,)).failed == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_precision_are_compared_in_at_least_float32(dtype: torch.dtype) -> None:
    network = TwoLayers().to(dtype)
    plan = trace_plan(network, (IMAGE.to(dtype),))

    verified = verify_plan(network, plan, (IMAGE.to(dtype),))

    assert verified.failed == {}
    assert verified.max_error < 1e-5


def test_settings_that_trade_precision_for_speed_do_not_reach_the_comparison() -> None:
    given = denoiser("attention_head_dim=8")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            verified = verify_plan(given.network, trace_plan(given.network, given.args), given.args)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)

    assert verified.failed == {}
    assert 0 < verified.max_error < 1e-5


def test_tracing_and_verifying_work_in_inference_mode() -> None:
    given = denoiser("attention_head_dim=8")
    plan = trace_plan(given.network, given.args)

    with torch.inference_mode():
        sample, timesteps = given.args[0] + 0, given.args[1]
        verified = verify_plan(given.network, trace_plan(given.network, (sample, timesteps)), (sample, timesteps))

    assert names(verified.plan) == names(plan)


def test_verification_leaves_weights_modes_and_random_state_alone() -> None:
    given = denoiser("hand-written")
    given.network.train()
    given.network.down1.eval()
    modes = {name: module.training for name, module in given.network.named_modules()}
    weights = {name: tensor.clone() for name, tensor in given.network.state_dict().items()}
    random_state = torch.get_rng_state()

    verify_plan(given.network, trace_plan(given.network, given.args), given.args)

    assert {name: module.training for name, module in given.network.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in given.network.state_dict().items())
    assert all(parameter.grad is None for parameter in given.network.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_seed_fixes_what_is_tried() -> None:
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)

    def error(seed: int) -> float:
        return verify_plan(given.network, plan, given.args, seed=seed).max_error

    assert error(1) == error(1)
    assert error(1) != error(2)


def test_an_output_that_is_zero_whatever_the_weights_proves_nothing() -> None:
    network = TwoLayers(lambda net, h: h)
    plan = trace_plan(network, (IMAGE,))
    network.register_forward_hook(lambda module, args, out: out * 0)

    with pytest.raises(StructureError, match="the output is zero whatever the weights"):
        verify_plan(network, plan, (IMAGE,))


def test_an_output_whose_shape_follows_the_width_is_refused() -> None:
    network = TwoLayers()
    plan = trace_plan(network, (IMAGE,))
    network.register_forward_hook(lambda net, args, out: out[..., : net.a.out_channels])

    verified = verify_plan(network, plan, (IMAGE,))

    assert verified.failed == {"a": "the output changes its shape"}


def test_a_call_that_the_dense_network_refuses_is_reported_as_such() -> None:
    network = TwoLayers()
    plan = trace_plan(network, (IMAGE,))

    with pytest.raises(RuntimeError, match="to have 3 channels"):
        verify_plan(network, plan, (IMAGE[:, :2],))


def test_two_channels_of_many_that_are_mixed_up_are_caught_whichever_masks_are_drawn() -> None:
    # Half of all masks keep or remove both.
    network = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 3, 1))
    plan = trace_plan(network, (IMAGE,))
    wrong = plan.ids["1.weight"][1].clone()
    wrong[3], wrong[20] = 20, 3

    for seed in range(4):
        failed = verify_plan(network, with_ids(plan, {("1.weight", 1): wrong}), (IMAGE,), seed=seed).failed
        assert set(failed) == {"0"}
        assert "once its channels change places, the output differs" in failed["0"]


@pytest.mark.parametrize("seed", range(4))
def test_a_width_that_is_split_in_parts_the_plan_does_not_know_is_caught(seed: int) -> None:
    network = TwoLayers(lambda net, h: h.view(h.shape[0], 2, -1, *h.shape[2:]).softmax(dim=3).flatten(1, 2))
    plan = trace_plan(network, (IMAGE,))
    assert [group.rows for group in plan.groups] == [2, 1]
    unaware = replace(plan, groups=tuple(replace(group, rows=1) for group in plan.groups))

    assert verify_plan(network, plan, (IMAGE,), seed=seed).failed == {}
    failed = verify_plan(network, unaware, (IMAGE,), seed=seed).failed
    assert set(failed) == {"a"} and "invalid for input of size" in failed["a"]


def test_a_group_that_lives_in_a_dimension_in_part_is_frozen_before_anything_is_tried() -> None:
    network = TwoLayers()
    plan = trace_plan(network, (IMAGE,))
    partly = plan.ids["a.bias"][0].clone()
    partly[5] = -1

    failed = verify_plan(network, with_ids(plan, {("a.bias", 0): partly}), (IMAGE,)).failed

    assert failed == {"a": "only 7 of its 8 channels live in dimension 0 of 'a.bias'"}


def test_a_plan_of_which_no_group_is_whole_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1))
    plan = trace_plan(network, (IMAGE,))
    partly = torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])

    with pytest.raises(StructureError, match=r"plan: no channel group is whole \(only 7 of its 8 channels live in dim"):
        verify_plan(network, with_ids(plan, {("0.bias", 0): partly}), (IMAGE,))


def test_a_mask_that_leaves_an_output_of_zeros_is_no_failure() -> None:
    class Dead(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).relu().amax(dim=(2, 3), keepdim=True))

    network = Dead(nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 3, 1, bias=False))
    dark = -torch.ones(1, 3, 4, 4)

    for seed in range(6):  # in some of them, a channel that stays is negative throughout
        assert verify_plan(network, trace_plan(network, (dark,)), (dark,), seed=seed).failed == {}


def test_a_network_that_insists_on_single_precision_is_verified_all_the_same() -> None:
    network = TwoLayers(lambda net, h: nn.functional.conv2d(h.float(), net.b.weight.float(), padding=1).float())

    verified = verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,))

    assert verified.plan.verified


def test_only_verification_marks_a_plan_as_verified() -> None:
    network = TwoLayers()
    plan = trace_plan(network, (IMAGE,))

    assert not plan.verified
    assert verify_plan(network, plan, (IMAGE,)).plan.verified


def test_what_a_network_computes_in_single_precision_is_not_held_against_it() -> None:
    # Attention in float32 whatever the rest is in: other orders of summation differ by 1e-7.
    network = TwoLayers(lambda net, h: nn.functional.conv2d(h.float(), net.extra.float()).to(h.dtype))
    network.extra = nn.Parameter(torch.randn(8, 8, 1, 1))
    plan = trace_plan(network, (IMAGE,))

    verified = verify_plan(network, plan, (IMAGE,), tolerance=1e-10)

    assert verified.failed == {} and verified.max_error < 1e-12
    wrong = with_ids(plan, {("extra", 1): plan.ids["extra"][1].roll(1)})
    assert set(verify_plan(network, wrong, (IMAGE,), tolerance=1e-10).failed) == {"a"}


def test_a_difference_that_is_not_a_number_does_not_pass() -> None:
    class Two(TwoLayers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.c(self.b(h)), torch.full((1,), float("nan") if self.a.out_channels < 8 else 1.0)

    verified = verify_plan(Two(), trace_plan(Two(), (IMAGE,)), (IMAGE,))

    assert set(verified.failed) == {"a"}


def test_an_output_that_is_not_finite_proves_nothing() -> None:
    network = TwoLayers(lambda net, h: h.exp().exp().exp())

    with pytest.raises(StructureError, match="the output is not finite with random weights"):
        verify_plan(network, trace_plan(network, (100 * IMAGE,)), (100 * IMAGE,))


def test_networks_too_large_to_double_are_verified_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_earlybird.structure.trial.DOUBLED_UP_TO", 0)
    given = denoiser("hand-written")
    plan = trace_plan(given.network, given.args)
    place = ("up1.conv2.weight", 1)
    wrong = with_ids(plan, {place: plan.ids[place[0]][place[1]].roll(1)})

    right = verify_plan(given.network, plan, given.args)

    assert right.failed == {} and 1e-9 < right.max_error < 1e-4
    assert set(verify_plan(given.network, wrong, given.args).failed) == {"up1.conv1"}


def test_running_statistics_that_training_moves_are_no_difference() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)).train()
    before = network[1].running_mean.clone()

    assert verify_plan(network, trace_plan(network, (IMAGE,)), (IMAGE,)).failed == {}
    assert torch.equal(network[1].running_mean, before)
