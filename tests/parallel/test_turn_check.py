"""The check on what a ticket in turn is given, and the remedy that its message shows."""

import math
import re
import textwrap
from typing import Any

import pytest
import torch
from modules import Mlp
from torch import Tensor, nn

from lightning_earlybird import TimestepPartition
from lightning_earlybird.parallel.timesteps import find_sampler, limited_timesteps
from lightning_earlybird.parallel.turn_check import TimestepsOutsideError, check_turn

AXIS, BOUNDS = (0, 1000), (240, 460)
FLOW, PART = (0.0, 1.0), (0.24, 0.46)


def check(timesteps: Any, bounds: Any = BOUNDS, axis: Any = AXIS, has_sampler: bool = False) -> None:
    check_turn(timesteps, bounds, axis=axis, ticket=1, module_name="Lit", has_sampler=has_sampler)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.int16])
def test_integers_must_lie_in_the_half_open_interval(dtype: torch.dtype) -> None:
    check(torch.arange(240, 460, dtype=dtype))
    for outside in (239, 460, -1, 999):
        with pytest.raises(TimestepsOutsideError, match=f"with timestep {outside} while ticket 1 was in turn"):
            check(torch.tensor([300, outside, 301], dtype=dtype))


def test_the_end_of_the_axis_is_outside_for_integers() -> None:
    check(torch.tensor([999]), (460, 1000))
    with pytest.raises(TimestepsOutsideError, match="timestep 1000"):
        check(torch.tensor([1000]), (460, 1000))


def test_small_integers_do_not_wrap_around() -> None:
    check(torch.tensor([250], dtype=torch.uint8), (240, 460))
    with pytest.raises(TimestepsOutsideError, match="timestep 3 "):
        check(torch.tensor([3], dtype=torch.uint8), (-10, 3), (-10, 1000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("axis", "bounds"), [(FLOW, PART), (FLOW, (0.46, 1.0)), (AXIS, BOUNDS), ((-8.0, 8.0), (-1.0, 0.0))]
)
def test_what_was_drawn_inside_passes_in_every_dtype(dtype: torch.dtype, axis: Any, bounds: Any) -> None:
    start, stop = bounds
    below = torch.nextafter(torch.tensor(stop, dtype=torch.float64), torch.tensor(start, dtype=torch.float64)).item()
    drawn = torch.tensor([start, (start + stop) / 2, below, stop], dtype=torch.float64)
    check(drawn.to(dtype), bounds, axis)
    for outside in (start - 0.1 * (stop - start) - 0.05, stop + 0.1 * (stop - start) + 0.05):
        with pytest.raises(TimestepsOutsideError):
            check(torch.tensor([outside], dtype=dtype), bounds, axis)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_timestep_that_lookup_gives_to_the_region_passes(dtype: torch.dtype) -> None:
    partition = TimestepPartition.of([(0.0, 0.24, 0.3), (0.24, 0.44, 0.6), (0.44, 1.0, 0.8)], overlap=0.02)
    timesteps = torch.linspace(0, 1, 1001, dtype=torch.float64).to(dtype)
    owners = partition.lookup(timesteps)
    for index in range(len(partition)):
        check(timesteps[owners == index], partition.training_bounds(index), FLOW)
    assert timesteps[owners == 2].max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_of_another_unit_and_back_passes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for start, stop in [(0.24, 0.46), (-0.3, 0.05), (-1.5, -0.3), (0.0, 0.001)]:
        edges = torch.tensor([start, stop], dtype=torch.float64).to(dtype).repeat(4000)
        drawn = torch.nextafter(edges, torch.rand(8000, generator=generator, dtype=dtype) - 0.5 + edges)
        drawn = drawn.clamp(edges[0], edges[1])
        check((4 * drawn).exp().log() / 4, (start, stop), (-8.0, 8.0))  # c_noise of EDM, through sigma
        check((drawn * 1000) / 1000, (start, stop), (-8.0, 8.0))


def test_nan_is_outside() -> None:
    with pytest.raises(TimestepsOutsideError, match="timestep nan"):
        check(torch.tensor([0.3, math.nan]), (-math.inf, math.inf), (-math.inf, math.inf))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (3, 1, 1, 1), (0,)])
def test_timesteps_may_have_any_shape(shape: tuple[int, ...]) -> None:
    check(torch.full(shape, 300))
    if math.prod(shape):
        with pytest.raises(TimestepsOutsideError, match="timestep 500 "):
            check(torch.full(shape, 500))


def test_a_number_is_checked_too() -> None:
    check(300)
    check(0.3, PART, FLOW)
    with pytest.raises(TimestepsOutsideError, match=r"timestep 500 while .* in \[240, 460\)\. "):
        check(500)
    with pytest.raises(TimestepsOutsideError, match=r"timestep 0.5 while"):
        check(0.5, PART, FLOW)


def test_infinite_bounds_are_open() -> None:
    whole = (-math.inf, math.inf)
    check(torch.tensor([-1e9, -0.5]), (-math.inf, -0.2), whole)
    check(torch.tensor([-(10**9), -1]), (-math.inf, 0), whole)
    with pytest.raises(TimestepsOutsideError, match=r"timestep 0.0 .* in \[-inf, -0.2\)"):
        check(torch.tensor([-1.0, 0.0]), (-math.inf, -0.2), whole)


def test_the_message_counts_what_lies_outside() -> None:
    message = r"timestep 600 while ticket 1 was in turn, .* \[240, 460\) \(2 of 3 timesteps lie outside\)\. "
    with pytest.raises(TimestepsOutsideError, match=message):
        check(torch.tensor([300, 600, 100]))


@pytest.mark.parametrize(
    ("axis", "bounds", "has_sampler", "message"),
    [
        (AXIS, BOUNDS, False, r"only integer draws over exactly \[0, 1000\) were restricted \(torch.randint, "),
        (FLOW, PART, True, r"come from Lit.sample_timesteps: it was given start=0.24 and stop=0.46 if it takes them"),
        ((0.5, 9.5), (0.5, 2.0), False, r"draws on a time axis \[0.5, 9.5\) cannot be told from other random numbers"),
        ((-math.inf, math.inf), (-1.0, 0.0), False, r"draws on a time axis \[-inf, inf\) cannot be told from"),
    ],
)
def test_the_message_says_how_timesteps_were_restricted(
    axis: Any, bounds: Any, has_sampler: bool, message: str
) -> None:
    with pytest.raises(TimestepsOutsideError, match=message):
        check(torch.tensor([5000.0]), bounds, axis, has_sampler)


class Antithetic(nn.Module):
    """As DDIM's code draws them, with integers mirrored into the other half of the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mlp()
        self.weights = torch.ones(1000)
        self.device = torch.device("cpu")
        self.ours = False

    def draw(self, n: int) -> Tensor:
        timesteps = torch.randint(0, 1000, (n // 2 + 1,))
        return torch.cat([timesteps, 999 - timesteps])[:n]

    def training_step(self, samples: Tensor) -> Tensor:
        timesteps = self.sample_timesteps(len(samples)) if self.ours else self.draw(len(samples))
        return self.model(samples, timesteps).sum()


class Scaled(Antithetic):
    def draw(self, n: int) -> Tensor:
        return (torch.rand(n) * 1000).long()


class Permuted(Antithetic):
    def draw(self, n: int) -> Tensor:
        return torch.randperm(1000)[:n]


class HalfRange(Antithetic):
    def draw(self, n: int) -> Tensor:
        timesteps = torch.randint(0, 501, (n // 2,))
        return torch.cat([timesteps, 999 - timesteps])


class Descending(Antithetic):
    """As training code for Stable Diffusion 3 looks them up."""

    def draw(self, n: int) -> Tensor:
        return torch.arange(1000).flip(0)[torch.randint(0, 1000, (n,))]


class NoZero(Antithetic):
    def draw(self, n: int) -> Tensor:
        return torch.randint(low=1, high=1000, size=(n,))


class Flow(Antithetic):
    def draw(self, n: int) -> Tensor:
        return torch.randn(n).sigmoid()


class WholeSigmas(Antithetic):
    """In continuous time, with regions that are written in integers."""

    def draw(self, n: int) -> Tensor:
        return torch.rand(n) * 80


class Sigmas(Antithetic):
    def draw(self, n: int) -> Tensor:
        return torch.randn(n)


def run(module: Antithetic, axis: Any, bounds: Any) -> Tensor:
    """One turn, as the strategy takes it; what the denoiser was given."""
    seen: list[Tensor] = []

    def before(network: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        sampler = find_sampler(module)
        seen.append(args[1])
        check_turn(
            args[1], bounds, axis=axis, ticket=1, module_name=type(module).__name__, has_sampler=sampler is not None
        )

    hook = module.model.register_forward_pre_hook(before)
    try:
        with limited_timesteps(module, axis, bounds):
            module.training_step(torch.randn(64, 2))
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("other", [False, True], ids=["uniform", "other density"])
@pytest.mark.parametrize(
    ("kind", "axis", "bounds"),
    [(kind, AXIS, BOUNDS) for kind in (Antithetic, Scaled, Permuted, HalfRange, Descending, NoZero)]
    + [
        (Scaled, (0.0, 1000.0), (240.0, 460.0)),
        (Flow, FLOW, PART),
        (Flow, (0, 1), PART),
        (Flow, (0, 1), (0, 0.5)),
        (WholeSigmas, (0, 80), (0, 40)),
    ]
    + [(Sigmas, (-math.inf, math.inf), (-math.inf, 0.5)), (Sigmas, (-8.0, 8.0), (0.2, 1.0))],
)
def test_what_cannot_be_intercepted_is_refused_and_cured_by_what_the_message_shows(
    kind: type[Antithetic], axis: Any, bounds: Any, other: bool
) -> None:
    torch.manual_seed(0)
    module = kind()
    with pytest.raises(TimestepsOutsideError) as error:
        run(module, axis, bounds)
    recipe = textwrap.dedent(str(error.value).split("\n\n", 1)[1])
    assert recipe.endswith("timesteps = self.sample_timesteps(batch_size)  # in training_step")
    if other:
        recipe = re.sub(r"    return draw_uniform.*\n", "", recipe).replace("# return", "return")
    names: dict[str, Any] = {"torch": torch}
    exec(recipe.rsplit("\n\n", 1)[0], names)

    cured = type("Cured", (kind,), {"sample_timesteps": names["sample_timesteps"]})()
    cured.ours = True
    timesteps = torch.cat([run(cured, axis, bounds) for _ in range(8)])
    assert timesteps.is_floating_point() == kind().draw(2).is_floating_point()
    assert timesteps.unique().numel() > 50
    cured.training_step(torch.randn(64, 2))  # outside of a turn the defaults hold


def test_a_method_that_training_step_does_not_call_is_found_out() -> None:
    torch.manual_seed(0)
    module = type("Unused", (Antithetic,), {"sample_timesteps": lambda self, n: torch.randint(0, 1000, (n,))})()
    with pytest.raises(
        TimestepsOutsideError, match=r"Unused.sample_timesteps: .* or does not call it for the timesteps"
    ):
        run(module, AXIS, BOUNDS)


def test_a_method_that_ignores_the_bounds_is_found_out() -> None:
    torch.manual_seed(0)
    kind = type("Deaf", (Antithetic,), {"sample_timesteps": lambda self, n, **kwargs: torch.randint(0, 1000, (n,))})
    module = kind()
    module.ours = True
    with pytest.raises(TimestepsOutsideError, match="it takes start and stop without keeping to them"):
        run(module, AXIS, BOUNDS)


def test_mirror_images_that_stay_inside_are_in_order() -> None:
    assert run(Antithetic(), AXIS, (300, 700)).shape == (64,)
