"""Whose turn it is on a rank: which ticket gets the samples, which timesteps are drawn, under which names is logged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_earlybird.ensemble import TicketEnsemble, Turn
from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.integer_draws import unlimited_draws
from lightning_earlybird.parallel.relay import logged_as
from lightning_earlybird.parallel.separate import folder_of
from lightning_earlybird.parallel.timesteps import find_sampler, limited_timesteps
from lightning_earlybird.parallel.turn_check import TimestepsOutsideError, check_turn


class Turns:
    """Gives each ticket of a rank the word.

    Args:
        module: The LightningModule.
        ensemble: The ensemble in the denoiser's place.
        courses: Ticket -> its own steps; of the tickets that this rank hosts.
        step: Gives the optimizer steps that the rank has taken.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        ensemble: TicketEnsemble,
        courses: Mapping[int, Course],
        step: Callable[[], int],
    ) -> None:
        self.outputs: dict[int, STEP_OUTPUT] = {}
        """Ticket -> what ``training_step`` returned in its turn on the present batch."""
        self._module = module
        self._ensemble = ensemble
        self._courses = courses
        self._step = step
        self._warned_of_evaluation = False
        # That of the denoiser, and copies that the module averages itself.
        self._ensembles = [part for part in module.modules() if isinstance(part, TicketEnsemble)]

    def begin_step(self) -> list[int]:
        """The tickets that take part in the step that begins now: not those that have had their ``max_steps``."""
        self.outputs.clear()
        step = self._step()
        in_turn = [ticket for ticket, course in self._courses.items() if course.takes_part(step)]
        for ticket in set(self._courses).difference(in_turn):
            for parameter in self._ensemble.tickets[ticket].parameters():
                parameter.grad = None  # zeros would do, too, but for weight decay and momentum
            self._forget_logged(ticket)
        return in_turn

    def _forget_logged(self, ticket: int) -> None:
        """Else Lightning logs a ticket's last value again at each step until the epoch ends."""
        for result in self._module.trainer.fit_loop.epoch_loop._results.values():
            if result.meta.name.startswith(f"{folder_of([ticket])}/"):
                result._forward_cache = None

    @contextmanager
    def take(self, ticket: int) -> Iterator[None]:
        """One ticket trains: timesteps are drawn from its region and overlap, and every sample is its own.

        The ensemble stays the ticket's until :meth:`end`, since checkpointed activations are computed again in
        the backward pass.
        """
        bounds = self._ensemble.partition.training_bounds(ticket)
        self._give_turn(ticket, lambda timesteps: self._checked(ticket, bounds, timesteps))
        with self._limited(bounds), logged_as(self._module, ticket, tuple(self._courses)):
            yield

    @contextmanager
    def evaluation(self, ticket: int) -> Iterator[None]:
        """One ticket is evaluated: as in :meth:`take`, without the overlap, and with a warning for other timesteps."""
        region = self._ensemble.regions[ticket]
        bounds = region.start, region.stop
        self._give_turn(ticket, lambda timesteps: self._warned(ticket, bounds, timesteps))
        try:
            with self._limited(bounds), logged_as(self._module, ticket, tuple(self._courses)):
                yield
        finally:
            self.end()

    def end(self) -> None:
        """Route by timestep again."""
        for ensemble in self._ensembles:
            ensemble.turn = None

    def _give_turn(self, ticket: int, around: Callable[[Any], AbstractContextManager[None]]) -> None:
        for ensemble in self._ensembles:
            ensemble.turn = Turn(ticket, around)

    def _limited(self, bounds: tuple[float, float]) -> Any:
        partition = self._ensemble.partition
        return limited_timesteps(self._module, (partition.start, partition.stop), bounds)

    def _checked(self, ticket: int, bounds: tuple[float, float], timesteps: Any) -> AbstractContextManager[None]:
        partition = self._ensemble.partition
        check_turn(
            timesteps,
            bounds,
            axis=(partition.start, partition.stop),
            ticket=ticket,
            module_name=type(self._module).__name__,
            has_sampler=find_sampler(self._module) is not None,
        )
        return unlimited_draws()

    def _warned(self, ticket: int, bounds: tuple[float, float], timesteps: Any) -> AbstractContextManager[None]:
        try:
            return self._checked(ticket, bounds, timesteps)
        except TimestepsOutsideError as error:
            if not self._warned_of_evaluation:
                self._warned_of_evaluation = True
                warnings.warn(
                    f"In validation, ticket {ticket} is called for timesteps of others, for which its output means "
                    f"nothing; what validation logs holds for its own region only where it draws its timesteps there. "
                    f"{error}",
                    stacklevel=2,
                )
        return unlimited_draws()
