"""The training loss by region: what the samples really lost, in every way of training, or nothing at all."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import TIMESTEPS, ConvNet, Lit, fit
from torch import Tensor, nn

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.reporting import cost_of_dense
from lightning_earlybird.reporting.losses import LossReport
from lightning_earlybird.reporting.region_losses import NotDerivableError, RegionLosses, WatchedBatch, watch_calls

pytestmark = [pytest.mark.filterwarnings("ignore:max_search_steps=. reached")]

REGIONS = [(0, 300, 0.25), (300, 1000, 0.5)]
NAMES = ("earlybird/region_loss/0-300", "earlybird/region_loss/300-1000")
PARTITION = TimestepPartition.of(REGIONS)


class Telling(Lit):
    """Keeps timesteps and losses of all samples of every batch; ``how`` is what becomes of them."""

    how = staticmethod(torch.mean)

    def __init__(self, denoiser: Any = ConvNet) -> None:
        super().__init__(denoiser)
        self.told: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch, batch_idx):
        samples = batch[0]
        noise = torch.randn_like(samples)
        steps = torch.randint(TIMESTEPS, (len(samples),))
        share = (steps / TIMESTEPS).view(-1, 1, 1, 1)
        output = self.model(samples * (1 - share) + noise * share, steps)
        losses = (output.float() - noise).square().mean((1, 2, 3))
        self.told.append((steps, losses.detach()))
        return self.how(losses)


class Halving(Telling):
    how = staticmethod(lambda losses: 0.5 * losses.mean())


class Weighing(Telling):
    how = staticmethod(lambda losses: (losses * torch.linspace(0.1, 2, len(losses))).mean())


class Saying(Telling):
    how = staticmethod(lambda losses: {"loss": 0.5 * losses.mean(), "sample_losses": losses})


class SayingTooMuch(Telling):
    how = staticmethod(lambda losses: {"loss": losses.mean(), "sample_losses": losses[:, None].expand(-1, 2)})


def train(root: Path, module: Lit, *callbacks: Any, logger: bool = True, **settings: Any) -> list[dict[str, float]]:
    """Six steps of search and six of tickets; the logged losses by region, as rows."""
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)
    pruner = TimestepAwarePruner(REGIONS, round_to=4, overlap=100, dirpath=root / "tickets")
    given = {"max_steps": 12, "log_every_n_steps": 2} | settings
    fit(module, detector, pruner, *callbacks, logger=CSVLogger(root, name="", version="") if logger else False, **given)
    if not logger:
        return []
    with (root / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["earlybird/switch_step"] == "6.0" for row in rows)
    return [
        {"step": int(row["step"])} | {name: float(row[name]) for name in NAMES if row[name]}
        for row in rows
        if any(row.get(name) for name in NAMES)
    ]


def means(told: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    steps, losses = (torch.cat(parts) for parts in zip(*told, strict=True))
    parts = {NAMES[0]: losses[steps < 300], NAMES[1]: losses[steps >= 300]}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"accumulate_grad_batches": 3}, 1e-4),
        ({"precision": "bf16-mixed"}, 1e-2),
        ({"plugins": "scaled"}, 1e-2),
    ],
    ids=["plain", "accumulation", "bf16-mixed", "gradient scaler"],
)
def test_the_means_are_those_of_the_samples_since_the_last_time(
    settings: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    if settings.get("plugins"):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    module = Telling()
    rows = train(tmp_path, module, batches=6, **settings)
    batches = settings.get("accumulate_grad_batches", 1)
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9, 11]
    for row in rows:
        first, last = (row["step"] - 1) * batches, (row["step"] + 1) * batches
        # In the first batch the denoiser is still being looked for.
        expected = means(module.told[max(first, 1) : last])
        assert {name: row[name] for name in NAMES if name in row} == pytest.approx(expected, rel=tolerance)


def test_the_cost_counts_every_sample_also_where_a_fit_is_resumed_at_its_end(tmp_path: Path) -> None:
    def cost(folder: str, module: Lit, **settings: Any) -> tuple[TimestepAwarePruner, list[float]]:
        detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)
        pruner = TimestepAwarePruner(REGIONS, round_to=4, overlap=100, dirpath=tmp_path / folder)
        logger = CSVLogger(tmp_path / folder, name="", version="")
        trainer = fit(module, detector, pruner, max_steps=11, log_every_n_steps=2, logger=logger, **settings)
        trainer.save_checkpoint(tmp_path / folder / "end.ckpt")
        with (tmp_path / folder / "metrics.csv").open() as file:
            costs = [row["earlybird/cost_of_dense"] for row in csv.DictReader(file)]
        return pruner, [float(each) for each in costs if each]

    module = Telling()
    pruner, whole = cost("whole", module)
    steps = torch.cat([steps for steps, _ in module.told[6:]])
    tickets = [int((steps < 300).sum()), int((steps >= 300).sum())]
    assert sum(tickets) == 5 * 8  # the last of these batches was not logged
    # In the first batch of the search the denoiser is still being looked for.
    assert whole == [cost_of_dense(pruner.facts, 5 * 8, tickets)]

    _, again = cost("again", Telling(), ckpt_path=tmp_path / "whole" / "end.ckpt")
    assert again == whole


@pytest.mark.parametrize("compiled", ["not", "in place", "wrapped"])
def test_watching_changes_nothing(compiled: str, tmp_path: Path) -> None:
    def network() -> nn.Module:
        network: Any = ConvNet(dropout=0.3)
        if compiled == "in place":
            network.compile(backend="eager")
        return torch.compile(network, backend="eager") if compiled == "wrapped" else network

    with_logger, without = Telling(network), Telling(network)
    rows = train(tmp_path / "with", with_logger)
    train(tmp_path / "without", without, logger=False)
    assert len(rows) == 6
    last = means(with_logger.told[10:12])
    assert {name: rows[-1][name] for name in NAMES if name in rows[-1]} == pytest.approx(last, rel=1e-4)
    ours, theirs = with_logger.state_dict(), without.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not [part for part in with_logger.modules() if part._forward_hooks]


@pytest.mark.parametrize("module", [Halving, Weighing])
def test_a_loss_that_does_not_tell_is_not_logged_and_said_so_once(
    module: type[Telling], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, module()) == []
    assert caplog.text.count("the loss by region is not logged") == 1
    assert "return the loss of each sample as well" in caplog.text
    logged = (tmp_path / "metrics.csv").read_text()
    assert "region_loss" not in logged and "cost_of_dense" not in logged


def test_losses_that_training_step_returns_go_first(tmp_path: Path) -> None:
    module = Saying()
    rows = train(tmp_path, module)
    assert len(rows) == 6
    expected = means(module.told[10:12])
    assert {name: rows[-1][name] for name in NAMES if name in rows[-1]} == pytest.approx(expected)


def test_losses_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"'sample_losses' .* shape \(8, 2\), expected a tensor of shape \(8,\)"
    ):
        train(tmp_path, SayingTooMuch())


def test_sample_losses_are_told_from_gradients_whatever_the_target() -> None:
    torch.manual_seed(0)
    network, batch = ConvNet(), WatchedBatch()
    stop = watch_calls(network, TimestepArgument("timesteps", 1), batch)
    samples, target, steps = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.arange(6) * 150
    output = network(samples, steps)
    stop()
    with torch.no_grad():
        network(samples, steps)  # is not watched any more
    loss = nn.functional.mse_loss(output, target)
    (loss * 8.0).backward()
    batch.loss, batch.scale = loss.detach() * 8.0, 8.0
    timesteps, found = batch.sample_losses()
    assert torch.equal(timesteps, steps)
    assert torch.allclose(found.float(), (output - target).square().mean((1, 2, 3)), rtol=1e-5)

    losses = RegionLosses(PARTITION)
    losses.add(batch)
    assert losses.take() == pytest.approx([float(found[:2].mean()), float(found[2:].mean())])
    assert losses.take() == [None, None]
    assert losses.seen.tolist() == [2, 4]

    batch.loss = batch.loss * 1.01
    with pytest.raises(NotDerivableError, match="is the mean squared error"):
        batch.sample_losses()


def test_state_goes_on_where_it_was_and_that_of_other_regions_is_left() -> None:
    losses = RegionLosses(PARTITION)
    losses.add_mean(1, torch.tensor(3.0))
    again = RegionLosses(PARTITION)
    again.load_state_dict(losses.state_dict(taken=False))
    again.add_mean(1, torch.tensor(5.0))
    assert again.take() == [None, 4.0]
    assert RegionLosses(PARTITION).state_dict(taken=True)["totals"].sum() == 0
    other = RegionLosses(TimestepPartition.whole(0.5))
    other.load_state_dict(losses.state_dict(taken=False))
    assert other.seen.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seen": None}, "Tensor, NoneType, float"),
        ({"seen_before_switch": "3"}, "Tensor, Tensor, str"),
        ({"totals": torch.zeros(2, 5)}, r"shapes \(2, 5\) and \(2,\)"),
        ({"seen": torch.zeros(2, 2)}, r"shapes \(2, 2\) and \(2, 2\)"),
        ({"totals": torch.zeros(2, 2, dtype=torch.long)}, "shapes"),
    ],
)
def test_a_damaged_state_is_told_when_it_is_read(change: dict[str, object], error: str) -> None:
    state = RegionLosses(PARTITION).state_dict(taken=False) | change
    with pytest.raises(TypeError, match=error):
        LossReport().load_state_dict({"region_losses": state})
    with pytest.raises(KeyError):
        LossReport().load_state_dict({"region_losses": {"seen": torch.zeros(2)}})
    with pytest.raises(TypeError, match="'tells' is a str, expected bool"):
        LossReport().load_state_dict(
            {"region_losses": RegionLosses(PARTITION).state_dict(taken=False) | {"tells": "x"}}
        )
