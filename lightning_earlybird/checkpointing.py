"""Checkpoints of a module whose denoiser has become an ensemble: its structure travels with its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import find_ensemble, forget_training, split_name
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.saved_structure import CHECKPOINT_KEY, SavedStructure, check_dtypes, write_structure
from lightning_earlybird.transition import averaged_modules, let_tickets_idle, replace_denoiser, replace_outside_trainer

_OF_TICKET = re.compile(r"(^|\.)tickets\.[0-9]+\.")


def save_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint what its weights do not tell of the ensemble; plain containers and tensors only.

    Nothing for an ensemble without a record, which its owner put together by hand and can put together again.
    """
    found = find_ensemble(module)
    if found is not None and found[1].record is not None:
        checkpoint[CHECKPOINT_KEY] = write_structure(*found)


def restore_structure(
    trainer: pl.Trainer | None,
    module: pl.LightningModule,
    checkpoint: Mapping[str, Any],
    file: str | None = None,
    *,
    partial: bool = False,
) -> None:
    """Give a module with a dense denoiser the structure that a checkpoint was taken with; its weights come later.

    A module that has the structure already is given the checkpoint's regions and record. After an error the module is
    as it was.

    Args:
        trainer: The Trainer that loads the checkpoint; None where the module is loaded by itself.
        module: The LightningModule, changed in place.
        checkpoint: A checkpoint that nobody vouches for.
        file: Where it was read, for messages.
        partial: Whether a dense denoiser may become an ensemble of which other ranks train a part.

    Raises:
        EnsembleFormatError: If what the checkpoint says of tickets is damaged, or of a newer format.
        MisconfigurationException: If it cannot be reconciled with the module.
    """
    argument = "checkpoint_path" if trainer is None else "ckpt_path"
    if file is None:
        file = str(getattr(trainer, "ckpt_path", None) or "the checkpoint")
    structure = SavedStructure.read(checkpoint, file)
    present = find_ensemble(module)
    if structure is None:
        if present is not None and present[1].record is not None:
            raise MisconfigurationException(
                f"{argument}: the checkpoint was taken before the switch, but {present[0]!r} already holds tickets. "
                "Build a fresh module and load the checkpoint into that."
            )
        _refuse_undescribed(argument, module, checkpoint)
        return
    if structure.absent and present is None and not partial:
        raise MisconfigurationException(
            f"{argument}: the checkpoint lacks the tickets {sorted(structure.absent)} of {len(structure.shapes)}, "
            "which other ranks trained under MultiTicketStrategy. Load the ensemble that the pruner writes at the end, "
            "or put the groups' checkpoints together with TicketEnsembleSampler.from_checkpoint([...])."
        )
    if present is not None:
        _check_same(argument, present, structure)
        for root in (module, *(averaged_modules(trainer) if trainer is not None else [])):
            ensemble = root.get_submodule(structure.denoiser)
            assert isinstance(ensemble, TicketEnsemble)
            ensemble.partition, ensemble.timesteps = structure.partition, structure.timesteps
            ensemble.record = structure.record
        return
    name = structure.denoiser
    try:
        dense = unwrap(module.get_submodule(name))
        structure.check(dense)
    except (AttributeError, ValueError) as error:
        raise MisconfigurationException(
            f"{argument}: the tickets in the checkpoint do not fit this module's denoiser {name!r}: {error} Build the "
            "module that the checkpoint was taken from."
        ) from error
    if trainer is None:
        replace_outside_trainer(module, name, structure.build, _dense_name)
        return
    forget_training(trainer, dense)
    replace_denoiser(trainer, module, name, structure.build, lambda _, tensor: tensor, _dense_name)


def follow_checkpoints(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
    """Have the module's checkpoints carry the structure of its tickets, and restore it before weights are loaded.

    Both go through the module's own hooks: Lightning loads weights strictly before any callback sees the checkpoint,
    and asks no callback at all where only weights are saved. To be called in a callback's ``setup``. Returns a function
    that undoes it.
    """
    if find_ensemble(module) is not None:
        let_tickets_idle(trainer.strategy)  # a module that was loaded, or trained before, is not restored once more
    own_load, own_save = module.on_load_checkpoint, module.on_save_checkpoint

    # Closures and not bound methods: WeightAveraging deep-copies the module, and must not clone callbacks with it.
    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        restore_structure(trainer, module, checkpoint, partial=True)
        own_load(checkpoint)

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        save_structure(module, checkpoint)
        own_save(checkpoint)

    hooks = {"on_load_checkpoint": on_load_checkpoint, "on_save_checkpoint": on_save_checkpoint}
    module.__dict__.update(hooks)

    def undo() -> None:
        for name, hook in hooks.items():
            if module.__dict__.get(name) is hook:
                del module.__dict__[name]

    return undo


def _refuse_undescribed(argument: str, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse tickets that nothing is said of; where names need not match, the module would stay dense in silence."""
    weights = checkpoint.get("state_dict")
    names = (
        [key for key in weights if isinstance(key, str) and _OF_TICKET.search(key)] if isinstance(weights, dict) else []
    )
    unknown = sorted(set(names) - set(module.state_dict())) if names else []
    if unknown:
        raise MisconfigurationException(
            f"{argument}: the checkpoint holds tickets ({unknown[0]!r}) that it does not describe: it was saved by a "
            "Trainer without a TimestepAwarePruner, from a module without TicketCheckpoints. Load an earlier "
            "checkpoint of the tickets, and then this one's weights with load_state_dict."
        )


def _check_same(argument: str, present: tuple[str, TicketEnsemble], structure: SavedStructure) -> None:
    """Refuse a checkpoint whose weights would mean something else in the tickets that are there."""
    name, ensemble = present
    remedy = "Build a fresh module and load the checkpoint into that."
    if name != structure.denoiser:
        raise MisconfigurationException(
            f"{argument}: its tickets stand in {structure.denoiser!r}, but the module has tickets in {name!r}. {remedy}"
        )
    if set(ensemble.hosted) & structure.absent:
        raise MisconfigurationException(
            f"{argument}: the checkpoint lacks the tickets {sorted(structure.absent)}, which other ranks trained, and "
            "the module has them. Load it into a fresh module, or go by the ensemble that the pruner writes at the end."
        )
    shapes = tuple(
        ticket.shapes()
        if isinstance(ticket, AbsentTicket)
        else {key: value.shape for key, value in ticket.state_dict().items()}
        for ticket in ensemble.tickets
    )
    if shapes != structure.shapes:
        raise MisconfigurationException(f"{argument}: its tickets have other shapes than those in {name!r}. {remedy}")
    # Shapes alone do not tell how channels are shared out over attention heads and norm groups.
    if ensemble.record is None or ensemble.record.edits != structure.record.edits:
        raise MisconfigurationException(
            f"{argument}: its tickets have other attention heads or norm groups than those in {name!r}. {remedy}"
        )
    for index, (ticket, dtypes) in enumerate(zip(ensemble.tickets, structure.dtypes, strict=True)):
        try:
            if not isinstance(ticket, AbsentTicket):
                check_dtypes(ticket, dtypes)
        except ValueError as error:
            raise MisconfigurationException(f"{argument}: ticket {index} does not fit {name!r}: {error}") from error


def _dense_name(name: str) -> str:
    return split_name(name)[1]
