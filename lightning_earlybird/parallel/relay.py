"""One picture of all tickets: their metrics reach the loggers of rank 0, under names that tell them apart."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from torchmetrics import Metric

from lightning_earlybird.parallel.separate import folder_of
from lightning_earlybird.reporting import tolerated

# The loss of a region is about its ticket, too, and the cost of the training about all.
_OF_TICKET = re.compile(r"tickets?(_\d+)+/|earlybird/(region_loss/|cost_of_dense$)")


def named_by_ticket(metrics: Mapping[str, Any], hosted: Sequence[int]) -> dict[str, Any]:
    """Metrics under the names of the tickets that they are about.

    Args:
        metrics: Name -> value, as they were logged on a rank.
        hosted: The tickets of that rank. What is not known for each of them apart is given to all.

    Returns:
        ``ticket_N/name`` -> value; ``tickets_N_M/name`` for what is known of several together only.
    """
    named = {name: value for name, value in metrics.items() if _OF_TICKET.match(name)}
    apart = {name.split("/", 1)[1] for name in named}
    for name, value in metrics.items():
        if name not in named and name not in apart:
            named |= {f"ticket_{ticket}/{name}": value for ticket in hosted}
    return named


class MetricRelay:
    """Stands between the Trainer and its loggers while tickets train apart.

    On rank 0 metrics go on to the loggers, on the first rank of every other group they are sent to rank 0, and there
    to the loggers; each at its own ticket's step. Elsewhere nothing is logged, as ever.

    Args:
        loggers: The Trainer's loggers.
        hosted: The tickets of this rank.
        rank: This rank.
        send: Takes a message to rank 0 and does not block; None on ranks that log nothing.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        hosted: Sequence[int],
        rank: int,
        send: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._loggers = list(loggers)
        self._hosted = hosted
        self._rank = rank
        self._send = send

    def attach(self) -> None:
        """Take the place of ``log_metrics`` on each logger object."""
        for number, logger in enumerate(self._loggers):
            if self._rank == 0:
                logger.__dict__["log_metrics"] = functools.partial(self._log, logger.log_metrics)
                continue
            if self._send is not None:
                logger.__dict__["log_metrics"] = functools.partial(self._post, number)
            # Lightning calls it on the first rank of each group, with loggers that have no run there.
            logger.__dict__["after_save_checkpoint"] = _nothing

    def detach(self) -> None:
        """Leave the loggers as they were."""
        for logger in self._loggers:
            logger.__dict__.pop("log_metrics", None)
            logger.__dict__.pop("after_save_checkpoint", None)

    def deliver(self, messages: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """On rank 0: give what other ranks have sent to the loggers."""
        any_arrived = False
        for _, message in messages:
            any_arrived = True
            logger = self._loggers[message["logger"]]
            with tolerated(logger):
                type(logger).log_metrics(logger, message["metrics"], message["step"])
        if any_arrived:
            for logger in self._loggers:
                with tolerated(logger):
                    logger.save()

    def _log(self, log: Callable[..., None], metrics: Mapping[str, Any], step: int | None = None) -> None:
        log(named_by_ticket(metrics, self._hosted), step)

    def _post(self, number: int, metrics: Mapping[str, Any], step: int | None = None) -> None:
        assert self._send is not None
        values = {name: float(value) for name, value in named_by_ticket(metrics, self._hosted).items()}
        self._send({"logger": number, "metrics": values, "step": step})


def _nothing(checkpoint_callback: Any) -> None:
    """Takes the place of uploading a checkpoint."""


@contextmanager
def logged_as(module: pl.LightningModule, ticket: int, hosted: Sequence[int]) -> Iterator[None]:
    """While a ticket of several has its turn, ``self.log`` logs for that ticket as well as for the rank.

    The rank's own value (a mean over its tickets, or that of the last turn) is what callbacks monitor. An object of
    torchmetrics is one for all tickets of a rank, and is logged as ``tickets_N_M/name``.

    Args:
        module: The LightningModule.
        ticket: The ticket in turn.
        hosted: All tickets of the rank; with one alone there is nothing to tell apart.
    """
    if len(hosted) == 1:
        yield
        return
    log = module.log

    def log_both(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(name, value, *args, **kwargs)
        if not args:
            kwargs["prog_bar"] = False
        # A metric object has taken in the values of all tickets: what it computes is about none of them alone.
        owner = folder_of(hosted if isinstance(value, Metric) else [ticket])
        log(f"{owner}/{name}", value, *args, **kwargs)

    module.__dict__["log"] = log_both
    try:
        yield
    finally:
        del module.__dict__["log"]
