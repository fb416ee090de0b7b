"""The detector in real fits: when it checks, what it draws, what it decides, and what it leaves alone."""

import csv
import itertools
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import (
    ConvNet,
    Lit,
    Mlp,
    OnStep,
    Ranking,
    Repeatable,
    Tutorial,
    adamw,
    fit,
    frozen_sgd,
    kept_by_hand,
    loader,
)
from torch import Tensor, nn

import lightning_earlybird.conversion
from lightning_earlybird import EarlyBirdDetector, NonFiniteWeightsError, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.structure import ChannelPlan

FALLING = (0, 1, 2, 3, 4, 5, 6, 7)
RISING = FALLING[::-1]


def detector_for(sparsities: Any = (0.5,), **settings: Any) -> EarlyBirdDetector:
    """Checks after every step, in widths of any size, unless told otherwise."""
    return EarlyBirdDetector(sparsities, **({"every_n_train_steps": 1, "round_to": 1} | settings))


def steps_of(detector: EarlyBirdDetector, sparsity: float = 0.5) -> list[int]:
    return [check.step for check in detector.distances[sparsity]]


def still(detector: EarlyBirdDetector, order: Any = None, **settings: Any) -> pl.Trainer:
    """A fit in which only ``order`` (by default: nothing) changes which channels matter."""
    return fit(Lit(Mlp, frozen_sgd), Ranking(order or (lambda step: FALLING)), detector, **settings)


# --- when checks happen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "trainer", "expected"),
    [
        ({"every_n_epochs": 1}, {}, [4, 8, 12, 16, 20]),
        ({"every_n_epochs": 2}, {}, [8, 16]),
        ({"every_n_epochs": 1}, {"accumulate_grad_batches": 3}, [2, 4, 6, 8, 10]),
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12, 15, 18]),
        ({"every_n_train_steps": 1}, {"max_steps": 6}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 3}, {"accumulate_grad_batches": 2}, [3, 6, 9]),
        ({"every_n_train_steps": 2}, {"accumulate_grad_batches": 3}, [2, 4, 6, 8, 10]),
        ({"every_n_train_steps": 3, "every_n_epochs": 2}, {"limit_train_batches": 3}, [3, 6, 9, 12, 15]),
    ],
)
def test_checks_happen_at_these_steps_and_at_no_other(settings, trainer, expected) -> None:
    detector = EarlyBirdDetector([0.5], round_to=2, **settings)
    fit(Lit(Mlp), detector, max_epochs=5, **trainer)
    assert steps_of(detector) == expected


def test_several_optimizers_are_checked_once_a_multiple_of_the_interval_has_passed() -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__(Mlp)
            self.automatic_optimization = False
            self.scale = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            loss = self.scale * super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(parameters, lr=0.1) for parameters in (self.model.parameters(), [self.scale])]

    detector = detector_for(every_n_train_steps=3)
    trainer = fit(Two(), detector, max_epochs=2)
    assert trainer.global_step == 16
    assert steps_of(detector) == [4, 6, 10, 12, 16]


def test_a_check_sees_the_weights_after_the_step_it_is_named_after() -> None:
    module, detector, seen = Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.1)), detector_for(), []
    masks = OnStep(lambda trainer, pl_module: seen.append((detector.masks[0.5].kept["up"], deepcopy(pl_module.model))))
    fit(module, detector, masks, max_epochs=3)
    assert len(seen) == 12
    for mask, network in seen:
        assert torch.equal(mask, kept_by_hand(network, 4))
    assert len({tuple(mask.tolist()) for mask, _ in seen}) > 2  # the training moves them


def test_masks_of_several_sparsities_are_drawn_from_the_same_weights_and_nest() -> None:
    detector = detector_for([0.75, 0.25, 0.5])
    module = Lit(Mlp)
    assert detector.masks == {}
    fit(module, detector, max_epochs=1)
    assert list(detector.masks) == [0.75, 0.25, 0.5]
    for sparsity, kept in ((0.25, 6), (0.5, 4), (0.75, 2)):
        assert torch.equal(detector.masks[sparsity].kept["up"], kept_by_hand(module.model, kept))


def test_kept_widths_are_multiples_of_eight_where_nothing_else_is_said() -> None:
    detector = EarlyBirdDetector([1 / 3])
    fit(Lit(lambda: Mlp(24)), detector, max_epochs=1)
    assert detector.masks[1 / 3].num_kept == 16


def test_code_that_changes_at_widths_below_those_of_verification_is_refused_at_the_sparsity_that_needs_them() -> None:
    class Thresholds(Mlp):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(x) + timesteps.to(x.dtype)[:, None] / 1000)
            return self.down(hidden * 0.5 if hidden.shape[1] < 12 else hidden)

    fit(Lit(lambda: Thresholds(64)), EarlyBirdDetector([0.5]), max_epochs=1)
    module = Lit(lambda: Thresholds(64))
    before = module.model.up.weight.clone()
    message = (
        r"denoiser='model': at the widths of sparsity 0\.875 it computes something else .* Use a lower sparsity or"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, EarlyBirdDetector([0.5, 0.875]), max_epochs=1)
    assert torch.equal(module.model.up.weight, before)


# --- the paper's rule -------------------------------------------------------------------------------------------------


def test_a_sparsity_that_cannot_be_met_is_said_before_training() -> None:
    message = r"sparsity=0.5 of the channels cannot be met: 0.3333 is what steps of round_to=16 .* 0.3333 is the most"
    with pytest.warns(UserWarning, match=message):
        fit(Lit(lambda: Mlp(24)), EarlyBirdDetector([0.5], round_to=16), max_epochs=1)


def test_a_sparsity_that_global_ranking_misses_only_later_is_said_then_and_once(
    recwarn: pytest.WarningsRecorder,
) -> None:
    calls, seen = itertools.count(), []

    def rank(network: nn.Module, plan: ChannelPlan) -> Tensor:
        # Alike in both groups when it is tried; at the checks one group has all the weak channels.
        return torch.cat([torch.arange(32.0), torch.arange(32.0) if next(calls) == 0 else torch.ones(32)])

    def missed() -> list[str]:
        return [str(warning.message) for warning in recwarn if "cannot be met" in str(warning.message)]

    detector = detector_for([0.25], criterion=rank, target="params", scope="global", every_n_train_steps=2)
    fit(Lit(lambda: ConvNet(32)), detector, OnStep(lambda *_: seen.append(len(missed()))), max_epochs=1)
    assert seen == [0, 1, 1, 1] and "shared out with scope='global'" in missed()[0]


@pytest.mark.parametrize("settings", [{"round_to": 8}, {"round_to": 1, "min_width": 8}])
def test_a_rounding_or_minimum_under_which_nothing_can_go_is_refused_before_anything_is_learned(settings: Any) -> None:
    message = (
        r"denoiser='model': with round_to=\d and min_width=\d no layer can lose a channel, as the widest .* has 8\."
    )
    module = Lit(Mlp)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, EarlyBirdDetector([0.5], **settings), max_epochs=1)
    assert len(module.losses) == 1


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("every", [1, 2])
def test_a_mask_that_never_moves_emerges_at_check_number_window(window: int, every: int) -> None:
    detector = detector_for(window=window, every_n_train_steps=every)
    still(detector, max_epochs=3)
    assert detector.emerged == {0.5: window * every}
    distances = [check.distance for check in detector.distances[0.5]]
    assert distances[: window - 1] == [None] * (window - 1) and set(distances[window - 1 :]) == {0.0}


def test_a_ticket_emerges_once_every_mask_in_the_window_is_close_to_the_newest() -> None:
    detector = detector_for(window=3)
    still(detector, lambda step: RISING if step <= 5 and step % 2 else FALLING, max_epochs=3)
    # The masks alternate up to step 5; 6, 7 and 8 are the first three that agree.
    assert detector.emerged == {0.5: 8}
    assert [check.distance for check in detector.distances[0.5]][2:9] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_slow_drift_does_not_emerge_though_each_mask_is_close_to_the_one_before() -> None:
    def drifting(step: int) -> list[int]:
        return [(channel + step) % 16 for channel in range(16)]

    detector = detector_for(window=4, threshold=0.125)
    fit(Lit(lambda: Mlp(16), frozen_sgd), Ranking(drifting), detector, max_epochs=4)
    # One channel leaves and one comes at each step: 2/16 to the newest neighbour, three times that in the window.
    assert {check.distance for check in detector.distances[0.5][3:]} == {3 * 2 / 16}
    assert detector.emerged == {}


def test_each_sparsity_emerges_at_a_time_of_its_own() -> None:
    def settling(step: int) -> tuple[int, ...]:
        # The four strongest are settled from the start, of the others which is the weakest pair changes until step 7.
        return FALLING if step >= 7 or step % 2 else (0, 1, 2, 3, 6, 7, 4, 5)

    detector = detector_for([0.5, 0.25], window=3)
    still(detector, settling, max_epochs=4)
    assert detector.emerged == {0.5: 3, 0.25: 9}
    assert torch.equal(detector.ticket(0.25).kept["up"], torch.tensor([True] * 6 + [False] * 2))


def test_a_ticket_stays_the_mask_of_its_emergence() -> None:
    detector = detector_for(window=2)
    still(detector, lambda step: FALLING if step < 4 else RISING, max_epochs=3)
    assert detector.emerged == {0.5: 2}
    assert detector.ticket(0.5).kept["up"].tolist() == [True] * 4 + [False] * 4
    assert detector.masks[0.5].kept["up"].tolist() == [False] * 4 + [True] * 4


def test_a_ticket_that_has_not_emerged_is_no_answer() -> None:
    detector = detector_for(window=5)
    still(detector, max_epochs=1)
    with pytest.raises(LookupError, match=r"sparsity=0.5: no ticket has emerged in 4 checks. Train longer"):
        detector.ticket(0.5)
    with pytest.raises(KeyError, match=r"sparsity=0.3 is not searched for. This detector has \[0.5\]"):
        detector.ticket(0.3)


def test_distances_are_measured_from_the_untouched_initial_weights() -> None:
    module, detector = Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.2)), detector_for()
    initial = kept_by_hand(module.model, 4)
    fit(module, detector, max_epochs=2)
    final = kept_by_hand(module.model, 4)
    assert not torch.equal(initial, final)
    assert detector.distances[0.5][-1].from_start == (initial ^ final).float().mean()
    steps, _ = detector.windows[0.5].pairwise()
    assert steps == list(range(9))


def test_the_random_control_draws_new_masks_at_every_check_and_the_same_in_every_run() -> None:
    runs = []
    for _ in range(2):
        detector, masks = detector_for(criterion="random", threshold=0.0), []
        look = OnStep(lambda trainer, module, d=detector, m=masks: m.append(tuple(d.masks[0.5].flat().tolist())))
        still(detector, None, max_epochs=3)
        fit(Lit(Mlp, frozen_sgd), detector, look, max_epochs=3)
        runs.append(masks)
    assert runs[0] == runs[1] and len(set(runs[0])) > 6
    assert detector.emerged == {}


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_masks_can_be_drawn_from_the_averaged_weights() -> None:
    detector, ema = detector_for(weights="ema"), EMAWeightAveraging(decay=0.8)
    average: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def by_hand(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for name, value in module.model.state_dict().items():
            average[name] = 0.8 * average[name] + 0.2 * value if name in average else value.clone()
        network = Mlp()
        network.load_state_dict(average)
        raw, averaged = kept_by_hand(module.model, 4), kept_by_hand(network, 4)
        seen.append((detector.masks[0.5].kept["up"], averaged, raw))

    module = Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.5))
    fit(module, ema, detector, OnStep(by_hand), max_epochs=3)
    assert len(seen) == 12 and all(torch.equal(mask, averaged) for mask, averaged, _ in seen)
    assert any(not torch.equal(mask, raw) for mask, _, raw in seen)


def test_averages_that_are_mostly_initialisation_are_warned_about_once() -> None:
    detector, ema = detector_for(weights="ema", every_n_train_steps=2), EMAWeightAveraging(decay=0.99)
    # At check number five, the first that could decide: 0.99 ** 9 of what the first update copied.
    message = "weights='ema': the initialisation still makes up 91% of the averaged weights at step 10, .*'raw'"
    with pytest.warns(UserWarning, match=message) as warned:
        fit(Lit(Mlp), ema, detector, max_epochs=4)
    assert sum("makes up" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize(("weights", "told"), [("auto", True), ("raw", False)])
def test_raw_weights_are_used_beside_averages_unless_told_otherwise(weights: Any, told: bool, caplog) -> None:
    detector, module = (
        detector_for(weights=weights),
        Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.2)),
    )
    raw: list[Tensor] = []
    look = OnStep(lambda trainer, module: raw.append(kept_by_hand(module.model, 4)))
    with caplog.at_level("INFO"):
        fit(module, EMAWeightAveraging(decay=0.99), detector, look, max_epochs=2)
    assert torch.equal(detector.masks[0.5].kept["up"], raw[-1])
    assert ("masks are drawn from the raw weights" in caplog.text) == told


def test_averaged_weights_need_a_callback_that_keeps_them() -> None:
    with pytest.raises(
        MisconfigurationException, match="weights='ema' needs a WeightAveraging callback in the Trainer"
    ):
        fit(Lit(Mlp), EarlyBirdDetector([0.5], weights="ema"), max_epochs=1)


# --- what follows emergence -------------------------------------------------------------------------------------------


def test_training_continues_after_emergence() -> None:
    detector = detector_for([0.5, 0.25], window=2)
    trainer = still(detector, max_epochs=3)
    assert detector.emerged == {0.5: 2, 0.25: 2} and trainer.global_step == 12
    assert isinstance(trainer.lightning_module.model, Mlp)


def test_training_stops_when_the_last_ticket_has_emerged() -> None:
    def settling(step: int) -> tuple[int, ...]:
        return FALLING if step >= 3 or step % 2 else (0, 1, 2, 3, 6, 7, 4, 5)

    detector = detector_for([0.5, 0.25], window=2, on_emergence="stop")
    trainer = still(detector, settling, max_epochs=9)
    assert detector.emerged == {0.5: 2, 0.25: 4} and trainer.global_step == 4


def pruned(module: Lit, tmp_path: Path, **settings: Any) -> tuple[pl.Trainer, EarlyBirdDetector]:
    detector = EarlyBirdDetector([0.5], window=2, threshold=1.0, round_to=2, on_emergence="prune")
    trainer = fit(module, detector, default_root_dir=tmp_path, **settings)
    return trainer, detector


def test_pruning_gives_one_smaller_network_for_the_whole_time_axis_that_trains_on(tmp_path: Path, caplog) -> None:
    module = Lit()
    dense = sum(parameter.numel() for parameter in module.parameters())
    with caplog.at_level("INFO"):
        trainer, detector = pruned(module, tmp_path, max_epochs=4)
    assert isinstance(module.model, TicketEnsemble)
    (ticket,), (region,) = module.model.tickets, module.model.regions
    assert (region.start, region.stop, region.sparsity) == (-math.inf, math.inf, 0.5)
    assert ticket.hidden.weight.shape == (8, 8, 3, 3)
    assert sum(parameter.numel() for parameter in module.parameters()) < 0.35 * dense
    assert detector.emerged == {0.5: 8} and trainer.global_step == 16 and len(module.losses) == 16
    assert set(trainer.optimizers[0].param_groups[0]["params"]) == set(ticket.parameters())
    assert trainer.optimizers[0].state[ticket.hidden.weight]["step"] == 16
    assert detector.found is None and steps_of(detector) == [4, 8]
    assert "the denoiser has become a ticket at step 8" in caplog.text and "(-inf, inf)" in caplog.text


def test_a_pruned_fit_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    module = Lit()
    trainer, detector = pruned(module, tmp_path, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    again = Lit()
    trainer, resumed = pruned(again, tmp_path, max_epochs=3, ckpt_path=tmp_path / "pruned.ckpt")
    for (name, ours), (_, theirs) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert resumed.emerged == detector.emerged == {0.5: 8}
    trainer, resumed = pruned(again := Lit(), tmp_path, max_epochs=5, ckpt_path=tmp_path / "pruned.ckpt")
    assert trainer.global_step == 20 and len(again.losses) == 8 and steps_of(resumed) == [4, 8]
    assert again.model.tickets[0].hidden.weight.shape == (8, 8, 3, 3)


def test_what_a_traditional_ticket_lost_is_logged_beside_what_was_asked_for(tmp_path: Path) -> None:
    module, settings = Lit(), {"target": "params", "norm": "exact", "heads": "whole", "round_to": 1}
    logger = CSVLogger(tmp_path, name="", version="")
    detector = detector_for([0.5], on_emergence="prune", window=2, threshold=1.0, **settings)
    fit(module, detector, max_epochs=1, logger=logger)
    (fact,) = module.model.record.facts
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["earlybird/switch_step"])
    assert fact.target == "params" and fact.achieved_parameters == pytest.approx(0.5, rel=0.01)
    assert float(row["ticket_0/sparsity"]) == 0.5 and float(row["earlybird/switch_step"]) == 2
    assert float(row["ticket_0/parameters_removed"]) == fact.achieved_parameters


@pytest.mark.parametrize("first", [True, False])
def test_a_detector_that_only_watches_ends_its_search_when_another_one_prunes(first: bool) -> None:
    watching = detector_for([0.25], window=20)
    pruning = detector_for([0.5], on_emergence="prune", window=2, threshold=1.0)
    module = Lit()
    trainer = fit(module, *([watching, pruning] if first else [pruning, watching]), max_epochs=2)
    assert isinstance(module.model, TicketEnsemble) and trainer.global_step == 8
    assert watching.found is None and steps_of(watching, 0.25) == [1, 2]


def test_a_module_that_is_pruned_already_is_not_pruned_again(tmp_path: Path) -> None:
    module = Lit()
    pruned(module, tmp_path, max_epochs=3)
    ticket = module.model.tickets[0]
    trainer, detector = pruned(module, tmp_path, max_epochs=4)
    assert module.model.tickets[0] is ticket and detector.emerged == {}
    assert trainer.global_step == 16


# --- what is logged ---------------------------------------------------------------------------------------------------


def test_every_check_is_logged_with_its_distances_and_the_null_line_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    detector = detector_for([0.5, 0.25], every_n_train_steps=2, window=3)
    module = Lit(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.1))
    trainer = fit(module, detector, max_epochs=4, logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]

    def column(name: str) -> dict[int, float]:
        return {int(row["step"]): float(row[name]) for row in rows if name in row}

    for sparsity in (0.5, 0.25):
        checks = detector.distances[sparsity]
        for metric, values in (
            ("distance", [check.distance for check in checks]),
            ("distance_from_init", [check.from_start for check in checks]),
            ("distance_to_half", [check.from_half for check in checks]),
        ):
            # Lightning counts the step under way, from zero.
            expected = {c.step - 1: v for c, v in zip(checks, values, strict=True) if v is not None}
            assert column(f"earlybird/{metric}/{sparsity:g}") == pytest.approx(expected)
        assert column(f"earlybird/null_line/{sparsity:g}") == {0: 2 * sparsity * (1 - sparsity)}
        step = detector.emerged[sparsity]
        assert column(f"earlybird/emerged/{sparsity:g}") == {step - 1: step}
        assert f"distance/{sparsity:g}" in trainer.progress_bar_metrics
        assert not any(f"distance/{sparsity:g}" in row for row in rows)


# --- bad weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name_at_the_check(value: float) -> None:
    def spoil(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 4:
            with torch.no_grad():
                module.model.hidden.weight[1, 2, 0, 0] = value

    detector = detector_for(every_n_train_steps=2)
    with pytest.raises(NonFiniteWeightsError, match=r"parameter 'hidden.weight' of the denoiser holds NaN or inf"):
        fit(Lit(configure=frozen_sgd), OnStep(spoil), detector, max_epochs=3)
    assert steps_of(detector) == [2]  # no mask was taken from them


# --- state ------------------------------------------------------------------------------------------------------------


def histories(detector: EarlyBirdDetector) -> dict[str, Any]:
    pairwise = {sparsity: window.pairwise() for sparsity, window in detector.windows.items()}
    return {
        "checks": detector.distances,
        "emerged": detector.emerged,
        "masks": {s: mask.flat().tolist() for s, mask in detector.masks.items()},
        "pairwise": {s: (steps, distances.tolist()) for s, (steps, distances) in pairwise.items()},
        "tickets": {s: detector.ticket(s).flat().tolist() for s in detector.emerged},
    }


def searching(tmp_path: Path, max_epochs: int, ckpt_path: Path | None = None, **settings: Any) -> EarlyBirdDetector:
    checks = settings.pop("checks", {"every_n_train_steps": None})
    module = Repeatable(Mlp, lambda module: torch.optim.Adam(module.parameters(), 0.05))
    detector = detector_for([0.5, 0.25], window=3, threshold=0.25, **checks)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **settings)
    fit(module, detector, saving, max_epochs=max_epochs, ckpt_path=ckpt_path, enable_checkpointing=True)
    return detector


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("checks", "saving", "file"),
    [
        ({"every_n_train_steps": None}, {"every_n_epochs": 1}, "step=12.ckpt"),
        ({"every_n_train_steps": None}, {"every_n_train_steps": 5}, "step=10.ckpt"),
        ({"every_n_train_steps": 2}, {"every_n_train_steps": 5}, "step=10.ckpt"),
        ({"every_n_train_steps": 2}, {"every_n_train_steps": 7}, "step=7.ckpt"),
        ({"every_n_train_steps": 3}, {"every_n_epochs": 1}, "step=12.ckpt"),
    ],
)
def test_a_resumed_search_has_the_history_of_an_uninterrupted_one(checks, saving, file, tmp_path: Path) -> None:
    whole = searching(tmp_path, 6, checks=checks, **saving)
    resumed = searching(tmp_path, 6, tmp_path / file, checks=checks, **saving)
    assert histories(resumed) == histories(whole)
    assert set(whole.emerged) == {0.5, 0.25}


def test_checkpoints_load_without_unpickling(tmp_path: Path) -> None:
    searching(tmp_path, 3)
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    (detector,) = (value for key, value in state["callbacks"].items() if "EarlyBirdDetector" in key)
    assert detector["search"]["sparsities"] == [0.5, 0.25]


def test_two_detectors_keep_their_states_apart(tmp_path: Path) -> None:
    def run(epochs: int, **settings: Any) -> list[EarlyBirdDetector]:
        detectors = [detector_for([0.5], window=2), detector_for([0.25], window=3)]
        module = Repeatable(Mlp)
        trainer = fit(module, *detectors, max_epochs=epochs, **settings)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        return detectors

    first = run(2)
    assert [histories(each) for each in run(2, ckpt_path=tmp_path / "two.ckpt")] == [histories(each) for each in first]


def test_a_second_fit_with_the_same_callback_starts_anew() -> None:
    detector, runs = detector_for([0.5, 0.25], window=3, threshold=0.25), []
    for _ in range(2):
        fit(Lit(Mlp), detector, max_epochs=3)
        runs.append(histories(detector))
    assert runs[0] == runs[1] and len(runs[0]["checks"][0.5]) == 12


def test_a_fit_that_goes_on_with_the_same_trainer_goes_on_with_the_search() -> None:
    detector = detector_for(window=3, threshold=0.25)
    module = Lit(Mlp)
    trainer = fit(module, detector, max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(module), loader(module))
    assert steps_of(detector) == list(range(1, 13))


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_the_training_is_bit_identical_with_and_without_the_callbacks(tmp_path: Path) -> None:
    """Dropout, noise and timesteps come from the global generator: not one number more may be taken from it."""

    def losses(*callbacks: pl.Callback, **settings: Any) -> list[float]:
        module = Lit(lambda: ConvNet(dropout=0.2))
        fit(module, *callbacks, max_epochs=3, **settings)
        return module.losses

    plain = losses()
    assert losses(detector_for([0.5, 0.25], criterion="random")) == plain
    assert losses(EMAWeightAveraging(), EarlyBirdDetector([0.5]), limit_val_batches=0) == plain
    pruner = TimestepAwarePruner([(0, 500, 0.25), (500, 1000, 0.5)], max_search_steps=12, round_to=4, dirpath=tmp_path)
    with pytest.warns(UserWarning, match="the fit ended during the search"):
        assert losses(pruner) == plain


def test_the_denoiser_is_traced_once_in_a_fit_whatever_the_number_of_checks(monkeypatch) -> None:
    calls = []
    trace = lightning_earlybird.conversion.trace_plan

    def counting(*args: Any) -> Any:
        calls.append(args)
        return trace(*args)

    monkeypatch.setattr(lightning_earlybird.conversion, "trace_plan", counting)
    detector = EarlyBirdDetector([0.5, 0.25], every_n_train_steps=1, round_to=2)
    fit(Tutorial(), detector, max_epochs=3, batches=2)
    assert steps_of(detector) == [1, 2, 3, 4, 5, 6]
    assert len(calls) == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_finds_the_channels_of_full_precision(precision: Any) -> None:
    full, detector = detector_for(), detector_for()
    fit(Lit(), full, max_epochs=1)
    fit(Lit(), detector, max_epochs=1, precision=precision)
    assert [g.size for g in detector.found.plan.groups] == [g.size for g in full.found.plan.groups] == [16, 16]
    assert detector.found.macs == full.found.macs


def test_manual_optimization_under_autocast_finds_the_same_channels() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    detector = detector_for()
    fit(Manual(), detector, max_epochs=1, precision="bf16-mixed")
    assert [group.size for group in detector.found.plan.groups] == [16, 16]
    assert steps_of(detector) == [1, 2, 3, 4]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsities": []}, "sparsities=.* must be a non-empty list"),
        ({"sparsities": [0.5, 1.0]}, r"sparsities=\[0.5, 1.0\]: 1.0 must lie in \(0, 1\)"),
        ({"sparsities": [0.5, 0.5]}, "must not repeat a value"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be an integer of at least 1"),
        ({"every_n_train_steps": -2}, "every_n_train_steps=-2 must be an integer of at least 1"),
        ({"round_to": 0}, "round_to=0 must be an integer of at least 1"),
        ({"window": 1}, "window=1 must be at least 2"),
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \[0, 1\]"),
        (
            {"criterion": "l1"},
            "criterion='l1' must be one of 'magnitude', 'random', 'taylor', 'diff_pruning', or a call",
        ),
        ({"score_batches": 0}, "score_batches=0 must be an integer of at least 1"),
        ({"score_threshold": 1.5}, r"score_threshold=1.5 must lie in \[0, 1\]: it is a fraction of the largest loss"),
        ({"weights": "average"}, "weights='average' must be one of 'auto', 'raw', 'ema'"),
        ({"on_emergence": "exit"}, "on_emergence='exit' must be one of 'continue', 'stop', 'prune'"),
        (
            {"sparsities": [0.3, 0.6], "on_emergence": "prune"},
            "on_emergence='prune' with 2 sparsities: one traditional ticket needs exactly one. .*TimestepAwarePruner",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyBirdDetector(**({"sparsities": [0.5]} | settings))


def test_the_constructor_keeps_what_it_was_given() -> None:
    sparsities = (0.5, 0.25)
    detector = EarlyBirdDetector(sparsities, denoiser="model", window=3, round_to=4)
    assert detector.sparsities is sparsities
    assert (detector.denoiser, detector.window, detector.round_to, detector.weights) == ("model", 3, 4, "auto")
    assert detector.masks == {} and detector.distances == {0.5: [], 0.25: []} and detector.emerged == {}


def test_a_denoiser_without_prunable_channels_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return self.layer(x) * timesteps[:, None]

    module = Lit(Flat)
    before = deepcopy(module.state_dict())
    detector = EarlyBirdDetector([0.5])

    with pytest.raises(
        MisconfigurationException,
        match=r"denoiser='model': .*Flat has no channel that can be pruned\. Reasons: the network's output",
    ):
        fit(module, detector, max_epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.trainer.global_step == 0
    assert detector.found is None and detector.masks == {}


def test_a_denoiser_of_which_nothing_passes_verification_is_refused_before_it_learns() -> None:
    class Written(ConvNet):
        """The width of both layers is written into the code."""

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            h = self.conv_in(x).view(len(x), 16, 4, 4) * timesteps.view(-1, 1, 1, 1)
            return self.conv_out(self.hidden(h).view(len(x), 16, 4, 4))

    module = Lit(Written)
    before = deepcopy(module.state_dict())

    with pytest.raises(
        MisconfigurationException, match=r"denoiser='model': .*every channel group fails verification\. First: .*shape"
    ):
        fit(module, detector_for(), max_epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_denoiser_that_chooses_layers_by_the_timesteps_is_refused_with_the_place() -> None:
    class Experts(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            expert = self.early if timesteps.float().mean() < 500 else self.late
            return self.conv_out(expert(self.hidden(self.conv_in(x))))

    with pytest.raises(
        MisconfigurationException,
        match=r"denoiser='model': .*Experts decides by the values .* \(Experts, test_detector\.py:\d+\).*torch\.where",
    ):
        fit(Lit(Experts), detector_for(), max_epochs=1)


def test_a_denoiser_that_reads_values_and_uses_all_its_layers_is_pruned_with_a_warning() -> None:
    class Checked(ConvNet):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            if bool((timesteps < 0).any()):
                raise ValueError("timesteps must not be negative")
            return super().forward(x, timesteps)

    detector = detector_for()
    message = r"denoiser='model': Python code reads values of tensors \(Checked, test_detector\.py:\d+\)"
    with pytest.warns(UserWarning, match=message):
        fit(Lit(Checked), detector, max_epochs=1)
    assert [group.name for group in detector.found.plan.groups] == ["conv_in", "hidden"]


def test_many_groups_that_fail_for_one_reason_make_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    class Blocks(ConvNet):
        """The width of five of its layers is written into the code."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(5))

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            h = self.conv_in(x) * timesteps.view(-1, 1, 1, 1)
            for block in self.blocks:
                h = block(h).view(len(x), 16, 4, 4)
            return self.conv_out(self.hidden(h))

    fit(Lit(Blocks), detector_for(), max_epochs=1)

    messages = [str(warning.message) for warning in recwarn if "stay whole" in str(warning.message)]
    assert len(messages) == 1
    assert "5 channel groups stay whole" in messages[0]
    assert "RuntimeError: shape '[1, 16, 4, 4]' is invalid for input of size" in messages[0]
    assert "(blocks.4, blocks.0, blocks.1 and 2 more)" in messages[0]


def test_channels_whose_pruning_fails_verification_stay_whole_with_a_warning() -> None:
    class Averaging(ConvNet):
        """Its output depends on how wide the hidden layer is."""

        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            time = self.time(timesteps.to(x.dtype).view(-1, 1) / 1000)
            hidden = self.hidden(nn.functional.silu(self.norm(self.conv_in(x) + time[:, :, None, None])))
            return self.conv_out(nn.functional.silu(hidden)) / hidden.shape[1]

    detector = detector_for()
    message = r"denoiser='model': 1 channel group stays whole, .*: the output differs by .* \(hidden\)"
    with pytest.warns(UserWarning, match=message):
        fit(Lit(Averaging), detector, max_epochs=1)
    assert [group.name for group in detector.found.plan.groups] == ["conv_in"]
    assert list(detector.masks[0.5].kept) == ["conv_in"]


def test_ways_of_holding_the_denoiser_that_cannot_follow_are_refused_in_the_first_step() -> None:
    class Twice(Lit):
        def __init__(self) -> None:
            super().__init__(Mlp, adamw)
            self.encoder = self.model.up

    module = Twice()
    before = module.model.up.weight.clone()
    with pytest.raises(MisconfigurationException, match="a part of it is also held as 'encoder'"):
        fit(module, EarlyBirdDetector([0.5]), max_epochs=1)
    assert torch.equal(module.model.up.weight, before)
    with pytest.raises(MisconfigurationException, match="a part of it is also held as 'encoder'"):
        fit(module, EarlyBirdDetector([0.5], denoiser="model"), max_epochs=1)
