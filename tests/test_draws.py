"""Draws inside an interval: where they lie, how they are distributed, what is refused."""

import math
import re

import pytest
import torch
from torch import Tensor

import lightning_earlybird
from lightning_earlybird import draw_uniform, draw_within, regions
from lightning_earlybird.draws import DrawError, within

COUNT = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square(values: Tensor, expected: Tensor) -> float:
    """Standard deviations by which the chi-square statistic of integers 0.. exceeds its mean."""
    counts = torch.bincount(values, minlength=len(expected)).double()
    assert len(counts) == len(expected), "a value beyond the last"
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def kolmogorov(shares: Tensor) -> float:
    """Kolmogorov's statistic of what should be uniform on [0, 1]: below 1.95 in 999 of 1000 samples."""
    ordered = shares.double().sort().values
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return distance.item() * math.sqrt(len(ordered))


def logit_normal(count: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(count, generator=generator).sigmoid()


def logit_normal_share(timesteps: Tensor, start: float, stop: float) -> Tensor:
    """The distribution function of the logit-normal density on [start, stop)."""
    low, high, at = (
        torch.special.ndtr(torch.logit(torch.as_tensor(t, dtype=torch.float64))) for t in (start, stop, timesteps)
    )
    return (at - low) / (high - low)


def test_the_draws_can_be_imported_with_the_regions_too() -> None:
    assert regions.draw_uniform is lightning_earlybird.draw_uniform
    assert regions.draw_within is lightning_earlybird.draw_within


@pytest.mark.parametrize("antithetic", [False, True])
def test_integers_are_uniform_on_the_interval(antithetic: bool) -> None:
    timesteps = draw_uniform(COUNT, 240, 260, antithetic=antithetic, generator=seeded())
    assert timesteps.dtype == torch.long
    assert timesteps.shape == (COUNT,)
    for half in timesteps.chunk(2):  # of pairs, one row is independent of all others
        assert chi_square(half - 240, torch.full((20,), COUNT / 40)) < 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_numbers_in_continuous_time_are_uniform_on_the_interval(antithetic: bool) -> None:
    timesteps = draw_uniform(COUNT, 0.24, 0.44, antithetic=antithetic, generator=seeded())
    assert timesteps.dtype == torch.float32
    for half in timesteps.chunk(2):
        assert kolmogorov((half - 0.24) / 0.2) < 1.95
        assert kolmogorov((half - 0.25) / 0.2) > 4, "the statistic sees a shift by a twentieth"


def test_the_bounds_types_decide_between_integers_and_continuous_time() -> None:
    assert draw_uniform(4, 0, 2).dtype == torch.long
    assert all(draw_uniform(4, *bounds).is_floating_point() for bounds in [(0.0, 2), (0, 2.0), (0.0, 2.0)])
    assert draw_uniform(64, float(0), float(1), generator=seeded()).unique().numel() == 64


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8])
def test_mirrored_integers_come_in_pairs_about_the_middle(batch_size: int) -> None:
    timesteps = draw_uniform(batch_size, 240, 440, antithetic=True, generator=seeded())
    half = (batch_size + 1) // 2
    assert len(timesteps) == batch_size
    assert (timesteps[: batch_size - half] + timesteps[half:] == 240 + 440 - 1).all()
    assert torch.equal(timesteps[:half], draw_uniform(half, 240, 440, generator=seeded()))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8])
def test_mirrored_numbers_come_in_pairs_about_the_middle(batch_size: int) -> None:
    timesteps = draw_uniform(batch_size, 0.24, 0.44, antithetic=True, generator=seeded())
    half = (batch_size + 1) // 2
    assert len(timesteps) == batch_size
    torch.testing.assert_close(
        timesteps[: batch_size - half] + timesteps[half:], torch.full((batch_size - half,), 0.68)
    )


def test_every_integer_is_mirrored_into_the_interval() -> None:
    timesteps = draw_uniform(600, 3, 6, antithetic=True, generator=seeded())
    assert timesteps.unique().tolist() == [3, 4, 5]


@pytest.mark.parametrize("bounds", [(0.24, 0.44), (0.0, 1.0), (999.0, 1000.0), (-3.5, -0.1), (1e6, 1e6 + 1.0)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24], ids=["least", "greatest"])
def test_the_extreme_numbers_stay_inside(
    bounds: tuple[float, float], uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), uniform))
    timesteps = draw_uniform(2, *bounds, antithetic=True)
    assert timesteps.dtype == torch.float32
    assert within(timesteps, *bounds).all()


def test_a_generator_decides_what_is_drawn() -> None:
    for bounds in [(0, 10), (0.0, 10.0)]:
        first, again = (draw_uniform(8, *bounds, generator=seeded(3)) for _ in range(2))
        assert torch.equal(first, again)
        torch.manual_seed(3)
        assert torch.equal(draw_uniform(8, *bounds), first)


def test_the_result_lies_on_the_device_that_was_asked_for() -> None:
    assert draw_uniform(8, 0, 10, device="meta").device.type == "meta"
    assert draw_uniform(8, 0.0, 1.0, generator=seeded(), device="meta").device.type == "meta"
    assert draw_uniform(8, 0, 10, generator=seeded()).device.type == "cpu"


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None])
def test_a_batch_size_that_is_no_positive_integer_is_refused(batch_size: object) -> None:
    message = re.escape(f"batch_size={batch_size!r} must be an integer of at least 1")
    with pytest.raises(ValueError, match=message):
        draw_uniform(batch_size, 0, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        draw_within(torch.rand, batch_size, 0, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [(5, 5), (6, 5), (0.5, 0.5)])
def test_an_empty_interval_is_refused(bounds: tuple[float, float]) -> None:
    message = re.escape(f"[start, stop) = [{bounds[0]!r}, {bounds[1]!r}) is empty: start must be below stop")
    with pytest.raises(ValueError, match=message):
        draw_uniform(4, *bounds)
    with pytest.raises(ValueError, match=message):
        draw_within(torch.rand, 4, *bounds)


def test_a_bound_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^start=nan must be a plain int or float"):
        draw_uniform(4, math.nan, 1.0)
    with pytest.raises(ValueError, match=r"^stop='1' must be a plain int or float"):
        draw_within(torch.rand, 4, 0, "1")  # type: ignore[arg-type]


def test_an_unbounded_interval_has_no_uniform_density() -> None:
    with pytest.raises(ValueError, match=r"\[-inf, 0\) has no uniform density: both bounds must be finite. Use draw_w"):
        draw_uniform(4, -math.inf, 0)


def test_an_interval_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds no number of torch.float32: widen the interval"):
        draw_uniform(4, 1000.0, 1000.00001)


@pytest.mark.parametrize("bounds", [(0.0, 0.1), (0.24, 0.44), (0.9, 1.0)])
def test_a_logit_normal_density_stays_what_it_is_inside(bounds: tuple[float, float]) -> None:
    generator = seeded(1)
    parts = [draw_within(lambda n: logit_normal(n, generator), 64, *bounds) for _ in range(150)]
    timesteps = torch.cat(parts)
    assert all(part.shape == (64,) for part in parts)
    assert within(timesteps, *bounds).all()
    assert kolmogorov(logit_normal_share(timesteps, *bounds)) < 1.95
    start, stop = bounds
    assert kolmogorov((timesteps - start) / (stop - start)) > 3, "the statistic tells it from a uniform density"


def test_a_density_over_integers_stays_what_it_is_inside() -> None:
    weights = torch.linspace(1, 3, 50)
    generator = seeded(2)
    timesteps = draw_within(lambda n: torch.multinomial(weights, n, True, generator=generator), COUNT, 10, 30)
    assert timesteps.dtype == torch.long
    assert chi_square(timesteps - 10, COUNT * weights[10:30].double() / weights[10:30].sum()) < 4
    assert chi_square(timesteps - 10, torch.full((20,), COUNT / 20)) > 20, "the statistic tells it from a uniform one"


@pytest.mark.parametrize("bounds", [(0, 300), (300, 1000), (600, 700)])
def test_a_sampler_that_orders_its_timesteps_is_not_cut_short(bounds: tuple[int, int]) -> None:
    # The first half of a batch is drawn below the middle and mirrored into the second: its first rows are no sample.
    generator = seeded(4)

    def mirrored(count: int) -> Tensor:
        half = torch.randint(0, 500, (count // 2,), generator=generator).sort().values
        return torch.cat([half, 999 - half])

    timesteps = torch.cat([draw_within(mirrored, 32, *bounds) for _ in range(400)])
    tenths = (timesteps - bounds[0]) * 10 // (bounds[1] - bounds[0])
    assert chi_square(tenths, torch.full((10,), len(tenths) / 10)) < 4


def test_draws_that_all_lie_inside_are_passed_on_as_they_are() -> None:
    generator, same = seeded(5), seeded(5)
    state = torch.get_rng_state()
    timesteps = draw_within(lambda n: torch.rand(n, generator=generator), 16, 0.0, 1.0)
    assert torch.equal(timesteps, torch.rand(16, generator=same))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_of_the_draws_is_kept() -> None:
    timesteps = draw_within(lambda n: torch.arange(n), 16, 8, 1000)
    assert (timesteps.diff() != 0).all()
    first, later = timesteps[:8], timesteps[8:]
    assert first.tolist() == list(range(8, 16))
    assert (later.diff() > 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shape_and_dtype_are_those_of_the_sampler(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    timesteps = draw_within(lambda n: torch.rand(n, *shape).to(dtype), 9, 0.25, 0.75)
    assert timesteps.shape == (9, *shape)
    assert timesteps.dtype == dtype
    assert within(timesteps, 0.25, 0.75).all()


def test_one_end_of_the_interval_may_be_open() -> None:
    generator = seeded(6)
    timesteps = draw_within(lambda n: torch.randn(n, generator=generator), 1000, -math.inf, -0.5)
    assert timesteps.max() < -0.5
    assert timesteps.min() < -2


def test_rounds_grow_so_that_a_small_share_takes_few_of_them() -> None:
    sizes = []

    def draw(count: int) -> Tensor:
        sizes.append(count)
        return torch.rand(count)

    draw_within(draw, 32, 0.0, 0.02)
    assert sizes[:3] == [32, 64, 128]
    assert len(sizes) <= 8


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_density_without_mass_in_the_interval_is_refused(batch_size: int) -> None:
    sizes = []

    def draw(count: int) -> Tensor:
        sizes.append(count)
        return torch.rand(1).expand(count)

    message = (
        rf"\[start, stop\) = \[240, 460\) got 0 of \d+ timesteps drawn, fewer than batch_size={batch_size}: the "
        r"density has \(almost\) no mass there. Its last timesteps lay in \[0\.\d+, 0\.\d+\]: the interval "
        "must be in the same time unit"
    )
    with pytest.raises(DrawError, match=message):
        draw_within(draw, batch_size, 240, 460)
    assert len(sizes) == 20
    assert max(sizes) <= 2**20


def test_nan_is_never_inside() -> None:
    with pytest.raises(DrawError, match="got 0 of"):
        draw_within(lambda n: torch.full((1,), math.nan).expand(n), 1, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.rand(4), r"shape \(4,\)"),
        (torch.rand(3, 2), r"shape \(3, 2\)"),
        (torch.rand(()), r"shape \(\)"),
        ((torch.rand(3), torch.ones(3)), "a tuple"),
        ([0.1, 0.2, 0.3], "a list"),
    ],
    ids=["too many", "two per row", "scalar", "tuple", "list"],
)
def test_a_sampler_that_returns_anything_else_is_refused(result: object, got: str) -> None:
    message = rf"draw\(3\) must return a tensor of 3 timesteps, shape \(3,\) or \(3, 1, ...\), not {got}"
    with pytest.raises(DrawError, match=message):
        draw_within(lambda n: result, 3, 0, 1)  # type: ignore[arg-type, return-value]


def test_one_round_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU nothing waits; what would is counted instead: boolean indexing, and reading a number or a truth value.
    waits = []
    for name in ("__bool__", "item", "tolist", "nonzero", "__int__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *a, _f=original, _n=name, **k: waits.append(_n) or _f(*a, **k))
    original_index = Tensor.__getitem__

    def index(self: Tensor, key: object) -> Tensor:
        if isinstance(key, Tensor) and key.dtype == torch.bool:
            waits.append("mask")
        return original_index(self, key)

    monkeypatch.setattr(Tensor, "__getitem__", index)
    rounds = []
    draw_within(lambda n: rounds.append(n) or torch.rand(n, dtype=torch.float32), 64, 0, 0.25)
    assert waits == ["mask"] * len(rounds)
