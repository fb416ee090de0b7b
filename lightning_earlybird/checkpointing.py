"""Checkpoints of a module whose denoiser has become an ensemble: its structure travels with its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import find_ensemble, forget_training, split_name
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import resize_
from lightning_earlybird.tickets import EnsembleRecord
from lightning_earlybird.transition import averaged_modules, replace_denoiser

CHECKPOINT_KEY = "lightning_earlybird"
CHECKPOINT_VERSION = 1


def save_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint what its weights do not tell of the ensemble; plain containers and tensors only."""
    found = find_ensemble(module)
    if found is None:
        return
    name, ensemble = found
    assert ensemble.record is not None
    checkpoint[CHECKPOINT_KEY] = {
        "format_version": CHECKPOINT_VERSION,
        "denoiser": name,
        "partition": ensemble.partition.to_json(),
        "timesteps": asdict(ensemble.timesteps),
        "record": ensemble.record.to_json(),
        "masks": [mask.state_dict() for mask in ensemble.record.masks],
        # Of tickets that other ranks train there are no tensors to tell their shapes.
        "absent": {
            str(index): {key: list(shape) for key, shape in ticket.shapes().items()}
            for index, ticket in enumerate(ensemble.tickets)
            if isinstance(ticket, AbsentTicket)
        },
    }


def restore_structure(trainer: pl.Trainer, module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Give a module with a dense denoiser the structure that a checkpoint was taken with; its weights come later.

    Raises:
        MisconfigurationException: If the structures cannot be reconciled.
    """
    state = checkpoint.get(CHECKPOINT_KEY)
    present = find_ensemble(module)
    if state is None:
        if present is not None:
            raise MisconfigurationException(
                f"ckpt_path: the checkpoint was taken before the switch, but {present[0]!r} already holds tickets. "
                "Build a fresh module and load the checkpoint into that."
            )
        return
    if state["format_version"] > CHECKPOINT_VERSION:
        raise MisconfigurationException(
            f"ckpt_path: its tickets have format version {state['format_version']}, and this lightning-earlybird reads "
            f"up to {CHECKPOINT_VERSION}. Upgrade it."
        )
    name = state["denoiser"]
    record = EnsembleRecord.from_json(state["record"], [TicketMask.from_state_dict(mask) for mask in state["masks"]])
    partition = TimestepPartition.from_json(state["partition"])
    timesteps = TimestepArgument(**state["timesteps"])
    prefix = f"{name}.tickets."
    shapes: list[dict[str, torch.Size]] = [{} for _ in partition]
    for key, tensor in checkpoint["state_dict"].items():
        if key.startswith(prefix):
            ticket, dense_name = split_name(key.removeprefix(f"{name}."))
            shapes[ticket][dense_name] = tensor.shape
    absent = {int(index): own for index, own in state.get("absent", {}).items()}
    for index, own in absent.items():
        shapes[index] = {key: torch.Size(shape) for key, shape in own.items()}
    if present is not None and set(present[1].hosted) & set(absent):
        raise MisconfigurationException(
            f"ckpt_path: the checkpoint lacks the tickets {sorted(absent)}, which other ranks trained, and the module "
            "has them. Load it into a fresh module, or go by the ensemble that the pruner writes at the end."
        )
    if present is not None:
        own_shapes = [
            ticket.shapes()
            if isinstance(ticket, AbsentTicket)
            else {key: value.shape for key, value in ticket.state_dict().items()}
            for ticket in present[1].tickets
        ]
        if own_shapes != shapes:
            raise MisconfigurationException(
                f"ckpt_path: its tickets have other shapes than those in {present[0]!r}. Build a fresh module and load "
                "the checkpoint into that."
            )
        # Shapes alone do not tell how channels are shared out over attention heads and norm groups.
        if present[1].record is None or present[1].record.edits != record.edits:
            raise MisconfigurationException(
                f"ckpt_path: its tickets have other attention heads or norm groups than those in {present[0]!r}. Build "
                "a fresh module and load the checkpoint into that."
            )
        for root in (module, *averaged_modules(trainer)):
            ensemble = root.get_submodule(present[0])
            assert isinstance(ensemble, TicketEnsemble)
            ensemble.partition, ensemble.timesteps, ensemble.record = partition, timesteps, record
        return

    def build(dense: nn.Module) -> nn.Module:
        tickets: list[nn.Module] = [
            resize_(copy.deepcopy(dense), shape, edits) for shape, edits in zip(shapes, record.edits, strict=True)
        ]
        for index in absent:
            tickets[index] = AbsentTicket(tickets[index])
        ensemble = TicketEnsemble(tickets, partition, timesteps)
        ensemble.record = record
        return ensemble

    try:
        forget_training(trainer, unwrap(module.get_submodule(name)))
        replace_denoiser(trainer, module, name, build, lambda _, tensor: tensor, lambda new: split_name(new)[1])
    except (AttributeError, ValueError) as error:
        raise MisconfigurationException(
            f"ckpt_path: the tickets in the checkpoint do not fit this module's denoiser {name!r}: {error} Build the "
            "module that the checkpoint was taken from."
        ) from error


def follow_checkpoints(trainer: pl.Trainer, module: pl.LightningModule) -> Callable[[], None]:
    """Have the module's checkpoints carry the structure of its tickets, and restore it before weights are loaded.

    Both go through the module's own hooks: Lightning loads weights strictly before any callback sees the checkpoint,
    and asks no callback at all where only weights are saved. Returns a function that undoes it.
    """
    own_load, own_save = module.on_load_checkpoint, module.on_save_checkpoint

    # Closures and not bound methods: WeightAveraging deep-copies the module, and must not clone callbacks with it.
    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        restore_structure(trainer, module, checkpoint)
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
