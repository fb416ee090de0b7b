"""Draws of timesteps inside a half-open interval, for a module's own ``sample_timesteps``.

A ticket trains on its part of the time axis only: its timesteps are those that the dense network would have drawn,
given that they fall into that part.
"""

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Rounds double up to the largest one: about 2**20 draws of a single timestep, some 10**7 of a usual batch. A density
# with less mass inside than that finds is taken for a mistake in the time unit.
_ROUNDS = 20
_LARGEST_ROUND = 2**20


class DrawError(ValueError):
    """An unrestricted sampler does not give timesteps, or gives none inside the interval."""


def draw_uniform(
    batch_size: int,
    start: float,
    stop: float,
    *,
    antithetic: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws timesteps uniformly from ``[start, stop)``.

    Args:
        batch_size: Number of timesteps.
        start: First timestep of the interval.
        stop: First timestep after it. Integers are drawn if both bounds are of type ``int``, otherwise numbers in
            continuous time; write ``float(start)`` where whole bounds are meant as such.
        antithetic: Whether to draw in pairs mirrored about the middle of the interval, ``t`` and ``start + stop - 1 -
            t`` for integers, ``start + stop - t`` in continuous time, which lowers the variance of the loss. Row ``i``
            and row ``i + ceil(batch_size / 2)`` are a pair; of an odd batch one row has no partner.
        generator: Source of the numbers; they are drawn on its own device.
        device: Where the result lies; the generator's device, or else torch's default one.

    Returns:
        Timesteps, shape (batch_size,), long or of torch's default floating dtype.

    Raises:
        ValueError: If ``batch_size`` is no positive integer, or the interval is empty or unbounded.
    """
    _check_batch_size(batch_size)
    check_interval(start, stop)
    if math.isinf(start) or math.isinf(stop):
        raise ValueError(
            f"[start, stop) = [{start!r}, {stop!r}) has no uniform density: both bounds must be finite. Use "
            "draw_within with the density that the dense network is trained with."
        )
    count = (batch_size + 1) // 2 if antithetic else batch_size
    # Compiled functions of changing batch size cannot be traced where `generator=None` is written out.
    source: dict[str, Any] = (
        {"device": device} if generator is None else {"generator": generator, "device": generator.device}
    )
    if isinstance(start, int) and isinstance(stop, int):
        timesteps = torch.randint(start, stop, (count,), **source)
        mirrored = (start + stop - 1) - timesteps
    else:
        uniform = torch.rand(count, **source)
        lower, upper = rounded(start, uniform.dtype), rounded(stop, uniform.dtype)
        if lower == upper:
            raise ValueError(
                f"[start, stop) = [{start!r}, {stop!r}) holds no number of {uniform.dtype}: widen the interval."
            )
        # Rounding can reach `stop`, which is outside, and the mirror of `start` lies exactly there.
        largest = float(torch.nextafter(torch.tensor(upper), torch.tensor(lower)))
        timesteps = (lower + (upper - lower) * uniform).clamp(lower, largest)
        mirrored = (lower + upper - timesteps).clamp(lower, largest)
    if antithetic:
        timesteps = torch.cat([timesteps, mirrored])[:batch_size]
    return timesteps if device is None else timesteps.to(device)


def _never_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """As ``torch.compiler.disable``, whose type says nothing."""
    return cast(Callable[_P, _R], torch.compiler.disable(function))


# How many rounds there are depends on what was drawn: compiled code would be compiled again and again.
@_never_compiled
def draw_within(draw: Callable[[int], Tensor], batch_size: int, start: float, stop: float) -> Tensor:
    """Draws timesteps of any density, given that they lie in ``[start, stop)``: those outside are drawn again.

    What comes is distributed exactly as the sampler's timesteps inside the interval are. Mirrored pairs and strata of a
    sampler are lost, since partners fall outside; every timestep by itself is distributed as it should be.

    Args:
        draw: The sampler of the whole axis: ``draw(n)`` returns n timesteps, shape (n,) or (n, 1, ...), any dtype, on
            any device. It is asked for ``batch_size`` timesteps first, for more in further rounds.
        batch_size: Number of timesteps.
        start: First timestep of the interval; may be ``-inf``.
        stop: First timestep after it; may be ``inf``. Bounds are rounded to the dtype of the timesteps.

    Returns:
        Timesteps, shape (batch_size,) or (batch_size, 1, ...), as ``draw`` gives them, in the order of drawing. There
        is one host synchronisation per round: usually one to four.

    Raises:
        ValueError: If ``batch_size`` is no positive integer, or the interval is empty.
        DrawError: If ``draw`` does not return n timesteps, or hardly any of them fall into the interval.
    """
    _check_batch_size(batch_size)
    check_interval(start, stop)
    accepted: list[Tensor] = []
    found = drawn = 0
    for round_index in range(_ROUNDS):
        size = max(batch_size, min(batch_size << round_index, _LARGEST_ROUND))
        timesteps = _checked(draw(size), size)
        inside = timesteps[within(timesteps.reshape(size), start, stop)]
        excess = found + len(inside) - batch_size
        if excess > 0:
            # Any of the last round may be left out, not just the last: a sampler may order its timesteps, as one that
            # stratifies or mirrors them does.
            order = torch.randperm(len(inside), device=inside.device)[excess:]
            inside = inside[order.sort().values]
        accepted.append(inside)
        found += len(inside)
        drawn += size
        if found == batch_size:
            return torch.cat(accepted)
    raise DrawError(
        f"[start, stop) = [{start!r}, {stop!r}) got {found} of {drawn} timesteps drawn, fewer than batch_size="
        f"{batch_size}: the density has (almost) no mass there. Its last timesteps lay in "
        f"[{timesteps.min().item()!r}, {timesteps.max().item()!r}]: the interval must be in the same time unit and "
        "hold a fair share of them. Adapt the draw, or move the bounds of the regions."
    )


def within(timesteps: Tensor, start: float, stop: float) -> Tensor:
    """Which timesteps lie in ``[start, stop)``, bounds rounded to their dtype; NaN does not.

    Args:
        timesteps: Any shape, integer or floating.
        start: First timestep of the interval; may be ``-inf``.
        stop: First timestep after it; may be ``inf``.

    Returns:
        Booleans of the same shape and on the same device.
    """
    values = timesteps if timesteps.is_floating_point() else timesteps.long()
    return (values >= rounded(start, timesteps.dtype)) & (values < rounded(stop, timesteps.dtype))


def rounded(bound: float, dtype: torch.dtype) -> float:
    """A bound as timesteps of a dtype can be compared with it.

    Args:
        bound: On the time axis; may be infinite.
        dtype: That of the timesteps.

    Returns:
        The nearest number of a floating dtype, or the least integer that is not below the bound; infinity where no
        integer of 64 bits is as large.
    """
    if math.isinf(bound):
        return bound
    if dtype.is_floating_point:
        # In its own dtype a timestep can equal a bound such as 0.24 exactly; in float64 the float32 value lies below.
        return float(torch.tensor(bound, dtype=dtype))
    # For an integer t and any real b: t >= b is t >= ceil(b), and likewise t < b; no rounding of large t to float.
    whole = math.ceil(bound)
    # Tensors compare with larger integers wrongly, or not at all.
    return whole if -(2**63) <= whole < 2**63 else math.copysign(math.inf, whole)


def check_number(name: str, value: Any) -> None:
    """Refuse what is no plain number.

    Raises:
        ValueError: The message names the argument.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits, and must fit into 64; use -inf or inf.")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name}={value!r} must be a plain int or float and not NaN; an open end is -inf or inf.")


def check_interval(start: float, stop: float) -> None:
    """Refuse bounds that are no numbers or hold nothing between them.

    Raises:
        ValueError: The message quotes them.
    """
    check_number("start", start)
    check_number("stop", stop)
    if not start < stop:
        raise ValueError(f"[start, stop) = [{start!r}, {stop!r}) is empty: start must be below stop.")


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1, the number of timesteps.")


def _checked(timesteps: Any, size: int) -> Tensor:
    if isinstance(timesteps, Tensor) and timesteps.dim() > 0 and len(timesteps) == size == timesteps.numel():
        return timesteps
    got = f"shape {tuple(timesteps.shape)}" if isinstance(timesteps, Tensor) else f"a {type(timesteps).__name__}"
    raise DrawError(
        f"draw({size}) must return a tensor of {size} timesteps, shape ({size},) or ({size}, 1, ...), not {got}."
    )
