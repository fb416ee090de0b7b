"""Tickets are written in the course of a fit: what becomes of it where the disk is full, read-only or gone."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.tickets import check_target, save_ensemble


def is_rehearsal(trainer: pl.Trainer) -> bool:
    """Whether this is a development run, which writes nothing: a real one's tickets must not be replaced by its own."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning's connectors


def check_directory(trainer: pl.Trainer, directory: Path) -> None:
    """Refuse a directory that tickets cannot be written to, before anything is learned. For callbacks' ``setup``.

    Args:
        trainer: The Trainer of the fit; a development run is not checked.
        directory: The pruner's directory.

    Raises:
        FileExistsError: Something else than tickets is there.
        MisconfigurationException: It cannot be made or written to.
    """
    if is_rehearsal(trainer):
        return
    for name in ("switch", "ensemble"):
        check_target(directory / name)
    if not trainer.is_global_zero:
        return  # only the first rank writes, and other machines may see other disks
    present = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not present.is_dir():
        problem = f"{str(present)!r} is a file"
    elif not os.access(present, os.W_OK | os.X_OK):
        problem = f"{str(present)!r} cannot be written to (read-only, or not permitted)"
    else:
        return
    raise MisconfigurationException(
        f"dirpath={str(directory)!r}: {problem}, so that no ticket could be saved there. Give the TimestepAwarePruner "
        "a dirpath that can be written to."
    )


def write_at_switch(trainer: pl.Trainer, ensemble: TicketEnsemble, directory: Path) -> bool:
    """Write the tickets as they begin; a disk that refuses is warned about, as training can do without them.

    Returns:
        Whether they could be written.
    """
    try:
        _write(trainer, ensemble, directory)
        return True
    except OSError as error:
        rank_zero_warn(
            f"TimestepAwarePruner: the tickets at the switch could not be written to {str(directory)!r} ({error}), so "
            "that no later fit can start from them by regions=PATH. Training goes on: they are in the module, in the "
            "checkpoints from now on, and the trained ensemble will be written at the end. Make room there until then."
        )
        return False


def write_at_end(trainer: pl.Trainer, ensemble: TicketEnsemble, directory: Path) -> Path:
    """Write the trained tickets, elsewhere if need be: they are what the fit was for.

    Returns:
        Where they are.

    Raises:
        OSError: Neither there nor anywhere else. The message says where the tickets still are.
    """
    try:
        _write(trainer, ensemble, directory)
    except OSError as error:
        rescued = _write_elsewhere(trainer, ensemble)
        if rescued is None:
            raise OSError(
                f"The trained ensemble could not be written to {str(directory)!r} ({error}), nor to the Trainer's "
                f"default_root_dir or {tempfile.gettempdir()!r}. {_whereabouts(trainer)}"
            ) from error
        rank_zero_warn(
            f"TimestepAwarePruner: the trained ensemble could not be written to {str(directory)!r} ({error}). It is in "
            f"{str(rescued)!r} instead; move it from there."
        )
        return rescued
    if not is_rehearsal(trainer):
        rank_zero_info(f"TimestepAwarePruner: the ensemble is in {str(directory)!r}.")
    return directory


def _write_elsewhere(trainer: pl.Trainer, ensemble: TicketEnsemble) -> Path | None:
    for root in (trainer.default_root_dir, tempfile.gettempdir()):
        place: str | None = None
        try:
            place = tempfile.mkdtemp(prefix="earlybird-ensemble-", dir=root)
            _write(trainer, ensemble, Path(place))
        except OSError:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
        else:
            return Path(place)
    return None


def _write(trainer: pl.Trainer, ensemble: TicketEnsemble, directory: Path) -> None:
    record = ensemble.record
    assert record is not None
    if trainer.is_global_zero and not is_rehearsal(trainer):
        save_ensemble(
            directory,
            ensemble,
            denoiser=record.denoiser,
            edits=record.edits,
            masks=record.masks,
            facts=record.facts,
            sample_shape=record.sample_shape,
        )


def _whereabouts(trainer: pl.Trainer) -> str:
    """Where trained tickets are when they could not be written."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [
        getattr(callback, name, "")
        for callback in callbacks
        if isinstance(callback, Checkpoint)
        for name in ("last_model_path", "best_model_path")
    ]
    known = list(dict.fromkeys(path for path in paths if path))
    checkpoints = f"Checkpoints of this fit: {', '.join(map(repr, known))}. " if known else ""
    return (
        f"{checkpoints}This process still has it: make room and call "
        "TicketEnsembleSampler.from_trainer(trainer).save_pretrained(...)."
    )
