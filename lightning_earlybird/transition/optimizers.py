"""Optimizers that go on, as the very same objects, with the parameters of the replacement.

Schedulers, ``LightningOptimizer`` wrappers, gradient scalers and the user's own references all point at the optimizer
objects, so these are edited in place instead of being built anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_earlybird.transition.lineage import Inherit, Lineage, share


def family(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it wraps (look-ahead, sharpness-aware and the like)."""
    members = [optimizer]
    for member in members:
        inner = [value for value in vars(member).values() if isinstance(value, Optimizer)]
        members += [value for value in inner if not any(value is known for known in members)]
    return members


def made_beforehand(module: pl.LightningModule) -> list[Optimizer]:
    """Optimizers that LightningCLI made of its ``--optimizer`` before there was a Trainer.

    It binds them to the ``configure_optimizers`` that it gives the module, which returns the same ones at every call.
    So they hold the dense parameters, also where a checkpoint has put tickets in their place before the fit begins.
    """
    function = getattr(module.configure_optimizers, "__func__", None)
    bound = function.keywords.values() if isinstance(function, partial) else ()
    return [value for value in bound if isinstance(value, Optimizer)]


def succeed(optimizers: Iterable[Optimizer], module: pl.LightningModule, lineage: Lineage, inherit: Inherit) -> bool:
    """Put the heirs in the place of the dense parameters, in groups and state, in place. True if a group changed.

    Each heir goes to its parent's group. A state tensor shaped like the parent is cut like the weights; scalars and
    plain values are copied for each heir. A parameter with state of another shape (the factored moments of Adafactor,
    say) loses its state, and the optimizer initialises it again.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    changed = False
    for optimizer in optimizers:
        complete = True
        done: set[int] = set()
        for member in family(optimizer):
            complete &= _succeed_in_state(member.state, lineage, inherit)
            for group in member.param_groups:
                if id(group) not in done:  # a wrapper usually shows its inner optimizer's own groups
                    done.add(id(group))
                    changed |= _succeed_in_group(group, lineage, names)
        if not complete:
            rank_zero_warn(
                f"{type(optimizer).__name__} keeps state that is not shaped like its parameters and cannot be cut to"
                " the tickets: for those parameters it starts again from its initial state."
            )
    return changed


def _succeed_in_group(group: dict[str, Any], lineage: Lineage, names: Mapping[nn.Parameter, str]) -> bool:
    leaving = set(lineage.dense.parameters())
    old = list(group["params"])
    first = next((index for index, parameter in enumerate(old) if parameter in leaving), None)
    if first is None:
        return False
    present = set(old)
    born = [heir for _, heir, parent in lineage if parent in present]
    # Heirs stand where the first dense parameter stood, in the order of their module: this is what a
    # `configure_optimizers` that goes through `parameters()` gives.
    new = [*old[:first], *born, *(parameter for parameter in old[first:] if parameter not in leaving)]
    if "param_names" in group:
        names = {**names, **dict(zip(old, group["param_names"], strict=True))}
        group["param_names"] = [names[parameter] for parameter in new]
    group["params"][:] = new
    return True


def _succeed_in_state(state: MutableMapping[Any, Any], lineage: Lineage, inherit: Inherit) -> bool:
    """Move state to the heirs; False if some of it is lost."""
    estate = {parameter: state.pop(parameter) for parameter in lineage.dense.parameters() if parameter in state}
    complete = True
    for name, heir, parent in lineage:
        if parent in estate:
            part = _part(estate[parent], name, heir, parent, inherit)
            if part is None:
                complete = False
            else:
                state[heir] = part
    return complete


def _part(
    values: Mapping[str, Any], name: str, heir: nn.Parameter, parent: nn.Parameter, inherit: Inherit
) -> dict[str, Any] | None:
    """One heir's part of its parent's state, or None if it cannot be cut."""
    part: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor):
            if _holds_tensor(value):
                return None
            part[key] = deepcopy(value)
        elif value.ndim == 0 or (value.numel() == 1 and value.shape != parent.shape):
            part[key] = value.detach().clone()
        elif value.shape == parent.shape and type(value) in (Tensor, nn.Parameter):
            part[key] = share(name, heir, value, inherit)
        else:  # another shape, or a tensor type of its own, such as a quantised moment
            return None
    return part


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple, set)) and any(map(_holds_tensor, value)))
