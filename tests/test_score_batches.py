"""Batches for scoring: what they hold, and what they leave alone."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_earlybird.score_batches import scoring_batches, to_device
from lightning_earlybird.untouched import isolated_rng, seed_everything_by


class Numbers(pl.LightningModule):
    """Keeps the batches that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Look(pl.Callback):
    """Takes batches after every step, as scoring does."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.taken: list[list[Any]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with isolated_rng():
            seed_everything_by(trainer.global_step, trainer.global_rank)
            self.taken.append(scoring_batches(trainer, self.count))


def train(loaders: Callable[[], Any], *callbacks: pl.Callback, epochs: int = 2) -> list[Any]:
    module = Numbers()
    torch.manual_seed(3)
    quiet_trainer(*callbacks, max_epochs=epochs).fit(module, loaders())
    return module.seen


def plain(batches: Any) -> Any:
    if isinstance(batches, Tensor):
        return batches.tolist()
    if isinstance(batches, dict):
        return {key: plain(value) for key, value in batches.items()}
    return [plain(batch) for batch in batches] if isinstance(batches, list | tuple) else batches


def numbers(length: int = 12) -> TensorDataset:
    return TensorDataset(torch.arange(length))


def flat(batches: list[Any]) -> list[int]:
    return [number for batch in batches for number in batch[0].tolist()]


def test_batches_are_drawn_at_random_with_the_loaders_size_and_the_same_for_the_same_step() -> None:
    looks = [Look(), Look()]
    for look in looks:
        train(lambda: DataLoader(numbers(), batch_size=4), look)
    first, second = looks
    assert plain(first.taken) == plain(second.taken)
    assert all([len(batch[0]) for batch in batches] == [4, 4] for batches in first.taken)
    assert all(len(set(flat(batches))) == 8 for batches in first.taken)  # none twice
    assert len({tuple(flat(batches)) for batches in first.taken}) == len(first.taken) == 6


def test_a_small_data_set_is_gone_through_again() -> None:
    look = Look(count=4)
    train(lambda: DataLoader(numbers(6), batch_size=4), look, epochs=1)
    taken = flat(look.taken[0])
    assert sorted(taken[:6]) == sorted(taken[6:12]) == list(range(6)) and len(taken) == 16


class Stateful(IterableDataset):
    """Counts on from zero whenever it is iterated."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


class Mapped(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index * 10


def shuffled(**settings: Any) -> DataLoader:
    return DataLoader(numbers(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7), **settings)


def working() -> DataLoader:
    return shuffled(num_workers=1, persistent_workers=True, multiprocessing_context="fork")


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled by the global generator": lambda: DataLoader(numbers(), batch_size=4, shuffle=True),
    "shuffled by a generator of its own": shuffled,
    "persistent workers": working,
    "iterable": lambda: DataLoader(Stateful(), batch_size=4),
    "without batching": lambda: DataLoader(Mapped(), batch_size=None),
    "batches of its own": lambda: DataLoader(numbers(), batch_sampler=[[0, 1], [2, 3, 4], [5]]),
    "random subset": lambda: DataLoader(
        numbers(), batch_size=2, sampler=SubsetRandomSampler([1, 3, 5, 7], torch.Generator().manual_seed(4))
    ),
    "list of tensors": lambda: {"only": [torch.arange(3), torch.arange(3, 6)]},
    "dictionary": lambda: {"a": shuffled(), "b": DataLoader(Stateful(), batch_size=3)},
    "combined": lambda: CombinedLoader([shuffled(), DataLoader(Mapped(), batch_size=2)], "min_size"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_training_sees_the_batches_that_it_would_have_seen(name: str) -> None:
    look = Look()
    assert plain(train(LOADERS[name], look)) == plain(train(LOADERS[name]))
    assert all(len(batches) == 2 for batches in look.taken)


def first_taken(loaders: Callable[[], Any]) -> list[Any]:
    look = Look(count=3)
    train(loaders, look, epochs=1)
    return plain(look.taken[0])


def test_samplers_that_choose_and_batches_of_somebodys_making_are_followed() -> None:
    assert first_taken(LOADERS["batches of its own"]) == [[[0, 1]], [[2, 3, 4]], [[5]]]
    taken = first_taken(LOADERS["random subset"])
    assert sorted(number for batch in taken for number in batch[0]) == [1, 3, 5, 7]


def test_structure_mode_and_collation_are_kept() -> None:
    taken = first_taken(LOADERS["dictionary"])
    assert [set(batch) for batch in taken] == [{"a", "b"}] * 3
    assert [batch["b"] for batch in taken] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    (first, *_) = first_taken(LOADERS["combined"])
    assert len(first) == 2 and len(first[0][0]) == 4 and len(first[1]) == 2
    collated = first_taken(lambda: DataLoader(Mapped(), batch_size=2, collate_fn=sum))
    assert all(type(number) is int for number in collated)
    assert all(isinstance(number, int) for number in first_taken(LOADERS["without batching"]))


def test_batches_are_converted_and_moved_as_those_of_the_training() -> None:
    class Hooked(Numbers):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 0.25]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2]

    moved: list[Tensor] = []

    class Move(Look):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            moved.append(to_device(trainer, self.taken[-1][0])[0])

    look, module = Move(), Hooked()
    trainer = quiet_trainer(look, max_epochs=1, precision="bf16-true")
    trainer.fit(module, DataLoader(TensorDataset(torch.arange(12.0)), batch_size=4))
    expected = [(batches[0][0].bfloat16() + 0.25) * 2 for batches in look.taken]
    assert moved[0].dtype == torch.bfloat16
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moved, expected, strict=True))


def test_what_can_be_iterated_only_once_is_refused_with_a_remedy() -> None:
    batches = iter([torch.zeros(1)] * 4)
    with pytest.raises(
        MisconfigurationException, match=r"train_dataloaders hold the iterator list_iterator, .*DataLoader"
    ):
        train(lambda: batches, Look())
    assert len(list(batches)) >= 2  # none was taken besides those of the training


def test_a_loader_that_gives_nothing_a_second_time_is_refused() -> None:
    class Once:
        """An iterable that runs dry."""

        def __init__(self) -> None:
            self.left = [torch.zeros(1)]

        def __iter__(self) -> Iterator[Tensor]:
            while self.left:
                yield self.left.pop()

    with pytest.raises(
        MisconfigurationException, match="train_dataloaders gave no batch when they were iterated a sec"
    ):
        train(Once, Look())
