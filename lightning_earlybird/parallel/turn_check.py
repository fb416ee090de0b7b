"""The check on what a ticket in turn is given: timesteps of its own, or an error that shows how to draw them."""

import math
import textwrap

import torch
from torch import Tensor

from lightning_earlybird.draws import rounded
from lightning_earlybird.parallel.timesteps import Interval

# Rounding errors to allow for in continuous time, in units of the dtype's precision.
_ULPS = 4


class TimestepsOutsideError(ValueError):
    """The denoiser was called with timesteps that the ticket in turn does not train on."""


def check_turn(
    timesteps: Tensor | float,
    bounds: Interval,
    *,
    axis: Interval,
    ticket: int,
    module_name: str,
    has_sampler: bool,
) -> None:
    """Refuses timesteps on which the ticket in turn does not train; costs one host synchronisation.

    Integers must lie in ``[start, stop)``. In continuous time bounds are rounded to the dtype of the timesteps as
    elsewhere, and both count as inside, with a few units of rounding error: a timestep drawn just below ``stop`` may
    come out as ``stop`` once it is scaled, cast to half precision, or turned into a sigma and back, and at the end of
    the axis ``stop`` itself is a timestep. A rare event of one batch in millions must not end a training.

    Args:
        timesteps: What the denoiser was called with: a tensor of any shape, or a number.
        bounds: ``(start, stop)`` of the ticket's training.
        axis: ``(start, stop)`` of the whole time axis.
        ticket: Index of the ticket.
        module_name: Name of the user's LightningModule class.
        has_sampler: Whether timesteps were restricted through its ``sample_timesteps``, not in integer draws.

    Raises:
        TimestepsOutsideError: The message quotes the first timestep outside, says how timesteps were restricted, and
            shows how to write and call a ``sample_timesteps`` that keeps to the bounds.
    """
    if isinstance(timesteps, Tensor):
        values = timesteps.detach().to("cpu").reshape(-1)
    else:
        values = torch.tensor([timesteps], dtype=torch.float64 if isinstance(timesteps, float) else None)
    outside = _outside(values, *bounds)
    if not bool(outside.any()):
        return
    count = int(outside.sum())
    others = f" ({count} of {len(values)} timesteps lie outside)" if len(values) > 1 else ""
    raise TimestepsOutsideError(
        f"The denoiser was called with timestep {values[outside][0].item()!r} while ticket {ticket} was in turn, which "
        f"trains on timesteps in [{bounds[0]!r}, {bounds[1]!r}){others}. "
        + _how_restricted(module_name, axis, bounds, has_sampler)
        + " Write the draw as a method of the LightningModule, with the density that it has now, in the unit in which "
        "the denoiser takes its timesteps:\n\n" + textwrap.indent(_recipe(axis, _is_continuous(values, axis)), "    ")
    )


def _outside(values: Tensor, start: float, stop: float) -> Tensor:
    if not values.is_floating_point():
        values = values.long()
        return (values < rounded(start, torch.long)) | (values >= rounded(stop, torch.long))
    # The scale is at least 1 because values next to 0 may be differences of larger ones, as log(sigma) is.
    scale = max([1.0, *(abs(bound) for bound in (start, stop) if math.isfinite(bound))])
    allowance = _ULPS * torch.finfo(values.dtype).eps * scale
    lower, upper = rounded(start, values.dtype) - allowance, rounded(stop, values.dtype) + allowance
    # Written as the negation of what must hold, so that NaN, which compares false with everything, is outside too.
    return ~((values >= lower) & (values <= upper))


def _is_continuous(values: Tensor, axis: Interval) -> bool:
    whole = all(isinstance(end, int) for end in axis) and not values.is_floating_point()
    return not whole and not bool((values == values.round()).all())


def _how_restricted(module_name: str, axis: Interval, bounds: Interval, has_sampler: bool) -> str:
    if has_sampler:
        return (
            f"Timesteps come from {module_name}.sample_timesteps: it was given start={bounds[0]!r} and "
            f"stop={bounds[1]!r} if it takes them, and what it drew outside was drawn again if not. So either it takes "
            "start and stop without keeping to them, or training_step changes what it returns, or does not call it "
            "for the timesteps of the denoiser."
        )
    if not all(math.isfinite(end) and float(end).is_integer() for end in axis):
        return (
            f"{module_name} has no method sample_timesteps, and draws on a time axis [{axis[0]!r}, {axis[1]!r}) cannot "
            "be told from other random numbers, so that nothing was restricted."
        )
    return (
        f"{module_name} has no method sample_timesteps, so that only integer draws over exactly [{axis[0]!r}, "
        f"{axis[1]!r}) were restricted (torch.randint, torch.randint_like, Tensor.random_). Not restricted were draws "
        "over another range, draws with NumPy, in the data loader, with torch.rand or torch.randperm; and a timestep "
        "made from a draw, such as its mirror image T - 1 - t or an entry of a schedule, need not lie where the draw "
        "does."
    )


def _recipe(axis: Interval, continuous: bool) -> str:
    """How to write and call ``sample_timesteps``, for the kind of time axis at hand."""
    if not all(map(math.isfinite, axis)):
        defaults = [f'float("{end}")' if math.isinf(end) else repr(float(end)) for end in axis]
        other = "torch.randn(n, device=self.device)"
        uniform = None
    elif continuous:
        defaults = [repr(float(end)) for end in axis]
        scale = "" if defaults[1] == "1.0" else f"{defaults[1]} * "
        other = f"{scale}torch.randn(n, device=self.device).sigmoid()"
        uniform = "float(start), float(stop)"
    else:
        defaults = [repr(int(end)) for end in axis]
        other = f"torch.multinomial(self.weights, n, replacement=True){' + ' + defaults[0] if axis[0] else ''}"
        # With bounds in floats draw_uniform would draw in continuous time.
        uniform = "start, stop" if all(isinstance(end, int) for end in axis) else "int(start), int(stop)"
    lines = [
        "from lightning_earlybird import draw_uniform, draw_within",
        "",
        f"def sample_timesteps(self, batch_size, start={defaults[0]}, stop={defaults[1]}):",
    ]
    if uniform is not None:
        lines.append(f"    return draw_uniform(batch_size, {uniform}, device=self.device)  # or antithetic=True")
        lines.append("    # any other density, from what draws n timesteps of the whole axis:")
    lines.append(f"    {'# ' if uniform else ''}return draw_within(lambda n: {other}, batch_size, start, stop)")
    lines += ["", "timesteps = self.sample_timesteps(batch_size)  # in training_step"]
    return "\n".join(lines)
