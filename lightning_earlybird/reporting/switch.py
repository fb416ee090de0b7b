"""What loggers are told when the denoiser has become tickets, and when these are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl

from lightning_earlybird.records import EnsembleRecord, TicketFacts
from lightning_earlybird.reporting.figures import MATPLOTLIB_AVAILABLE
from lightning_earlybird.reporting.loggers import log_figure, log_metrics, log_summary, log_ticket_table
from lightning_earlybird.reporting.tables import ticket_metrics
from lightning_earlybird.reporting.widths import widths_figure


def report_switch(trainer: pl.Trainer, record: EnsembleRecord, switched_at: int, *, folder: Path | None = None) -> None:
    """Log the ticket table, what each ticket has left, and the figure of its widths.

    Args:
        trainer: The Trainer of the fit.
        record: What is known about the tickets.
        switched_at: Optimizer step of the switch.
        folder: Where the figure's PNG file goes; None writes none.
    """
    log_metrics(trainer, {"earlybird/switch_step": switched_at, **ticket_metrics(record.facts)})
    if not record.facts:
        return  # of tickets that somebody put together by hand nothing is known
    log_ticket_table(trainer, "earlybird/tickets", record.facts)
    if record.masks and MATPLOTLIB_AVAILABLE and trainer.is_global_zero and (trainer.loggers or folder is not None):
        regions = [fact.region for fact in record.facts]
        log_figure(trainer, "earlybird/widths", widths_figure(record.masks, regions), folder=folder)
    summary: dict[str, float | None] = {}
    for index, fact in enumerate(record.facts):
        summary[f"ticket_{index}/channels"] = fact.channels[1]
        summary[f"ticket_{index}/parameters"] = fact.parameters[1]
        summary[f"ticket_{index}/macs"] = None if fact.macs is None else fact.macs[1]
    dense = record.facts[0]
    summary["earlybird/dense_parameters"] = dense.parameters[0]
    summary["earlybird/dense_macs"] = None if dense.macs is None else dense.macs[0]
    log_summary(trainer, summary)


def cost_of_dense(facts: Sequence[TicketFacts], search: float, tickets: Sequence[float]) -> float | None:
    """Multiply-accumulate operations of a training, as a fraction of those of dense training on as many samples.

    Args:
        facts: One entry per ticket, in region order.
        search: Samples (or batches of equal size) that the dense denoiser was trained on.
        tickets: The same for each ticket.

    Returns:
        The fraction; None where operations were not counted, or there were no samples.
    """
    macs = [fact.macs for fact in facts]
    samples = search + sum(tickets)
    if None in macs or not samples:
        return None
    dense = macs[0][0] if macs[0] is not None else 0
    spent = search * dense + sum(n * pair[1] for n, pair in zip(tickets, macs, strict=True) if pair is not None)
    return spent / (samples * dense)


def report_end(trainer: pl.Trainer, values: Mapping[str, float | None]) -> None:
    """Log what is known once the training is over.

    Args:
        trainer: The Trainer of the fit.
        values: Name without ``earlybird/`` -> value; None is left out.
    """
    log_summary(trainer, {f"earlybird/{name}": value for name, value in values.items()})
