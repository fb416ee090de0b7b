"""Criteria beyond magnitude in real fits: what they score, what they cost, what they leave alone, what they refuse."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import ConvNet, Lit, Mlp, OnStep, Repeatable, Tutorial, fit, frozen_sgd, loader, quiet_trainer
from torch import Tensor, nn

from lightning_earlybird import (
    EarlyBirdDetector,
    NonFiniteWeightsError,
    TicketEnsemble,
    TimestepAwarePruner,
    TimestepPartition,
    TimestepRegion,
)
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.score_batches import scoring_batches
from lightning_earlybird.scoring import GradientScorer
from lightning_earlybird.structure import ChannelPlan
from lightning_earlybird.transition import averaged_modules
from lightning_earlybird.untouched import isolated_rng, seed_everything_by

EARLY, LATE = TimestepRegion(0, 500, 0.5), TimestepRegion(500, 1000, 0.5)
HALVES = [EARLY, LATE]
FIRST_HALF, SECOND_HALF = [True] * 4 + [False] * 4, [False] * 4 + [True] * 4


def detector_for(criterion: Any = "taylor", sparsities: Any = (0.5,), **settings: Any) -> EarlyBirdDetector:
    """Checks after every step, in widths of any size, unless told otherwise."""
    settings = {"every_n_train_steps": 1, "round_to": 1} | settings
    return EarlyBirdDetector(sparsities, criterion=criterion, **settings)


def pruner_for(tmp_path: Path, regions: Any = HALVES, **settings: Any) -> TimestepAwarePruner:
    return TimestepAwarePruner(regions, **({"round_to": 1, "dirpath": tmp_path / "tickets"} | settings))


class Gated(nn.Module):
    """Channels 0 to 3 of ``up`` act at early timesteps only, 4 to 7 at late ones, with weights of ``late`` there."""

    sample_shape: tuple[int, ...] = (2,)

    def __init__(self, late: float = 1.0) -> None:
        super().__init__()
        self.up, self.time, self.down = nn.Linear(2, 8), nn.Linear(1, 8), nn.Linear(8, 2)
        self.time.requires_grad_(False)
        with torch.no_grad():
            self.time.weight.copy_(torch.tensor([-1e5] * 4 + [1e5] * 4)[:, None])
            self.time.bias.copy_(torch.tensor([5e4 - 50] * 4 + [50 - 5e4] * 4))
            self.down.weight[:, 4:] *= late
            self.up.weight[4:] *= late

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        gate = torch.sigmoid(self.time(timesteps[:, None] / 1000))
        return self.down(self.up(x) * gate)


# --- what is scored ---------------------------------------------------------------------------------------------------


def products(network: nn.Module, loss: Tensor) -> Tensor:
    """The sums of weight times gradient over the slices of an :class:`Mlp`'s group, shape (2, channels)."""
    weights = [network.up.weight, network.down.weight]
    gradients = torch.autograd.grad(loss, weights)
    up, down = (weight.detach() * gradient for weight, gradient in zip(weights, gradients, strict=True))
    return torch.stack([up.sum(1), down.sum(0)])


def mask_by_hand(trainer: pl.Trainer, module: Lit, kept: int, network: nn.Module | None = None) -> Tensor:
    """The channels of largest Taylor score, from the loss of the scoring batches."""
    live, total = module.model, torch.zeros(2, 8)
    module.model = live if network is None else network
    with isolated_rng():
        seed_everything_by(trainer.global_step, 0)
        for index, batch in enumerate(scoring_batches(trainer, 4)):
            seed_everything_by(trainer.global_step, 0, index)
            total += products(module.model, module.loss(batch[0]))
    module.model = live
    order = total.abs().mean(0).argsort(descending=True, stable=True)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def test_taylor_masks_are_those_of_the_gradient_of_the_modules_own_loss() -> None:
    detector, seen = detector_for(), []

    def compare(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seen.append((detector.masks[0.5].kept["up"], mask_by_hand(trainer, module, 4)))

    fit(Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.1)), detector, OnStep(compare), max_epochs=3)
    assert len(seen) == 12 and all(torch.equal(mask, by_hand) for mask, by_hand in seen)
    assert len({tuple(mask.tolist()) for mask, _ in seen}) > 2


def test_taylor_masks_can_be_those_of_the_averaged_weights() -> None:
    detector, ema, seen = detector_for(weights="ema"), EMAWeightAveraging(decay=0.8), []

    def compare(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        average = averaged_modules(trainer)[0].model
        by_hand = mask_by_hand(trainer, module, 4, average), mask_by_hand(trainer, module, 4)
        seen.append((detector.masks[0.5].kept["up"], *by_hand))

    module = Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.3))
    fit(module, ema, detector, OnStep(compare), max_epochs=3)
    assert len(seen) == 12 and all(torch.equal(mask, averaged) for mask, averaged, _ in seen)
    assert any(not torch.equal(mask, raw) for mask, _, raw in seen)


@pytest.mark.parametrize(
    ("criterion", "first"), [("taylor", "detector"), ("taylor", "pruner"), ("diff_pruning", "detector")]
)
def test_tickets_of_two_regions_of_one_sparsity_keep_the_channels_that_act_in_each(
    criterion: str, first: str, tmp_path: Path
) -> None:
    module, pruner = Lit(Gated, frozen_sgd), pruner_for(tmp_path)
    detector = detector_for(criterion, window=2, score_batches=8)
    fit(module, *((detector, pruner) if first == "detector" else (pruner, detector)), max_epochs=2)
    assert detector.emerged == {EARLY: 2, LATE: 2} and pruner.switched_at == 2
    assert detector.ticket(EARLY).kept["up"].tolist() == FIRST_HALF
    assert detector.ticket(LATE).kept["up"].tolist() == SECOND_HALF
    assert isinstance(module.model, TicketEnsemble)
    assert [mask.flat().tolist() for mask in module.model.record.masks] == [FIRST_HALF, SECOND_HALF]
    assert [(fact.step, fact.emerged, fact.channels) for fact in pruner.facts] == [(2, True, (8, 4))] * 2
    with pytest.raises(KeyError, match=r"sparsity=0.5 is that of 2 regions, region \[0, 500\) of sparsity 0.5, "):
        detector.ticket(0.5)
    with pytest.raises(KeyError, match=r"sparsity=0.3 is not searched for. This detector has \['region \[0, 500\) of"):
        detector.ticket(0.3)


def test_regions_that_stay_dense_have_no_masks_and_one_of_its_sparsity_goes_by_that(tmp_path: Path) -> None:
    pruner = pruner_for(tmp_path, [(0, 500, 0.0), LATE])
    detector, module = detector_for(window=2, score_batches=8), Lit(Gated, frozen_sgd)
    fit(module, detector, pruner, max_epochs=2)
    assert detector.emerged == {LATE: 2} and detector.key(0.5) == detector.key(LATE) == LATE
    assert detector.ticket(0.5).kept["up"].tolist() == SECOND_HALF
    assert [mask.flat().tolist() for mask in module.model.record.masks] == [[True] * 8, SECOND_HALF]


def test_sparsities_that_no_region_has_are_not_searched_by_region_and_this_is_said(tmp_path: Path) -> None:
    detector = detector_for(sparsities=[0.5, 0.75])
    message = r"sparsities=\[0.5, 0.75\]: criterion='taylor' draws masks by region, and no region .* has \[0.75\]"
    with pytest.warns(UserWarning, match=message):
        fit(Lit(Gated, frozen_sgd), detector, pruner_for(tmp_path), max_epochs=2)
    assert list(detector.distances) == HALVES


def test_without_regions_taylor_scores_are_over_the_whole_axis_and_masks_go_by_sparsity() -> None:
    detector = detector_for(sparsities=[0.5, 0.25])
    fit(Lit(Gated, frozen_sgd), detector, max_epochs=1)
    assert list(detector.masks) == [0.5, 0.25]
    assert detector.masks[0.5].flat().tolist() not in (FIRST_HALF, SECOND_HALF)


class Uneven(Lit):
    """Late outputs are 10,000 times as large, and 100,000 times closer to their target in proportion."""

    def __init__(self) -> None:
        super().__init__(lambda: Gated(late=100.0), frozen_sgd)

    def loss(self, samples: Tensor) -> Tensor:
        steps = torch.randint(1000, (len(samples),))
        output = self.model(samples, steps)
        target = output.detach() * torch.where(steps < 500, 2.0, 1 - 1e-5)[:, None]
        return nn.functional.mse_loss(output, target)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # Early: an output of 1 and an error of 1; late: 10,000 and 0.1, so that output times error is a thousand.
        ({"criterion": "taylor"}, SECOND_HALF),
        # But the late loss, 0.01, is a hundredth of the early one.
        ({"criterion": "diff_pruning"}, FIRST_HALF),
        ({"criterion": "diff_pruning", "score_threshold": 0.0}, SECOND_HALF),
    ],
)
def test_diff_pruning_does_not_count_timesteps_of_small_loss(settings: dict[str, Any], kept: list[bool]) -> None:
    detector = detector_for(**settings, score_batches=8)
    fit(Uneven(), detector, max_epochs=1)
    assert detector.masks[0.5].kept["up"].tolist() == kept


def test_a_callable_scores_as_it_likes_and_sees_the_denoiser_and_its_plan() -> None:
    seen = []

    def alternating(denoiser: nn.Module, plan: ChannelPlan) -> Tensor:
        seen.append((denoiser, plan))
        return torch.arange(plan.num_channels) % 2 + torch.rand(())

    detector, module = detector_for(alternating), Lit(Mlp)
    fit(module, detector, max_epochs=1)
    assert detector.masks[0.5].kept["up"].tolist() == [False, True] * 4
    assert len(seen) == 5 and {id(network) for network, _ in seen} == {id(module.model)}
    assert seen[0][1] is seen[-1][1] and detector.criterion is alternating


def test_a_region_without_samples_is_scored_by_all_of_them_and_this_is_said(tmp_path: Path) -> None:
    class Early(Lit):
        def loss(self, samples: Tensor) -> Tensor:
            return self.model(samples, torch.randint(500, (len(samples),))).square().mean()

    detector = detector_for(window=2)
    pruner = pruner_for(tmp_path, max_search_steps=1)
    message = (
        r"score_batches=4: no sample of the scoring batches fell into the region \[500, 1000\), .*Raise score_batches"
    )
    with (
        pytest.warns(UserWarning, match=message) as warned,
        pytest.warns(
            UserWarning, match=r"max_search_steps=1 reached: the masks of region \[0, 500\) of sparsity 0.5, reg"
        ),
    ):
        fit(Early(Gated, frozen_sgd), detector, pruner, max_epochs=1)
    assert sum("score_batches" in str(warning.message) for warning in warned) == 1
    assert detector.masks[LATE].flat().tolist() == detector.masks[EARLY].flat().tolist() == FIRST_HALF


def test_a_unet_with_gradient_checkpointing_goes_through_its_switch_with_taylor_scores(tmp_path: Path) -> None:
    module = Tutorial()
    module.model.enable_gradient_checkpointing()
    regions = [(0, 240, 0.5), (240, 1000, 0.5)]
    detector = EarlyBirdDetector([0.5], criterion="taylor", every_n_train_steps=1, window=2, threshold=1.0)
    pruner = TimestepAwarePruner(regions, overlap=20, dirpath=tmp_path / "tickets")
    fit(module, detector, pruner, EMAWeightAveraging(decay=0.9), max_epochs=1)
    assert pruner.switched_at == 2
    first, second = detector.masks.values()
    assert first.num_kept == second.num_kept and first.distance(second) > 0


def test_masks_by_region_meet_a_target_that_is_allocated_over_all_layers(tmp_path: Path) -> None:
    detector = EarlyBirdDetector([0.5], criterion="taylor", every_n_train_steps=1, window=2, threshold=1.0)
    pruner = pruner_for(tmp_path, target="params", scope="global")
    fit(Lit(lambda: ConvNet(64)), detector, pruner, max_epochs=1)
    assert [fact.achieved_parameters for fact in pruner.facts] == pytest.approx([0.5, 0.5], rel=0.02)
    widths = [[int(kept.sum()) for kept in mask.kept.values()] for mask in detector.masks.values()]
    assert all(first != second for first, second in widths)  # not the same share of every layer


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.25), ("bf16-true", 1.0), ("64-true", 1.0)])
def test_scores_can_be_taken_in_every_precision(precision: Any, tolerance: float) -> None:
    first: list[TicketMask] = []
    for chosen in ("32-true", precision):
        detector = detector_for(score_batches=8)
        look = OnStep(
            lambda trainer, module, d=detector: first.append(d.masks[0.5]) if len(d.windows[0.5].checks) == 1 else None
        )
        fit(Lit(configure=frozen_sgd), detector, look, max_epochs=1, precision=chosen)
    # Other precisions draw other noise from the same random state; under autocast it is the same.
    assert len(first) == 2 and first[0].num_kept == first[1].num_kept and first[0].distance(first[1]) <= tolerance


# --- frozen parameters ------------------------------------------------------------------------------------------------


def test_groups_whose_weights_are_frozen_are_ranked_by_magnitude_and_this_is_said_once() -> None:
    class Partly(Lit):
        def __init__(self) -> None:
            super().__init__(ConvNet, lambda module: frozen_sgd(module))
            for part in (self.model.hidden, self.model.conv_out):
                part.requires_grad_(False)

    by_magnitude, detector = detector_for("magnitude"), detector_for("taylor")
    fit(Partly(), by_magnitude, max_epochs=1)
    message = (
        r"no gradient reaches 1 channel groups of the denoiser \(their weights are frozen or unused\), such as 'hidd"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Partly(), detector, max_epochs=1)
    assert sum("no gradient" in str(warning.message) for warning in warned) == 1
    ours, theirs = detector.masks[0.5].kept, by_magnitude.masks[0.5].kept
    assert torch.equal(ours["hidden"], theirs["hidden"]) and not torch.equal(ours["conv_in"], theirs["conv_in"])


def test_a_frozen_layer_in_a_group_contributes_nothing() -> None:
    class Partly(Lit):
        def __init__(self) -> None:
            super().__init__(Mlp, frozen_sgd)
            self.model.down.requires_grad_(False)

    detector, seen = detector_for(), []

    def compare(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.model.down.requires_grad_(True)
        with isolated_rng():
            total = torch.zeros(8)
            seed_everything_by(trainer.global_step, 0)
            for index, batch in enumerate(scoring_batches(trainer, 4)):
                seed_everything_by(trainer.global_step, 0, index)
                total += products(module.model, module.loss(batch[0]))[0]
        module.model.down.requires_grad_(False)
        seen.append(set(total.abs().argsort()[4:].tolist()) == set(detector.masks[0.5].flat().nonzero()[:, 0].tolist()))

    fit(Partly(), detector, OnStep(compare), max_epochs=1)
    assert seen == [True] * 4


# --- what is left alone -----------------------------------------------------------------------------------------------


class Busy(Lit):
    """Changes in its training step everything that one may change there."""

    def __init__(self) -> None:
        super().__init__(lambda: ConvNet(dropout=0.2))
        self.stem = nn.BatchNorm2d(1)
        self.mean = torchmetrics.MeanMetric()
        self.kept = torchmetrics.CatMetric()
        self.register_buffer("count", torch.zeros(()))
        self.own = torch.Generator().manual_seed(5)
        self.numbers = np.random.default_rng(5)
        self.steps_taken, self.smooth, self.by_name = 0, torch.zeros(1), {}
        self.history: list[Any] = []

    def training_step(self, batch, batch_idx):
        noise = torch.randn(batch[0].shape, generator=self.own) * float(self.numbers.normal())
        samples = self.stem(batch[0]) + noise * random.random() * np.random.rand()
        self.count += 1
        self.steps_taken += 1
        self.smooth.mul_(0.9).add_(1)
        self.by_name["last"] = self.steps_taken
        loss = self.loss(samples)
        self.mean.update(loss.detach())
        self.kept.update(loss.detach())
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean})
        self.logger and self.logger.log_metrics({"by_hand": float(self.count)}, step=int(self.count))
        self.history.append(loss.item())
        return {"loss": loss}

    def on_train_epoch_end(self):
        self.history.append(float(self.kept.compute().sum()))


def trace(criterion: Any, tmp_path: Path, **settings: Any) -> tuple[Any, ...]:
    """Everything that a fit leaves behind, from the same random state every time."""
    random.seed(1)
    np.random.seed(1)
    module, logger = Busy(), CSVLogger(tmp_path, name="", version=f"{criterion}")
    callbacks: list[pl.Callback] = [EMAWeightAveraging(decay=0.9, update_every_n_steps=1)]
    if criterion is not None:
        callbacks.append(detector_for(criterion, [0.5, 0.25], **settings.pop("detector", {})))
    trainer = fit(module, *callbacks, max_epochs=2, logger=logger, log_every_n_steps=1, **settings)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = [{key: value for key, value in row.items() if value and "earlybird" not in key} for row in rows]
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    states = [torch.rand(3).tolist(), np.random.rand(), random.random(), torch.rand(3, generator=module.own).tolist()]
    averaged = [value.tolist() for value in averaged_modules(trainer)[0].state_dict().values()]
    plain = (module.history, module.steps_taken, module.smooth.tolist(), module.by_name, float(module.count))
    return weights, averaged, plain, states, [row for row in rows if set(row) - {"step", "epoch"}], module.training


@pytest.mark.parametrize(
    ("criterion", "settings"),
    [
        ("taylor", {}),
        ("diff_pruning", {"accumulate_grad_batches": 2}),
        ("taylor", {"detector": {"weights": "ema"}, "gradient_clip_val": 0.5}),
        ("taylor", {"detector": {"every_n_train_steps": None}, "precision": "bf16-mixed"}),
        (lambda denoiser, plan: torch.rand(plan.num_channels), {}),
    ],
    ids=["taylor", "diff_pruning, accumulating", "averaged weights", "epoch ends, bf16-mixed", "callable"],
)
@pytest.mark.filterwarnings("ignore:weights='ema'. the initialisation still makes up")
def test_the_training_is_bit_identical_whatever_scores_the_channels(criterion, settings, tmp_path: Path) -> None:
    without = {key: value for key, value in settings.items() if key != "detector"}
    assert trace(criterion, tmp_path, **settings) == trace(None, tmp_path, **without)


def test_pending_gradients_stay_the_same_tensors_with_the_same_bits() -> None:
    detector, seen = detector_for("magnitude"), []
    scorer = GradientScorer("diff_pruning", batches=2, threshold=0.1)

    class Score(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            before = {name: (p.grad, p.grad.clone()) for name, p in pl_module.named_parameters() if p.grad is not None}
            data = [p.data_ptr() for p in pl_module.parameters()]
            calls = len(pl_module.losses)
            scorer.score(trainer, pl_module, detector.found, TimestepPartition.of(HALVES, overlap=20))
            scorer.forget()
            assert len(pl_module.losses) == calls
            assert data == [p.data_ptr() for p in pl_module.parameters()]
            after = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            assert before.keys() == after.keys()
            seen.append(all(after[n] is grad and torch.equal(grad, copy) for n, (grad, copy) in before.items()))

    fit(Lit(), detector, Score(), max_epochs=1, accumulate_grad_batches=4)
    assert seen == [True] * 4 and scorer.checks == 4


def test_a_network_that_normalises_its_weights_in_forward_keeps_them_and_its_first_step() -> None:
    class Forced(Mlp):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    for weight in (self.up.weight, self.down.weight):  # the latter is kept for the backward pass
                        weight.copy_(nn.functional.normalize(weight, dim=1))
            return super().forward(x, timesteps)

    plain, scored = Lit(Forced), Lit(Forced)
    fit(plain, max_epochs=1)
    fit(scored, detector_for(), max_epochs=1)
    assert plain.losses == scored.losses
    assert torch.equal(plain.model.up.weight, scored.model.up.weight)


def test_a_step_that_changes_frozen_parameters_is_refused_before_anything_is_learned() -> None:
    class HandMade(Lit):
        def __init__(self) -> None:
            super().__init__(Mlp)
            self.target = Mlp().requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                for mine, its in zip(self.target.parameters(), self.model.parameters(), strict=True):
                    mine.lerp_(its, 0.1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(
        MisconfigurationException, match=r"changes the frozen parameter 'target.up.weight' \(4 in all\)"
    ):
        fit(HandMade(), detector_for(denoiser="model"), max_epochs=1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_denoiser_is_scored_eagerly_and_trains_on_compiled(in_place: bool) -> None:
    plain, compiled = Lit(Mlp), Lit(Mlp)
    if in_place:
        compiled.model.compile(backend="eager")
    else:
        compiled.model = torch.compile(compiled.model, backend="eager")
    first, second = detector_for(), detector_for()
    fit(plain, first, max_epochs=1)
    fit(compiled, second, max_epochs=1)
    assert [mask.flat().tolist() for mask in first.masks.values()] == [m.flat().tolist() for m in second.masks.values()]
    assert plain.losses == pytest.approx(compiled.losses)


# --- cost and progress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "steps"), [("taylor", 3), ("diff_pruning", 4)])
def test_the_cost_of_scoring_is_logged_and_said(criterion: str, steps: int, tmp_path: Path, caplog, capsys) -> None:
    detector = detector_for(criterion, score_batches=3)
    logger = CSVLogger(tmp_path, name="", version="")
    with caplog.at_level("INFO"):
        fit(Lit(Mlp), detector, max_epochs=1, logger=logger, enable_progress_bar=True)
    with (tmp_path / "metrics.csv").open() as file:
        seconds = [row["earlybird/scoring_seconds"] for row in csv.DictReader(file)]
    assert len([value for value in seconds if value and float(value) > 0]) == 4
    assert f"scoring by criterion='{criterion}' took" in caplog.text
    assert (
        caplog.text.count(
            f"s for 3 batches, the cost of about {steps:.1f} training steps, and will do so at every check"
        )
        == 1
    )
    assert caplog.text.count("s in 5 checks.") == 1
    assert "Scoring channels: " in capsys.readouterr().err


def test_without_a_progress_bar_in_the_trainer_there_is_none_for_scoring(capsys) -> None:
    fit(Lit(Mlp), detector_for(), max_epochs=1)
    assert "Scoring channels" not in capsys.readouterr().err


def test_the_switch_takes_the_scores_of_the_check_of_its_step(tmp_path: Path) -> None:
    detector, calls = detector_for(window=2), []

    class Counting(Lit):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    fit(Counting(Gated, frozen_sgd), detector, pruner_for(tmp_path), max_epochs=1)
    # Four batches of an epoch; at the start and at two checks four more.
    assert len(calls) == 4 + 3 * 4


def test_metrics_and_figures_are_named_by_region(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    detector = detector_for(window=2)
    trainer = fit(Lit(Gated, frozen_sgd), detector, pruner_for(tmp_path), max_epochs=1, logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        names = {key for row in csv.DictReader(file) for key, value in row.items() if value}
    for name in ("0-500", "500-1000"):
        for kind in ("distance", "distance_from_init", "distance_to_half", "null_line", "emerged"):
            assert f"earlybird/{kind}/{name}" in names
        assert f"distance/{name}" in trainer.progress_bar_metrics
    assert (tmp_path / "tickets" / "mask_distance.png").exists()


# --- state ------------------------------------------------------------------------------------------------------------


def searching(tmp_path: Path, epochs: int, ckpt_path: Path | None = None) -> EarlyBirdDetector:
    detector = detector_for(window=7, every_n_train_steps=2)
    module = Repeatable(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.05))
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_epochs=1)
    pruner = pruner_for(tmp_path, on_search_limit="raise")
    settings = {"max_epochs": epochs, "ckpt_path": ckpt_path, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match=r"the denoiser is still dense \({'0-500': .*, '500-1000': "):
        fit(module, detector, pruner, saving, **settings)
    return detector


def test_a_resumed_search_by_region_has_the_history_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = searching(tmp_path, 3)
    state = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    (saved,) = (value for key, value in state["callbacks"].items() if "EarlyBirdDetector" in key)
    assert saved["search"]["sparsities"] == [[0, 500, 0.5], [500, 1000, 0.5]]
    resumed = searching(tmp_path, 3, tmp_path / "step=8.ckpt")
    assert list(resumed.distances) == HALVES and resumed.distances == whole.distances
    assert len(whole.distances[EARLY]) == 6 and any(check.from_start for check in whole.distances[EARLY])


def test_a_fit_resumes_after_its_switch_with_what_had_emerged_by_region(tmp_path: Path) -> None:
    def run(epochs: int, name: str, **settings: Any) -> tuple[pl.Trainer, EarlyBirdDetector, TimestepAwarePruner]:
        detector, pruner = detector_for(window=2), pruner_for(tmp_path / name, overlap=20)
        module = Lit(Gated, lambda module: torch.optim.Adam(module.parameters(), 1e-4))
        return fit(module, detector, pruner, max_epochs=epochs, **settings), detector, pruner

    trainer, detector, pruner = run(1, "first")
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer, resumed, again = run(2, "second", ckpt_path=tmp_path / "after.ckpt")
    assert trainer.global_step == 8 and resumed.emerged == detector.emerged and list(resumed.emerged) == HALVES
    assert again.facts == pruner.facts and resumed.ticket(LATE).distance(detector.ticket(LATE)) == 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_a_search_by_region_can_be_tested_with_both_callbacks(first: bool, tmp_path: Path) -> None:
    trainer = fit(Lit(Gated, frozen_sgd), detector_for(window=2), pruner_for(tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    module, callbacks = Lit(Gated), [detector_for(window=2), TimestepAwarePruner(HALVES)]
    tester = quiet_trainer(*(callbacks if first else reversed(callbacks)))
    tester.test(module, loader(module), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert isinstance(module.model, TicketEnsemble) and len(module.model.record.facts) == 2


def test_a_traditional_ticket_can_be_found_by_taylor_scores(tmp_path: Path) -> None:
    module, detector = Lit(), detector_for(window=2, threshold=1.0, on_emergence="prune", round_to=4)
    fit(module, detector, max_epochs=1, default_root_dir=tmp_path)
    assert isinstance(module.model, TicketEnsemble) and detector.emerged == {0.5: 2}
    assert module.model.tickets[0].hidden.weight.shape == (8, 8, 3, 3)


# --- errors -----------------------------------------------------------------------------------------------------------


def unchanged(module: pl.LightningModule, *callbacks: pl.Callback, match: str, error: type[Exception]) -> None:
    """The fit is refused before anything is learned."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(module, *callbacks, max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_callable_that_gives_no_scores_is_refused_before_anything_is_learned() -> None:
    match = r"criterion=<function .*lambda.*> returned a torch.float32 tensor of shape \(3,\), but must return .*\(8,\)"
    unchanged(Lit(Mlp), detector_for(lambda denoiser, plan: torch.ones(3)), match=match, error=ValueError)


def test_manual_optimization_is_refused_before_training() -> None:
    module = Lit(Mlp)
    module.automatic_optimization = False
    match = "criterion='taylor' needs automatic optimization: .*criterion='magnitude'"
    unchanged(module, detector_for(), match=match, error=MisconfigurationException)
    assert module.losses == []


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_iterates_by_itself_is_refused_before_training() -> None:
    class Iterating(Lit):
        def training_step(self, dataloader_iter):
            raise AssertionError

    match = "criterion='taylor' calls training_step with batches of its own, but this one takes dataloader_iter"
    unchanged(Iterating(Mlp), detector_for(), match=match, error=MisconfigurationException)


class Odd(Lit):
    """A training step that in scoring, which is its second call, gives something else than a loss."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__(Mlp)
        self.give, self.calls = give, [0]

    def training_step(self, batch, batch_idx):
        self.calls = [*self.calls, batch_idx]
        loss = super().training_step(batch, batch_idx)
        return loss if len(self.calls) == 2 else self.give(loss)


@pytest.mark.parametrize(
    ("give", "match"),
    [
        (lambda loss: None, "in 4 batches training_step returned no loss, .*Return the loss"),
        (lambda loss: {"logs": loss}, "in 4 batches training_step returned no loss, .*'loss'"),
        (lambda loss: loss.detach(), "the loss that training_step returned does not depend on .*not detached"),
    ],
)
@pytest.mark.parametrize("criterion", ["taylor", "diff_pruning"])
def test_a_step_without_a_loss_is_refused_before_anything_is_learned(criterion, give, match) -> None:
    unchanged(Odd(give), detector_for(criterion), match=match, error=MisconfigurationException)


def test_gradients_that_are_not_finite_are_refused_by_name() -> None:
    match = "criterion='taylor': the gradient of '(up|down).weight' holds NaN or infinite values in the scoring batches"
    unchanged(Odd(lambda loss: loss * float("nan")), detector_for(), match=match, error=NonFiniteWeightsError)


def test_a_mask_that_is_asked_for_before_it_emerged_is_no_answer(tmp_path: Path) -> None:
    detector = detector_for(window=9)
    with pytest.warns(UserWarning, match="still dense"):
        fit(Lit(Gated, frozen_sgd), detector, pruner_for(tmp_path), max_epochs=1)
    with pytest.raises(LookupError, match=r"region \[0, 500\) of sparsity 0.5: no ticket has emerged in 4 checks"):
        detector.ticket(EARLY)
    assert isinstance(detector.masks[EARLY], TicketMask)


def test_the_constructor_keeps_what_it_was_given() -> None:
    detector = EarlyBirdDetector([0.5], criterion="diff_pruning", score_batches=7, score_threshold=0.25)
    assert (detector.criterion, detector.score_batches, detector.score_threshold) == ("diff_pruning", 7, 0.25)
    assert (EarlyBirdDetector([0.5]).score_batches, EarlyBirdDetector([0.5]).score_threshold) == (4, 0.1)
