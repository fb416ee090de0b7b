"""When a fit of several ranks must end before its time: what is shared, saved and waited for."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _launch_process_observer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.utilities.exceptions import SIGTERMException


def share_sigterm(trainer: pl.Trainer, request_stop: Callable[[], None]) -> None:
    """Let a SIGTERM that one rank receives reach all of them without a collective.

    Lightning's own handler broadcasts within the signal handler, wherever the main thread happens to be: between two
    other collectives, or inside one. It is exchanged for one that only takes notes.

    Args:
        trainer: The Trainer of the fit, whose handlers are registered.
        request_stop: Tells the other ranks; must be safe in a signal handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # no handlers are registered there
    received: list[int] = []

    def take_note(signum: int, frame: FrameType | None) -> None:
        # Not `received_sigterm`: Lightning's loops would raise on this rank, while others of its group go on to their
        # next collective.
        request_stop()
        if not received and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        received.append(signum)

    connector = trainer._signal_connector

    composed = signal.getsignal(signal.SIGTERM)
    if isinstance(composed, _HandlersCompose):
        own = connector._sigterm_notifier_fn
        composed.signal_handlers = [take_note if handler == own else handler for handler in composed.signal_handlers]


def stop_together(trainer: pl.Trainer, asked: Callable[[], bool]) -> None:
    """Have the ranks of a group stop at the same batch, when the first of them knows that it is asked to.

    Takes the place of what Lightning does before every batch of several ranks. That goes by a flag which other parts of
    its loops read without asking anybody, and takes a broken connection for "go on".

    Args:
        trainer: The Trainer of the fit.
        asked: Whether this rank knows that all are to stop.
    """

    def agree() -> None:
        flag = torch.tensor([int(asked())], device=trainer.strategy.root_device)
        torch.distributed.broadcast(flag, src=0)  # of the default group, which is that of the ticket
        if flag.item():
            raise SIGTERMException

    trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = agree


def look_between_batches(trainer: pl.Trainer, look: Callable[[], None]) -> None:
    """Have a function called before each training batch is fetched, which may raise.

    In the hooks of a batch's start the data loader has moved on, and its state belongs to no place that a fit could
    resume from.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.__dict__.pop("advance", None)
    advance = loop.advance

    def look_and_advance(data_fetcher: Any) -> None:
        look()
        advance(data_fetcher)

    loop.__dict__["advance"] = look_and_advance


def before_validations(trainer: pl.Trainer, note: Callable[[], None]) -> None:
    """Have a function called before each validation of the training, and before anything is drawn for it."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.__dict__.pop("run", None)
    run = loop.run

    def note_and_run() -> Any:
        note()
        return run()

    loop.__dict__["run"] = note_and_run


def validation_is_unfinished(trainer: pl.Trainer) -> bool:
    """Whether a validation has broken off within one of its batches."""
    total = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return trainer.validating and total.ready != total.completed


def stop_by_themselves(trainer: pl.Trainer) -> None:
    """Lightning's own way again."""
    trainer.fit_loop.epoch_loop.val_loop.__dict__.pop("run", None)
    for name in ("_broadcast_sigterm_tensor", "advance"):
        trainer.fit_loop.epoch_loop.__dict__.pop(name, None)


def replace_child_observer() -> None:
    """Stop Lightning's thread that kills everything, this process first, within seconds of a child's death.

    The liaison watches over the children instead: it says which rank was lost, and leaves the others time to save.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def restore_child_observer(strategy: Any) -> None:
    """Have Lightning's thread watch the children again, after a fit that ended well."""
    children = child_processes(strategy)
    if children:
        _launch_process_observer(children)


def end_children(strategy: Any, seconds: float) -> None:
    """End the processes that the launcher has started and that do not leave by themselves: stopped ones, say.

    Args:
        strategy: The strategy.
        seconds: How long they have to leave; one that hangs says where before it does.
    """
    children = child_processes(strategy)
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in children) and time.monotonic() < until:
        time.sleep(0.1)
    for process in children:
        if process.poll() is None:
            process.kill()


def save_interrupted(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint without asking any other rank; never raises, since another error is under way.

    Args:
        trainer: The Trainer.
        path: The file.
    """
    try:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
    except Exception as error:
        _say(f"MultiTicketStrategy: {str(path)!r} could not be saved: {type(error).__name__}: {error}")
    else:
        _say(f"MultiTicketStrategy: the state at step {trainer.global_step} is in {str(path)!r}.")


def child_processes(strategy: Any) -> list[Any]:
    """The processes that the launcher has started; empty where others did."""
    launcher = strategy.launcher
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []


def _say(text: str) -> None:
    # From every rank: each has its own file.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
