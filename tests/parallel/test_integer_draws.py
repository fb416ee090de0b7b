"""Integer draws over another range: every form of them, and what is left alone."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.overrides import _get_current_function_mode

from lightning_earlybird.parallel.integer_draws import LimitedIntegerDraws, unlimited_draws

T = 1000
AXIS, BOUNDS = (0, T), (240, 460)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Each draws eight integers between two bounds, or below one.
BETWEEN: dict[str, Callable[[int, int], Tensor]] = {
    "randint": lambda low, high: torch.randint(low, high, (8,)),
    "randint of a list": lambda low, high: torch.randint(low, high, [8]),
    "randint of a size": lambda low, high: torch.randint(low, high, torch.Size([8])),
    "randint, size named": lambda low, high: torch.randint(low, high, size=(8,)),
    "randint, high named": lambda low, high: torch.randint(low, high=high, size=(8,)),
    "randint, all named": lambda low, high: torch.randint(low=low, high=high, size=(8,)),
    "randint, other order": lambda low, high: torch.randint(size=(8,), high=high, low=low),
    "randint of a shape": lambda low, high: torch.randint(low, high, (2, 4)),
    "randint, 32 bits": lambda low, high: torch.randint(low, high, (8,), dtype=torch.int32),
    "randint of floats": lambda low, high: torch.randint(low, high, (8,), dtype=torch.float32),
    "randint on a device": lambda low, high: torch.randint(low, high, (8,), device="cpu").long(),
    "randint with a generator": lambda low, high: torch.randint(low, high, (8,), generator=seeded()),
    "randint into a tensor": lambda low, high: torch.randint(low, high, (8,), out=torch.empty(8, dtype=torch.long)),
    "randint of NumPy's integers": lambda low, high: torch.randint(np.int64(low), np.int64(high), (8,)),
    "randint of a tensor": lambda low, high: torch.randint(low, torch.tensor(high), (8,)),
    "randint_like": lambda low, high: torch.randint_like(torch.empty(8), low, high),
    "randint_like, high named": lambda low, high: torch.randint_like(torch.empty(8), low, high=high),
    "randint_like, all named": lambda low, high: torch.randint_like(input=torch.empty(8), low=low, high=high),
    "randint_like, 64 bits": lambda low, high: torch.randint_like(torch.empty(8), low, high, dtype=torch.long),
    "random_": lambda low, high: torch.empty(8, dtype=torch.long).random_(low, high),
    "random_ of floats": lambda low, high: torch.empty(8).random_(low, high),
    "random_, high named": lambda low, high: torch.empty(8).random_(low, to=high),
    "random_, all named": lambda low, high: torch.empty(8).random_(**{"from": low, "to": high}),
    "random_ of the class": lambda low, high: torch.Tensor.random_(torch.empty(8), low, high),
    "random_ with a generator": lambda low, high: torch.empty(8).random_(low, high, generator=seeded()),
}
BELOW: dict[str, Callable[[int], Tensor]] = {
    "randint": lambda high: torch.randint(high, (8,)),
    "randint, size named": lambda high: torch.randint(high, size=(8,)),
    "randint, all named": lambda high: torch.randint(high=high, size=(8,)),
    "randint with a generator": lambda high: torch.randint(high, (8,), generator=seeded()),
    "randint_like": lambda high: torch.randint_like(torch.empty(8), high),
    "randint_like, high named": lambda high: torch.randint_like(torch.empty(8), high=high),
    "random_": lambda high: torch.empty(8, dtype=torch.long).random_(high),
    "random_, high named": lambda high: torch.empty(8).random_(to=high),
}


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("axis", [(0, T), (1, T + 1), (-5, 5)])
def test_every_draw_between_the_axis_ends_becomes_the_same_draw_between_the_bounds(
    name: str, axis: tuple[int, int]
) -> None:
    bounds = (axis[0] + 3, axis[0] + 7)
    torch.manual_seed(1)
    expected, following = BETWEEN[name](*bounds), torch.rand(3)
    torch.manual_seed(1)
    with LimitedIntegerDraws(axis, bounds):
        drawn, after = BETWEEN[name](*axis), torch.rand(3)
    assert same(drawn, expected)
    assert torch.equal(after, following), "as many random numbers are consumed"


@pytest.mark.parametrize("name", BELOW)
def test_every_draw_below_the_end_of_the_axis_becomes_one_between_the_bounds(name: str) -> None:
    torch.manual_seed(1)
    expected, following = BETWEEN[name.replace("all named", "high named")](*BOUNDS), torch.rand(3)
    torch.manual_seed(1)
    with LimitedIntegerDraws(AXIS, BOUNDS):
        drawn, after = BELOW[name](T), torch.rand(3)
    assert same(drawn, expected)
    assert torch.equal(after, following)


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("ends", [(0, 10), (0, T - 1), (0, T + 1), (1, T), (1, T + 1), (0, T // 2 + 1), (240, 460)])
def test_a_draw_of_any_other_range_is_left_alone(name: str, ends: tuple[int, int]) -> None:
    torch.manual_seed(1)
    expected = BETWEEN[name](*ends)
    torch.manual_seed(1)
    with LimitedIntegerDraws(AXIS, BOUNDS):
        assert same(BETWEEN[name](*ends), expected)


@pytest.mark.parametrize("name", BELOW)
def test_a_draw_below_another_end_is_left_alone(name: str) -> None:
    for axis in [AXIS, (1, 10)]:  # class labels; and a draw below 10 begins at 0
        torch.manual_seed(1)
        expected = BELOW[name](10)
        torch.manual_seed(1)
        with LimitedIntegerDraws(axis, (4, 5)):
            assert same(BELOW[name](10), expected)


def test_the_random_numbers_consumed_do_not_depend_on_the_bounds() -> None:
    followers = []
    for bounds in [(0, T), (0, 1), (240, 460), (999, 1000)]:
        torch.manual_seed(1)
        with LimitedIntegerDraws(AXIS, bounds):
            torch.randint(0, T, (7,))
        followers.append(torch.rand(1).item())
    assert len(set(followers)) == 1


def test_an_output_tensor_is_filled_and_returned() -> None:
    out = torch.full((8,), -1)
    with LimitedIntegerDraws(AXIS, BOUNDS):
        assert torch.randint(T, (8,), out=out) is out
        filled = torch.empty(8)
        assert filled.random_(T) is filled
    for tensor in (out, filled):
        assert ((tensor >= 240) & (tensor < 460)).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(4),
        lambda: torch.randperm(T),
        lambda: torch.empty(4, dtype=torch.long).random_(),
        lambda: torch.empty(4, dtype=torch.long).random_(240, None),
        lambda: torch.multinomial(torch.ones(T), 4),
        lambda: torch.empty(4).uniform_(0, T),
        lambda: torch.arange(0, T),
        lambda: torch.randint_like(torch.empty(4), torch.tensor(float(T))),
    ],
)
def test_anything_but_a_range_of_integers_is_left_alone(draw: Callable[[], Tensor]) -> None:
    torch.manual_seed(1)
    expected = draw()
    torch.manual_seed(1)
    with LimitedIntegerDraws(AXIS, BOUNDS):
        assert same(draw(), expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randint(0, float(T), (4,)),
        lambda: torch.randint(0, torch.tensor([T, T]), (4,)),
        lambda: torch.randint("0", T, (4,)),
        lambda: torch.randint(high=T),
        lambda: torch.randint(low=0, size=(4,)),
        lambda: torch.randint(low=T, size=(4,)),
        lambda: torch.empty(4).random_(**{"from": T}),
        lambda: torch.randint(0, torch.tensor(float(T)), (4,)),
        lambda: torch.randint_like(torch.empty(2), torch.tensor([T, T])),
        lambda: torch.randint(),
    ],
)
def test_a_malformed_draw_fails_as_it_does_without(draw: Callable[[], Tensor]) -> None:
    with pytest.raises((TypeError, RuntimeError, ValueError)) as without:
        draw()
    with LimitedIntegerDraws(AXIS, BOUNDS), pytest.raises(type(without.value)) as error:
        draw()
    assert str(error.value).splitlines()[0] == str(without.value).splitlines()[0]


def test_draws_in_other_threads_are_left_alone() -> None:
    drawn: list[Tensor] = []
    with LimitedIntegerDraws(AXIS, BOUNDS):
        worker = threading.Thread(target=lambda: drawn.append(torch.randint(T, (512,))))
        worker.start()
        worker.join()
    assert drawn[0].max() > 900


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_does_not_matter_whether_gradients_are_recorded(grad: Callable[[], torch.no_grad]) -> None:
    with LimitedIntegerDraws(AXIS, BOUNDS), grad():
        drawn = torch.randint(T, (512,))
    assert ((drawn >= 240) & (drawn < 460)).all()


def test_a_default_device_does_not_hide_the_draw() -> None:
    with LimitedIntegerDraws(AXIS, BOUNDS), torch.device("cpu"):
        inner = torch.randint(T, (512,))
    with torch.device("meta"), LimitedIntegerDraws(AXIS, BOUNDS):
        assert torch.randint(T, (512,)).device.type == "meta"
    assert ((inner >= 240) & (inner < 460)).all()


def test_gradients_are_what_they_are_without() -> None:
    network, samples = nn.Linear(3, 3), torch.randn(4, 3)
    network(samples).square().sum().backward()
    expected, network.weight.grad = network.weight.grad, None
    with LimitedIntegerDraws(AXIS, BOUNDS):
        loss = network(samples).square().sum()
    loss.backward()
    assert torch.equal(network.weight.grad, expected)


def test_inside_the_denoiser_draws_are_left_alone_and_operations_unwatched() -> None:
    with LimitedIntegerDraws(AXIS, BOUNDS):
        with LimitedIntegerDraws(AXIS, (0, 1)):
            with unlimited_draws():
                assert _get_current_function_mode() is None
                assert torch.randint(T, (512,)).max() > 900
                with unlimited_draws():
                    assert torch.randint(T, (512,)).max() > 900
            assert torch.randint(T, (512,)).max() == 0
        drawn = torch.randint(T, (512,))
        assert ((drawn >= 240) & (drawn < 460)).all()
    assert _get_current_function_mode() is None


def test_an_error_inside_the_denoiser_leaves_the_limits_in_place() -> None:
    with LimitedIntegerDraws(AXIS, BOUNDS):
        with pytest.raises(KeyError), unlimited_draws():
            raise KeyError
        assert torch.randint(T, (512,)).max() < 460
    assert torch.randint(T, (512,)).max() > 900


def test_a_mode_that_the_user_entered_is_not_left_for_the_denoiser() -> None:
    with LimitedIntegerDraws(AXIS, BOUNDS), torch.device("meta"), unlimited_draws():
        assert torch.empty(1).device.type == "meta"


@pytest.mark.parametrize("fullgraph", [False, True])
def test_draws_inside_a_compiled_function_follow_the_bounds_of_every_turn(fullgraph: bool) -> None:
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=fullgraph)
    def noised(samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(0, 10, (len(samples),))
        return samples.sin(), torch.randint(0, T, (len(samples),), device=samples.device), labels

    samples = torch.randn(256, 2)
    for start, stop in [(0, 240), (240, 460), (460, 1000)] * 3:
        with LimitedIntegerDraws(AXIS, (start, stop)):
            _, drawn, labels = noised(samples)
        assert start <= drawn.min() < start + 20
        assert stop - 20 < drawn.max() < stop
        assert sorted(labels.unique().tolist()) == list(range(10))
    assert counters["stats"]["unique_graphs"] == 3, "one for each ticket, not one for each turn"
    _, drawn, _ = noised(samples)
    assert drawn.min() < 20
    assert drawn.max() > 980


def test_a_compiled_denoiser_is_compiled_once_for_all_turns() -> None:
    torch._dynamo.reset()
    counters.clear()
    network = torch.compile(nn.Linear(2, 2), backend="aot_eager")
    for start in [0, 100, 200, 300] * 3:
        with LimitedIntegerDraws(AXIS, (start, start + 100)):
            drawn = torch.randint(T, (4,))
            network(torch.randn(4, 2)).sum().backward()
        assert ((drawn >= start) & (drawn < start + 100)).all()
    assert counters["stats"]["unique_graphs"] == 1
