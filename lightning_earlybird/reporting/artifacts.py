"""Tickets as versioned artifacts of a W&B run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_earlybird.records import TicketFacts
from lightning_earlybird.reporting.loggers import tolerated

LARGEST_BYTES = 2**31
"""What ``log_tickets="auto"`` logs at most."""


def log_tickets(
    trainer: pl.Trainer,
    directory: Path,
    facts: Sequence[TicketFacts],
    *,
    alias: str,
    step: int,
    choice: bool | Literal["auto"] = "auto",
) -> None:
    """Log saved tickets as a version of the artifact ``tickets-RUN`` of type ``tickets``.

    Does nothing on ranks other than the first, and for loggers other than W&B's.

    Args:
        trainer: The Trainer of the fit.
        directory: What :func:`~.tickets.save_ensemble` wrote.
        facts: One entry per ticket, in region order, for the metadata.
        alias: Name of the version: ``switch`` or ``final``.
        step: Optimizer step at which the tickets were written.
        choice: ``"auto"`` leaves out what is larger than :data:`LARGEST_BYTES`, and says so.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    files = sorted(path for path in directory.glob("**/*") if path.is_file())
    if not (trainer.is_global_zero and loggers and files and choice):
        return
    size = sum(path.stat().st_size for path in files)
    if choice == "auto" and size > LARGEST_BYTES:
        rank_zero_info(
            f"TimestepAwarePruner: the tickets in {str(directory)!r} are not logged to W&B, as they take "
            f"{size / 2**30:.1f} GiB. log_tickets=True logs them all the same."
        )
        return
    import wandb

    metadata: dict[str, Any] = {"step": step, "tickets": [fact.to_json() for fact in facts]}
    for logger in loggers:
        with tolerated(logger):
            run = logger.experiment
            artifact = wandb.Artifact(f"tickets-{run.id}", "tickets", metadata=metadata)
            for path in files:
                artifact.add_file(str(path), path.relative_to(directory).as_posix())
            run.log_artifact(artifact, aliases=[alias, "latest"])
