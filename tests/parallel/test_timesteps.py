"""What a module draws while a ticket is in turn: through its own method, or in its integer draws."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import Lit, Tutorial, fit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_earlybird import draw_uniform
from lightning_earlybird.draws import DrawError
from lightning_earlybird.parallel.timesteps import find_sampler, limited_timesteps

AXIS, BOUNDS = (0, 1000), (240, 460)
FLOW, PART = (0.0, 1.0), (0.24, 0.46)


class WithBounds(nn.Module):
    """Notes what its sampler is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def sample_timesteps(self, batch_size: int, start: float = 0, stop: float = 1000, *, scale: int = 1) -> Tensor:
        self.seen.append((batch_size, start, stop, scale))
        return draw_uniform(batch_size, start, stop)


class AnyKeywords(nn.Module):
    def sample_timesteps(self, batch_size: int, **kwargs: Any) -> Any:
        return batch_size, kwargs


class Biased(nn.Module):
    """Knows nothing of tickets; density (t + 1) ** 2 - t ** 2 over 1000 ** 2."""

    def sample_timesteps(self, n: int, device: str = "cpu") -> Tensor:
        return (1000 * torch.rand(n, device=device).sqrt()).long()


class LogitNormal(nn.Module):
    def forward(self, n: int) -> Tensor:
        return torch.randn(n).sigmoid()


class HasModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sample_timesteps = LogitNormal()


def inside(timesteps: Tensor, bounds: tuple[float, float] = BOUNDS) -> bool:
    return bool(((timesteps >= bounds[0]) & (timesteps < bounds[1])).all())


def test_a_method_that_takes_bounds_is_given_those_of_the_ticket() -> None:
    module = WithBounds()
    with limited_timesteps(module, AXIS, BOUNDS):
        assert inside(module.sample_timesteps(8))
        module.sample_timesteps(batch_size=4, scale=3)
    module.sample_timesteps(2)
    assert module.seen == [(8, 240, 460, 1), (4, 240, 460, 3), (2, 0, 1000, 1)]


def test_a_method_that_takes_any_keyword_is_given_the_bounds() -> None:
    module = AnyKeywords()
    with limited_timesteps(module, AXIS, BOUNDS):
        assert module.sample_timesteps(8, scale=2) == (8, {"scale": 2, "start": 240, "stop": 460})


def test_a_ticket_of_the_whole_axis_is_given_its_bounds_too() -> None:
    module = WithBounds()
    with limited_timesteps(module, (10, 20), (10, 20)):
        module.sample_timesteps(8)
    assert module.seen == [(8, 10, 20, 1)]


@pytest.mark.parametrize(
    "call",
    [
        lambda module: module.sample_timesteps(8, 0, 1000),
        lambda module: module.sample_timesteps(8, 0, stop=1000),
        lambda module: module.sample_timesteps(8, start=0, stop=1000),
        lambda module: module.sample_timesteps(8, stop=1000),
        lambda module: module.sample_timesteps(8, None, None),
    ],
)
def test_bounds_that_the_call_gives_do_not_widen_those_of_the_ticket(call: Callable[[WithBounds], Tensor]) -> None:
    module = WithBounds()
    with limited_timesteps(module, AXIS, BOUNDS):
        call(module)
    assert module.seen == [(8, 240, 460, 1)]


def test_narrower_bounds_of_the_call_are_kept() -> None:
    module = WithBounds()
    with limited_timesteps(module, AXIS, BOUNDS):
        module.sample_timesteps(8, 300, 1000)
        module.sample_timesteps(8, stop=400)
    assert module.seen == [(8, 300, 460, 1), (8, 240, 400, 1)]


def test_bounds_of_the_call_that_the_ticket_lies_outside_of_are_refused() -> None:
    message = (
        r"training_step asks WithBounds.sample_timesteps for timesteps in an interval that has none in common with "
        r"\[240, 460\), the timesteps of the ticket in turn. Leave start and stop out"
    )
    module = WithBounds()
    with limited_timesteps(module, AXIS, BOUNDS), pytest.raises(ValueError, match=message):
        module.sample_timesteps(8, 0, 240)


def test_bounds_after_further_positional_arguments_are_passed_by_name() -> None:
    class Varied(nn.Module):
        def sample_timesteps(self, n: int, *shape: int, start: int, stop: int) -> Any:
            return n, shape, start, stop

    module = Varied()
    with limited_timesteps(module, AXIS, BOUNDS):
        assert module.sample_timesteps(8, 1, 2) == (8, (1, 2), 240, 460)


@pytest.mark.parametrize(
    ("axis", "bounds", "expected"),
    [
        ((0, 1000), (240, 460), (240, 460)),
        ((0, 1000), (240, 460.0), (240, 460)),  # an overlap of 20.0
        ((0.0, 1000.0), (240, 460), (240.0, 460.0)),
        ((0.0, 1.0), (0.0, 1), (0.0, 1.0)),
        ((0, 1), (0, 0.5), (0.0, 0.5)),
        ((0, 1000), (240.5, 460), (240.5, 460.0)),
        ((-math.inf, math.inf), (-math.inf, 0), (-math.inf, 0.0)),
        ((0, math.inf), (0, 80), (0.0, 80.0)),
    ],
)
def test_bounds_are_integers_where_the_axis_is_given_in_integers(
    axis: tuple[float, float], bounds: tuple[float, float], expected: tuple[float, float]
) -> None:
    module = AnyKeywords()
    with limited_timesteps(module, axis, bounds):
        _, given = module.sample_timesteps(8)
    assert (given["start"], given["stop"]) == expected
    assert [type(end) for end in given.values()] == [type(end) for end in expected]


@pytest.mark.parametrize("call", [lambda m: m.sample_timesteps(64), lambda m: m.sample_timesteps(n=64, device="cpu")])
def test_a_method_that_knows_no_bounds_keeps_its_density_inside_of_them(call: Callable[[Biased], Tensor]) -> None:
    torch.manual_seed(0)
    module = Biased()
    with limited_timesteps(module, AXIS, BOUNDS):
        timesteps = torch.cat([call(module) for _ in range(200)])
    assert timesteps.shape == (64 * 200,)
    assert inside(timesteps)
    # (t ** 2 - 240 ** 2) / (460 ** 2 - 240 ** 2) is the distribution function: the mean of its values is a half.
    shares = ((timesteps + 0.5) ** 2 - 240**2) / (460**2 - 240**2)
    assert abs(shares.mean() - 0.5) < 4 / math.sqrt(12 * len(shares))
    assert abs(timesteps.float().mean() - 349.5) > 4 * 220 / math.sqrt(12 * len(shares)), "it is not uniform"


def test_a_ticket_of_the_whole_axis_draws_as_the_method_does() -> None:
    module = Biased()
    torch.manual_seed(0)
    expected = module.sample_timesteps(64)
    torch.manual_seed(0)
    with limited_timesteps(module, AXIS, AXIS):
        assert torch.equal(module.sample_timesteps(64), expected)


def test_a_sampler_may_be_a_module_of_its_own() -> None:
    module = HasModule()
    with limited_timesteps(module, FLOW, PART):
        assert inside(module.sample_timesteps(256), PART)
        assert list(dict(module.named_modules())) == ["", "sample_timesteps"]
    assert isinstance(module.sample_timesteps, LogitNormal)
    assert "sample_timesteps" not in vars(module)


def test_a_sampler_may_be_set_on_the_instance() -> None:
    module = nn.Module()
    sampler = partial(torch.randint, 0, 1000)
    module.sample_timesteps = lambda n: sampler((n,))
    before = module.sample_timesteps
    with limited_timesteps(module, AXIS, BOUNDS):
        assert inside(module.sample_timesteps(256))
    assert module.sample_timesteps is before


def test_a_compiled_sampler_follows_the_bounds_of_every_turn() -> None:
    torch._dynamo.reset()
    module = WithBounds()
    module.sample_timesteps = torch.compile(lambda n, start=0, stop=1000: draw_uniform(n, start, stop), backend="eager")
    for start in (0, 100, 200, 0):
        for batch_size in (64, 32):
            with limited_timesteps(module, AXIS, (start, start + 100)):
                assert inside(module.sample_timesteps(batch_size), (start, start + 100))


@pytest.mark.parametrize("sampler", [WithBounds, Biased])
def test_a_compiled_step_follows_the_bounds_of_every_turn(sampler: type[nn.Module]) -> None:
    torch._dynamo.reset()
    module = sampler()
    step = torch.compile(lambda samples: module.sample_timesteps(len(samples)) + 0 * samples[:, 0], backend="aot_eager")
    for start in (0, 100, 200, 0):
        with limited_timesteps(module, AXIS, (start, start + 100)):
            assert inside(step(torch.randn(64, 2)), (start, start + 100))
    assert step(torch.randn(512, 2)).max() > 900


def test_drawing_again_is_not_compiled_for_every_turn() -> None:
    torch._dynamo.reset()
    counters.clear()
    module = Biased()
    step = torch.compile(lambda samples: module.sample_timesteps(len(samples)) + 0 * samples[:, 0], backend="aot_eager")
    compiled = []
    for turn in range(12):
        start = 100 * (turn % 3)
        with limited_timesteps(module, AXIS, (start, start + 50 + turn)):
            step(torch.randn(64, 2))
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[5] <= 4


class Like(nn.Module):
    def sample_timesteps(self, samples: Tensor) -> Tensor:
        return torch.randint(0, 1000, samples.shape[:1])


def test_a_ticket_of_the_whole_axis_may_be_drawn_for_in_any_way() -> None:
    module = Like()
    with limited_timesteps(module, AXIS, AXIS):
        assert module.sample_timesteps(torch.zeros(512)).max() > 900


def test_a_method_called_without_a_batch_size_is_refused() -> None:
    message = (
        r"Like.sample_timesteps must be called with the batch size, an integer, as its first argument .* not with "
        r"Tensor. Let Like.sample_timesteps take start and stop"
    )
    module = Like()
    with limited_timesteps(module, AXIS, BOUNDS), pytest.raises(TypeError, match=message):
        module.sample_timesteps(torch.zeros(3))


def test_a_method_that_returns_more_than_timesteps_is_refused() -> None:
    class Weighted(nn.Module):
        def sample_timesteps(self, n: int) -> tuple[Tensor, Tensor]:
            return torch.randint(0, 1000, (n,)), torch.ones(n)

    message = (
        r"Weighted.sample_timesteps was asked for timesteps of the ticket in turn: draw\(3\) must return a tensor of 3 "
        r"timesteps, .* not a tuple. Let Weighted.sample_timesteps take start and stop"
    )
    module = Weighted()
    with limited_timesteps(module, AXIS, BOUNDS), pytest.raises(DrawError, match=message):
        module.sample_timesteps(3)


def test_a_method_in_another_unit_is_refused() -> None:
    module = HasModule()
    with (
        limited_timesteps(module, AXIS, BOUNDS),
        pytest.raises(DrawError, match=r"HasModule.sample_timesteps .* got 0 of \d+ timesteps .* the same time unit"),
    ):
        module.sample_timesteps(3)


def test_an_error_of_the_method_itself_is_passed_on() -> None:
    class Broken(nn.Module):
        def sample_timesteps(self, n: int) -> Tensor:
            raise ValueError("no schedule")

    module = Broken()
    with limited_timesteps(module, AXIS, BOUNDS), pytest.raises(ValueError, match=r"^no schedule$"):
        module.sample_timesteps(3)


@pytest.mark.parametrize("build", [WithBounds, Biased, HasModule, Lit])
def test_nothing_is_left_behind(build: Callable[[], nn.Module]) -> None:
    module = build()
    members, state = dict(vars(module)), list(module.state_dict())
    with limited_timesteps(module, AXIS, BOUNDS):
        assert list(module.state_dict()) == state
    assert vars(module) == members
    with pytest.raises(KeyError), limited_timesteps(module, AXIS, BOUNDS):
        raise KeyError
    assert vars(module) == members
    torch.manual_seed(0)
    assert torch.randint(0, 1000, (256,)).max() > 900


def test_a_copy_made_in_a_turn_draws_from_the_whole_axis_with_a_method_of_its_own() -> None:
    module = WithBounds()
    with limited_timesteps(module, AXIS, BOUNDS):
        copied = copy.deepcopy(module)
        assert inside(module.sample_timesteps(256))
    copied.sample_timesteps(8)
    assert copied.seen == [(8, 0, 1000, 1)]
    assert module.seen == [(256, 240, 460, 1)]
    assert pickle.loads(pickle.dumps(copied)).seen == copied.seen


@pytest.mark.parametrize("build", [WithBounds, Biased, nn.Module])
def test_of_nested_turns_the_innermost_counts(build: Callable[[], nn.Module]) -> None:
    module = build()

    def draw() -> Tensor:
        return module.sample_timesteps(512) if find_sampler(module) else torch.randint(0, 1000, (512,))

    torch.manual_seed(0)
    with limited_timesteps(module, AXIS, (0, 100)):
        with limited_timesteps(module, AXIS, (500, 600)):
            assert inside(draw(), (500, 600))
        with limited_timesteps(module, AXIS, AXIS):
            assert draw().max() > 900
        assert inside(draw(), (0, 100))
    assert draw().max() > 900


def test_nothing_is_intercepted_where_there_is_a_method() -> None:
    module = WithBounds()
    torch.manual_seed(0)
    with limited_timesteps(module, AXIS, BOUNDS):
        assert torch.randint(0, 1000, (256,)).max() > 900


@pytest.mark.parametrize("value", [50, None, torch.tensor(50)])
def test_a_number_of_that_name_is_no_method(value: object) -> None:
    module = nn.Module()
    module.sample_timesteps = value
    assert find_sampler(module) is None
    with limited_timesteps(module, AXIS, BOUNDS):
        assert inside(torch.randint(0, 1000, (256,)))
        assert module.sample_timesteps is value


def test_the_method_is_found_as_it_is_outside_of_a_turn() -> None:
    module = Biased()
    with limited_timesteps(module, AXIS, BOUNDS):
        assert find_sampler(module) == module.__class__.sample_timesteps.__get__(module)
    assert find_sampler(Lit()) is None


@pytest.mark.parametrize(
    ("axis", "bounds"),
    [((0, 1000), (240, 460)), ((0.0, 1000.0), (240.0, 460.0)), ((0, 1000), (239.5, 459.5)), ((0, 1000.0), (240, 460))],
)
def test_integer_draws_are_restricted_however_the_bounds_are_written(
    axis: tuple[float, float], bounds: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    with limited_timesteps(nn.Module(), axis, bounds):
        drawn = torch.randint(0, 1000, (8192,))
    assert (drawn.min(), drawn.max()) == (240, 459)


@pytest.mark.parametrize(
    ("axis", "bounds"),
    [
        ((-math.inf, math.inf), (-math.inf, 0)),
        ((0, math.inf), (0, 100)),
        ((0.5, 1000), (0.5, 100)),
        ((1, 1000), (1, 100)),
        ((0, 1000), (0.2, 0.8)),  # no integer inside: the check says so
    ],
)
def test_where_no_integer_draw_has_the_range_of_the_axis_none_is_touched(
    axis: tuple[float, float], bounds: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    with limited_timesteps(nn.Module(), axis, bounds):
        assert torch.randint(0, 1000, (256,)).max() > 900


@pytest.mark.parametrize("bounds", [(-1, 100), (900, 1001), (2000, 3000)])
def test_bounds_beyond_the_axis_are_refused(bounds: tuple[int, int]) -> None:
    with (
        pytest.raises(ValueError, match=r"bounds=\(.*\) must lie inside axis=\(0, 1000\)"),
        limited_timesteps(nn.Module(), AXIS, bounds),
    ):
        pass


@pytest.mark.parametrize("bounds", [(100, 100), (200, 100), (math.nan, 1)])
def test_bounds_that_are_no_interval_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"is empty|not NaN"), limited_timesteps(nn.Module(), AXIS, bounds):
        pass


class Turns(SingleDeviceStrategy):
    """Gives every step to the ticket of the same bounds."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with limited_timesteps(self.lightning_module, AXIS, BOUNDS):
            return super().training_step(*args, **kwargs)


class BySampler(Lit):
    def loss(self, samples: Tensor) -> Tensor:
        steps = self.sample_timesteps(len(samples))
        return self.model(samples, steps).square().mean()

    def sample_timesteps(self, n: int) -> Tensor:
        return (1000 * torch.rand(n, device=self.device).sqrt()).long()


@pytest.mark.parametrize("build", [Tutorial, Lit, BySampler])
def test_in_a_trainer_training_is_restricted_and_validation_is_not(build: Callable[[], pl.LightningModule]) -> None:
    module = build()
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    network = module.model
    network.register_forward_pre_hook(lambda net, args: seen[net.training].append(args[1]))
    validated = build is not Tutorial
    fit(module, strategy=Turns(torch.device("cpu")), max_epochs=4, limit_val_batches=4 if validated else 0)
    timesteps = torch.cat(seen[True])
    assert len(timesteps) == 4 * 4 * 8
    assert inside(timesteps)
    assert timesteps.max() - timesteps.min() > 150
    assert not validated or not inside(torch.cat(seen[False]))
