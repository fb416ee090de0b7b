"""The pruner in real fits: search, switch, ticket training, and what is on disk at the end."""

import csv
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from modules import REGIONS, ConvNet, Lit, Mlp, OnStep, Ranking, Tutorial, fit, frozen_sgd, loader, quiet_trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from lightning_earlybird import (
    EarlyBirdDetector,
    SearchLimitError,
    TicketEnsemble,
    TicketEnsembleSampler,
    TimestepAwarePruner,
    TimestepRegion,
)
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.structure import TicketSlicer, count_macs, count_parameters, extract, trace_plan
from lightning_earlybird.tickets import load_ensemble
from lightning_earlybird.transition import averaged_modules

SWITCH = 6  # where `quick` detectors see every ticket emerge


def quick(*sparsities: float, **settings: Any) -> EarlyBirdDetector:
    """Two checks, three steps apart, are enough for it."""
    settings = {"every_n_train_steps": 3, "window": 2, "threshold": 1.0} | settings
    return EarlyBirdDetector(sparsities or (0.25, 0.5), **settings)


def pruner_in(tmp_path: Path, regions: Any = REGIONS, **settings: Any) -> TimestepAwarePruner:
    return TimestepAwarePruner(regions, **({"round_to": 4, "dirpath": tmp_path / "tickets"} | settings))


class Watch(pl.Callback):
    """Keeps the newest dense state, and the first state of the tickets, as its place among the callbacks shows them."""

    def __init__(self) -> None:
        self.dense: dict[str, Any] = {}
        self.tickets: dict[str, Any] = {}
        self.rates: list[float] = []

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if isinstance(module.model, TicketEnsemble) and self.tickets:
            return
        network = unwrap(module.model)
        named = dict(network.named_parameters())
        optimizer = trainer.optimizers[0]
        averages = [unwrap(average.model) for average in averaged_modules(trainer)]
        state = {
            "step": trainer.global_step,
            "network": deepcopy(network),
            "moments": {name: deepcopy(optimizer.state[p]) for name, p in named.items() if p in optimizer.state},
            "averages": deepcopy(averages),
            "gradients": {name: p.grad.clone() for name, p in named.items() if p.grad is not None},
        }
        if isinstance(network, TicketEnsemble):
            self.tickets = state
        else:
            self.dense = state

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.look(trainer, pl_module)  # the switch happens in this hook

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.look(trainer, pl_module)


def slicers_of(module: pl.LightningModule, dense: nn.Module) -> list[TicketSlicer]:
    """How each ticket was cut, from a trace of the dense network that the callbacks have no part in."""
    plan = trace_plan(deepcopy(dense).float(), (torch.randn(1, *module.sample_shape), torch.tensor([7])))
    return [TicketSlicer(plan, mask) for mask in module.model.record.masks]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_cut_from(module: pl.LightningModule, before: Watch, after: Watch) -> None:
    """Weights, optimizer state and pending gradients of the tickets are the dense ones under their masks."""
    dense, tickets = before.dense, after.tickets
    assert tickets["step"] == dense["step"]
    slicers = slicers_of(module, dense["network"])
    for slicer, ticket in zip(slicers, tickets["network"].tickets, strict=True):
        assert_same_state(ticket, extract(dense["network"], slicer.plan, slicer.mask))
    for kind in ("moments", "gradients"):
        names = {f"tickets.{index}.{name}" for index in range(len(slicers)) for name in dense[kind]}
        assert tickets[kind].keys() == names
    for name, gradient in tickets["gradients"].items():
        _, index, parent = name.split(".", 2)
        assert torch.equal(gradient, slicers[int(index)].slice(parent, dense["gradients"][parent])), name
    for name, state in tickets["moments"].items():
        _, index, parent = name.split(".", 2)
        origin = dense["moments"][parent]
        assert torch.equal(state["step"], origin["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], slicers[int(index)].slice(parent, origin[key])), (name, key)


# --- a module that knows nothing of it --------------------------------------------------------------------------------


def test_the_module_of_lightnings_diffusion_tutorial_trains_through_the_switch_untouched(
    tmp_path: Path, caplog
) -> None:
    regions = [TimestepRegion(0, 240, 0.3), TimestepRegion(240, 440, 0.5), TimestepRegion(440, 1000, 0.75)]
    pruner = TimestepAwarePruner(regions, overlap=20, round_to=4, target="params", dirpath=tmp_path / "tickets")
    module, ema = Tutorial(), EMAWeightAveraging(decay=0.9)
    dense = count_parameters(module)
    logger = CSVLogger(tmp_path, name="", version="")
    with caplog.at_level("INFO"):
        trainer = fit(module, quick(0.3, 0.5, 0.75), pruner, ema, max_epochs=3, logger=logger)
    assert pruner.switched_at == SWITCH and trainer.global_step == 12 and pruner.phase == "tickets"
    assert isinstance(module.model, TicketEnsemble) and module.model.regions == tuple(regions)
    sizes = [count_parameters(ticket) for ticket in module.model.tickets]
    for size, region, fact in zip(sizes, regions, pruner.facts, strict=True):
        assert 1 - size / dense == pytest.approx(region.sparsity, rel=0.01)
        assert fact.parameters == (dense, size) and fact.target == "params"
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert "the denoiser has become 3 tickets at step 6" in caplog.text

    sampler = TicketEnsembleSampler.from_trainer(trainer)
    for ticket, average in zip(sampler.tickets, ema._average_model.module.model.tickets, strict=True):
        assert_same_state(ticket, average)
    images = sampler.sample(
        3,
        scheduler=DDIMScheduler(),
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    assert images.shape == (3, 1, 8, 8) and images.abs().max() <= 1
    pipeline = DDPMPipeline(unet=sampler, scheduler=module.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=3, output_type="np").images.shape == (2, 8, 8, 1)


def test_every_training_step_after_the_switch_trains_only_the_tickets_its_timesteps_reach(tmp_path: Path) -> None:
    class Early(Lit):
        def loss(self, samples: Tensor) -> Tensor:
            if isinstance(self.model, TicketEnsemble):
                return self.model(samples, torch.full((len(samples),), 10)).square().mean()
            return super().loss(samples)

    module, after = Early(), Watch()
    fit(module, quick(), pruner_in(tmp_path), after, max_epochs=3)
    first, second = (module.model.tickets[index].conv_out.weight for index in (0, 1))
    assert not torch.equal(first, after.tickets["network"].tickets[0].conv_out.weight)
    assert torch.equal(second, after.tickets["network"].tickets[1].conv_out.weight)


# --- when the switch happens ------------------------------------------------------------------------------------------


def test_the_switch_happens_at_the_check_at_which_the_last_ticket_emerges(tmp_path: Path) -> None:
    def settling(step: int) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4, 5, 6, 7) if step >= 7 or step % 2 else (0, 1, 2, 3, 6, 7, 4, 5)

    pruner = pruner_in(tmp_path, round_to=1)
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3)
    fit(Lit(Mlp, frozen_sgd), Ranking(settling), detector, pruner, max_epochs=4)
    assert detector.emerged == {0.5: 3, 0.25: 9}
    assert pruner.switched_at == 9 and detector.found is None
    assert [(fact.step, fact.emerged) for fact in pruner.facts] == [(9, True), (3, True)]
    # The check at the switch is the last one.
    assert detector.distances[0.5][-1].step == 9


def test_the_switch_waits_only_for_the_sparsities_that_its_regions_need(tmp_path: Path) -> None:
    def settling(step: int) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4, 5, 6, 7) if step % 2 else (0, 1, 2, 3, 6, 7, 4, 5)

    pruner = pruner_in(tmp_path, [(0, 1000, 0.5)], round_to=1)
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3)
    fit(Lit(Mlp, frozen_sgd), Ranking(settling), detector, pruner, max_epochs=2)
    assert pruner.switched_at == 3 and detector.emerged == {0.5: 3}


def test_checks_at_the_end_of_epochs_switch_there(tmp_path: Path) -> None:
    module, before, after = Lit(), Watch(), Watch()
    pruner = pruner_in(tmp_path)
    fit(module, before, quick(every_n_train_steps=None), pruner, after, max_epochs=4)
    assert pruner.switched_at == 8
    assert_cut_from(module, before, after)


def test_the_search_limit_takes_the_masks_as_they_are(tmp_path: Path) -> None:
    pruner, module = pruner_in(tmp_path, max_search_steps=5), Lit()
    before, after = Watch(), Watch()
    message = r"max_search_steps=5 reached: the masks of sparsity \[0.25, 0.5\] are taken as they are"
    with pytest.warns(UserWarning, match=message):
        trainer = fit(module, before, quick(), pruner, after, max_epochs=3)
    assert pruner.switched_at == 5 and trainer.global_step == 12
    assert_cut_from(module, before, after)
    assert [(fact.step, fact.emerged) for fact in pruner.facts] == [(5, False), (5, False)]


def test_the_search_limit_can_end_the_fit(tmp_path: Path) -> None:
    pruner, module = pruner_in(tmp_path, max_search_steps=5, on_search_limit="raise"), Lit()
    message = r"max_search_steps=5: the tickets of sparsity \[0.25, 0.5\] have not emerged by step 5. Raise"
    with pytest.raises(SearchLimitError, match=message):
        fit(module, quick(), pruner, max_epochs=3)
    assert len(module.losses) == 5 and isinstance(module.model, ConvNet)


@pytest.mark.parametrize("limit", [SWITCH, SWITCH + 3])
def test_a_search_limit_that_emergence_meets_changes_nothing(limit: int, tmp_path: Path) -> None:
    pruner = pruner_in(tmp_path, max_search_steps=limit, on_search_limit="raise")
    fit(Lit(), quick(), pruner, max_epochs=3)
    assert pruner.switched_at == SWITCH


def test_a_search_limit_on_an_epochs_last_step_lets_that_epochs_check_speak_first(tmp_path: Path) -> None:
    # Four steps an epoch; with a FIFO of two, the masks of steps 4 and 8 decide, and 8 is the limit.
    pruner = pruner_in(tmp_path, max_search_steps=8, on_search_limit="raise")
    detector = EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0)
    fit(Lit(), detector, pruner, max_epochs=3)
    assert pruner.switched_at == 8 and detector.emerged == {0.25: 8, 0.5: 8}


def on_plateau(module: pl.LightningModule) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    scheduler = ReduceLROnPlateau(optimizer, patience=0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class FarBetterDense(Lit):
    """Validates to the same number for the same weights, and to a far smaller one while the denoiser is dense."""

    def validation_step(self, batch, batch_idx):
        with isolate_rng():
            torch.manual_seed(0)
            self.log("val_loss", self.loss(batch[0]) * (1.0 if isinstance(self.model, TicketEnsemble) else 1e-3))


def test_scores_of_the_dense_network_are_not_held_against_the_tickets(tmp_path: Path) -> None:
    module, pruner = FarBetterDense(configure=on_plateau), pruner_in(tmp_path)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", filename="{step}", enable_version_counter=False)
    stopping = EarlyStopping("val_loss", patience=3)
    detector = quick(every_n_train_steps=None)
    settings = {"max_epochs": 5, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = fit(module, detector, pruner, best, stopping, **settings)
    assert pruner.switched_at == 8 and trainer.global_step == 20
    scores = {float(best.best_model_score), float(stopping.best_score), trainer.lr_scheduler_configs[0].scheduler.best}
    assert len(scores) == 1 and scores.pop() > 0.01
    # The file of the switching step was written of the dense network, under its score, and is no longer the best.
    assert isinstance(torch.load(tmp_path / "best" / "step=8.ckpt", weights_only=True)["state_dict"], dict)
    assert best.best_model_path != str(tmp_path / "best" / "step=8.ckpt")
    (measured,) = trainer.validate(module, loader(module), ckpt_path="best", verbose=False)
    assert measured["val_loss"] == pytest.approx(float(best.best_model_score))


def test_a_checkpoint_of_weights_alone_carries_the_structure(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    trainer = fit(module := Lit(), quick(), pruner_in(tmp_path), saving, max_epochs=3, enable_checkpointing=True)
    again = Lit()
    fresh = quiet_trainer(pruner_in(tmp_path), limit_test_batches=1)
    fresh.test(again, loader(again), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert trainer.global_step == 12
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_batch_norm_is_refused_before_training_unless_one_region_sees_every_batch(tmp_path: Path) -> None:
    class Normed(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm2d(1)

        def forward(self, x, t):
            return super().forward(self.batch_norm(x), t)

    module = Lit(Normed)
    with pytest.raises(
        MisconfigurationException, match="denoiser='model' has the batch norm 'batch_norm': a ticket sees"
    ):
        fit(module, quick(), pruner_in(tmp_path), max_epochs=1)
    assert len(module.losses) == 1 and torch.equal(module.model.batch_norm.weight, torch.ones(1))


def test_saved_tickets_of_another_network_are_refused(tmp_path: Path) -> None:
    fit(Tutorial(), quick(), pruner_in(tmp_path), max_epochs=3)

    class Other(Tutorial):
        def __init__(self) -> None:
            super().__init__()
            self.model = type(self.model)(**{**self.model.config, "act_fn": "gelu"})

    with pytest.raises(MisconfigurationException, match="cut from another network than 'model': act_fn='silu' against"):
        fit(Other(), TimestepAwarePruner(tmp_path / "tickets" / "switch", dirpath=tmp_path / "new"), max_epochs=1)


def test_a_fit_that_ends_during_the_search_says_how_far_it_came(tmp_path: Path) -> None:
    pruner = pruner_in(tmp_path)
    message = (
        r"the fit ended during the search, the denoiser is still dense "
        r"\({0.25: '2 checks', 0.5: '2 checks'}\). Train longer"
    )
    with pytest.warns(UserWarning, match=message):
        fit(Lit(), quick(window=4), pruner, max_epochs=2)
    assert pruner.switched_at is None and pruner.facts == () and pruner.phase == "search"
    assert not (tmp_path / "tickets").exists()


def test_a_fit_that_ends_during_the_search_tells_emerged_tickets_from_missing_ones(tmp_path: Path) -> None:
    def settling(step: int) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4, 5, 6, 7) if step % 2 else (0, 1, 2, 3, 6, 7, 4, 5)

    with pytest.warns(UserWarning, match=r"{0.25: 'distance 0.500 after 4 checks', 0.5: 'emerged at step 3'}"):
        fit(
            Lit(Mlp, frozen_sgd),
            Ranking(settling),
            EarlyBirdDetector([0.25, 0.5], every_n_train_steps=1, window=3),
            pruner_in(tmp_path, round_to=1),
            max_epochs=1,
        )


# --- what the tickets inherit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_tickets_are_the_dense_network_and_its_optimizer_state_under_their_masks(settings, tmp_path: Path) -> None:
    module, before, after, pruner = Lit(), Watch(), Watch(), pruner_in(tmp_path)
    trainer = fit(module, before, quick(), pruner, after, max_epochs=5, **settings)
    assert pruner.switched_at == SWITCH and trainer.global_step > SWITCH + 2
    assert_cut_from(module, before, after)
    (optimizer,) = trainer.optimizers
    assert set(optimizer.param_groups[0]["params"]) == set(module.parameters()) == set(optimizer.state)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    # The tickets go on learning.
    for name, parameter in module.model.named_parameters():
        assert not torch.equal(parameter, after.tickets["network"].get_parameter(name)), name


def test_a_switch_within_an_accumulation_window_keeps_its_gradients(tmp_path: Path) -> None:
    """The search limit may be reached by the first of three batches that make a step."""
    module, before, after = Lit(), Watch(), Watch()
    pruner = pruner_in(tmp_path, max_search_steps=1)
    with pytest.warns(UserWarning, match="max_search_steps=1 reached"):
        trainer = fit(module, before, quick(), pruner, after, max_epochs=2, accumulate_grad_batches=3)
    assert pruner.switched_at == 1 and trainer.global_step == 4
    assert after.tickets["gradients"]
    assert_cut_from(module, before, after)


def test_learning_rates_and_group_settings_are_those_of_a_fit_without_switch(tmp_path: Path) -> None:
    def configure(module: pl.LightningModule) -> dict[str, Any]:
        named = list(module.named_parameters())
        groups = [
            {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.1},
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
        schedule = OneCycleLR(optimizer, max_lr=[0.02, 0.05], total_steps=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    switched, plain = Watch(), Watch()
    module, dense = Lit(configure=configure), Lit(configure=configure)
    trainer = fit(module, quick(), pruner_in(tmp_path), switched, max_epochs=3)
    unswitched = fit(dense, plain, max_epochs=3)
    assert isinstance(module.model, TicketEnsemble) and isinstance(dense.model, ConvNet)
    assert switched.rates == plain.rates and len(set(plain.rates)) == 12
    groups, plain_groups = (each.optimizers[0].param_groups for each in (trainer, unswitched))
    for ours, theirs in zip(groups, plain_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert {names[p].rpartition(".")[2] for p in groups[0]["params"]} == {"weight"}
    assert {names[p].rpartition(".")[2] for p in groups[1]["params"]} == {"bias"}


@pytest.mark.parametrize("first", [True, False])
def test_averaged_tickets_are_the_averaged_dense_weights_under_the_masks(first: bool, tmp_path: Path) -> None:
    module, before, after = Lit(), Watch(), Watch()
    ema, pruner = EMAWeightAveraging(decay=0.8), pruner_in(tmp_path)
    order = [ema, before, quick(), pruner, after] if first else [before, quick(), pruner, after, ema]
    fit(module, *order, max_epochs=3)
    (average,), (tickets,) = before.dense["averages"], after.tickets["averages"]
    assert pruner.switched_at == SWITCH
    assert not torch.equal(average.conv_in.weight, before.dense["network"].conv_in.weight)
    for slicer, ticket in zip(slicers_of(module, before.dense["network"]), tickets.tickets, strict=True):
        assert_same_state(ticket, extract(average, slicer.plan, slicer.mask))
    assert_cut_from(module, before, after)
    assert ema._average_model.n_averaged == 12
    saved = load_ensemble(tmp_path / "tickets" / "ensemble", ConvNet)
    assert_same_state(saved, ema._average_model.module.model)


def test_masks_from_averaged_weights_are_used_for_the_switch(tmp_path: Path) -> None:
    module, before = Lit(configure=lambda m: torch.optim.Adam(m.parameters(), 0.3)), Watch()
    detector, pruner = quick(weights="ema"), pruner_in(tmp_path)
    with pytest.warns(UserWarning, match="initialisation still makes up"):
        fit(module, EMAWeightAveraging(decay=0.9), before, detector, pruner, max_epochs=3)
    for fact, mask in zip(pruner.facts, module.model.record.masks, strict=True):
        assert torch.equal(mask.flat(), detector.ticket(fact.region.sparsity).flat())


def test_rewinding_gives_the_tickets_the_initial_weights_and_a_fresh_optimizer(tmp_path: Path) -> None:
    module, before, after = Lit(), Watch(), Watch()
    initial = deepcopy(module.model)
    ema = EMAWeightAveraging(decay=0.8)
    trainer = fit(module, ema, before, quick(), pruner_in(tmp_path, rewind="init"), after, max_epochs=3)
    slicers = slicers_of(module, initial)
    assert not torch.equal(before.dense["network"].hidden.weight, initial.hidden.weight)
    for networks in (after.tickets["network"], after.tickets["averages"][0]):
        for slicer, ticket in zip(slicers, networks.tickets, strict=True):
            assert_same_state(ticket, extract(initial, slicer.plan, slicer.mask))
    assert after.tickets["moments"] == {}
    assert all(state["step"] == 12 - SWITCH for state in trainer.optimizers[0].state.values())


def test_rewinding_works_in_manual_optimization_that_goes_backward_by_itself(tmp_path: Path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(batch[0]).backward()
            optimizer.step()

    module, after = Manual(), Watch()
    initial = deepcopy(module.model)
    fit(module, quick(), pruner_in(tmp_path, rewind="init"), after, max_epochs=3)
    for slicer, ticket in zip(slicers_of(module, initial), after.tickets["network"].tickets, strict=True):
        assert_same_state(ticket, extract(initial, slicer.plan, slicer.mask))


# --- the detector it uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_the_detector_of_the_trainer_is_used_wherever_it_stands(first: bool, tmp_path: Path) -> None:
    detector, pruner = quick(), pruner_in(tmp_path)
    trainer = fit(Lit(), *([pruner, detector] if first else [detector, pruner]), max_epochs=3)
    assert pruner.detector is detector and pruner.switched_at == SWITCH
    assert trainer.callbacks.index(detector) == trainer.callbacks.index(pruner) - 1
    assert [type(callback).__name__ for callback in trainer.callbacks].count("EarlyBirdDetector") == 1


def test_a_pruner_alone_brings_a_detector_with_the_settings_of_the_paper(tmp_path: Path) -> None:
    pruner, module = pruner_in(tmp_path), Lit(configure=frozen_sgd)
    trainer = fit(module, pruner, max_epochs=7)
    detector = pruner.detector
    assert detector in trainer.callbacks and list(detector.windows) == [0.25, 0.5]
    assert (detector.window, detector.threshold, detector.every_n_epochs) == (5, 0.1, 1)
    assert detector.emerged == {0.25: 20, 0.5: 20} and pruner.switched_at == 20


def test_a_detector_without_the_sparsities_of_the_regions_is_refused(tmp_path: Path) -> None:
    message = (
        r"regions need the sparsities \[0.25, 0.5\], and of the EarlyBirdDetectors with \[\[0.3, 0.5\]\] none covers "
        r"them. Give one detector all of them, or none"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(Lit(), quick(0.3, 0.5), pruner_in(tmp_path), max_epochs=1)


def test_of_two_detectors_the_one_that_covers_the_regions_is_used(tmp_path: Path) -> None:
    other, right, pruner = quick(0.75, round_to=4), quick(0.25, 0.5, 0.75), pruner_in(tmp_path)
    fit(Lit(), other, pruner, right, max_epochs=2)
    assert pruner.detector is right and pruner.switched_at == SWITCH
    with pytest.raises(MisconfigurationException, match=r"regions need the sparsities .* more than one covers them"):
        fit(Lit(), quick(0.25, 0.5), pruner_in(tmp_path), right, max_epochs=1)


@pytest.mark.parametrize(
    ("detector", "pruner", "message"),
    [
        ({"on_emergence": "stop"}, {}, "on_emergence='stop' contradicts the TimestepAwarePruner"),
        ({"denoiser": "model"}, {"denoiser": "net"}, "denoiser='model' of the EarlyBirdDetector contradicts .*'net'"),
        ({"round_to": 8}, {"round_to": 4}, "round_to=8 of the EarlyBirdDetector contradicts round_to=4"),
        ({"target": "macs"}, {}, "target='macs' of the EarlyBirdDetector contradicts target='channels'"),
        ({"scope": "global"}, {}, "scope='global' of the EarlyBirdDetector contradicts scope='uniform'"),
        ({"norm": "exact"}, {}, "norm='exact' of the EarlyBirdDetector contradicts norm='shrink'"),
    ],
)
def test_settings_of_detector_and_pruner_that_contradict_each_other_are_refused(
    detector: dict, pruner: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(Lit(), quick(**detector), pruner_in(tmp_path, **pruner), max_epochs=1)


def test_the_denoiser_and_the_rounding_may_be_given_to_either(tmp_path: Path) -> None:
    for detector, pruner in (({"denoiser": "model"}, {}), ({}, {"denoiser": "model"})):
        used = pruner_in(tmp_path, **pruner)
        fit(Lit(), quick(**detector), used, max_epochs=2)
        assert used.switched_at == SWITCH
        assert [mask.num_kept for mask in load_ensemble(used.directory / "switch", ConvNet).record.masks] == [24, 16]


def test_a_second_fit_with_the_same_callbacks_starts_anew(tmp_path: Path) -> None:
    pruner, detector, runs = pruner_in(tmp_path), quick(), []
    for _ in range(2):
        module = Lit()
        fit(module, pruner, detector, max_epochs=3)
        runs.append((pruner.switched_at, pruner.facts, module.losses))
    assert runs[0] == runs[1] and runs[0][0] == SWITCH


def test_a_second_fit_of_the_same_module_goes_on_with_its_tickets(tmp_path: Path) -> None:
    pruner, module = pruner_in(tmp_path), Lit()
    trainer = fit(module, pruner, quick(), max_epochs=3)
    tickets, facts = list(module.model.tickets), pruner.facts
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(module), loader(module))
    assert pruner.switched_at == SWITCH and trainer.global_step == 16
    fit(module, pruner, quick(), max_epochs=1)
    assert pruner.switched_at == 0
    assert list(module.model.tickets) == tickets and pruner.facts == facts


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regions",
    [
        [TimestepRegion(0, 300, 0.25), TimestepRegion(300, 1000, 0.5)],
        [[0, 300, 0.25], [300, 1000, 0.5]],
        [{"start": 0, "stop": 300, "sparsity": 0.25}, {"start": 300, "stop": 1000, "sparsity": 0.5}],
        OmegaConf.create([[0, 300, 0.25], [300, 1000, 0.5]]),
        OmegaConf.create([{"start": 0, "stop": 300, "sparsity": 0.25}, {"start": 300, "stop": 1000, "sparsity": 0.5}]),
    ],
    ids=["regions", "triples", "dicts", "omegaconf triples", "omegaconf dicts"],
)
def test_regions_may_be_given_in_plain_types(regions: Any, tmp_path: Path) -> None:
    pruner = pruner_in(tmp_path, regions)
    assert pruner.regions is regions
    module = Lit()
    fit(module, quick(), pruner, max_epochs=2)
    assert module.model.regions == (TimestepRegion(0, 300, 0.25), TimestepRegion(300, 1000, 0.5))


def test_one_region_gives_one_ticket(tmp_path: Path) -> None:
    module = Lit()
    fit(module, quick(0.5), pruner_in(tmp_path, [(0, 1000, 0.5)]), max_epochs=3)
    (ticket,) = module.model.tickets
    assert ticket.hidden.weight.shape == (8, 8, 3, 3)


def test_a_region_of_sparsity_zero_keeps_the_dense_network_without_waiting_for_it(tmp_path: Path) -> None:
    module, before, after = Lit(), Watch(), Watch()
    pruner = pruner_in(tmp_path, [(0, 300, 0.5), (300, 1000, 0.0)])
    fit(module, before, quick(0.5), pruner, after, max_epochs=3)
    assert list(pruner.detector.windows) == [0.5]
    assert_cut_from(module, before, after)
    assert_same_state(after.tickets["network"].tickets[1], before.dense["network"])
    assert [(fact.emerged, fact.achieved_parameters == 0.0) for fact in pruner.facts] == [(True, False), (True, True)]


def test_regions_that_all_stay_dense_become_copies_after_the_first_batch(tmp_path: Path) -> None:
    module, pruner = Lit(), pruner_in(tmp_path, [(0, 300, 0), (300, 1000, 0)])
    fit(module, pruner, max_epochs=1)
    assert pruner.switched_at == 1
    assert [ticket.hidden.weight.shape[0] for ticket in module.model.tickets] == [16, 16]
    assert not torch.equal(*(ticket.hidden.weight for ticket in module.model.tickets))  # each learns for itself


def test_two_regions_of_one_sparsity_start_from_one_mask(tmp_path: Path) -> None:
    module, after = Lit(), Watch()
    fit(module, quick(0.5), pruner_in(tmp_path, [(0, 300, 0.5), (300, 1000, 0.5)]), after, max_epochs=3)
    assert_same_state(*after.tickets["network"].tickets)
    first, second = module.model.tickets
    assert not torch.equal(first.hidden.weight, second.hidden.weight)


def test_budgets_of_regions_have_no_effect_in_one_process_and_that_is_said(tmp_path: Path) -> None:
    pruner = pruner_in(tmp_path, [(0, 1000, 0.5, 100)])
    with pytest.warns(UserWarning, match="regions: max_steps has no effect with strategy=SingleDeviceStrategy"):
        fit(Lit(), quick(0.5), pruner, max_epochs=2)


def test_tickets_saved_earlier_replace_the_denoiser_at_the_start_of_the_fit(tmp_path: Path, caplog) -> None:
    first, module = pruner_in(tmp_path), Lit()
    fit(module, quick(), first, max_epochs=3)
    again, ema, before = Lit(), EMAWeightAveraging(decay=0.8), {}

    class AtStart(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                before["live"] = deepcopy(pl_module.model)
                before["average"] = deepcopy(averaged_modules(trainer)[0].model)

    second = TimestepAwarePruner(str(tmp_path / "tickets" / "switch"), dirpath=tmp_path / "second")
    assert second.phase == "search" and second.detector is None
    with caplog.at_level("INFO"):
        trainer = fit(again, second, ema, AtStart(), max_epochs=2)
    saved = load_ensemble(tmp_path / "tickets" / "switch", ConvNet)
    assert_same_state(before["live"], saved)
    assert_same_state(before["average"], saved)
    assert before["live"].training and all(ticket.training for ticket in before["live"].tickets)
    assert second.switched_at == 0 and second.facts == first.facts and second.phase == "tickets"
    assert set(trainer.optimizers[0].param_groups[0]["params"]) == set(again.parameters())
    assert len(again.losses) == 8
    assert "have replaced the denoiser 'model'" in caplog.text
    assert_same_state(load_ensemble(tmp_path / "second" / "ensemble", ConvNet), ema._average_model.module.model)


def test_saved_tickets_start_without_the_optimizer_state_of_a_dense_checkpoint(tmp_path: Path) -> None:
    fit(Lit(), quick(), pruner_in(tmp_path), max_epochs=2)
    fit(Lit(), max_epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    pruner = TimestepAwarePruner(tmp_path / "tickets" / "switch", dirpath=tmp_path / "second")
    trainer = fit(Lit(), pruner, max_epochs=2, ckpt_path=tmp_path / "dense.ckpt")
    assert pruner.switched_at == 4
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {4}


@pytest.mark.parametrize("first", [True, False])
def test_saved_tickets_leave_nothing_to_search_for_a_detector_in_the_trainer(first: bool, tmp_path: Path) -> None:
    fit(Lit(), quick(), pruner_in(tmp_path), max_epochs=2)
    detector, pruner = quick(), TimestepAwarePruner(tmp_path / "tickets" / "switch", dirpath=tmp_path / "second")
    trainer = fit(Lit(), *([detector, pruner] if first else [pruner, detector]), max_epochs=1)
    assert trainer.global_step == 4 and pruner.phase == "tickets"
    assert detector.found is None and not any(detector.distances.values())


def test_saved_tickets_need_a_denoiser_that_they_fit(tmp_path: Path) -> None:
    fit(Lit(), quick(), pruner_in(tmp_path), max_epochs=2)
    path = tmp_path / "tickets" / "switch"

    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.second = ConvNet()

    def run(module: pl.LightningModule, **settings: Any) -> TimestepAwarePruner:
        pruner = TimestepAwarePruner(path, dirpath=tmp_path / "second", **settings)
        fit(module, pruner, max_epochs=1)
        return pruner

    with pytest.raises(MisconfigurationException, match=r"regions=.*: 0 sub-modules have the tensors of these tickets"):
        run(Lit(Mlp))
    with pytest.raises(MisconfigurationException, match=r"2 sub-modules have the tensors.*denoiser='model'"):
        run(Two())
    with pytest.raises(MisconfigurationException, match="denoiser='net' is not a sub-module of Two"):
        run(Two(), denoiser="net")
    module = Two()
    run(module, denoiser="second")
    assert isinstance(module.second, TicketEnsemble) and isinstance(module.model, ConvNet)
    held = Lit()
    held.encoder = held.model.hidden
    with pytest.raises(MisconfigurationException, match="a part of it is also held as 'encoder'"):
        run(held, denoiser="model")


# --- what is written and logged ---------------------------------------------------------------------------------------


def test_the_tickets_are_on_disk_at_the_switch_and_the_ensemble_at_the_end(tmp_path: Path) -> None:
    module, after, pruner = Lit(), Watch(), pruner_in(tmp_path)
    present = []

    class Files(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            present.append(tuple(sorted(path.name for path in (tmp_path / "tickets").glob("*"))))

    fit(module, quick(), pruner, after, Files(), max_epochs=3)
    assert present == [()] * 6 + [("mask_distance.png", "mask_overlap.png", "switch", "widths.png")] * 6
    assert pruner.directory == tmp_path / "tickets"
    noisy, steps = torch.randn(9, 1, 4, 4), torch.tensor([0, 299, 300, 999, 10, 500, 301, 700, 200])
    for name, expected in (("switch", after.tickets["network"]), ("ensemble", module.model)):
        loaded = load_ensemble(tmp_path / "tickets" / name, ConvNet)
        assert loaded.regions == module.model.regions
        assert torch.equal(loaded(noisy, steps), expected.eval()(noisy, steps))
        assert loaded.record.facts == pruner.facts
        assert loaded.record.sample_shape == (1, 4, 4)


def test_the_table_counts_what_is_there(tmp_path: Path, caplog) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module, before, pruner = Lit(), Watch(), pruner_in(tmp_path)
    with caplog.at_level("INFO"):
        fit(module, before, quick(), pruner, max_epochs=3, logger=logger)
    call = (torch.randn(1, 1, 4, 4), torch.tensor([7]))
    dense = before.dense["network"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("earlybird/switch_step")]
    (row,) = rows
    assert float(row["earlybird/switch_step"]) == SWITCH and int(row["step"]) == SWITCH
    for index, (fact, ticket, width) in enumerate(zip(pruner.facts, module.model.tickets, (12, 8), strict=True)):
        parameters = count_parameters(dense), sum(parameter.numel() for parameter in ticket.parameters())
        assert fact.region == module.model.regions[index]
        assert fact.parameters == parameters
        assert fact.channels == (32, 2 * width)
        assert fact.macs == (count_macs(dense, call), count_macs(ticket, call))
        # 16 positions, kernels of nine: conv_in, hidden, conv_out; and the time embedding.
        assert fact.macs == tuple(16 * 9 * (w + w * w + w) + w for w in (16, width))
        removed = 1 - parameters[1] / parameters[0]
        assert float(row[f"ticket_{index}/sparsity"]) == fact.region.sparsity
        assert float(row[f"ticket_{index}/parameters_removed"]) == pytest.approx(removed)
        assert float(row[f"ticket_{index}/channels_removed"]) == 1 - width / 16
        assert float(row[f"ticket_{index}/macs_removed"]) == pytest.approx(fact.achieved_macs)
        assert f"{-removed:.1%}" in caplog.text
    assert "[300, 1000)" in caplog.text


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_on_both_sides_of_the_switch_is_logged(accumulate: int, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = Lit()
    settings = {"accumulate_grad_batches": accumulate, "batches": 4 * accumulate}
    fit(module, quick(), pruner_in(tmp_path), max_epochs=16, logger=logger, **settings)
    with (tmp_path / "metrics.csv").open() as file:
        at, after = [
            row for row in csv.DictReader(file) if row["earlybird/loss_at_switch"] or row["earlybird/loss_after_switch"]
        ]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    switch = 6 * accumulate  # in batches, of which a loss is returned for each
    assert float(at["earlybird/loss_before_switch"]) == pytest.approx(mean(module.losses[:switch]))
    assert float(at["earlybird/loss_at_switch"]) == pytest.approx(module.losses[switch])
    assert float(after["earlybird/loss_after_switch"]) == pytest.approx(mean(module.losses[switch + 25 : switch + 50]))
    assert (int(at["step"]), int(after["step"])) == (6, (switch + 50) // accumulate - 1)


def test_tickets_are_written_beside_the_files_of_the_logger(tmp_path: Path) -> None:
    pruner = TimestepAwarePruner(REGIONS, round_to=4)
    for number in (0, 1):
        trainer = fit(Lit(), quick(), pruner, max_epochs=2, logger=CSVLogger(tmp_path))
        assert pruner.directory == Path(trainer.logger.log_dir) / "tickets"
        assert pruner.directory == tmp_path / "lightning_logs" / f"version_{number}" / "tickets"
        assert sorted(path.name for path in pruner.directory.iterdir()) == [
            "ensemble",
            "mask_distance.png",
            "mask_overlap.png",
            "switch",
            "widths.png",
        ]


def test_tickets_are_written_into_a_new_folder_where_there_is_no_logger(tmp_path: Path) -> None:
    pruner = TimestepAwarePruner(REGIONS, round_to=4)
    for number in (0, 1):
        fit(Lit(), quick(), pruner, max_epochs=2, default_root_dir=tmp_path)
        assert pruner.directory == tmp_path / "earlybird" / f"version_{number}"
        assert sorted(path.name for path in pruner.directory.iterdir()) == [
            "ensemble",
            "mask_distance.png",
            "mask_overlap.png",
            "switch",
            "widths.png",
        ]


def test_a_folder_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "tickets" / "switch").mkdir(parents=True)
    (tmp_path / "tickets" / "switch" / "thesis.txt").write_text("the only copy")
    module = Lit()
    with pytest.raises(FileExistsError, match="holds something else"):
        fit(module, quick(), pruner_in(tmp_path), max_epochs=1)
    assert module.losses == []


def test_a_fast_development_run_passes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruner = TimestepAwarePruner(REGIONS, round_to=4)
    with pytest.warns(UserWarning, match="the fit ended during the search"):
        fit(Lit(), pruner, EMAWeightAveraging(), fast_dev_run=True, logger=True, limit_val_batches=1.0)
    assert list(tmp_path.iterdir()) == []
    pruner = TimestepAwarePruner(REGIONS, round_to=4, max_search_steps=1)
    with pytest.warns(UserWarning, match="max_search_steps=1 reached"):
        fit(module := Lit(), pruner, fast_dev_run=2, default_root_dir=tmp_path)
    assert isinstance(module.model, TicketEnsemble)


# --- ways of training -------------------------------------------------------------------------------------------------


class Gan(Lit):
    """Two networks, two optimizers, trained by hand as Lightning documents it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        optimizer, critic_optimizer = self.optimizers()
        (samples,) = batch
        steps = torch.randint(1000, (len(samples),))
        self.toggle_optimizer(critic_optimizer)
        critic_optimizer.zero_grad()
        self.manual_backward(self.critic(self.model(samples, steps)).mean() - self.critic(samples).mean())
        critic_optimizer.step()
        self.untoggle_optimizer(critic_optimizer)
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(-self.critic(self.model(samples, steps)).mean())
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.AdamW(network.parameters(), lr=0.01) for network in (self.model, self.critic)]


def test_a_second_network_and_its_optimizer_are_left_alone(tmp_path: Path) -> None:
    module, before, after, pruner = Gan(), Watch(), Watch(), pruner_in(tmp_path)
    kept: list[Any] = []

    def critic(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == SWITCH:
            optimizer = trainer.optimizers[1]
            tensors = [*optimizer.param_groups[0]["params"]]
            tensors += [optimizer.state[p][key] for p in tensors for key in ("step", "exp_avg", "exp_avg_sq")]
            kept.append([(id(tensor), tensor.clone()) for tensor in tensors])

    fit(module, before, OnStep(critic), quick(), pruner, after, OnStep(critic), max_epochs=3)
    # Two optimizers step for each batch.
    assert pruner.switched_at == SWITCH and before.dense["step"] == SWITCH
    assert_cut_from(module, before, after)
    (first, second) = kept
    assert len(first) == 4 * 4
    for (name, value), (other, now) in zip(first, second, strict=True):
        assert name == other and torch.equal(value, now)
    assert all(p.requires_grad for p in module.parameters())
    assert count_parameters(module.model.tickets[1]) < count_parameters(before.dense["network"])


def test_manual_optimization_trains_through_the_switch_as_automatic_does(tmp_path: Path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    manual, automatic = Manual(), Lit()
    for module in (manual, automatic):
        fit(module, quick(), pruner_in(tmp_path), max_epochs=3)
        assert isinstance(module.model, TicketEnsemble)
    assert manual.losses == automatic.losses


def compiled_wrapper(module: Lit) -> None:
    module.model = torch.compile(module.model, backend="eager")


def compiled_in_place(module: Lit) -> None:
    module.model.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch._dynamo")
@pytest.mark.parametrize("compiled", [compiled_wrapper, compiled_in_place])
def test_a_compiled_denoiser_becomes_compiled_tickets(compiled: Callable[[Lit], None], tmp_path: Path) -> None:
    torch._dynamo.reset()
    module, plain = Lit(), Lit()
    compiled(module)
    before, after, pruner = Watch(), Watch(), pruner_in(tmp_path)
    fit(module, before, quick(), pruner, after, max_epochs=3)
    fit(plain, quick(), pruner_in(tmp_path), max_epochs=3)
    assert pruner.switched_at == SWITCH
    assert module.losses == pytest.approx(plain.losses, rel=1e-4)
    assert_cut_from(module, before, after)
    assert all(ticket._compiled_call_impl is not None for ticket in module.model.tickets)
    loaded = load_ensemble(tmp_path / "tickets" / "ensemble", ConvNet)
    assert not any("_orig_mod" in name for name in loaded.state_dict())


def test_training_after_the_switch_validates_and_tests_with_the_tickets(tmp_path: Path) -> None:
    module, pruner = Lit(), pruner_in(tmp_path)
    ema = EMAWeightAveraging(decay=0.8)
    trainer = fit(module, quick(), pruner, ema, max_epochs=4, limit_val_batches=2)
    assert trainer.callback_metrics["val_loss"].isfinite()
    (results,) = trainer.test(module, loader(module), verbose=False)
    assert math.isfinite(results["test_loss"])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": [(0, 300, 0.5), (400, 1000, 0.5)]}, "regions"),
        ({"regions": [(0, 300, 0.5), (200, 1000, 0.5)]}, "regions"),
        ({"regions": [(300, 1000, 0.5), (0, 300, 0.5)]}, "regions"),
        ({"regions": [(0, 300, 1.0)]}, "sparsity"),
        ({"regions": []}, "regions"),
        ({"regions": [(0, 300, 0.25), (300, 1000, 0.5)], "overlap": 800}, "overlap=800"),
        ({"max_search_steps": 0}, "max_search_steps=0 must be an integer of at least 1"),
        ({"round_to": 2.5}, "round_to=2.5 must be an integer of at least 1"),
        ({"on_search_limit": "stop"}, "on_search_limit='stop' must be one of 'prune', 'raise'"),
        ({"rewind": "step"}, "rewind='step' must be one of None, 'init'"),
        ({"target": "flops"}, "target='flops' must be one of 'channels', 'params', 'macs'"),
        ({"scope": "layer"}, "scope='layer' must be one of 'uniform', 'global'"),
        ({"heads": "all"}, "heads='all' must be one of 'equal', 'whole'"),
        ({"norm": "ragged"}, "norm='ragged' must be one of 'shrink', 'exact'"),
        ({"min_width": 0}, "min_width=0 must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepAwarePruner(**({"regions": REGIONS} | settings))


@pytest.mark.parametrize(
    "setting",
    [
        {"overlap": 20},
        {"max_search_steps": 5},
        {"rewind": "init"},
        {"target": "macs"},
        {"scope": "global"},
        {"round_to": 4},
        {"min_width": 2},
        {"heads": "whole"},
        {"norm": "exact"},
    ],
)
def test_saved_tickets_refuse_settings_that_would_do_nothing(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} has no effect on the tickets saved in regions='tickets'"):
        TimestepAwarePruner("tickets", **setting)


class ShardedFSDPStrategy(SingleDeviceStrategy):
    """Stands for FSDP, which needs accelerators."""


class FakeDeepSpeedStrategy(SingleDeviceStrategy):
    """Stands for DeepSpeed, which needs accelerators."""


@pytest.mark.parametrize("strategy", [ShardedFSDPStrategy, FakeDeepSpeedStrategy])
@pytest.mark.parametrize("callback", ["detector", "pruner"])
def test_strategies_that_shard_parameters_are_refused_before_training(strategy, callback, tmp_path: Path) -> None:
    module = Lit()
    callbacks = [quick()] if callback == "detector" else [pruner_in(tmp_path)]
    trainer = quiet_trainer(*callbacks, max_epochs=1)
    trainer._accelerator_connector.strategy.__class__ = strategy
    message = f"strategy={strategy.__name__}: the denoiser's parameters are replaced .*strategy='ddp'"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, loader(module), loader(module))
    assert module.losses == []


def test_a_module_that_leaves_the_meta_device_in_time_is_pruned(tmp_path: Path) -> None:
    class Later(Lit):
        def configure_model(self) -> None:
            if self.model.hidden.weight.is_meta:
                self.model.to_empty(device="cpu")
                self.model.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)

    module, pruner = Later(), pruner_in(tmp_path)
    module.model.to("meta")
    fit(module, quick(), pruner, max_epochs=2)
    assert pruner.switched_at == SWITCH


def test_a_denoiser_that_does_not_exist_is_refused_before_training(tmp_path: Path) -> None:
    module = Lit()
    with pytest.raises(MisconfigurationException, match="denoiser='unet' is not a sub-module of Lit"):
        fit(module, pruner_in(tmp_path, denoiser="unet"), max_epochs=1)
    assert module.losses == []


def test_regions_that_do_not_cover_the_first_batch_are_refused_before_anything_is_learned(tmp_path: Path) -> None:
    class Continuous(Lit):
        def loss(self, samples: Tensor) -> Tensor:
            return self.model(samples, torch.linspace(0, 1.5, len(samples)).view(-1, 1)).square().mean()

    module = Continuous()
    before = deepcopy(module.state_dict())
    message = r"regions=\[{'start': 0.*: in the first batch, timesteps hold 1.07.*, outside the time axis \[0, 1\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, quick(0.5), pruner_in(tmp_path, [(0, 1, 0.5)]), max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    fit(module, quick(0.5), pruner := pruner_in(tmp_path, [(0, 1, 0.5), (1, math.inf, 0.0)]), max_epochs=2)
    assert pruner.switched_at == SWITCH


def test_optimizers_that_cannot_follow_are_refused_before_training(tmp_path: Path) -> None:
    module = Lit(configure=lambda module: torch.optim.LBFGS(module.parameters()))
    with pytest.raises(MisconfigurationException, match="configure_optimizers gives LBFGS: it keeps parameters"):
        fit(module, pruner_in(tmp_path), max_epochs=1)
    fit(saved := Lit(), quick(), pruner_in(tmp_path), max_epochs=2)
    with pytest.raises(MisconfigurationException, match="configure_optimizers gives LBFGS: it keeps parameters"):
        fit(module, TimestepAwarePruner(tmp_path / "tickets" / "switch", dirpath=tmp_path / "second"), max_epochs=1)
    assert module.losses == [] and saved.losses


def test_the_constructor_keeps_what_it_was_given() -> None:
    pruner = TimestepAwarePruner(REGIONS, overlap=20, max_search_steps=100, rewind="init", dirpath="tickets")
    assert pruner.regions is REGIONS
    assert (pruner.overlap, pruner.max_search_steps, pruner.rewind, pruner.dirpath) == (20, 100, "init", "tickets")
    assert (pruner.facts, pruner.switched_at, pruner.directory, pruner.detector) == ((), None, None, None)
