"""Integer draws of another range than the one that the code around them asks for."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

# How many arguments come before the bounds: the tensor that is filled, or whose shape is taken.
_LEADING: dict[Any, int] = {torch.randint: 0, torch.randint_like: 1, torch.Tensor.random_: 1}


class LimitedIntegerDraws(TorchFunctionMode):
    """Integer draws over exactly the axis become draws over the bounds.

    These are ``torch.randint``, ``torch.randint_like`` and ``Tensor.random_`` in all their forms; shape, dtype, device,
    generator and the number of random numbers consumed are the same as without.

    It acts while torch.compile traces a function, too (a draw inside of a compiled graph is seen at no other time), and
    dynamo guards on the bounds: graphs that draw are compiled once for each ticket, others once.

    Args:
        axis: ``(start, stop)`` of the draws to be limited.
        bounds: ``(start, stop)`` of what is drawn instead.
    """

    def __init__(self, axis: tuple[int, int], bounds: tuple[int, int]) -> None:
        super().__init__()
        self.axis = axis
        self.bounds = bounds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LEADING:
            args, kwargs = self._limited(func, args, kwargs)
        return func(*args, **kwargs)

    def _limited(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        low, high = ("from", "to") if func is torch.Tensor.random_ else ("low", "high")
        leading = _LEADING[func] if "input" not in kwargs else 0
        trailing = int(func is torch.randint and "size" not in kwargs)
        given = args[leading : len(args) - trailing]
        ends = [*given, *(kwargs[name] for name in (low, high) if name in kwargs)]
        if len(ends) == 1:  # the upper one, or torch would have refused the call by now
            ends = [0, *ends]
        if len(ends) != 2 or (_integer(ends[0]), _integer(ends[1])) != self.axis:
            return args, kwargs
        if "input" in kwargs:  # nothing positional may come after it
            return (), {**kwargs, low: self.bounds[0], high: self.bounds[1]}
        rest = {name: value for name, value in kwargs.items() if name not in (low, high)}
        return (*args[:leading], *self.bounds, *args[len(args) - trailing :]), rest


@contextmanager
def unlimited_draws() -> Iterator[None]:
    """Leaves integer draws alone inside of :class:`LimitedIntegerDraws`, for the time of a call of the denoiser.

    No timesteps are drawn in there, and watching every operation costs a microsecond of each.
    """
    mode = _get_current_function_mode()
    # A mode that the user's code entered since then is not ours to leave.
    if not isinstance(mode, LimitedIntegerDraws):
        yield
        return
    mode.__exit__(None, None, None)
    try:
        with unlimited_draws():
            yield
    finally:
        mode.__enter__()


def _integer(value: Any) -> int | None:
    """A bound as torch takes it: an integer of Python or NumPy, or a tensor of one."""
    if isinstance(value, int):
        return value
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_floating_point()):
        return None
    return operator.index(value) if hasattr(value, "__index__") else None
