"""Four ranks, two of which share a ticket: data, collectives and metrics within the group; several fits in one launch.

Each rank writes down what it saw, and the tests read that.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities import CombinedLoader
from modules import ConvNet, Lit, quiet_trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric
from worlds import run

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TimestepAwarePruner

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.75)]
GROUPS = [[0, 1], [2], [3]]
SAMPLES, BATCH, EPOCHS = 64, 4, 3
EVERYTHING = list(range(SAMPLES))


class Recording(Lit):
    """Writes down the samples that it gets, and what collectives say."""

    def __init__(self, configure: Any = None, hook: bool = False, **settings: Any) -> None:
        super().__init__(**({} if configure is None else {"configure": configure}))
        self.hook = hook
        self.settings = settings
        self.ids: dict[int, list[list[int]]] = defaultdict(list)
        self.validated: dict[int, list[int]] = defaultdict(list)
        self.seen: dict[str, list] = defaultdict(list)
        self.metric = MeanMetric()

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.ids[self.current_epoch].append([int(number) for _, numbers in parts for number in numbers])
        loss = torch.stack([self.loss(images) for images, _ in parts]).mean()
        rank = torch.tensor(float(self.global_rank))
        self.log("rank", rank, sync_dist=True)
        self.metric(rank)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        self.seen["gathered"].append(self.all_gather(rank).reshape(-1).tolist())
        self.seen["synced"].append(float(self.trainer.callback_metrics.get("rank", -1)))
        self.seen["rate"].append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx):
        self.validated[self.current_epoch] += batch[1].tolist()
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def on_train_epoch_end(self):
        self.seen["epoch_metric"].append(float(self.metric.compute()))

    def on_train_end(self):
        ensemble = self.model
        self.seen["hosted"] = list(getattr(ensemble, "hosted", ()))
        self.seen["weights"] = {name: value.clone() for name, value in self.state_dict().items()}
        self.seen["world"] = [dist.get_world_size(), self.trainer.world_size]

    def train_dataloader(self):
        if self.hook:
            return own_sampler(self.trainer.world_size, self.trainer.global_rank)
        return data(shuffle=True, **self.settings)


class ByHand(Recording):
    def __init__(self) -> None:
        super().__init__(hook=True)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


def data(samples: int = SAMPLES, first: int = 0, **settings: Any) -> DataLoader:
    images = torch.randn(samples, *ConvNet.sample_shape, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(first, first + samples)), batch_size=BATCH, **settings)


def own_sampler(replicas: int, rank: int) -> DataLoader:
    dataset = data().dataset
    return DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, num_replicas=replicas, rank=rank))


def one_cycle(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    steps = module.trainer.estimated_stepping_batches
    module.seen["estimated"] = steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def write(out: Path, name: str, trainer: Any, module: Recording) -> None:
    final = {key: value.clone() for key, value in module.state_dict().items()}
    after = torch.ones(1)
    dist.all_reduce(after)
    state = {
        "ids": dict(module.ids),
        "validated": dict(module.validated),
        "steps": trainer.global_step,
        "final": final,
        "after": [trainer.world_size, float(after)],
        "groups": [list(group) for group in trainer.strategy.plan.assignment.groups],
        "switched_at": next(c for c in trainer.callbacks if isinstance(c, TimestepAwarePruner)).switched_at,
        **module.seen,
    }
    torch.save(state, out / f"{name}_{trainer.global_rank}.pt")


def train(out: Path) -> None:
    """The scenario."""

    def trainer(*callbacks: Any, assignment: Any = GROUPS, **settings: Any) -> Any:
        return quiet_trainer(
            *callbacks, strategy=MultiTicketStrategy(assignment), devices=4, **{"limit_val_batches": 1.0} | settings
        )

    # Switches in the middle of an epoch of three batches.
    first = trainer(
        EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=1, window=2, threshold=1.0),
        TimestepAwarePruner(REGIONS, round_to=4, overlap=50, dirpath=out / "search"),
        EMAWeightAveraging(decay=0.9),
        max_epochs=EPOCHS,
        check_val_every_n_epoch=1,
    )
    module = Recording(one_cycle, num_workers=1, persistent_workers=True)
    first.fit(module, val_dataloaders=data())
    write(out, "search", first, module)

    # The same Trainer, strategy and module go on for an epoch: a whole world again at first.
    for record in (module.ids, module.validated, module.seen):
        record.clear()
    first.fit_loop.max_epochs = EPOCHS + 1
    module.configure = lambda module: torch.optim.AdamW(module.parameters(), lr=0.01)
    first.fit(module, val_dataloaders=data())
    write(out, "again", first, module)

    def saved(name: str) -> TimestepAwarePruner:
        return TimestepAwarePruner(str(out / "search" / "switch"), dirpath=out / name)

    module = Recording()
    loaders = {"few": data(32, first=1000), "many": data(shuffle=True)}
    combined = trainer(saved("combined"), max_epochs=2, limit_val_batches=0)
    combined.fit(module, CombinedLoader(loaders, "max_size_cycle"))
    write(out, "combined", combined, module)

    module = ByHand()
    own = trainer(saved("own_sampler"), max_epochs=2, use_distributed_sampler=False, limit_val_batches=0)
    own.fit(module)
    write(out, "own_sampler", own, module)

    # Switches between two epochs.
    module = Recording()
    given = trainer(
        EarlyBirdDetector([0.25, 0.5, 0.75], every_n_epochs=1, window=2, threshold=1.0),
        TimestepAwarePruner(REGIONS, round_to=4, dirpath=out / "given_sampler"),
        max_epochs=4,
        use_distributed_sampler=False,
    )
    rank = dist.get_rank()
    given.fit(module, own_sampler(4, rank), own_sampler(4, rank))
    write(out, "given_sampler", given, module)

    # Two tickets, and nobody says who trains them. Switches at the last batch of an epoch.
    module = Recording(one_cycle)
    planned = trainer(
        EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3, threshold=1.0),
        TimestepAwarePruner([(0, 500, 0.25), (500, 1000, 0.5)], round_to=4, dirpath=out / "planned"),
        assignment=None,
        max_epochs=2,
        limit_val_batches=0,
    )
    planned.fit(module)
    write(out, "planned", planned, module)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    run(__file__, folder)
    return folder


def states(out: Path, name: str) -> list[dict]:
    return [torch.load(out / f"{name}_{rank}.pt", weights_only=True) for rank in range(4)]


def in_groups(states: list[dict]) -> list[list[dict]]:
    return [[states[rank] for rank in group] for group in states[0]["groups"]]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


FITS = ("search", "again", "combined", "own_sampler", "given_sampler", "planned")
SEARCHES = {"search": 2, "given_sampler": 8, "planned": 3}
"""Fit -> the step of its switch; the others begin with saved tickets. The world's epochs have four batches a rank."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_each_group_goes_through_all_the_data_in_every_epoch_and_shares_them_inside(out, name):
    for group in in_groups(states(out, name)):
        epochs = sorted(group[0]["ids"])
        orders = [flat(group[0]["ids"][epoch]) for epoch in epochs]
        assert len(set(map(tuple, orders))) == len(orders)  # all are shuffled, differently
        if name in SEARCHES:
            epochs = epochs[group[0]["switched_at"] // 4 + 1 :]  # those after that in which the world was split
        assert epochs
        for epoch in epochs:
            seen = [number for state in group for number in flat(state["ids"][epoch])]
            assert sorted(number for number in seen if number < 1000) == EVERYTHING
            few = sorted(number for number in seen if number >= 1000)
            assert few == (sorted(2 * list(range(1000, 1032))) if name == "combined" else [])
            assert len({len(state["ids"][epoch]) for state in group}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_the_epoch_of_the_switch_goes_on_with_as_many_batches_as_the_group_has(out, name):
    for group in in_groups(states(out, name)):
        for state in group:
            assert state["switched_at"] == SEARCHES[name]
            assert len(state["ids"][SEARCHES[name] // 4]) == math.ceil(16 / len(group))
            ids = flat(state["ids"][SEARCHES[name] // 4])
            assert len(set(ids)) > len(ids) // 2  # new ones, not one batch again and again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search", "given_sampler"])
def test_each_group_validates_on_all_the_data(out, name):
    for group in in_groups(states(out, name)):
        for epoch in sorted(group[0]["ids"])[SEARCHES[name] // 4 :]:
            seen = [number for state in group for number in state["validated"][epoch]]
            # In the first epoch there was the sanity check as well: two batches a rank of the world.
            assert sorted(seen if epoch > 0 else set(seen)) == EVERYTHING


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_ranks_of_a_group_hold_the_same_weights_to_the_last_bit(out, name):
    found = states(out, name)
    assert sorted(len(group) for group in in_groups(found)) in ([1, 1, 2], [2, 2], [1, 3])
    for group in in_groups(found):
        for state in group[1:]:
            assert state["weights"].keys() == group[0]["weights"].keys()
            for key, value in state["weights"].items():
                assert "metric" in key or torch.equal(value, group[0]["weights"][key])
        assert all(len(state["hosted"]) == 1 and state["world"] == 2 * [len(group)] for state in group)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_at_the_end_the_world_is_back_and_all_ranks_hold_what_the_groups_trained(out, name):
    found = states(out, name)
    for state in found:
        assert state["after"] == [4, 4.0]
        for key, value in state["final"].items():
            assert "metric" in key or torch.equal(value, found[0]["final"][key])
        for key, value in state["weights"].items():
            assert "metric" in key or torch.equal(value, state["final"][key])


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_collectives_and_metrics_are_those_of_the_group(out, name):
    found = states(out, name)
    for group, ranks in zip(in_groups(found), found[0]["groups"], strict=True):
        for state in group:
            before = SEARCHES.get(name, 0)
            assert state["gathered"] == before * [[0.0, 1.0, 2.0, 3.0]] + (len(state["gathered"]) - before) * [
                list(map(float, ranks))
            ]
            assert state["synced"][-1] == sum(ranks) / len(ranks)
            assert state["epoch_metric"][-1] == sum(ranks) / len(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search", "planned"])
def test_a_schedule_for_the_estimated_steps_ends_with_the_last_step_of_each_group(out, name):
    for group in in_groups(states(out, name)):
        for state in group:
            epochs = len(state["ids"])
            assert state["estimated"] == 4 * epochs
            assert state["steps"] == epochs * math.ceil(16 / len(group))
            # All values of the schedule are used, in turn, up to the last.
            assert len(set(state["rate"])) == 4 * epochs
            assert state["rate"][-1] == min(state["rate"])


@pytest.mark.slow
def test_optimization_by_hand_works_where_every_rank_has_one_ticket(out):
    for state in states(out, "own_sampler"):
        assert state["steps"] == sum(map(len, state["ids"].values()))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
