"""The order of optimizer parameters that the user's ``configure_optimizers`` gives for the new structure.

Lightning restores optimizer states by index. A fit that resumes after the switch builds its optimizers anew, so the
optimizers of this fit must hold their parameters in the order that the user's code will give then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.core.optimizer import LightningOptimizer, _init_optimizers_and_lr_schedulers
from torch.optim import Optimizer

from lightning_earlybird.transition.optimizers import made_beforehand


def bare(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """The optimizer inside Lightning's wrapper, or the optimizer itself."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def adopt_configured_order(module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Reorder the parameters inside each group, in place, as ``configure_optimizers`` orders them.

    The hook is called once, on the changed module, and what it makes is thrown away. A group that it does not
    reproduce keeps its order, with one warning. Optimizers of LightningCLI are not made anew in a fit that resumes, but
    changed as they are here, and so come to the same order.
    """
    if made_beforehand(module):
        return
    fresh: list[Optimizer] = []
    problem = None
    with _left_untouched(module, optimizers):
        try:
            fresh = [bare(optimizer) for optimizer in _init_optimizers_and_lr_schedulers(module)[0]]
        except Exception as error:  # the user's code, written for the dense structure, may fail in any way
            problem = f"it raises {type(error).__name__}: {error}"
    if problem is None and len(fresh) != len(optimizers):
        problem = f"it gives {len(fresh)} optimizers where the fit has {len(optimizers)}"
    if problem is None:
        problems = [_adopt(optimizer, dry) for optimizer, dry in zip(optimizers, fresh, strict=True)]
        problem = next(filter(None, problems), None)
    if problem is not None:
        rank_zero_warn(
            f"`configure_optimizers` does not give this fit's optimizers for the tickets: {problem}. Training goes on"
            " with each ticket parameter in the group of the dense one, but a fit that resumes from a later checkpoint"
            " may restore optimizer states in the wrong order, or fail. To avoid it, let `configure_optimizers` make"
            " its optimizers from the module's `named_parameters()`, without relying on the denoiser's structure."
        )


def _adopt(optimizer: Optimizer, dry: Optimizer) -> str | None:
    """Take over the order of a fresh optimizer; returns what does not fit."""
    kind = type(dry).__name__
    if dry is optimizer:
        return f"it returns a {kind} that was made before it was called"
    problem = None
    for index, group in enumerate(optimizer.param_groups):
        wanted = dry.param_groups[index] if index < len(dry.param_groups) else {"params": []}
        if set(wanted["params"]) != set(group["params"]):
            problem = problem or f"parameter group {index} of its {kind} has other members than in this fit"
            continue
        group["params"][:] = wanted["params"]
        if "param_names" in group:
            group["param_names"] = list(wanted["param_names"])
    return problem


@contextmanager
def _left_untouched(module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Undo what a call of ``configure_optimizers`` does besides returning: to the module, to live optimizers.

    User code often stores what it makes (``self.scheduler = ...``) and would then step what was thrown away. Random
    number generators are left to the caller.
    """
    owners = [vars(owner) for owner in (module, *optimizers)]
    # Dictionaries and lists are restored in place, because others may hold them too.
    mutable: list[Any] = [value for owner in owners for value in owner.values() if type(value) in (dict, list)]
    mutable += [*owners, *(group for optimizer in optimizers for group in optimizer.param_groups)]
    contents = [value.copy() for value in mutable]
    frozen = {parameter: parameter.requires_grad for parameter in module.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever it says, it has said at the start of the fit
        yield
    for value, content in zip(mutable, contents, strict=True):
        if isinstance(value, list):
            value[:] = content
        else:
            for key in value.keys() - content.keys():
                del value[key]
            value.update(content)
    for parameter, requires_grad in frozen.items():
        parameter.requires_grad_(requires_grad)
