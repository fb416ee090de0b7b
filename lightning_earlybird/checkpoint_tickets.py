"""An ensemble out of Lightning checkpoints, without the LightningModule that they were taken from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_earlybird.arguments import check_choice
from lightning_earlybird.checkpoint_files import read_checkpoint
from lightning_earlybird.descriptions import build_dense, sketch_dense
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.files import Field
from lightning_earlybird.saved_structure import CHECKPOINT_KEY, SavedStructure, tensors_of_tickets

Weights = Literal["auto", "raw", "ema"]
PathLike = str | os.PathLike[str]


def load_tickets(
    paths: Sequence[PathLike], denoiser: Callable[[], nn.Module] | None = None, weights: Weights = "auto"
) -> TicketEnsemble:
    """The ensemble that checkpoints hold; in evaluation mode, with its record.

    Args:
        paths: One checkpoint, or one of each group of ranks where these trained different tickets.
        denoiser: Builds the *dense* network; needed where that is not a diffusers model.
        weights: ``"ema"`` for averaged weights, ``"raw"`` for live ones; ``"auto"`` is averaged where there are such.

    Returns:
        The ensemble, on the CPU (or where ``denoiser`` builds its network).

    Raises:
        EnsembleFormatError: If a checkpoint is damaged, or of a newer format.
        ValueError: If a checkpoint holds no tickets or not those weights, a ticket is missing or comes twice, the
            checkpoints are not of one fit, the tickets do not fit the network, or ``denoiser`` is needed.
    """
    check_choice("weights", weights, get_args(Weights))
    structures: list[SavedStructure] = []
    states: dict[int, dict[str, Tensor]] = {}
    sources: dict[int, str] = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        structure = SavedStructure.read(checkpoint, str(path))
        if structure is None:
            raise ValueError(
                f"path={str(path)!r} holds no tickets: it was taken before the switch, or not by a fit that makes "
                "them. Take a later checkpoint; load_from_checkpoint(MyModule, path) gives the dense denoiser."
            )
        _check_same_fit(structures, structure, path)
        structures.append(structure)
        tickets = tensors_of_tickets(_chosen(checkpoint, weights, path), structure.denoiser, len(structure.shapes))
        for index, state in enumerate(tickets):
            if not state:
                continue
            if index in states:
                raise ValueError(
                    f"path: {sources[index]!r} and {str(path)!r} both hold ticket {index}; give one of them."
                )
            states[index], sources[index] = state, str(path)
    missing = sorted(set(range(len(structures[0].shapes))) - set(states))
    if missing:
        raise ValueError(
            f"path={[str(path) for path in paths]}: the tickets {missing} of {len(structures[0].shapes)} are missing. "
            "Under MultiTicketStrategy other ranks trained them: give a checkpoint of each group, path=[...], or take "
            "the ensemble that the pruner writes at the end, with from_pretrained."
        )
    complete = replace(
        structures[0],
        shapes=tuple({name: tensor.shape for name, tensor in states[index].items()} for index in sorted(states)),
        dtypes=tuple({name: tensor.dtype for name, tensor in states[index].items()} for index in sorted(states)),
        absent=frozenset(),
    )
    description = Field(complete.record.denoiser, str(paths[0]), f"{CHECKPOINT_KEY}.record.denoiser")
    with torch.random.fork_rng(devices=[]):
        if denoiser is None and complete.record.denoiser is not None:
            # Both come from the file: they are tried before memory is taken for the network.
            sketch = sketch_dense(description, [states[index] for index in sorted(states)])
            try:
                complete.check(sketch)
            except ValueError as error:
                description.fail(f"builds a network that the tickets do not fit: {error}")
        dense = build_dense(denoiser, description)
    try:
        complete.check(dense)
    except ValueError as error:
        raise ValueError(
            f"path={str(paths[0])!r}: the tickets do not fit the {'network of denoiser=' if denoiser else 'network'}"
            f": {error}"
        ) from error
    ensemble = complete.build(dense)
    for index, ticket in enumerate(ensemble.tickets):
        _fill(ticket, states[index])
    return ensemble.eval()


def _chosen(checkpoint: Mapping[str, Any], weights: Weights, path: PathLike) -> Field:
    """The state dict with the weights that were asked for; the averaged ones take the place of the module's own."""
    document = Field(checkpoint, str(path))
    averaged = "current_model_state" in checkpoint
    if weights == "ema" and not averaged:
        raise ValueError(
            f"weights='ema': {str(path)!r} was saved without a WeightAveraging callback, or after the fit, when the "
            "module's weights are the averaged ones. Use weights='auto'."
        )
    return document["current_model_state" if weights == "raw" and averaged else "state_dict"]


def _check_same_fit(others: Sequence[SavedStructure], structure: SavedStructure, path: PathLike) -> None:
    for other in others[:1]:
        same = (
            structure.denoiser == other.denoiser
            and structure.partition == other.partition
            and structure.timesteps == other.timesteps
            and replace(structure.record, masks=()) == replace(other.record, masks=())
            and all(a.distance(b) == 0 for a, b in zip(structure.record.masks, other.record.masks, strict=True))
        )
        if not same:
            raise ValueError(f"path={str(path)!r} is not of the same fit as the checkpoints before it.")


def _fill(ticket: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a ticket its numbers in memory of its own, in the dtype and memory format that they were saved in."""
    own = ticket.state_dict(keep_vars=True)
    for name, tensor in state.items():
        # Through `.data`, so that parameters stay the same objects: tied ones stay tied.
        own[name].data = tensor.detach().clone().to(own[name].device)
