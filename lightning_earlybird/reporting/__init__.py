"""What a run shows of itself: metrics, figures and tables, for the loggers of a Trainer and for files.

Matplotlib and wandb are imported only where they are used.
"""

from lightning_earlybird.reporting.accounts import wandb_is_offline as wandb_is_offline
from lightning_earlybird.reporting.accounts import wandb_logger as wandb_logger
from lightning_earlybird.reporting.artifacts import log_tickets as log_tickets
from lightning_earlybird.reporting.figures import MATPLOTLIB_AVAILABLE as MATPLOTLIB_AVAILABLE
from lightning_earlybird.reporting.figures import distance_figure as distance_figure
from lightning_earlybird.reporting.figures import overlap_figure as overlap_figure
from lightning_earlybird.reporting.figures import save_figure as save_figure
from lightning_earlybird.reporting.loggers import log_figure as log_figure
from lightning_earlybird.reporting.loggers import log_metrics as log_metrics
from lightning_earlybird.reporting.loggers import log_summary as log_summary
from lightning_earlybird.reporting.loggers import log_ticket_table as log_ticket_table
from lightning_earlybird.reporting.loggers import logger_step as logger_step
from lightning_earlybird.reporting.loggers import tolerated as tolerated
from lightning_earlybird.reporting.losses import LossReport as LossReport
from lightning_earlybird.reporting.search_figures import SearchFigures as SearchFigures
from lightning_earlybird.reporting.switch import cost_of_dense as cost_of_dense
from lightning_earlybird.reporting.switch import report_end as report_end
from lightning_earlybird.reporting.switch import report_switch as report_switch
from lightning_earlybird.reporting.tables import TICKET_COLUMNS as TICKET_COLUMNS
from lightning_earlybird.reporting.tables import ticket_metrics as ticket_metrics
from lightning_earlybird.reporting.tables import ticket_rows as ticket_rows
from lightning_earlybird.reporting.tables import ticket_table as ticket_table
from lightning_earlybird.reporting.widths import widths_figure as widths_figure
from lightning_earlybird.reporting.workspace import define_metrics as define_metrics
from lightning_earlybird.reporting.workspace import describe_run as describe_run
