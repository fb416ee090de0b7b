"""What the strategy changes of Lightning's own ways with processes and signals, and that it changes it back."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from modules import quiet_trainer

from lightning_earlybird.parallel.distress import (
    replace_child_observer,
    restore_child_observer,
    share_sigterm,
    stop_by_themselves,
    stop_together,
)


def observed() -> list[list[subprocess.Popen]]:
    return [t._child_processes for t in threading.enumerate() if t.name == "child-process-observer"]


def test_lightning_watches_over_child_processes_again_after_a_fit() -> None:
    launcher = object.__new__(_SubprocessScriptLauncher)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", ""])]
    restore_child_observer(SimpleNamespace(launcher=launcher))
    assert launcher.procs in observed()
    replace_child_observer()
    assert launcher.procs not in observed()
    assert launcher.procs[0].wait(30) == 0


def test_a_sigterm_is_noted_and_no_loop_of_lightning_raises_because_of_it() -> None:
    trainer, notes = quiet_trainer(), []
    connector = trainer._signal_connector
    connector.register_signal_handlers()
    try:
        for _ in range(2):  # once before training, once at its start
            share_sigterm(trainer, lambda: notes.append(1))
        os.kill(os.getpid(), signal.SIGTERM)
        assert notes == [1] and not trainer.received_sigterm
    finally:
        connector.teardown()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_ranks_agree_on_stopping_and_a_broken_group_is_no_agreement(world_of_one) -> None:
    trainer, asked = quiet_trainer(), []
    loop = trainer.fit_loop.epoch_loop
    stop_together(trainer, lambda: bool(asked))
    loop._broadcast_sigterm_tensor()
    asked.append(1)
    with pytest.raises(SIGTERMException):
        loop._broadcast_sigterm_tensor()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="process group"):
        loop._broadcast_sigterm_tensor()
    stop_by_themselves(trainer)
    loop._broadcast_sigterm_tensor()  # Lightning's: it takes the error for "go on"
    assert "_broadcast_sigterm_tensor" not in vars(loop)
