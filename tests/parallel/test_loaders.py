"""Loaders, and what is left of a fit, when a group of ranks takes the place of the world: without processes."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from modules import Lit, OnStep, fit, loader, quiet_trainer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_earlybird.parallel.budgets import steps_left
from lightning_earlybird.parallel.loaders import GroupLoaders, adapt_samplers, fingerprint
from lightning_earlybird.parallel.separate import SchedulerPace

WORLD = {"num_replicas": 4, "rank": 2}
GROUP = {"num_replicas": 2, "rank": 1}


def dataset(size: int = 21) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def loops(*loaders: Any) -> Any:
    """As much of a Trainer as is looked at: the loops with their loaders and where these come from."""
    train, val = (SimpleNamespace(_combined_loader=CombinedLoader(each) if each else None) for each in loaders)
    train.epoch_loop = SimpleNamespace(val_loop=val)
    train._data_source, val._data_source = (_DataLoaderSource(each, "") for each in loaders)
    return SimpleNamespace(fit_loop=train)


@pytest.mark.parametrize("size", [20, 21, 23])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [DistributedSampler, UnrepeatedDistributedSampler])
def test_an_adapted_sampler_deals_out_what_one_made_for_the_group_would(size, shuffle, drop_last, kind):
    settings = {"shuffle": shuffle, "drop_last": drop_last}
    sampler = kind(dataset(size), **WORLD, **settings)
    trainer = loops(DataLoader(dataset(size), sampler=sampler), [])
    adapt_samplers(trainer, WORLD, GROUP)
    expected = kind(dataset(size), **GROUP, **settings)
    assert list(sampler) == list(expected) and len(sampler) == len(expected)
    adapt_samplers(trainer, GROUP, WORLD)
    expected = kind(dataset(size), **WORLD, **settings)
    assert list(sampler) == list(expected) and len(sampler) == len(expected)


def test_samplers_inside_of_batch_samplers_and_of_validation_are_adapted_and_others_are_not():
    inner, validation = (DistributedSampler(dataset(), **WORLD, shuffle=False) for _ in range(2))
    other = DistributedSampler(dataset(), num_replicas=3, rank=0)  # not of the ranks
    batched = DataLoader(dataset(), batch_sampler=BatchSampler(inner, 2, False))
    trainer = loops(
        {"a": batched, "b": DataLoader(dataset(), sampler=other)}, DataLoader(dataset(), sampler=validation)
    )
    adapt_samplers(trainer, WORLD, GROUP)
    assert [(each.num_replicas, each.rank) for each in (inner, validation, other)] == [(2, 1), (2, 1), (3, 0)]


def test_loaders_that_are_asked_for_later_are_those_of_the_group():
    given = DataLoader(dataset(), sampler=DistributedSampler(dataset(), **WORLD))
    trainer = loops(given, [given])
    numbered = []

    @contextmanager
    def number():
        numbered.append(True)
        yield

    added = GroupLoaders(trainer, [WORLD], GROUP, number)
    sources = trainer.fit_loop._data_source, trainer.fit_loop.epoch_loop.val_loop._data_source
    assert sources[1].dataloader() == [given] and numbered == [True]
    assert (given.sampler.num_replicas, given.sampler.rank) == (2, 1)
    assert sources[0].dataloader() is given and given.sampler.num_replicas == 2
    added.undo()
    assert sources[0].dataloader() is given and len(numbered) == 2


@pytest.mark.parametrize("accumulated", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_steps": 7, "max_epochs": -1}, {"max_epochs": 3, "max_steps": 7}]
)
def test_the_steps_that_are_left_are_those_that_are_taken(accumulated, limits):
    expected: list[tuple[int, int]] = []

    class Before(OnStep):
        def on_train_start(self, trainer, pl_module):
            expected.append((trainer.global_step, steps_left(trainer)[0]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            expected.append((trainer.global_step, steps_left(trainer)[0]))

    trainer = fit(Lit(), Before(lambda *_: None), batches=5, accumulate_grad_batches=accumulated, **limits)
    assert {done + left for done, left in expected} == {trainer.global_step}
    assert len(expected) > 5


def test_a_second_fit_counts_its_own_steps():
    expected: list[int] = []

    class Before(OnStep):
        def on_train_start(self, trainer, pl_module):
            expected.append(steps_left(trainer)[0])

    module, trainer = Lit(), quiet_trainer(Before(lambda *_: None), max_epochs=1)
    trainer.fit(module, loader(module, 5), loader(module, 1))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(module, 5), loader(module, 1))
    assert expected == [5, 10]


@pytest.mark.parametrize(("former", "present"), [(4, 12), (10, 46), (5, 7), (1, 9), (6, 6)])
def test_a_schedule_takes_as_many_steps_as_it_was_made_for_evenly_spread(former, present):
    taken: list[Any] = []
    scheduler = object()
    config = SimpleNamespace(scheduler=scheduler, interval="step", reduce_on_plateau=False)
    module = Lit()
    module.trainer = SimpleNamespace(lr_scheduler_configs=[config])
    module.__dict__["lr_scheduler_step"] = lambda scheduler, metric: taken.append(metric)
    SchedulerPace(module, former, present)
    for call in range(1, present + 1):
        module.lr_scheduler_step(scheduler, call)
        assert len(taken) == call * former // present
    assert len(taken) == former


@pytest.mark.parametrize("settings", [{"interval": "epoch"}, {"reduce_on_plateau": True}])
def test_schedules_by_epochs_and_by_a_metric_are_left_alone(settings):
    taken: list[Any] = []
    scheduler = object()
    config = SimpleNamespace(**({"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False} | settings))
    module = Lit()
    module.trainer = SimpleNamespace(lr_scheduler_configs=[config])
    module.__dict__["lr_scheduler_step"] = lambda scheduler, metric: taken.append(metric)
    SchedulerPace(module, 1, 10)
    for call in range(3):
        module.lr_scheduler_step(scheduler, call)
    assert taken == [0, 1, 2]


def test_parts_of_a_data_set_are_told_apart_by_length_and_indices():
    whole = TensorDataset(torch.zeros(8, 1))
    assert fingerprint(whole) == fingerprint(TensorDataset(torch.ones(8, 1))) == (8, None)
    halves = [Subset(whole, range(start, 8, 2)) for start in range(2)]
    assert fingerprint(halves[0]) == fingerprint(Subset(whole, [0, 2, 4, 6]))
    assert fingerprint(halves[0])[0] == fingerprint(halves[1])[0] == 4
    assert fingerprint(halves[0]) != fingerprint(halves[1])
    assert fingerprint(None) == (None, None)
