"""What MultiTicketStrategy does not take, and says so before training."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import ConvNet, Lit, loader, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_earlybird import MultiTicketStrategy, TimestepAwarePruner
from lightning_earlybird.transition import check_supported

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.75)]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world of one rank in this process, of which nothing is left afterwards."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def fit(module: Any, tmp_path: Path, data: Any = None, assignment: Any = None, **settings: Any) -> None:
    pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path)
    trainer = quiet_trainer(pruner, strategy=MultiTicketStrategy(assignment), max_steps=2, **settings)
    trainer.fit(module, loader(module) if data is None else data, loader(module, 1))


def world_of_two(**settings: Any) -> Any:
    """A Trainer that has not launched anything."""
    strategy = MultiTicketStrategy(settings.pop("assignment", None), **settings.pop("options", {}))
    return quiet_trainer(strategy=strategy, **({"devices": 2} | settings))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_processes_that_are_not_started_by_script_are_refused(method, tmp_path):
    trainer = world_of_two(options={"start_method": method})
    message = (
        rf"MultiTicketStrategy\(start_method='{method}'\).*would stay in the worker.*start_method='popen'.*torchrun"
    )
    with pytest.raises(MisconfigurationException, match=message):
        TimestepAwarePruner(REGIONS, dirpath=tmp_path).setup(trainer, Lit(), "fit")


def test_synchronised_batch_norm_is_refused():
    module = Lit(lambda: nn.Sequential(ConvNet(), nn.BatchNorm2d(1)))
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True.*Trainer\(sync_batchnorm=False\)"):
        check_supported(world_of_two(sync_batchnorm=True), module)


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ([0, 1], r"assignment=\[0, 1\] misses ticket 2.*Give each ticket its ranks"),
        ([0, 1, 2], r"assignment=.* needs 3 ranks.*there are 2\. Start 3 processes"),
        ({0: 0, 1: 0, 2: 0}, r"assignment=.* leaves rank 1 of 2 without a ticket.*start fewer processes"),
        ([[0, 1], [0, 1], [0]], r"assignment=.*share ranks 0, 1.*Divide the ranks"),
        ({0: 0, 1: 1, 3: 1}, r"assignment=.* has ticket 3, but there are 3"),
        ("somebody", r"assignment='somebody' must be a list"),
    ],
    ids=["a ticket is missing", "too many ranks", "an idle rank", "groups that cross", "an unknown ticket", "no list"],
)
def test_assignments_that_do_not_fit_are_refused(assignment, problem, tmp_path):
    strategy = world_of_two(assignment=assignment).strategy
    with pytest.raises(MisconfigurationException, match=f"MultiTicketStrategy: {problem}"):
        strategy.prepare(Lit(), 3, tmp_path)


def test_a_fit_with_an_assignment_that_does_not_fit_ends_before_training(tmp_path):
    module = Lit()
    with pytest.raises(MisconfigurationException, match=r"MultiTicketStrategy: assignment=.* needs 3 ranks"):
        fit(module, tmp_path, assignment=[0, 1, 2])
    assert not module.losses


class ByHand(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_optimization_by_hand_is_refused_where_a_rank_has_several_tickets(tmp_path):
    message = r"automatic_optimization=False with 3 tickets on 1 rank\(s\).*Use a rank for each ticket"
    with pytest.raises(MisconfigurationException, match=message):
        fit(ByHand(), tmp_path)
    with pytest.raises(MisconfigurationException, match=r"automatic_optimization=False with 3 tickets on 2"):
        world_of_two().strategy.prepare(ByHand(), 3, tmp_path)
    # Each rank has one ticket here.
    world_of_two(devices=3, assignment=[[0], [1, 2]]).strategy.prepare(ByHand(), 2, tmp_path)


class FromIterator(Lit):
    def training_step(self, dataloader_iter):
        raise AssertionError("never called")


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_training_step_that_takes_the_iterator_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"training_step\(dataloader_iter\).*Let it take `batch`"):
        fit(FromIterator(), tmp_path)


class Split(IterableDataset):
    """As Hugging Face's split_dataset_by_node leaves it."""

    _distributed = object()

    def __iter__(self):
        return iter(torch.randn(4, *ConvNet.sample_shape))


def test_data_that_were_split_when_they_were_made_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"train_dataloader: its Split was split by rank.*Leave"):
        fit(Lit(), tmp_path, DataLoader(Split(), batch_size=2))


def test_a_fit_without_a_pruner_is_warned_about_and_trains():
    module = Lit()
    trainer = quiet_trainer(strategy="multi_ticket", max_steps=2)
    with pytest.warns(UserWarning, match=r"without a TimestepAwarePruner among the callbacks.*Add the pruner"):
        trainer.fit(module, loader(module), loader(module, 1))
    assert isinstance(trainer.strategy, MultiTicketStrategy)
    assert len(module.losses) == 2


@pytest.mark.parametrize("patience_s", [0, -1.0, float("nan")])
def test_a_patience_of_no_time_is_refused(patience_s):
    with pytest.raises(ValueError, match=r"patience_s=.* must be above 0"):
        MultiTicketStrategy(patience_s=patience_s)
