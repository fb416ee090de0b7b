"""Metrics, figures and tables for the loggers of a Trainer, each as far as it can show them."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_earlybird.records import TicketFacts
from lightning_earlybird.reporting.figures import pixels, save_figure
from lightning_earlybird.reporting.tables import TICKET_COLUMNS, ticket_rows, ticket_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def logger_step(trainer: Trainer) -> int:
    """The step under which Lightning logs its own metrics at this moment.

    W&B draws everything over ``trainer/global_step`` and wants it to ascend, so what a callback logs must carry the
    same number as what ``self.log`` gives right after it. That number counts batches that stepped, from zero, whatever
    the number of optimizers; ``trainer.global_step`` would be ahead of it by at least one.

    Args:
        trainer: A Trainer inside ``fit``.

    Returns:
        The step, at least 0.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # The counter moves on after on_train_batch_end; between batches, epoch ends included, it is one ahead of the last.
    within_batch = progress.ready > progress.completed
    return max(0, loop._batches_that_stepped - (0 if within_batch else 1))


# Loggers that have failed and been told of; by identity, as a logger may define equality and not be hashable.
_FAILED: "weakref.WeakValueDictionary[int, Logger]" = weakref.WeakValueDictionary()


@contextmanager
def tolerated(logger: Logger) -> Iterator[None]:
    """Go on where a logger fails, with one warning: a service that is gone is no reason to end days of training."""
    try:
        yield
    except Exception as error:  # loggers talk to any service, and fail in any way
        if _FAILED.get(id(logger)) is not logger:
            _FAILED[id(logger)] = logger
            rank_zero_warn(
                f"{type(logger).__name__} failed to log what the early-bird callbacks gave it "
                f"({type(error).__name__}: {error}). Training goes on, and it is not told again; what is missing there "
                "is in the callbacks and in the checkpoints."
            )


def log_metrics(
    trainer: Trainer, metrics: Mapping[str, float | None], step: int | None = None, *, save: bool = True
) -> None:
    """Gives metrics to every logger of the Trainer.

    A logger that fails is warned about once and does not end the training; so it is with figures and tables.

    Args:
        trainer: The Trainer; without loggers nothing happens.
        metrics: Name -> value; ``None`` stands for "not measured yet" and is left out.
        step: The step to log under; ``None`` takes that of Lightning's own metrics, :func:`logger_step`.
        save: Whether they are to be in the file at once; what comes often is better left to the logger.
    """
    known = {name: float(value) for name, value in metrics.items() if value is not None}
    if not known:
        return
    for logger in trainer.loggers:
        with tolerated(logger):
            logger.log_metrics(known, step=logger_step(trainer) if step is None else step)
            if save:
                logger.save()


def log_summary(trainer: Trainer, values: Mapping[str, float | None]) -> None:
    """Gives what is known once to the summary of W&B's runs, which makes no charts of it, and to others as metrics.

    Args:
        trainer: The Trainer; does nothing on ranks other than the first.
        values: Name -> value; ``None`` is left out.
    """
    if not trainer.is_global_zero:
        return
    known = {name: float(value) for name, value in values.items() if value is not None}
    step = logger_step(trainer)
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(known)
            else:
                logger.log_metrics(known, step=step)
                logger.save()


def log_figure(
    trainer: Trainer,
    name: str,
    figure: "Figure",
    *,
    step: int | None = None,
    folder: str | PathLike[str] | None = None,
) -> None:
    """Gives a figure to W&B and TensorBoard as an image, and writes it to a PNG file when there is a folder.

    Does nothing on ranks other than the first.

    Args:
        trainer: The Trainer; its loggers of other kinds are passed over.
        name: Key of the image, for example ``"earlybird/mask_distance"``; the last part names the file.
        figure: The figure; it is left open and unchanged.
        step: As in :func:`log_metrics`.
        folder: Where the PNG file goes; made when missing. A file that cannot be written is warned about.
    """
    if not trainer.is_global_zero:
        return
    if folder is not None:
        path = Path(folder) / f"{name.rpartition('/')[2]}.png"
        try:
            save_figure(figure, path)
        except OSError as error:
            rank_zero_warn(f"The figure {str(path)!r} could not be written ({error}). Training goes on without it.")
    step = logger_step(trainer) if step is None else step
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [pixels(figure)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                # Not add_figure: that imports pyplot.
                logger.experiment.add_image(name, pixels(figure), step, dataformats="HWC")


def log_ticket_table(trainer: Trainer, name: str, facts: Sequence[TicketFacts], *, step: int | None = None) -> None:
    """Gives the ticket table to W&B as a table and to TensorBoard as text.

    Does nothing on ranks other than the first.

    Args:
        trainer: The Trainer; its loggers of other kinds are passed over.
        name: Key of the table, for example ``"earlybird/tickets"``.
        facts: One entry per ticket, in region order.
        step: As in :func:`log_metrics`.
    """
    if not trainer.is_global_zero:
        return
    step = logger_step(trainer) if step is None else step
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.log_table(name, columns=list(TICKET_COLUMNS), data=ticket_rows(facts), step=step)
            elif isinstance(logger, TensorBoardLogger):
                # Four spaces make a fixed-width block in TensorBoard's Markdown.
                block = "\n".join(f"    {line}" for line in ticket_table(facts).splitlines())
                logger.experiment.add_text(name, block, step)
