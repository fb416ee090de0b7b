"""Fits that do not go their usual way: bad numbers, odd validations, finders, second fits, detectors side by side."""

import math
import signal
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, ConvNet, Lit, Mlp, OnStep, Repeatable, fit, kept_by_hand, loader, quiet_trainer
from torch import Tensor, nn

import lightning_earlybird.pruner
import lightning_earlybird.transition.switch
from lightning_earlybird import EarlyBirdDetector, NonFiniteWeightsError, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.tickets import load_ensemble

SWITCH = 6
NOT_FOUND = "ignore:Be aware that when using `ckpt_path`"
MID_EPOCH = "ignore:You're resuming from a checkpoint that ended before the epoch ended"
WEIGHTS_ONLY = "ignore:.*weights_only"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch) -> None:
    """They take longer than all the rest of these fits."""
    monkeypatch.setattr(lightning_earlybird.pruner, "MATPLOTLIB_AVAILABLE", False)


def quick(*sparsities: float, **settings: Any) -> EarlyBirdDetector:
    """Two checks, three steps apart, are enough for it."""
    return EarlyBirdDetector(
        sparsities or (0.25, 0.5), **({"every_n_train_steps": 3, "window": 2, "threshold": 1.0} | settings)
    )


def pruner_in(tmp_path: Path, **settings: Any) -> TimestepAwarePruner:
    return TimestepAwarePruner(REGIONS, **({"round_to": 4, "dirpath": tmp_path / "tickets"} | settings))


def steps_of(detector: EarlyBirdDetector) -> list[int]:
    return [check.step for check in next(iter(detector.distances.values()))]


def assert_left_alone(module: pl.LightningModule) -> None:
    """No hook of the callbacks is left behind."""
    assert not {"on_load_checkpoint", "on_save_checkpoint", "log"} & vars(module).keys()
    assert all(not part._forward_pre_hooks for part in module.modules())


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def finite(module: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


# --- bad numbers ------------------------------------------------------------------------------------------------------


class Spoiled(Lit):
    """Its loss is what ``spoil`` makes of it; with ``careful``, steps of bad gradients are left out, as scalers do."""

    def __init__(self, spoil: Callable[["Spoiled", Tensor], Tensor], *, careful: bool = False) -> None:
        super().__init__()
        self.spoil, self.careful = spoil, careful

    def loss(self, samples: Tensor) -> Tensor:
        return self.spoil(self, super().loss(samples))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if self.careful and not all(bool(gradient.isfinite().all()) for gradient in gradients):
            for gradient in gradients:
                gradient.zero_()


def bad_at(*steps: int, value: float = math.nan) -> Callable[[Spoiled, Tensor], Tensor]:
    return lambda module, loss: loss * value if module.global_step in steps else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor"])
def test_a_bad_loss_whose_step_is_left_out_changes_nothing(criterion, value: float, tmp_path: Path) -> None:
    """In the step of a check, in the one before the switch, and in the first of the tickets."""
    module = Spoiled(bad_at(2, 5, value=value), careful=True)
    pruner = pruner_in(tmp_path)
    fit(module, quick(criterion=criterion), pruner, max_epochs=3)
    assert pruner.switched_at == SWITCH and finite(module)
    assert sum(not math.isfinite(loss) for loss in module.losses) == 2


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor"])
def test_weights_that_are_not_finite_end_the_fit_before_the_switch_with_a_good_checkpoint_on_disk(
    criterion, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, pruner = Spoiled(bad_at(5)), pruner_in(tmp_path)
    with pytest.raises(NonFiniteWeightsError, match=r"parameter 'conv_in.weight', .* of the denoiser holds NaN or inf"):
        fit(module, quick(criterion=criterion), pruner, saving, max_epochs=3, enable_checkpointing=True)
    assert len(module.losses) == SWITCH and isinstance(module.model, ConvNet)
    assert pruner.switched_at is None and not (tmp_path / "tickets" / "switch").exists()
    assert_left_alone(module)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0.ckpt"]
    again = Spoiled(bad_at())
    resumed = pruner_in(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        fit(again, quick(criterion=criterion), resumed, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.switched_at == SWITCH and finite(again)


def test_gradients_that_are_bad_once_cost_one_check(tmp_path: Path) -> None:
    module, pruner, detector = Spoiled(bad_at(6), careful=True), pruner_in(tmp_path), quick(criterion="taylor")
    with pytest.warns(UserWarning, match=r"no masks of step 6. criterion='taylor': the gradient of 'conv_in.weight'"):
        fit(module, detector, pruner, max_epochs=3)
    assert steps_of(detector) == [3, 9] and pruner.switched_at == 9 and finite(module)


def test_gradients_that_are_bad_at_the_search_limit_put_the_switch_off(tmp_path: Path) -> None:
    module, pruner = Spoiled(bad_at(4, 5), careful=True), pruner_in(tmp_path, max_search_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, quick(criterion="taylor", window=4), pruner, max_epochs=3)
    for step in (4, 5):
        assert any(f"there are no masks of step {step}" in str(warning.message) for warning in caught)
    assert pruner.switched_at == 6 and finite(module)


def test_gradients_that_stay_bad_end_the_fit(tmp_path: Path) -> None:
    module = Spoiled(bad_at(*range(3, 99)), careful=True)
    detector = quick(criterion="taylor", every_n_train_steps=1, window=9)
    with pytest.warns(UserWarning, match="no masks of step"), pytest.raises(NonFiniteWeightsError, match="gradient of"):
        fit(module, detector, pruner_in(tmp_path), max_epochs=3)
    # The checks of the steps 3 to 7.
    assert len(module.losses) == 7 and steps_of(detector) == [1, 2]
    assert finite(module) and isinstance(module.model, ConvNet)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_averages_that_are_not_finite_end_the_fit_before_the_switch(weights: Any, tmp_path: Path) -> None:
    """All that comes of the fit would be bad: the callback puts its averages into the module at the end."""
    ema, module, pruner = EMAWeightAveraging(decay=0.9), Lit(), pruner_in(tmp_path)

    def spoil(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 5:
            with torch.no_grad():
                ema._average_model.module.model.hidden.weight[0, 0, 0, 0] = math.inf

    with pytest.raises(NonFiniteWeightsError, match=r"'hidden.weight' of the averaged denoiser holds NaN or infinite"):
        fit(module, ema, OnStep(spoil), quick(weights=weights), pruner, max_epochs=3)
    assert len(module.losses) == SWITCH and pruner.switched_at is None
    assert isinstance(module.model, ConvNet) and finite(module)


# --- validation -------------------------------------------------------------------------------------------------------


class Meddling(Lit):
    """Changes itself in its validation, right before the switch."""

    def __init__(self, meddle: Callable[["Meddling"], Any]) -> None:
        super().__init__(lambda: ConvNet(dropout=0.3))
        self.meddle = meddle

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.model, ConvNet):
            self.meddle(self)


def there_and_back(module: Meddling) -> None:
    module.to(torch.float64)
    module.to(torch.float32)


@pytest.mark.parametrize(
    "meddle",
    [
        Meddling.eval,
        lambda module: module.model.eval(),
        lambda module: module.model.drop.eval(),
        lambda module: torch.set_grad_enabled(False),
        there_and_back,
        Meddling.cpu,
    ],
    ids=["eval", "eval of the denoiser", "eval of a layer", "grad", "dtype", "device"],
)
def test_a_validation_that_changes_modes_or_places_does_not_change_the_tickets(meddle, tmp_path: Path) -> None:
    def run(module: Meddling) -> Meddling:
        fit(module, quick(every_n_train_steps=None), pruner_in(tmp_path), max_epochs=4, limit_val_batches=1)
        return module

    plain, module = run(Meddling(lambda module: None)), run(Meddling(meddle))
    assert isinstance(module.model, TicketEnsemble) and torch.is_grad_enabled()
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert module.losses == plain.losses


# --- limits and development runs --------------------------------------------------------------------------------------


def test_a_development_run_leaves_the_tickets_of_a_real_one_alone(tmp_path: Path) -> None:
    fit(real := Lit(), quick(), pruner_in(tmp_path), max_epochs=3)
    before = {path: path.read_bytes() for path in (tmp_path / "tickets").rglob("*") if path.is_file()}
    module = Lit()
    with pytest.warns(UserWarning, match="max_search_steps=1 reached"):
        fit(module, quick(), pruner_in(tmp_path, max_search_steps=1), fast_dev_run=3, default_root_dir=tmp_path)
    assert isinstance(module.model, TicketEnsemble)  # it has seen the switch work
    assert {path: path.read_bytes() for path in (tmp_path / "tickets").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tickets"] and isinstance(real.model, TicketEnsemble)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"limit_train_batches": 1}, 8),
        ({"limit_train_batches": 0.5}, 16),
        ({"overfit_batches": 1}, 8),
        ({"overfit_batches": 0.5}, 16),
        ({"num_sanity_val_steps": 2, "limit_val_batches": 2}, 32),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_limits_count_the_steps_that_are_taken(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    detector, pruner = quick(), pruner_in(tmp_path)
    trainer = fit(Lit(), detector, pruner, max_epochs=8, **settings)
    assert trainer.global_step == steps and steps_of(detector) == [3, 6] and pruner.switched_at == SWITCH


def test_a_fit_without_batches_and_one_without_epochs_do_nothing(tmp_path: Path) -> None:
    for settings in ({"limit_train_batches": 0, "max_epochs": 2}, {"max_epochs": 0}):
        module, pruner = Lit(), pruner_in(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, quick(), pruner, **settings)
        assert pruner.switched_at is None and module.losses == [] and not (tmp_path / "tickets").exists()
        assert_left_alone(module)


# --- finders ----------------------------------------------------------------------------------------------------------


class Tunable(Lit):
    """Has what the finders look for; keeps its denoiser's weights at the start and after every step."""

    def __init__(self) -> None:
        super().__init__(Mlp, lambda module: torch.optim.AdamW(module.parameters(), lr=module.lr))
        self.lr, self.batch_size = 0.05, 8
        self.untouched = (deepcopy(self.model),)  # in a tuple, or it would be taken for an average
        self.seen: dict[int, nn.Module] = {}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader(self).dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return self.train_dataloader()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if isinstance(self.model, Mlp):
            self.seen[self.trainer.global_step] = deepcopy(self.model)


def finders() -> dict[str, Callable[[], pl.Callback]]:
    return {
        "lr": lambda: LearningRateFinder(num_training_steps=12, early_stop_threshold=None),
        "power": lambda: BatchSizeFinder("power", max_trials=2, steps_per_trial=4, init_val=4),
        "binsearch": lambda: BatchSizeFinder("binsearch", max_trials=2, steps_per_trial=4, init_val=4),
    }


@pytest.mark.filterwarnings(WEIGHTS_ONLY)
@pytest.mark.filterwarnings("ignore:.*num_workers|.*does not have many workers")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", finders())
def test_a_finder_beside_the_callbacks_is_no_part_of_the_search(kind: str, first: bool, tmp_path: Path) -> None:
    """Its trial would reach the search limit, and the search itself begins from the untouched weights."""
    finder, detector = finders()[kind](), quick(0.5, window=9)
    pruner = TimestepAwarePruner([(0, 1000, 0.5)], round_to=1, max_search_steps=7, dirpath=tmp_path / "tickets")
    order = [finder, detector, pruner] if first else [detector, pruner, finder]
    module = Tunable()
    trainer = quiet_trainer(*order, max_epochs=3, default_root_dir=tmp_path, limit_val_batches=1)
    with pytest.warns(UserWarning, match="max_search_steps=7 reached"):
        trainer.fit(module)
    assert pruner.switched_at == 7 and steps_of(detector) == [3, 6] and isinstance(module.model, TicketEnsemble)
    masks = [kept_by_hand(network, 4) for network in (*module.untouched, module.seen[3], module.seen[6])]
    distances = [check.from_start for check in detector.distances[0.5]]
    assert distances == [float((mask != masks[0]).sum()) / len(mask) for mask in masks[1:]]
    assert_left_alone(module)


@pytest.mark.filterwarnings(WEIGHTS_ONLY)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "tune",
    [
        lambda tuner, module: tuner.lr_find(module, num_training=8, early_stop_threshold=None),
        lambda tuner, module: tuner.scale_batch_size(module, max_trials=2, init_val=4),
    ],
    ids=["lr_find", "scale_batch_size"],
)
def test_a_tuner_before_the_fit_is_no_part_of_it(tune: Callable[..., Any], tmp_path: Path) -> None:
    detector, pruner, module = quick(), pruner_in(tmp_path, max_search_steps=7, round_to=1), Tunable()
    trainer = quiet_trainer(detector, pruner, max_epochs=3, default_root_dir=tmp_path, limit_val_batches=1)
    tune(Tuner(trainer), module)
    assert pruner.switched_at is None and steps_of(detector) == [] and isinstance(module.model, Mlp)
    assert_left_alone(module)
    trainer.fit(module)
    assert pruner.switched_at == SWITCH and steps_of(detector) == [3, 6]


class FineTuning(LearningRateFinder):
    """As Lightning's documentation has it: looks for a new rate at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__(num_training_steps=6, early_stop_threshold=None)
        self.epoch = epoch

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.filterwarnings(WEIGHTS_ONLY)
@pytest.mark.filterwarnings("ignore:.*does not have many workers|You defined a `validation_step` but")
@pytest.mark.parametrize("epoch", [1, 2])  # in the search, and after the switch
def test_a_finder_in_the_middle_of_the_fit_is_no_part_of_the_search(epoch: int, tmp_path: Path) -> None:
    detector, pruner, module = quick(), pruner_in(tmp_path, round_to=1), Tunable()
    trainer = quiet_trainer(FineTuning(epoch), detector, pruner, max_epochs=4, default_root_dir=tmp_path)
    trainer.fit(module)
    assert len(module.losses) > trainer.global_step == 16  # those of the trial as well
    assert steps_of(detector) == [3, 6] and pruner.switched_at == SWITCH
    assert isinstance(module.model, TicketEnsemble)


# --- a second fit with the same callbacks -----------------------------------------------------------------------------


def test_the_same_trainer_goes_on_with_the_same_module(tmp_path: Path) -> None:
    detector, pruner, module = quick(), pruner_in(tmp_path), Lit()
    with pytest.warns(UserWarning, match="the fit ended during the search"):
        trainer = fit(module, detector, pruner, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(module), loader(module))
    assert pruner.switched_at == SWITCH and steps_of(detector) == [3, 6]
    tickets = list(module.model.tickets)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(module), loader(module))
    assert pruner.switched_at == SWITCH and list(module.model.tickets) == tickets and trainer.global_step == 12


@pytest.mark.parametrize("epochs", [1, 2])  # its search was under way, or over
def test_the_same_trainer_begins_anew_with_another_module(epochs: int, tmp_path: Path) -> None:
    detector, pruner, first, second = quick(), pruner_in(tmp_path), Lit(), Lit()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TimestepAwarePruner: the fit ended during the search")
        trainer = fit(first, detector, pruner, max_epochs=epochs)
    before, spent = pruner.facts, trainer.global_step
    trainer.fit_loop.max_epochs = epochs + 3
    trainer.fit(second, loader(second), loader(second))
    assert isinstance(second.model, TicketEnsemble) and pruner.switched_at > spent
    # Of its own weights alone: the first mask is that of its initialisation, and two checks have seen it.
    assert len(steps_of(detector)) == 2 and min(steps_of(detector)) > spent
    assert pruner.facts != before and [fact.step for fact in pruner.facts] == [pruner.switched_at] * 2
    saved = load_ensemble(tmp_path / "tickets" / "ensemble", ConvNet)
    assert torch.equal(saved.tickets[0].conv_in.weight, second.model.tickets[0].conv_in.weight)


def test_a_fit_after_one_that_broke_off_goes_on_with_the_search(tmp_path: Path) -> None:
    broken = [True]

    def fail(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 5 and broken:
            broken.clear()
            raise ZeroDivisionError("in the middle")

    detector, pruner, module = quick(), pruner_in(tmp_path), Lit()
    trainer = quiet_trainer(OnStep(fail), detector, pruner, max_epochs=4)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader(module), loader(module))
    assert_left_alone(module)
    trainer.fit(module, loader(module), loader(module))
    assert steps_of(detector) == [3, 6] and pruner.switched_at == SWITCH
    # And with another Trainer, and another module.
    fit(other := Lit(), detector, pruner, max_epochs=3)
    assert isinstance(other.model, TicketEnsemble) and steps_of(detector) == [3, 6] and pruner.switched_at == SWITCH


def test_a_detector_without_its_pruner_has_its_own_settings_again(tmp_path: Path) -> None:
    def settings() -> tuple[list[Any], Any]:
        return list(detector.windows), detector.state_dict()["settings"]["round_to"]

    detector = quick(criterion="taylor")
    fit(Lit(), detector, pruner := pruner_in(tmp_path), max_epochs=2)
    served = settings()
    assert [key.sparsity for key in served[0]] == [0.25, 0.5] and served[1] == 4
    fit(Lit(), detector, max_epochs=2)
    assert settings() == ([0.25, 0.5], 8) and detector.emerged == {0.25: 6, 0.5: 6}
    for order in ([detector, pruner], [pruner, detector], [detector, pruner_in(tmp_path)]):
        fit(Lit(), *order, max_epochs=2)
        assert settings() == served and set(detector.emerged.values()) == {6}


# --- two detectors ----------------------------------------------------------------------------------------------------


class Names(Logger):
    name, version, save_dir = "names", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def log_metrics(self, metrics, step=None):
        self.seen += metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def histories(detector: EarlyBirdDetector) -> dict[str, Any]:
    return {"checks": detector.distances, "emerged": detector.emerged}


INERT = "ignore:weights='ema'. the initialisation still makes up"


def side_by_side(**settings: Any) -> list[EarlyBirdDetector]:
    """The one that the paper has, a control, and one that looks at the averages."""
    common: dict[str, Any] = {"every_n_train_steps": 1, "window": 4, "threshold": 0.3, "round_to": 4} | settings
    kinds: list[dict[str, Any]] = [{}, {"criterion": "random"}, {"weights": "ema"}]
    return [EarlyBirdDetector([0.25, 0.5], **common, **kind) for kind in kinds]


@pytest.mark.filterwarnings(INERT)
def test_detectors_of_one_sparsity_and_another_criterion_keep_their_states_apart(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None = None) -> list[dict[str, Any]]:
        detectors = side_by_side()
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = [EMAWeightAveraging(decay=0.5), *detectors, saving]
        fit(Repeatable(), *callbacks, max_epochs=4, ckpt_path=ckpt_path, enable_checkpointing=True)
        return [histories(detector) for detector in detectors]

    whole = run()
    assert run(tmp_path / "epoch=1.ckpt") == whole
    assert whole[0] != whole[1] != whole[2] != whole[0]


@pytest.mark.filterwarnings(INERT)
def test_detectors_of_one_sparsity_log_under_names_of_their_own(tmp_path: Path) -> None:
    names, first = Names(), quick(0.75, round_to=4)
    trainer = fit(Lit(), first, *side_by_side(), EMAWeightAveraging(), max_epochs=1, logger=names)
    paths = ("earlybird", "earlybird/random", "earlybird/magnitude")
    expected = [f"{path}/null_line/{sparsity}" for path in paths for sparsity in (0.25, 0.5)]
    assert sorted(name for name in names.seen if "null_line" in name) == sorted([*expected, "earlybird/null_line/0.75"])
    shown = {name for name in trainer.progress_bar_metrics if "0.5" in name}
    assert shown == {"distance/0.5", "earlybird/random/distance/0.5", "earlybird/magnitude/distance/0.5"}


def test_the_detector_that_a_pruner_uses_keeps_the_plain_names(tmp_path: Path) -> None:
    names, control = Names(), quick(0.5, criterion="random", round_to=4)
    with pytest.warns(UserWarning, match="the fit ended during the search"):
        fit(Lit(), control, quick(), pruner_in(tmp_path), max_epochs=1, logger=names, limit_train_batches=3)
    assert {"earlybird/null_line/0.25", "earlybird/null_line/0.5", "earlybird/random/null_line/0.5"} <= {*names.seen}


def test_another_detector_may_watch_beside_the_one_of_the_pruner_and_stop_the_fit(tmp_path: Path) -> None:
    watching, used, pruner = quick(0.75, on_emergence="stop", round_to=4, window=3), quick(), pruner_in(tmp_path)
    trainer = fit(Lit(), watching, used, pruner, max_epochs=4)
    assert pruner.detector is used and pruner.switched_at == SWITCH and trainer.global_step == 16
    assert watching.emerged == {} and steps_of(watching) == [
        3,
        6,
    ]  # the dense network was gone before it had seen enough


@pytest.mark.filterwarnings(MID_EPOCH)
def test_a_fit_with_two_detectors_and_a_pruner_resumes_on_either_side_of_the_switch(tmp_path: Path) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> tuple[Repeatable, list[dict[str, Any]]]:
        control, used = quick(0.5, criterion="random", round_to=4, every_n_train_steps=2), quick(0.25, 0.5)
        pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / name)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        module = Repeatable()
        fit(module, control, used, pruner, saving, max_epochs=3, ckpt_path=ckpt_path, enable_checkpointing=True)
        return module, [histories(control), histories(used)]

    module, seen = run("whole")
    for epoch in (0, 1):
        again, resumed = run("resumed", tmp_path / f"epoch={epoch}.ckpt")
        assert resumed == seen and again.losses == module.losses[4 * (epoch + 1) :]
        assert_same(again, module)


def former_key(detector: EarlyBirdDetector) -> str:
    return f"EarlyBirdDetector{{'sparsities': {list(detector.sparsities)}, 'denoiser': None}}"


@pytest.mark.filterwarnings(NOT_FOUND)
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_checkpoint_from_before_the_criterion_belonged_to_the_key_loads(criterion: Any, tmp_path: Path) -> None:
    detector = quick(criterion=criterion, every_n_train_steps=1, window=3, round_to=2)
    trainer = fit(Repeatable(Mlp), detector, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    checkpoint["callbacks"][former_key(detector)] = checkpoint["callbacks"].pop(detector.state_key)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert (detector.state_key == former_key(detector)) == (criterion == "magnitude")
    again = quick(criterion=criterion, every_n_train_steps=1, window=3, round_to=2)
    fit(Repeatable(Mlp), again, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert histories(again) == histories(detector)


@pytest.mark.filterwarnings(NOT_FOUND)
def test_a_search_does_not_silently_begin_anew_under_another_criterion(tmp_path: Path) -> None:
    fit(Lit(), quick(criterion="random"), max_epochs=1).save_checkpoint(tmp_path / "random.ckpt")
    for other in ({}, {"criterion": "taylor"}):
        with pytest.raises(MisconfigurationException, match=r"criterion='\w+' does not fit the checkpoint, .*'random'"):
            fit(Lit(), quick(**other), max_epochs=2, ckpt_path=tmp_path / "random.ckpt")
    # Beside the one that it belongs to, a new detector begins.
    known, added = quick(criterion="random"), quick()
    fit(Lit(), known, added, max_epochs=2, ckpt_path=tmp_path / "random.ckpt")
    assert steps_of(known) == [3, 6] and steps_of(added) == [5, 6]


# --- interrupted at the switch ----------------------------------------------------------------------------------------


class ByStep(Lit):
    """Draws its samples from a seed of each step; Lightning's count of batches is one ahead after an exception."""

    def loss(self, samples: Tensor) -> Tensor:
        torch.manual_seed(100 + self.global_step)
        return super().loss(torch.randn_like(samples))


class Interrupts(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == SWITCH:
            raise self.error


@pytest.mark.filterwarnings(MID_EPOCH)
@pytest.mark.filterwarnings(NOT_FOUND)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["interrupt", "error"])
@pytest.mark.parametrize("first", [True, False])
def test_an_exception_right_before_or_after_the_switch_leaves_a_checkpoint_to_go_on_from(
    error: BaseException, first: bool, tmp_path: Path
) -> None:
    def callbacks() -> list[pl.Callback]:
        return [EMAWeightAveraging(decay=0.8), quick(), pruner_in(tmp_path)]

    ours = callbacks()
    around = [Interrupts(error), *ours] if first else [*ours, Interrupts(error)]
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, enable_version_counter=False)
    module, handler = ByStep(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((ZeroDivisionError, SystemExit)):
            fit(module, *around, saving, max_epochs=3, enable_checkpointing=True)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from an interrupt on
    assert isinstance(module.model, ConvNet if first else TicketEnsemble)
    assert_left_alone(module)
    again, ours, whole = ByStep(), callbacks(), ByStep()
    fit(again, *ours, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert ours[-1].switched_at == SWITCH
    fit(whole, *callbacks(), max_epochs=3)
    assert_same(again, whole)


STAGES = ["match", "hand_down", "succeed", "adopt_configured_order", "_require_same_structure", "_prepare_ddp"]


@pytest.mark.filterwarnings(MID_EPOCH)
@pytest.mark.filterwarnings(NOT_FOUND)
@pytest.mark.parametrize("stage", STAGES)
def test_a_switch_that_fails_half_way_leaves_the_dense_training_as_it_was(stage, tmp_path: Path, monkeypatch) -> None:
    states: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == SWITCH and not states:
                states.append(deepcopy(pl_module.state_dict()))
                states.append(deepcopy(trainer.optimizers[0].state_dict()))

    fit(ByStep(), Keep(), EMAWeightAveraging(decay=0.8), max_epochs=2)
    part = getattr(lightning_earlybird.transition.switch, stage)

    def fail(*arguments: Any, **more: Any) -> None:
        part(*arguments, **more)
        raise torch.OutOfMemoryError("made up")

    module = ByStep()
    saving = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, enable_version_counter=False)
    ema = EMAWeightAveraging(decay=0.8)
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError, match="made up"):
        patched.setattr(lightning_earlybird.transition.switch, stage, fail)
        fit(module, ema, quick(), pruner_in(tmp_path), saving, max_epochs=3, enable_checkpointing=True)
    assert isinstance(module.model, ConvNet) and isinstance(ema._average_model.module.model, ConvNet)
    assert_left_alone(module)
    checkpoint = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert checkpoint["global_step"] == SWITCH and "lightning_earlybird" not in checkpoint
    weights, optimizer = states
    assert checkpoint["current_model_state"].keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(checkpoint["current_model_state"][name], value), name
    assert checkpoint["optimizer_states"][0]["param_groups"] == optimizer["param_groups"]
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(checkpoint["optimizer_states"][0]["state"][index][name], value)
    again, whole = ByStep(), ByStep()
    for resumed, path in ((again, tmp_path / "failed.ckpt"), (whole, None)):
        fit(resumed, EMAWeightAveraging(decay=0.8), quick(), pruner_in(tmp_path), max_epochs=3, ckpt_path=path)
    assert_same(again, whole)


def test_a_fit_that_is_stopped_at_emergence_switches_when_it_goes_on(tmp_path: Path) -> None:
    def stop(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop |= trainer.global_step == SWITCH

    detector, pruner, module = quick(), pruner_in(tmp_path), Lit()
    with pytest.warns(UserWarning, match=r"ended during the search, .*emerged at step 6"):
        trainer = fit(module, OnStep(stop), detector, pruner, max_epochs=3)
    assert trainer.global_step == SWITCH and pruner.switched_at is None and isinstance(module.model, ConvNet)
    trainer.should_stop = False
    trainer.fit(module, loader(module), loader(module))
    assert pruner.switched_at == SWITCH and isinstance(module.model, TicketEnsemble)
