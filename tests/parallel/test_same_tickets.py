"""Whoever trains a ticket, and whatever else that rank trains: it becomes the same network, to the last bit.

Three tickets, saved beforehand, are trained by worlds of one, two and three ranks. The module's timesteps and noise
depend on the batch alone, so that the worlds differ in nothing but who trains what.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import TIMESTEPS, ConvNet, Lit, loader, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader
from worlds import run

from lightning_earlybird import EarlyBirdDetector, TicketEnsembleSampler, TimestepAwarePruner

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.75)]
WORLDS = {1: [(0, 1, 2)], 2: [(0,), (1, 2)], 3: [(0,), (1,), (2,)]}


class Repeatable(Lit):
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.trainer.fit_loop.total_batch_idx)

    def sample_timesteps(self, batch_size: int, start: int = 0, stop: int = TIMESTEPS) -> torch.Tensor:
        return torch.randint(start, stop, (batch_size,), generator=self.generator())

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        steps = self.sample_timesteps(len(samples))
        noise = torch.randn(samples.shape, generator=self.generator())
        share = (steps / TIMESTEPS).view(-1, 1, 1, 1)
        return nn.functional.mse_loss(self.model(samples * (1 - share) + noise * share, steps), noise)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


def cosine(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(out: Path, saved: str, ranks: str) -> None:
    """The scenario: each rank writes down what it holds, in the middle and at the end."""
    module = Repeatable(configure=cosine)
    average = EMAWeightAveraging(decay=0.8)
    checkpoints = ModelCheckpoint(out / "checkpoints", monitor="val_loss", save_last=True, save_top_k=1)
    trainer = quiet_trainer(
        average,
        TimestepAwarePruner(saved, dirpath=out),
        checkpoints,
        strategy="multi_ticket",
        devices=int(ranks),
        max_steps=17,  # in the middle of an epoch of six steps
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        log_every_n_steps=1,
        default_root_dir=out,
        enable_checkpointing=True,
        logger=CSVLogger(out, name="", version="log"),
    )
    data = loader(module, 12).dataset
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8))
    sampler = TicketEnsembleSampler.from_trainer(trainer)
    (scores,) = trainer.validate(module, DataLoader(data, batch_size=8), verbose=False)
    state = {
        "raw": module.state_dict(),
        "averaged": average._average_model.module.state_dict() if average._average_model else module.state_dict(),
        "sampler": sampler.state_dict(),
        "scores": scores,
        "steps": trainer.global_step,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "checkpoints": str(checkpoints.dirpath),
        "own": list(trainer.strategy.plan.assignment.hosted(trainer.global_rank)),
    }
    torch.save(state, out / f"rank_{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    module = Lit()
    trainer = quiet_trainer(
        TimestepAwarePruner(REGIONS, round_to=4, overlap=50, dirpath=folder / "saved"),
        EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=1, window=2, threshold=1.0),
        max_steps=3,
    )
    trainer.fit(module, loader(module), loader(module, 1))
    folders = {}
    for ranks in WORLDS:
        folders[ranks] = folder / str(ranks)
        folders[ranks].mkdir()
        run(__file__, folders[ranks], folder / "saved" / "ensemble", ranks)
    return folders


def states(worlds: dict[int, Path]) -> list[dict]:
    files = [folder / f"rank_{rank}.pt" for ranks, folder in worlds.items() for rank in range(ranks)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.slow
def test_tickets_are_the_same_on_every_rank_of_every_world(worlds):
    first, *others = states(worlds)
    for state in others:
        for part in ("raw", "averaged", "sampler"):
            assert state[part].keys() == first[part].keys()
            different = [name for name, tensor in first[part].items() if not torch.equal(tensor, state[part][name])]
            assert not different
        assert state["steps"] == first["steps"] == 17
        assert state["rate"] == first["rate"] != 0.01


@pytest.mark.slow
def test_the_ensemble_on_disk_is_that_of_one_process(worlds):
    ensembles = [TicketEnsembleSampler.from_pretrained(folder / "ensemble", ConvNet) for folder in worlds.values()]
    for ensemble in ensembles:
        for name, tensor in states(worlds)[0]["sampler"].items():
            assert torch.equal(tensor, ensemble.state_dict()[name]), name
    indices = [json.loads((folder / "ensemble" / "ensemble.json").read_text()) for folder in worlds.values()]
    assert indices[0] == indices[1] == indices[2]
    for folder in worlds.values():
        assert not (folder / "finished").exists()  # the parts are gone once the whole is there


@pytest.mark.slow
def test_each_group_has_checkpoints_of_its_own_and_the_last_is_of_the_last_step(worlds):
    for ranks, folder in worlds.items():
        for hosted in WORLDS[ranks]:
            name = f"ticket{'s' * (len(hosted) > 1)}_{'_'.join(map(str, hosted))}"
            last = torch.load(folder / "checkpoints" / name / "last.ckpt", weights_only=True)
            assert last["global_step"] == 17
            tickets = {key.split(".")[2] for key in last["state_dict"] if ".tickets." in key}
            assert tickets == set(map(str, hosted))
            names = [path.name for path in (folder / "checkpoints" / name).iterdir()]
            assert len(names) == 2  # the best, and the last
    assert {state["checkpoints"] for state in states(worlds)} == {str(f / "checkpoints") for f in worlds.values()}


@pytest.mark.slow
def test_metrics_have_the_same_names_and_values_in_every_world(worlds):
    def logged(folder: Path) -> dict[tuple[str, int], float]:
        head, *rows = [line.split(",") for line in (folder / "log" / "metrics.csv").read_text().splitlines()]
        found = {}
        for row in rows:
            cells = dict(zip(head, row, strict=True))
            for name, value in cells.items():
                if name.startswith("ticket_") and name.endswith(("train_loss", "val_loss")) and value:
                    found[name, int(cells["step"])] = float(value)
        return found

    one, two, three = (logged(folder) for folder in worlds.values())
    assert one == two == three
    assert {name for name, _ in one} == {f"ticket_{t}/{kind}_loss" for t in range(3) for kind in ("train", "val")}
    assert len([key for key in one if key[0] == "ticket_2/train_loss"]) == 17


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
