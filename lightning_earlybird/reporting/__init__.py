"""What a run shows of itself: metrics, figures and tables, for the loggers of a Trainer and for files.

Matplotlib and wandb are imported only where they are used.
"""

from lightning_earlybird.reporting.figures import (
    MATPLOTLIB_AVAILABLE,
    distance_figure,
    overlap_figure,
    save_figure,
)
from lightning_earlybird.reporting.loggers import (
    log_figure,
    log_metrics,
    log_ticket_table,
    logger_step,
    tolerated,
)
from lightning_earlybird.reporting.tables import (
    TICKET_COLUMNS,
    ticket_metrics,
    ticket_rows,
    ticket_table,
)

__all__ = [
    "MATPLOTLIB_AVAILABLE",
    "TICKET_COLUMNS",
    "distance_figure",
    "log_figure",
    "log_metrics",
    "log_ticket_table",
    "logger_step",
    "overlap_figure",
    "save_figure",
    "ticket_metrics",
    "ticket_rows",
    "ticket_table",
    "tolerated",
]
