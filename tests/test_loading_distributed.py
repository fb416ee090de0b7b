"""Checkpoints of two processes: in fits of the mixin without a pruner, and of groups that train different tickets."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import ConvNet, Lit, Repeatable, loader, quiet_trainer

import lightning_earlybird
from lightning_earlybird import (
    MultiTicketStrategy,
    TicketCheckpoints,
    TicketEnsembleSampler,
    TimestepAwarePruner,
    load_from_checkpoint,
)


class Ours(TicketCheckpoints, Repeatable):
    """Carries the structure of its tickets by itself."""


# So narrow that most batches have no sample for the first ticket.
REGIONS = [(0, 10, 0.25), (10, 1000, 0.5)]


def run(out: Path, *callbacks: pl.Callback, max_steps: int, module: Any = None, **settings: Any) -> None:
    ckpt_path = settings.pop("ckpt_path", None)
    module = Ours() if module is None else module
    saving = ModelCheckpoint(out, filename="{step}", save_last=True)
    averaging = EMAWeightAveraging(decay=0.8)
    settings = {"strategy": "ddp", "devices": 2, "max_steps": max_steps, "enable_checkpointing": True, **settings}
    trainer = quiet_trainer(averaging, *callbacks, saving, default_root_dir=out, **settings)
    trainer.fit(module, loader(module, 8), ckpt_path=ckpt_path)


def run_two_processes(out: Path) -> None:
    def pruner(name: str) -> TimestepAwarePruner:
        return TimestepAwarePruner(REGIONS, round_to=4, max_search_steps=2, dirpath=out / name / "tickets")

    run(out / "first", pruner("first"), max_steps=4)
    for name, callbacks in (("pruner", [pruner("pruner")]), ("mixin", [])):
        run(out / name, *callbacks, max_steps=8, ckpt_path=out / "first" / "last.ckpt")
    loaded = load_from_checkpoint(Lit, out / "first" / "last.ckpt")
    run(out / "loaded", pruner("loaded"), module=loaded, max_steps=4)
    run(out / "apart", pruner("apart"), max_steps=6, strategy=MultiTicketStrategy())


@pytest.mark.slow
def test_checkpoints_of_two_processes_travel(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_earlybird.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    # Without a pruner the mixin resumes to the same bits, and leaves checkpoints of the same kind.
    ours, theirs = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("mixin", "pruner"))
    for kind in ("state_dict", "current_model_state"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(value, theirs[kind][name]) for name, value in ours[kind].items()), kind
    assert len(Ours.load_from_checkpoint(tmp_path / "mixin" / "last.ckpt").model.tickets) == 2

    # A fit that begins with a loaded module does not wait for the ticket that a batch misses.
    assert torch.load(tmp_path / "loaded" / "last.ckpt", weights_only=True)["global_step"] == 4

    # What groups have saved apart makes the ensemble that the fit has written at its end.
    groups = [tmp_path / "apart" / f"ticket_{ticket}" / "last.ckpt" for ticket in (0, 1)]
    sampler = TicketEnsembleSampler.from_checkpoint(groups, ConvNet)
    ensemble = TicketEnsembleSampler.from_pretrained(tmp_path / "apart" / "tickets" / "ensemble", ConvNet)
    assert sampler.state_dict().keys() == ensemble.state_dict().keys()
    for name, value in ensemble.state_dict().items():
        assert torch.equal(sampler.state_dict()[name], value), name
    assert sampler.record.facts == ensemble.record.facts
    with pytest.raises(ValueError, match=r"the tickets \[1\] of 2 are missing"):
        TicketEnsembleSampler.from_checkpoint(groups[0], ConvNet)
    with pytest.raises(MisconfigurationException, match=r"the checkpoint lacks the tickets \[0\] of 2"):
        load_from_checkpoint(Lit, groups[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
