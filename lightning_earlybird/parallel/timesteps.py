"""While a ticket takes its turn, a module draws the timesteps of that ticket only.

Its own ``sample_timesteps`` is restricted where it has one; else integer draws over the whole time axis are. Neither
can know what ``training_step`` does with the timesteps afterwards, so what reaches the denoiser is checked as well
(:mod:`lightning_earlybird.parallel.turn_check`).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_earlybird.draws import DrawError, check_interval, draw_within, rounded
from lightning_earlybird.parallel.integer_draws import LimitedIntegerDraws, unlimited_draws

Interval: TypeAlias = tuple[float, float]
"""``(start, stop)``, half-open, in the time unit of the regions."""

_NAME = "sample_timesteps"


@contextmanager
def limited_timesteps(module: nn.Module, axis: Interval, bounds: Interval) -> Iterator[None]:
    """Restricts the timesteps that a module draws inside the context.

    A method ``sample_timesteps(batch_size, ...)`` comes first. If it takes ``start`` and ``stop``, it is given the
    bounds, and keeps to them itself; bounds that the caller gives, too, are met with them. Otherwise it is asked until
    enough of its timesteps lie inside, which keeps its density (:func:`~lightning_earlybird.draws.draw_within`).

    A module without this method has its integer draws restricted whose range is exactly the axis: ``torch.randint``,
    ``torch.randint_like`` and ``Tensor.random_``; inside of compiled functions ``torch.randint`` only. As many random
    numbers are consumed as without. Draws of any other range, or of another kind, are left alone.

    Contexts of one module may be nested: the innermost counts.

    Args:
        module: The LightningModule whose ``training_step`` runs inside. It is the same afterwards, whatever happens.
        axis: Bounds of the whole time axis.
        bounds: Those of the ticket in turn, inside the axis. ``start`` and ``stop`` are passed as integers if all four
            numbers are whole and the axis is given in integers, and as floats otherwise.

    Raises:
        ValueError: If an interval is empty, or the bounds reach beyond the axis.
    """
    for interval in (axis, bounds):
        check_interval(*interval)
    if not axis[0] <= bounds[0] < bounds[1] <= axis[1]:
        raise ValueError(f"bounds={bounds!r} must lie inside axis={axis!r}.")
    sampler = find_sampler(module)
    if sampler is not None:
        with _replaced(module, _limited_sampler(sampler, f"{type(module).__name__}.{_NAME}", axis, bounds)):
            yield
        return
    low, high = rounded(bounds[0], torch.long), rounded(bounds[1], torch.long)
    if bounds == axis or not all(map(_is_whole, axis)) or low >= high:
        with unlimited_draws():
            yield
        return
    with LimitedIntegerDraws((int(axis[0]), int(axis[1])), (int(low), int(high))):
        yield


def find_sampler(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own way to draw timesteps.

    Args:
        module: The LightningModule.

    Returns:
        ``module.sample_timesteps``, a method or a module, as it is outside of :func:`limited_timesteps`; None if there
        is none, or the name means something else, such as a number of steps.
    """
    sampler = getattr(module, _NAME, None)
    if isinstance(sampler, _Sampler):
        sampler = sampler.unlimited
    return sampler if callable(sampler) else None


class _Sampler:
    """What stands in for a ``sample_timesteps``; a class, so that the original is known again."""

    def __init__(self, unlimited: Callable[..., Any], limited: Callable[..., Any]) -> None:
        self.unlimited = unlimited
        self.limited = limited

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.limited(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the module that training_step makes outlives the turn: it gets a sampler of its own.
        return copy.deepcopy(self.unlimited, memo)


@contextmanager
def _replaced(module: nn.Module, sampler: _Sampler) -> Iterator[None]:
    """Shadows the method in the instance's ``__dict__``, where Python looks before the class and the submodules."""
    members = vars(module)
    had, before = _NAME in members, members.get(_NAME)
    members[_NAME] = sampler
    try:
        yield
    finally:
        if had:
            members[_NAME] = before
        else:
            del members[_NAME]


def _limited_sampler(sampler: Callable[..., Any], name: str, axis: Interval, bounds: Interval) -> _Sampler:
    parameters = _parameters(sampler)
    if _accepts(parameters, "start") and _accepts(parameters, "stop"):
        return _Sampler(sampler, _passing_bounds(sampler, name, parameters, _alike(axis, bounds)))
    if bounds == axis:
        return _Sampler(sampler, sampler)
    return _Sampler(sampler, _drawing_again(sampler, name, next(iter(parameters), ""), bounds))


def _parameters(sampler: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        # The signature of a module itself is that of __call__, which takes anything.
        return inspect.signature(sampler.forward if isinstance(sampler, nn.Module) else sampler).parameters
    except (TypeError, ValueError):
        return {}


def _accepts(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    kinds = [parameter.kind for parameter in parameters.values()]
    if name in parameters:
        return parameters[name].kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return inspect.Parameter.VAR_KEYWORD in kinds


def _alike(axis: Interval, bounds: Interval) -> Interval:
    """The bounds, both as integers or both as floats: an overlap of 20.0 must not make the timesteps of DDPM floats."""
    if all(map(_is_whole, (*axis, *bounds))) and all(isinstance(end, int) for end in axis):
        return int(bounds[0]), int(bounds[1])
    return float(bounds[0]), float(bounds[1])


def _is_whole(number: float) -> bool:
    return isinstance(number, int) or number.is_integer()


def _passing_bounds(
    sampler: Callable[..., Any], name: str, parameters: Mapping[str, inspect.Parameter], bounds: Interval
) -> Callable[..., Any]:
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = [parameter.name for parameter in parameters.values() if parameter.kind in places]
    ends: tuple[tuple[Literal["start", "stop"], float, Callable[..., float]], ...] = (
        ("start", bounds[0], max),
        ("stop", bounds[1], min),
    )

    def limited(*args: Any, **kwargs: Any) -> Any:
        # A training_step may pass bounds by itself, such as the number of timesteps: the draw is in both intervals.
        positional = dict(zip(order, args, strict=False))
        met = {}
        for end, bound, narrower in ends:
            given = positional.get(end, kwargs.get(end))
            met[end] = bound if given is None else narrower(bound, given)
        if not met["start"] < met["stop"]:
            raise ValueError(
                f"training_step asks {name} for timesteps in an interval that has none in common with "
                f"[{bounds[0]!r}, {bounds[1]!r}), the timesteps of the ticket in turn. Leave start and stop out of the "
                "call, or restrict them to what the regions cover."
            )
        args = (
            tuple(met.pop(end) if end in met else value for end, value in positional.items()) + args[len(positional) :]
        )
        return sampler(*args, **(kwargs | met))

    return limited


def _drawing_again(sampler: Callable[..., Any], name: str, first: str, bounds: Interval) -> Callable[..., Any]:
    remedy = f"Let {name} take start and stop, and draw inside of them by itself."

    def limited(*args: Any, **kwargs: Any) -> Any:
        batch_size = args[0] if args else kwargs.get(first)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(
                f"{name} must be called with the batch size, an integer, as its first argument to be restricted to the "
                f"timesteps of the ticket in turn, not with {type(batch_size).__name__}. {remedy}"
            )

        def draw(count: int) -> Any:
            return sampler(count, *args[1:], **kwargs) if args else sampler(**{**kwargs, first: count})

        try:
            return draw_within(draw, batch_size, *bounds)
        except DrawError as error:
            raise DrawError(f"{name} was asked for timesteps of the ticket in turn: {error} {remedy}") from error

    return limited
