"""Two processes under plain DDP go on from a checkpoint, each with its own random numbers and data."""

import json
import os
from pathlib import Path

import pytest
import torch
from resuming import differences, logged, train
from worlds import run, scenario

MOMENTS = ["batch-2", "batch-3", "validation-3", "epoch-3", "epoch-6", "batch-8"]
SETTINGS = {"strategy": "ddp", "devices": 2}
PLAIN = SETTINGS | {
    "stateful": False,
    "ema": "after",
    "accumulate_grad_batches": 2,
    "precision": "bf16-mixed",
    "schedule": "cosine",
}


def both(out: Path) -> None:
    """The scenario: a whole fit of three batches an epoch, and one from each of its checkpoints, on every rank."""
    _, whole = train(out / "whole", MOMENTS, **SETTINGS)
    rank = os.environ.get("LOCAL_RANK", "0")
    found = {}
    for moment in MOMENTS:
        trainer, resumed = train(out / moment, ckpt_path=out / "whole" / f"{moment}.ckpt", **SETTINGS)
        found[moment] = differences(resumed, whole)
    _, whole = train(out / "plain", ["epoch-6"], **PLAIN)
    _, resumed = train(out / "plain-6", ckpt_path=out / "plain" / "epoch-6.ckpt", **PLAIN)
    found["plain"] = differences(resumed, whole)
    found["batches"] = trainer.num_training_batches
    found["random"] = whole["random"].tolist()
    (out / f"rank_{rank}.json").write_text(json.dumps(found))


def one(out: Path) -> None:
    """The scenario: one process goes on with what two have begun."""
    train(out / "one", ckpt_path=out / "whole" / "batch-8.ckpt", max_steps=11)  # the schedule has twelve


@pytest.mark.slow
def test_two_processes_resume_as_if_they_had_not_been_interrupted(tmp_path: Path) -> None:
    run(__file__, "both", tmp_path)
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["batches"] == 3
        assert found["plain"] == []  # the loader that most have, at the end of an epoch
        assert [found[moment] for moment in MOMENTS] == [[]] * len(MOMENTS)
    assert ranks[0]["random"] != ranks[1]["random"]
    rows = logged(tmp_path / "whole")
    for moment in MOMENTS:
        own = logged(tmp_path / moment)
        assert own <= rows and len(own) > 10
    # Another number of processes is told that it draws other numbers, and goes on.
    assert "checkpoint holds the random states of 2 rank(s), and there are 1 now" in "".join(
        run(__file__, "one", tmp_path)
    )
    assert torch.load(tmp_path / "whole" / "batch-8.ckpt", weights_only=True)["global_step"] == 8


if __name__ == "__main__":
    scenario([both, one])
