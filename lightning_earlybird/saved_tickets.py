"""Tickets that were saved earlier take the denoiser's place at the start of a fit."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import forget_training, split_name
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.structure import count_parameters
from lightning_earlybird.tickets import describe_denoiser, load_ensemble, tensor_names
from lightning_earlybird.transition import check_supported, replace_denoiser


def take_saved_tickets(
    trainer: pl.Trainer, module: pl.LightningModule, name: str | None, path: Path
) -> tuple[str, TicketEnsemble]:
    """Replace the denoiser by the tickets in a directory.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule, changed in place.
        name: Dotted name of the denoiser; None finds the sub-module whose tensors have the tickets' names.
        path: Directory that ``save_ensemble`` wrote.

    Returns:
        The denoiser's name and the ensemble as it was loaded.

    Raises:
        EnsembleFormatError: If the directory is damaged or something else.
        MisconfigurationException: If the denoiser is not found, or is not the network that the tickets were cut from.
    """
    name = name or _matching_denoiser(module, path)
    check_supported(trainer, module, name)
    dense = unwrap(module.get_submodule(name))
    saved = load_ensemble(path, denoiser=lambda: copy.deepcopy(dense))
    _check_same_network(name, dense, saved, path)
    forget_training(trainer, dense)  # moments and gradients of the weights that are thrown away
    replace_denoiser(
        trainer,
        module,
        name,
        build=lambda _: copy.deepcopy(saved),
        inherit=lambda _, tensor: tensor,
        source=lambda new: split_name(new)[1],
    )
    return name, saved


def _matching_denoiser(module: nn.Module, path: Path) -> str:
    """The sub-module whose tensors have the names of the saved tickets' tensors."""
    names = tensor_names(path)
    matches = [name for name, part in module.named_modules() if name and set(unwrap(part).state_dict()) == names]
    outermost = [name for name in matches if not any(name.startswith(f"{other}.") for other in matches)]
    if len(outermost) != 1:
        raise MisconfigurationException(
            f"regions={str(path)!r}: {len(outermost)} sub-modules have the tensors of these tickets. Name the "
            "denoiser, for example denoiser='model'."
        )
    return str(outermost[0])


def _check_same_network(name: str, dense: nn.Module, saved: TicketEnsemble, path: Path) -> None:
    """Refuse tickets of another network, as far as their record tells."""
    record = saved.record
    theirs = record.denoiser if record is not None else None
    ours = describe_denoiser(dense)
    if theirs is not None and ours is not None:
        pairs = {"class": (theirs["class"], ours["class"])}
        pairs |= {k: (theirs["config"].get(k), ours["config"].get(k)) for k in theirs["config"] | ours["config"]}
        odd = [f"{key}={a!r} against {b!r}" for key, (a, b) in pairs.items() if a != b]
    else:
        sizes = record.facts[0].parameters[0] if record is not None and record.facts else None, count_parameters(dense)
        odd = [f"{sizes[0]:,} against {sizes[1]:,} parameters"] if sizes[0] not in (None, sizes[1]) else []
    if odd:
        raise MisconfigurationException(
            f"regions={str(path)!r}: the tickets were cut from another network than {name!r}: {'; '.join(odd[:4])}. "
            "Build the network that they were cut from."
        )
