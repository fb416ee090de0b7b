"""A strategy whose ranks may stand in groups, from a split of the world on or from a checkpoint of such a group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed import Store
from torch.distributed import distributed_c10d as c10d
from typing_extensions import override

from lightning_earlybird.parallel.fit_files import FoundFiles, describe_files, find_files
from lightning_earlybird.parallel.fit_record import FitRecord, SplitRecord
from lightning_earlybird.parallel.groups import RankGroups
from lightning_earlybird.parallel.loaders import forget_loaders
from lightning_earlybird.parallel.plan import TicketPlan
from lightning_earlybird.parallel.resumption import Resumption, forget_unfinished_batch, plan_resumed
from lightning_earlybird.parallel.separate import SeparateCheckpoints


class GroupedStrategy(DDPStrategy):
    """DDP whose group of ranks stands in for the world once there is one.

    Where a fit goes on from checkpoints of groups, the groups stand from the moment that these are loaded: before the
    module is wrapped, and before optimizers and data loaders are made. What was laid out for the whole world when the
    fit began, such as a schedule's length, is laid out for that again.

    Args:
        assignment: Who trains what, if the user says so.
        **kwargs: As for ``DDPStrategy``.

    Attributes:
        plan: Who trains what and how long that should take; None before the split.
    """

    def __init__(self, assignment: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.assignment = assignment
        self.plan: TicketPlan | None = None
        self._groups: RankGroups | None = None
        self._store: Store | None = None  # the world's
        self._directory: Path | None = None
        self._fit: str | None = None  # which one, for its checkpoints
        self._trained: weakref.ref[pl.LightningModule] | None = None  # by the fit before
        self._session = 0
        self._born = ""  # for those of its tickets
        self._former_places: tuple[str, ...] = ()
        self._step_seconds: tuple[float, ...] = ()
        self._measured = False
        self._whole: SplitRecord | None = None  # while the checkpoint of all tickets is written
        self._resumption: Resumption | None = None  # until training goes on
        self._checkpoints: SeparateCheckpoints | None = None  # likewise
        self._laid_out_for: int | None = None  # ranks, where not those of the world
        self._laying_out = False
        self._in_loader_hook = False
        self._find_unused = bool(self._ddp_kwargs.get("find_unused_parameters", False))

    def note_directory(self, directory: Path) -> None:
        """Where tickets will be written; for ``setup``, before a checkpoint is loaded."""
        self._directory = directory

    # --- the group in place of the world

    @property
    @override
    def world_size(self) -> int:
        if self._laying_out:
            return self._layout
        return super().world_size if self._groups is None else self._groups.size

    @property
    @override
    def global_rank(self) -> int:
        if self._laying_out:
            return super().global_rank % self._layout
        # The world's number in general: only loaders are made by the number within the group.
        groups = self._groups
        return groups.position if groups is not None and self._in_loader_hook else super().global_rank

    @property
    @override
    def is_global_zero(self) -> bool:
        return super().is_global_zero if self._groups is None else self._groups.position == 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._laying_out:
            return self._laid_out_sampling
        if self._groups is None:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self._groups.size, "rank": self._groups.position}

    @property
    def _all_ranks(self) -> int:
        return super().world_size

    @property
    def _layout(self) -> int:
        """Ranks that schedules were laid out for when the fit began."""
        return self._all_ranks if self._laid_out_for is None else self._laid_out_for

    @property
    def _world_sampling(self) -> dict[str, Any]:
        return {"num_replicas": self._all_ranks, "rank": super().global_rank}

    @property
    def _laid_out_sampling(self) -> dict[str, Any]:
        return {"num_replicas": self._layout, "rank": super().global_rank % self._layout}

    @contextmanager
    def _counted_in_group(self) -> Iterator[None]:
        """While a hook is asked for loaders, ranks are counted within the group."""
        self._in_loader_hook = True
        try:
            yield
        finally:
            self._in_loader_hook = False

    # --- going on from checkpoints of groups

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        trainer = self._module.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.plan = self._directory = self._resumption = self._checkpoints = self._laid_out_for = self._whole = None
        if trainer.global_step == 0 or self._trained is None or self._trained() is not self._module:
            self._fit, self._former_places = None, ()  # else the same fit goes on
        self._trained = weakref.ref(self._module)
        self._store = c10d._get_default_store() if self._all_ranks > 1 else None

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        trainer = self._module.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return super().load_checkpoint(checkpoint_path, weights_only)
        found = self._find_files(checkpoint_path, weights_only)
        for text in found.warnings:
            rank_zero_warn(text)
        if not found.tickets:
            assert found.dense is not None
            path = checkpoint_path if found.dense == Path(checkpoint_path) else found.dense
            checkpoint = super().load_checkpoint(path, weights_only)
            fit = FitRecord.read(checkpoint)
            if fit is not None:
                self._fit, self._session, self._former_places = fit.fit, fit.session + 1, fit.places
                forget_unfinished_batch(checkpoint)
            return checkpoint
        for text in (*found.remarks, describe_files(found.tickets)):
            rank_zero_info(f"MultiTicketStrategy: {text}")
        try:
            ranks_per_node = self.num_processes if self.num_nodes > 1 else None
            self.plan = plan = plan_resumed(found.tickets, self._all_ranks, self.assignment, ranks_per_node)
        except ValueError as error:
            raise MisconfigurationException(f"MultiTicketStrategy: {error}") from error
        load = super().load_checkpoint
        self._resumption = resumption = Resumption(
            found.tickets,
            plan,
            self.global_rank,
            trainer.accumulate_grad_batches,
            lambda path: load(path, weights_only),
        )
        # Callbacks are told next what they have written, and where.
        self._checkpoints = SeparateCheckpoints(trainer, resumption.hosted, resumed=True)
        resumption.prepare_callbacks(trainer)
        self._fit, self._session, self._born = resumption.fit, resumption.session, resumption.base.born
        places = [place for file in found.tickets.values() for place in file.fit.places]
        self._former_places = tuple(dict.fromkeys(places))
        self._laid_out_for = resumption.base.laid_out_for
        self._step_seconds, self._measured = resumption.base.step_seconds, resumption.base.measured
        self._groups = RankGroups(plan.assignment.groups, self.global_rank, self._timeout)
        self._say_what_is_new(resumption, found)
        return resumption.checkpoint

    def _find_files(self, path: _PATH, weights_only: bool | None) -> FoundFiles:
        """What rank 0 finds, on every rank."""
        found: FoundFiles | MisconfigurationException | None = None
        if super().is_global_zero:
            directory = self._directory
            places = [] if directory is None else [directory, directory / "interrupted"]
            try:
                found = find_files(path, places, weights_only)
            except MisconfigurationException as error:
                found = error
            except Exception as error:  # whatever it is, the other ranks wait to hear of it
                found = MisconfigurationException(f"ckpt_path={str(path)!r}: {type(error).__name__}: {error}")
        found = self.broadcast(found)
        if isinstance(found, MisconfigurationException):
            raise found
        assert found is not None
        return found

    def _say_what_is_new(self, resumption: Resumption, found: FoundFiles) -> None:
        before = {file.split.assignment for file in found.tickets.values() if file.split is not None}
        whole = [ticket for ticket, file in found.tickets.items() if file.split is not None and file.split.at_split]
        if before != {resumption.plan.assignment}:
            rank_zero_info(
                f"MultiTicketStrategy: tickets are shared out anew among {self._all_ranks} rank(s). Each gets what is "
                "left of its steps or epochs, once; the order of its data is another than it would have been.\n"
                f"{resumption.plan.table()}"
            )
        elif whole:
            rank_zero_info(
                f"MultiTicketStrategy: of the tickets {whole} there is only what they were when the world was split: "
                "they begin there anew, with another order of the data."
            )

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._resumption is not None and self._resumption.load_optimizers(self._module, self.optimizers):
            _optimizers_to_device(self.optimizers, self.root_device)
        else:
            super().load_optimizer_state_dict(checkpoint)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        if self._resumption is None:
            super().setup_optimizers(trainer)
            return
        # Schedules may ask the Trainer for the number of steps, and get what they got when the fit began.
        self._laying_out = True
        try:
            super().setup_optimizers(trainer)
        finally:
            self._laying_out = False
        forget_loaders(trainer)

    @override
    def configure_ddp(self) -> None:
        if self._groups is None:
            super().configure_ddp()
            return
        self._ddp_kwargs["find_unused_parameters"] = self._find_unused
        if self._groups.size > 1:  # a group of one needs no DDP, and is faster without
            super().configure_ddp()

    def _run_fit_loop(self, trainer: pl.Trainer, run: Callable[[], None]) -> None:
        """A rank whose tickets are trained already still has to wait for the others."""
        loop, resumption = trainer.fit_loop, self._resumption
        if resumption is None:
            run()
            return
        loop.setup_data()
        resumption.settle(trainer)
        if not loop.done:
            run()
            return
        loop.reset()
        loop.on_run_start()
        loop._restarting = False
        loop.on_run_end()

    def _leave_groups(self) -> None:
        """The world again, and what a broken resume has left."""
        if self._groups is not None:
            self._groups.leave()
            self._groups = None
        if self._checkpoints is not None:
            self._checkpoints.undo()
            self._checkpoints = None

    @property
    def _module(self) -> pl.LightningModule:
        module = self.lightning_module
        assert module is not None
        return module
