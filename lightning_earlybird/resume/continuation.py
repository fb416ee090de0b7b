"""Exact resume: the moment of a checkpoint, and what was under way at it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_earlybird.resume.epoch_means import (
    capture_epoch_means,
    forget_epoch_means,
    restore_epoch_means,
    restore_metric_objects,
    restore_newest,
    take_up_epoch_means,
)
from lightning_earlybird.resume.loaders import LoaderStates
from lightning_earlybird.resume.loops import UnfinishedEnd
from lightning_earlybird.resume.random_states import capture_random_states, restore_random_states

CONTINUATION_KEY = "lightning_earlybird_continuation"
CONTINUATION_VERSION = 1


class Continuing(pl.Callback):
    """A callback whose fits go on from their checkpoints as if they had not been interrupted.

    Besides what Lightning keeps, a checkpoint then holds for each rank the random states and the metrics of the epoch
    under way, and, in one process, gradients of an unfinished accumulation window. They come back at the moment of the
    training at which they were taken. A checkpoint that was written in ``on_train_batch_end`` before a validation, or
    before the end of an epoch, is followed by these, which Lightning leaves out.

    Where a Trainer has several such callbacks the first of them acts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._continuation: dict[str, Any] | None = None
        self._ending = UnfinishedEnd()
        self._gathered: list[dict[str, Any]] | None = None
        self._warned_of_gradients = False
        self._loaders = LoaderStates()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._continuation = self._gathered = None
        self._ending, self._loaders = UnfinishedEnd(), LoaderStates()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if CONTINUATION_KEY in checkpoint or trainer.state.fn != TrainerFn.FITTING:
            return
        gradients = self._pending_gradients(trainer, pl_module)
        self._loaders.correct(trainer, checkpoint)
        checkpoint[CONTINUATION_KEY] = {
            "format_version": CONTINUATION_VERSION,
            "ranks": self._gathered if self._gathered is not None else self._gather(trainer),
            "gradients": gradients,
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or not self._acts(trainer):
            return
        state: Any = checkpoint.get(CONTINUATION_KEY)
        known = isinstance(state, dict) and isinstance(state.get("ranks"), list)
        version = state["format_version"] if known and "format_version" in state else None
        if state is not None and version != CONTINUATION_VERSION:
            rank_zero_warn(
                f"ckpt_path: its random states have format version {version!r}, and this lightning-earlybird reads "
                f"{CONTINUATION_VERSION}. Training goes on with other random numbers."
            )
            state = None
        self._continuation = state
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is not None:
            self._ending.look_at(loops)
            self._loaders.take_from(loops)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fit_loop = trainer.fit_loop
        no_more_batches = self._ending.go_on(trainer)
        if self._acts(trainer):
            self._loaders.note_before_fetches(trainer)
        state, self._continuation = self._continuation, None
        own = None if state is None else self._own(trainer, state["ranks"])
        if state is None or len(state["ranks"]) == trainer.world_size:  # else the data were shared out otherwise
            self._loaders.restore(trainer, no_more_batches or not fit_loop.restarted_mid_epoch)
        if state is None or own is None:
            return
        attempt("newest metrics", restore_newest, trainer, own)
        attempt("metric objects", restore_metric_objects, trainer, own)
        within, of_epoch = fit_loop.restarted_mid_epoch, self._ending.of_epoch

        def before_epoch() -> None:
            if of_epoch:
                attempt("epoch's means", restore_epoch_means, trainer, own)
                self._ending.finish_epoch(trainer)
            # Before the hooks of the new epoch; its batches are then drawn anew, since they were drawn before.
            attempt("random states", restore_random_states, trainer, own)

        def before_batch(data_fetcher: Any) -> None:
            fit_loop._restarting = False  # plateau schedules go by metrics, which are known again
            take_up = restore_epoch_means if no_more_batches else take_up_epoch_means
            attempt("epoch's means", take_up, trainer, own)
            attempt("pending gradients", restore_gradients, trainer, state)
            # Last: what came before may have drawn numbers.
            attempt("random states", restore_random_states, trainer, own)

        if within:
            once(fit_loop.epoch_loop, "on_run_start", before_batch)
        else:
            once(fit_loop, "on_advance_start", before_epoch)
            once(fit_loop.epoch_loop, "on_run_start", iter)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        forget_epoch_means(trainer)  # of the epoch before, where that was resumed

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        forget_shadows(trainer)
        training = trainer.state.stage == RunningStage.TRAINING and trainer.fit_loop._data_fetcher is not None
        if have_agreed(exception) and training and trainer.world_size > 1 and self._acts(trainer):
            # All ranks leave at the same batch; after any other exception some may never come.
            self._gathered = self._gather(trainer, together=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        forget_shadows(trainer)

    def _acts(self, trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((each for each in callbacks if isinstance(each, Continuing)), None) is self

    def _gather(self, trainer: pl.Trainer, together: bool | None = None) -> list[dict[str, Any]]:
        """What every rank has under way; after an exception, when others may not answer, only this rank's."""
        own = {"random": capture_random_states(trainer), "means": capture_epoch_means(trainer)}
        if together is None:
            together = trainer.state.status != TrainerStatus.INTERRUPTED
        if trainer.world_size == 1 or not together:
            return [own]
        everywhere: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everywhere, own)
        return everywhere

    def _own(self, trainer: pl.Trainer, ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
        """This rank's part of what was under way on all ranks."""
        strategy: Any = trainer.strategy
        count = trainer.world_size
        position = strategy.distributed_sampler_kwargs["rank"] if count > 1 else 0
        if len(ranks) != count:
            rank_zero_info(
                f"The checkpoint holds the random states of {len(ranks)} rank(s), and there are {count} now: training "
                "goes on with other random numbers, and where the number of ranks has changed, with another order of "
                "the data."
            )
        return ranks[position] if position < len(ranks) else None

    def _pending_gradients(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Gradients that wait for more batches before the optimizer steps."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.fit_loop._data_fetcher is None or loop.batch_progress.current.ready == 0:
            return {}
        if not module.automatic_optimization or not loop._should_accumulate():
            return {}
        if trainer.world_size > 1:
            if not self._warned_of_gradients:
                self._warned_of_gradients = True
                rank_zero_warn(
                    f"The checkpoint of step {trainer.global_step} is written while gradients are accumulated, which "
                    "differ from rank to rank and are not kept: a fit that resumes from it makes this step without "
                    "them. Save at multiples of accumulate_grad_batches."
                )
            return {}
        return {
            name: parameter.grad.detach().to("cpu", copy=True)
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }


def have_agreed(exception: BaseException) -> bool:
    """Whether all ranks leave by a SIGTERM that they have told each other of before a batch.

    Lightning also leaves at the end of a batch, on a rank that has received one itself, while others may have begun the
    next batch. To wait for them then would be to wait until the process is killed, with nothing saved.
    """
    places = {frame.f_code.co_name for frame, _ in traceback.walk_tb(exception.__traceback__)}
    return isinstance(exception, SIGTERMException) and not places.isdisjoint(("_broadcast_sigterm_tensor", "agree"))


def attempt(what: str, restore: Callable[[pl.Trainer, Any], None], trainer: pl.Trainer, state: Any) -> None:
    """Restore a part of what was under way; where that fails, training goes on without it, and says so.

    Modules, metrics and libraries may have changed since the checkpoint was written.
    """
    try:
        restore(trainer, state)
    except Exception as error:
        rank_zero_warn(
            f"ckpt_path: the {what} of the checkpoint cannot be restored ({type(error).__name__}: {error}). Training "
            "goes on without them, and will not end exactly where the interrupted fit would have ended."
        )


def restore_gradients(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Gradients that wait for more batches before the optimizer steps."""
    named = dict(trainer.lightning_module.named_parameters())
    for name, gradient in state["gradients"].items():
        named[name].grad = gradient.to(named[name].device, copy=True)


def once(loop: Any, name: str, before: Callable[..., Any]) -> None:
    """Have a function called before a loop's method, the next time only."""
    method = getattr(loop, name)

    def shadow(*args: Any) -> None:
        loop.__dict__.pop(name, None)
        before(*args)
        method(*args)

    loop.__dict__[name] = shadow


def forget_shadows(trainer: pl.Trainer) -> None:
    """Undo what a fit that broke off has left."""
    trainer.fit_loop.__dict__.pop("on_advance_start", None)
    trainer.fit_loop.epoch_loop.__dict__.pop("on_run_start", None)
    trainer.fit_loop.epoch_loop.__dict__.pop("_on_before_fetch", None)
    forget_epoch_means(trainer)
