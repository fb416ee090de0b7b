"""W&B without a login: nothing is asked for, nothing fails, and it is said how the run gets to the service."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from wandb_records import offline_runs

from lightning_earlybird.reporting import wandb_is_offline, wandb_logger


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def test_without_a_login_the_run_stays_here_and_a_line_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        logger = wandb_logger("mine", save_dir=tmp_path, name="first")
    assert logger._offline and logger._wandb_init["mode"] == "offline"
    assert (logger._wandb_init["project"], logger._wandb_init["name"]) == ("mine", "first")
    assert f"wandb sync {tmp_path / 'wandb'}/offline-run-*" in caplog.text
    assert "run `wandb login` or set WANDB_API_KEY" in caplog.text


def test_a_login_or_a_mode_decides() -> None:
    assert wandb_is_offline("offline")
    # In a process of its own: the client keeps the key for the rest of the process.
    code = (
        "import os; from lightning_earlybird.reporting import wandb_is_offline, wandb_logger\n"
        "assert not wandb_is_offline() and not wandb_is_offline('online') and not wandb_logger()._offline\n"
        "os.environ['WANDB_MODE'] = 'offline'; assert wandb_is_offline() and not wandb_is_offline('online')"
    )
    environment = os.environ | {"WANDB_API_KEY": "0" * 40}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stays offline" not in done.stderr


def test_online_without_a_login_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(MisconfigurationException, match="nobody is logged in to W&B here: run `wandb login` or set"):
        wandb_logger(mode="online")


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='never' must be one of 'auto', 'online', 'offline'"):
        wandb_logger(mode="never")  # type: ignore[arg-type]


def test_the_run_is_where_it_was_wanted_also_with_a_client_that_somebody_started_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    # W&B's own process outlives a run and serves the children of who has started it: a notebook's, or a sweep's.
    log = (
        "import wandb; from lightning_earlybird.reporting import wandb_logger\n"
        "wandb_logger(mode='offline', save_dir='runs').log_metrics({'loss': 0.5}, step=1); wandb.finish()"
    )
    parent = (
        "import os, subprocess, sys, wandb\n"
        "wandb.init(mode='offline', dir='.').finish(); assert os.environ['WANDB_SERVICE']\n"
        f"subprocess.run([sys.executable, '-c', {log!r}], cwd={str(there)!r}, check=True)"
    )
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of another test
    done = subprocess.run([sys.executable, "-c", parent], cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Using an existing wandb-core service" in done.stderr
    (run,) = offline_runs(there / "runs")
    assert run.history[0]["loss"] == 0.5
