"""Search, switch and ticket training on two processes under plain DDP."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import REGIONS, ConvNet, Lit, loader, quiet_trainer

import lightning_earlybird
from lightning_earlybird import EarlyBirdDetector, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.tickets import load_ensemble
from lightning_earlybird.transition import averaged_modules


class Ranks(pl.Callback):
    """After the fit: what every rank holds, written down by the first."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (pruner,) = (callback for callback in trainer.callbacks if isinstance(callback, TimestepAwarePruner))
        assert isinstance(pl_module.model, TicketEnsemble) and pruner.detector is not None
        averages = [p for average in averaged_modules(trainer) for p in average.parameters()]
        numbers = {
            "weights": torch.cat([p.detach().flatten() for p in [*pl_module.parameters(), *averages]]),
            "masks": torch.cat([mask.flat() for mask in pl_module.model.record.masks]),
            "steps": torch.tensor([pruner.switched_at, trainer.global_step]),
            "checks": torch.tensor([check.from_start for check in pruner.detector.distances[0.5]]),
            "losses": torch.tensor(pl_module.losses),
        }
        everywhere = {name: trainer.strategy.all_gather(value) for name, value in numbers.items()}
        directories = [str(pruner.directory)] * 2
        torch.distributed.all_gather_object(directories, str(pruner.directory))
        if trainer.is_global_zero:
            torch.save(everywhere | {"directories": directories}, self.out)


def run(out: Path, name: str, *callbacks: pl.Callback, max_epochs: int = 4, ckpt_path: Any = None, **settings: Any):
    module = Lit()
    torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", "0")))  # noise and timesteps of each rank's own
    trainer = quiet_trainer(
        *callbacks,
        Ranks(out / f"{name}.pt"),
        strategy="ddp",
        devices=2,
        max_epochs=max_epochs,
        default_root_dir=out,
        limit_val_batches=1,
        log_every_n_steps=1,
        **settings,
    )
    # 64 samples on two ranks: four batches of eight an epoch on each.
    trainer.fit(module, loader(module, 8), loader(module, 8), ckpt_path=ckpt_path)


def run_two_processes(out: Path) -> None:
    def pruner(**settings: Any) -> TimestepAwarePruner:
        return TimestepAwarePruner(REGIONS, round_to=4, overlap=50, **settings)

    def detector(**settings: Any) -> EarlyBirdDetector:
        return EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0, **settings)

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(out / "checkpoints", filename="{epoch}", save_top_k=-1, enable_version_counter=False)

    logged = {"logger": CSVLogger(out, name="", version="log"), "enable_checkpointing": True}
    run(out, "logged", pruner(), EMAWeightAveraging(decay=0.8), detector(), saving(), **logged)
    run(
        out,
        "resumed",
        pruner(dirpath=out / "resumed"),
        EMAWeightAveraging(decay=0.8),
        detector(),
        saving(),
        max_epochs=5,
        ckpt_path=out / "checkpoints" / "epoch=2.ckpt",
        enable_checkpointing=True,
    )
    run(out, "unlogged", pruner(rewind="init", max_search_steps=5), detector(), accumulate_grad_batches=2)


@pytest.mark.slow
def test_two_processes_search_switch_and_train_the_same_tickets(tmp_path: Path) -> None:
    package = Path(lightning_earlybird.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sync_dist" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("the denoiser has become 2 tickets") == 2  # once a switch, by one rank

    places = {"logged": "log/tickets", "resumed": "resumed", "unlogged": "earlybird/version_0"}
    for name, steps in (("logged", [8, 16]), ("resumed", [8, 20]), ("unlogged", [4, 8])):
        result = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for kind in ("weights", "masks", "steps", "checks"):
            assert torch.equal(*result[kind]), (name, kind)
        assert result["steps"][0].tolist() == steps
        assert result["weights"].isfinite().all()
        assert not torch.equal(*result["losses"])  # the ranks saw different data
        assert set(result["directories"]) == {str(tmp_path / places[name])}
        ensemble = load_ensemble(tmp_path / places[name] / "ensemble", ConvNet)
        weights = torch.cat([parameter.detach().flatten() for parameter in ensemble.parameters()])
        assert torch.equal(weights, result["weights"][0][: len(weights)])
    assert not (tmp_path / "earlybird" / "version_1").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
