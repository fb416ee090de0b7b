"""Two ranks for three tickets: limits, callbacks, schedules and optimizer settings are those of each group.

Rank 0 trains ticket 0, rank 1 the tickets 1 and 2.
"""

import itertools
import os
import sys
import time
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import TIMESTEPS, ConvNet, Lit, OnStep, loader, quiet_trainer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from worlds import run

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TimestepAwarePruner
from lightning_earlybird.transition import averaged_modules

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.75)]
LIMITS = (5, 3, None)
ASSIGNMENT = [[0], [1], [1]]
SAMPLES = 36  # in batches of 4: 5 a rank for both ranks, 9 for one alone


class Recording(Lit):
    def __init__(self, configure: Any = None, drop: float = 0.1) -> None:
        super().__init__(**({} if configure is None else {"configure": configure}))
        self.drop = drop
        self.seen: dict[str, list] = defaultdict(list)

    def validation_step(self, batch, batch_idx):
        # Gets better in the group of rank 1 only.
        value = 1.0 if self.global_rank == 0 else 1.0 - 0.1 * self.current_epoch
        self.log("val_loss", torch.tensor(value), sync_dist=True)

    def on_before_zero_grad(self, optimizer):
        gradients = [
            p.grad.abs().max() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if gradients:
            self.seen["largest"].append(float(torch.stack(gradients).max()))
            self.seen["norms"].append(
                [
                    float(torch.cat([p.grad.flatten() for p in ticket.parameters() if p.grad is not None]).norm())
                    for ticket in self.model.tickets
                    if any(p.grad is not None for p in ticket.parameters())
                ]
            )


class Antithetic(Lit):
    def loss(self, samples):
        half = torch.randint(TIMESTEPS, (len(samples) // 2,))
        return self.model(samples, torch.cat([half, TIMESTEPS - 1 - half])).square().mean()


class Frames(OnStep):
    """The raw and the averaged weights of each ticket here after each step."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.frames: list[dict[str, torch.Tensor]] = []

    def note(self, trainer: Any, module: Any) -> None:
        averages = averaged_modules(trainer)
        self.frames.append(
            {
                f"{kind}_{number}": torch.cat(
                    [p.detach().flatten().clone() for p in root.model.tickets[number].parameters()]
                )
                for kind, root in [("raw", module), *(("averaged", average) for average in averages)]
                for number in module.model.hosted
            }
        )


class FramesAfterAll(Frames, ModelCheckpoint):
    """Lightning keeps checkpoints last: it sees what they save."""

    def __init__(self) -> None:
        Frames.__init__(self)
        frames, act = self.frames, self.act
        ModelCheckpoint.__init__(self, save_top_k=0)
        self.frames, self.act = frames, act


def data(samples: int = SAMPLES) -> DataLoader:
    images = torch.randn(samples, *ConvNet.sample_shape, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images), batch_size=4, shuffle=True)


def groups_and_schedules(module):
    weights = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.01}, {"params": others, "lr": 0.02, "weight_decay": 0}])
    by_step = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    by_epoch = StepLR(optimizer, 1, gamma=0.5)
    module.schedules = by_step, by_epoch
    module.seen["estimated"] = module.trainer.estimated_stepping_batches
    return [optimizer], [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]


def schedule(make: Any) -> Any:
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        scheduler = make(optimizer, module.trainer.estimated_stepping_batches)
        module.schedules = (scheduler,)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return configure


def train(out: Path, limited: str, unlimited: str) -> None:
    """The scenario."""

    def fit(name: str, module: Any, saved: str, *callbacks: Any, **settings: Any) -> Any:
        settings = {"limit_val_batches": 0, "default_root_dir": out, "assignment": ASSIGNMENT} | settings
        training = settings.pop("training", None) or data()
        trainer = quiet_trainer(
            TimestepAwarePruner(saved, dirpath=out / name),
            *callbacks,
            strategy=MultiTicketStrategy(settings.pop("assignment")),
            devices=2,
            **settings,
        )
        validation = data(8) if settings["limit_val_batches"] else None
        started = time.time()
        try:
            trainer.fit(module, training, validation)
            error = ""
        except Exception as problem:  # on every rank, and told apart by the tests
            error = f"{type(problem).__name__}: {problem}"
        state = {
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "error": error,
            "seconds": time.time() - started,
            "schedules": [schedule.last_epoch for schedule in getattr(module, "schedules", ())],
            "rates": [group["lr"] for group in trainer.optimizers[0].param_groups] if trainer.optimizers else [],
            "frames": next((each.frames for each in callbacks if isinstance(each, Frames)), []),
            **getattr(module, "seen", {}),
        }
        torch.save(state, out / f"{name}_{trainer.global_rank}.pt")

    average = {"decay": 0.5}
    fit(
        "epochs",
        Recording(),
        limited,
        EMAWeightAveraging(**average),
        FramesAfterAll(),
        max_epochs=2,
        enable_checkpointing=True,
    )
    fit(
        "steps",
        Recording(),
        limited,
        EMAWeightAveraging(**average),
        FramesAfterAll(),
        max_steps=4,
        enable_checkpointing=True,
    )
    fit(
        "stopping",
        Recording(),
        unlimited,
        EarlyStopping("val_loss", patience=1),
        ModelCheckpoint(out / "best", monitor="val_loss", save_last="link", filename="{epoch}"),
        ModelCheckpoint(out / "steps", every_n_train_steps=4, save_top_k=-1, save_last=True, filename="{step}"),
        ModelCheckpoint(out / "times", train_time_interval=timedelta(milliseconds=1), save_last=True, filename="t"),
        limit_val_batches=1,
        num_sanity_val_steps=0,
        max_epochs=5,
        enable_checkpointing=True,
    )
    fit(
        "timer",
        Recording(),
        unlimited,
        OnStep(lambda trainer, module: time.sleep(0.02 * (1 + 4 * trainer.global_rank))),
        Timer(timedelta(seconds=1)),
        max_epochs=1000,
    )
    fit(
        "settings",
        Recording(groups_and_schedules),
        unlimited,
        EMAWeightAveraging(**average),
        max_epochs=4,
        accumulate_grad_batches=3,
        precision="bf16-mixed",
        gradient_clip_val=1e-3,
        gradient_clip_algorithm="value",
    )
    for name, make in {
        "one_cycle": lambda optimizer, steps: OneCycleLR(optimizer, 0.01, total_steps=steps),
        "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    }.items():
        fit(name, Recording(schedule(make)), unlimited, max_epochs=3, accumulate_grad_batches=4, gradient_clip_val=1e-3)
    fit("refused", Recording(), unlimited, max_epochs=1, assignment=[[0], [1]])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    part = Subset(data().dataset, range(rank, SAMPLES, 2))
    training = DataLoader(part, batch_size=4)
    fit("parts", Recording(), unlimited, max_epochs=1, training=training, use_distributed_sampler=False)
    fit("antithetic", Antithetic(), unlimited, max_epochs=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("separate")
    for name, limits in (("limited", LIMITS), ("unlimited", (None, None, None))):
        module = Lit()
        regions = [(*region, limit) for region, limit in zip(REGIONS, limits, strict=True)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "regions: max_steps has no effect")  # here, where no ticket is trained
            quiet_trainer(
                TimestepAwarePruner(regions, round_to=4, overlap=50, dirpath=folder / name),
                EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=1, window=2, threshold=1.0),
                max_steps=3,
            ).fit(module, loader(module), loader(module, 1))
    run(__file__, folder, folder / "limited" / "switch", folder / "unlimited" / "switch")
    return folder


def states(out: Path, name: str) -> list[dict]:
    return [torch.load(out / f"{name}_{rank}.pt", weights_only=True) for rank in range(2)]


FITS = ("epochs", "steps", "stopping", "timer", "settings", "one_cycle", "cosine")


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_the_fit_ends_well_on_both_ranks(out, name):
    assert [state["error"] for state in states(out, name)] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("epochs", (5, 3, 18)), ("steps", (4, 3, 4))])
def test_each_ticket_takes_its_own_number_of_steps_and_then_stays_as_it_is(out, name, steps):
    first, second = states(out, name)
    assert (first["steps"], second["steps"]) == (steps[0], max(steps[1:]))
    for state, tickets in ((first, [0]), (second, [1, 2])):
        frames = state["frames"]
        assert len(frames) == state["steps"]
        for ticket in tickets:
            for kind in ("raw", "averaged"):
                values = [frame[f"{kind}_{ticket}"] for frame in frames]
                changes = [not torch.equal(before, after) for before, after in itertools.pairwise(values)]
                assert changes == [step < steps[ticket] for step in range(1, len(values))], (ticket, kind)
            # The average of a ticket that has ended does not reach its weights.
            assert not torch.equal(frames[-1][f"raw_{ticket}"], frames[-1][f"averaged_{ticket}"])


@pytest.mark.slow
def test_early_stopping_stops_the_group_whose_value_does_not_improve(out):
    first, second = states(out, "stopping")
    assert (first["epochs"], second["epochs"]) == (2, 5)
    assert (first["steps"], second["steps"]) == (18, 45)


@pytest.mark.slow
def test_each_group_writes_its_own_checkpoints_and_last_is_of_its_last_step(out):
    for name, steps, best in (("ticket_0", 18, "epoch=0"), ("tickets_1_2", 45, "epoch=4")):
        files = {path.name for path in (out / "best" / name).iterdir()}
        assert files == {f"{best}.ckpt", "last.ckpt"}
        assert {f"step={step}.ckpt" for step in range(4, steps + 1, 4)} | {"last.ckpt"} == {
            path.name for path in (out / "steps" / name).iterdir()
        }
        assert (out / "times" / name / "t.ckpt").exists()
        for kind in ("best", "steps", "times"):
            last = out / kind / name / "last.ckpt"
            assert torch.load(last, weights_only=True)["global_step"] == steps
            assert not last.is_symlink()
        assert torch.load(out / "best" / name / f"{best}.ckpt", weights_only=True)["global_step"] == 9 * (
            1 + int(best[-1])
        )


@pytest.mark.slow
def test_a_timer_stops_each_group_at_its_own_step(out):
    first, second = states(out, "timer")
    assert first["steps"] > 1.5 * second["steps"] > 0
    assert first["seconds"] < 30


@pytest.mark.slow
def test_accumulation_mixed_precision_and_clipping_by_value_work_with_several_param_groups(out):
    for state in states(out, "settings"):
        # 9 batches an epoch in windows of 3; the schedule was laid out for 5, with a step at the end of each epoch.
        assert state["estimated"] == 4 * 2
        assert state["steps"] == 4 * 3
        assert state["schedules"] == [8, 4]
        assert state["rates"][1] == pytest.approx(2 * state["rates"][0])
        assert max(state["largest"]) == pytest.approx(1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_schedules_over_the_estimated_steps_end_with_the_fit(out, name):
    for state in states(out, name):
        # 9 batches in windows of 4 and the rest: 3 steps an epoch, where 5 batches were 2.
        assert state["steps"] == 3 * 3
        assert state["schedules"] == [3 * 2]
        if name == "cosine":
            assert max(state["rates"]) < 1e-6


@pytest.mark.slow
def test_gradients_are_clipped_by_the_norm_of_each_ticket(out):
    for state, tickets in zip(states(out, "cosine"), (1, 2), strict=True):
        for norms in state["norms"]:
            assert norms == pytest.approx([1e-3] * tickets, rel=1e-3)


@pytest.mark.slow
def test_an_assignment_that_does_not_fit_is_refused_on_all_ranks_at_once(out):
    for state in states(out, "refused"):
        assert state["error"].startswith(MisconfigurationException.__name__)
        assert "assignment" in state["error"]
        assert state["seconds"] < 15


@pytest.mark.slow
def test_a_data_set_of_which_each_rank_was_given_a_part_is_refused_on_all_ranks(out):
    for state in states(out, "parts"):
        assert state["error"].startswith(MisconfigurationException.__name__)
        assert "differs from rank to rank" in state["error"] and "Give every rank the whole data set" in state["error"]
        assert state["steps"] == 0


@pytest.mark.slow
def test_timesteps_of_other_tickets_end_the_fit_at_the_first_batch_on_all_ranks(out):
    errors = [state["error"] for state in states(out, "antithetic")]
    assert any(error.startswith("TimestepsOutsideError: The denoiser was called with timestep") for error in errors)
    assert all(error.startswith(("TimestepsOutsideError", "RankLostError")) for error in errors)
    assert any("def sample_timesteps(self, batch_size" in error for error in errors)
    assert [state["steps"] for state in states(out, "antithetic")] == [0, 0]


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
