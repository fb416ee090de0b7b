"""The dense denoiser comes back where a switch fails half way: for want of memory, or interrupted."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_earlybird.transition.optimizers import family
from lightning_earlybird.transition.slots import Edit


@contextmanager
def undone_on_error(module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> Iterator[list[Edit]]:
    """Restore modules, gradients and optimizers where the block raises, so that checkpoints are whole or not at all.

    Nothing is copied but references: what the block replaces lives until its end.

    Args:
        module: The LightningModule of the fit.
        optimizers: Its optimizers, bare.

    Yields:
        Where to put down the edits of containers, in their order.
    """
    edits: list[Edit] = []
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    toggled = dict(module._param_requires_grad_state)
    members = [member for optimizer in optimizers for member in family(optimizer)]
    states: list[tuple[MutableMapping[Any, Any], dict[Any, Any]]] = [(each.state, dict(each.state)) for each in members]
    groups = [(group, dict(group), list(group["params"])) for each in members for group in each.param_groups]
    try:
        yield edits
    except BaseException:  # a KeyboardInterrupt, too, before checkpoints are saved on exceptions
        for container, key, former in reversed(edits):
            container[key] = former
        for parameter, gradient in gradients:
            parameter.grad = gradient
        module._param_requires_grad_state.clear()
        module._param_requires_grad_state.update(toggled)
        for state, former in states:
            state.clear()
            state.update(former)
        for group, former, parameters in groups:
            group.update(former)
            group["params"][:] = parameters
        raise
