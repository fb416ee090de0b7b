"""Replacing the denoiser of a running fit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.transition.averages import averaged_modules
from lightning_earlybird.transition.compiled import compile_like, denoiser_context
from lightning_earlybird.transition.lineage import Inherit, Lineage, Source, hand_down, match
from lightning_earlybird.transition.optimizers import made_beforehand, succeed
from lightning_earlybird.transition.rehearsal import adopt_configured_order, bare
from lightning_earlybird.transition.rollback import undone_on_error
from lightning_earlybird.transition.slots import Edit, averaged_twins, put

Build = Callable[[nn.Module], nn.Module]


def replace_denoiser(
    trainer: pl.Trainer, module: pl.LightningModule, name: str, build: Build, inherit: Inherit, source: Source
) -> nn.Module:
    """Replace the denoiser by what ``build`` makes of it, and let all that the Trainer keeps about it follow.

    The replacement goes wherever the module holds the denoiser, with its device, precision, mode, ``requires_grad``
    and compilation. Optimizers and schedulers stay the same objects: the replacement's parameters take the place of
    the dense ones in their groups, with the state cut by ``inherit``, and so do pending gradients. Averaged copies
    (``WeightAveraging``, ``StochasticWeightAveraging``, an ``AveragedModel`` inside the module) are rebuilt from the
    averaged weights. DDP wraps the module anew, looking for unused parameters from then on. The state of the global
    random number generators stays as it was.

    To be called on every rank at the same step, where no forward or backward pass is under way and weights are not
    swapped: ``on_train_start``, ``on_train_epoch_start``, ``on_train_batch_start`` and ``..._end``,
    ``on_train_epoch_end``; and while a checkpoint is loaded, before the strategy is set up. An accumulation window may
    be unfinished. Where it raises, the dense denoiser is back in its place, with its gradients and optimizer state.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, changed in place.
        name: Dotted name of the denoiser in the module.
        build: Makes the replacement from a dense denoiser, without changing it; called for the live one and for each
            averaged copy, always with the same structure as the result.
        inherit: (name of a parameter of the replacement, tensor shaped like its dense parent) -> the tensor cut to the
            shape of that parameter.
        source: Name of a parameter of the replacement -> name of its dense parent; both relative to the denoiser.

    Returns:
        The replacement now in the module.

    Raises:
        RuntimeError: During validation inside a fit.
        ValueError: If ``build``, ``inherit`` and ``source`` do not fit together.
    """
    if trainer.state.fn == TrainerFn.FITTING and not trainer.training:
        raise RuntimeError(
            f"replace_denoiser was called while the fit was {trainer.state.stage}: averaged weights may stand in the"
            " module then. Call it in `on_train_batch_end` or `on_train_epoch_end`."
        )
    strategy = trainer.strategy
    optimizers = [bare(optimizer) for optimizer in strategy.optimizers]
    # While a checkpoint is loaded the fit has no optimizers yet.
    beforehand = [made for made in made_beforehand(module) if not any(made is known for known in optimizers)]
    with (
        isolate_rng(include_cuda=strategy.root_device.type == "cuda"),
        undone_on_error(module, [*optimizers, *beforehand]) as edits,
    ):
        wrapped = unwrap_ddp(strategy)
        lineages = _exchange(module, name, build, source, edits, strategy.precision_plugin.convert_module)
        changed = False
        for lineage in lineages:
            hand_down(lineage, inherit)
            changed |= succeed(optimizers, module, lineage, inherit)
            succeed(beforehand, module, lineage, inherit)
            _rekey_toggled(module, lineage)
        if changed:
            adopt_configured_order(module, optimizers)
        for average in averaged_modules(trainer):
            _exchange(average, name, build, source, edits)
            _require_same_structure(average, module)
        _prepare_ddp(strategy, wrapped)
    return lineages[0].replacement


def replace_outside_trainer(module: pl.LightningModule, name: str, build: Build, source: Source) -> nn.Module:
    """As :func:`replace_denoiser`, for a module of which no Trainer knows: there is nothing else to follow."""
    with isolate_rng(include_cuda=False):
        return _exchange(module, name, build, source, [], lambda replacement: replacement)[0].replacement


def _exchange(
    root: pl.LightningModule,
    name: str,
    build: Build,
    source: Source,
    edits: list[Edit],
    convert: Callable[[nn.Module], nn.Module] | None = None,
) -> list[Lineage]:
    """Replace the denoiser of ``root``, and then the copies of it that ``root`` averages itself.

    Only the live module (the one with a ``convert``) is converted to the Trainer's precision and compiled; averaged
    ones keep the precision that they have.
    """
    dense = unwrap(root.get_submodule(name))
    context = denoiser_context(root, dense) if convert is not None else None
    lineages = []
    for twin in [dense, *averaged_twins(root, dense)]:
        replacement = build(twin).to(next(twin.parameters()).device)
        if convert is not None and twin is dense:
            replacement = convert(replacement)
        lineage = Lineage.trace(twin, replacement, source)
        match(lineage, source)
        put(root, twin, replacement, edits)
        lineages.append(lineage)
    compile_like(lineages[0].replacement, context)
    return lineages


def _require_same_structure(average: nn.Module, module: nn.Module) -> None:
    """Averages are updated by zipping tensors by position, where a wrong one may broadcast silently."""

    def tensors(root: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(key, value.shape) for key, value in [*root.named_parameters(), *root.named_buffers()]]

    for ours, theirs in zip_longest(tensors(average), tensors(module)):
        if ours != theirs:
            raise ValueError(
                f"`build` gave the averaged denoiser another structure than the live one: {ours} against {theirs}."
                " Let `build` depend on the structure of the denoiser alone, not on its weights."
            )


def _rekey_toggled(module: pl.LightningModule, lineage: Lineage) -> None:
    """Let `toggle_optimizer`, where it was left open, find the heirs in what it remembers."""
    toggled: dict[Any, bool] = module._param_requires_grad_state  # keyed by parameters, whatever its annotation says
    remembered = {heir: toggled[parent] for _, heir, parent in lineage if parent in toggled}
    for parameter in lineage.dense.parameters():
        toggled.pop(parameter, None)
    toggled.update(remembered)


def unwrap_ddp(strategy: Strategy) -> bool:
    """Take the module out of DDP, whose reducer is bound to the dense parameters; whether it was in DDP."""
    if not isinstance(strategy.model, DistributedDataParallel):
        return False
    strategy.model._remove_autograd_hooks()
    strategy.model = strategy.lightning_module
    return True


def let_tickets_idle(strategy: Strategy) -> None:
    """Have DDP not wait for the gradients of a ticket that a rank's batch misses; before it wraps the module."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True


def _prepare_ddp(strategy: Strategy, wrapped: bool) -> None:
    let_tickets_idle(strategy)
    if isinstance(strategy, DDPStrategy) and wrapped:
        strategy.configure_ddp()
