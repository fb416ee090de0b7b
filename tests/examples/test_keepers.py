"""Callbacks of the examples: what outlives the switch, and a restart."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from shared.keepers import LogKeeper


def test_metrics_of_a_resumed_run_hold_every_step_once(tmp_path: Path) -> None:
    def log(keeper: Any, step: int, **metrics: float) -> None:
        keeper.logger.log_metrics(metrics, step)
        keeper.logger.save()

    keeper = LogKeeper(CSVLogger(tmp_path, name="", version=""), "run")
    assert keeper.state_dict() == {"rows": [], "wandb_id": "run"}
    log(keeper, 9, train_loss=0.5)
    log(keeper, 19, train_loss=0.25, step_time=1e-3)
    state = keeper.state_dict()
    log(keeper, 29, train_loss=0.125)  # lost with the process, and logged again
    before = (tmp_path / "metrics.csv").read_text().splitlines()

    with pytest.warns(UserWarning, match="Previous log files in this directory will be deleted"):
        resumed = LogKeeper(CSVLogger(tmp_path, name="", version=""), "other")
        resumed.load_state_dict(state)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before[:3]
    log(resumed, 29, train_loss=0.125)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before
