"""Checkpoints on either side of the switch: what comes back, and what is refused."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, ConvNet, Lit, Mlp, Repeatable, fit, loader, quiet_trainer
from torch import Tensor, nn

from lightning_earlybird import EarlyBirdDetector, EnsembleFormatError, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.saved_structure import CHECKPOINT_KEY
from lightning_earlybird.structure import RaggedGroupNorm
from lightning_earlybird.transition import averaged_modules

# What Lightning says of callbacks that come, go or keep their files elsewhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


class State(pl.Callback):
    """Copies what a fit has to go on with: when it starts, and at the end of each epoch."""

    def __init__(self) -> None:
        self.at_start: dict[str, Any] = {}
        self.epochs: list[dict[str, Any]] = []

    def on_train_start(self, trainer, pl_module):
        self.at_start = self.copy(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(self.copy(trainer, pl_module))

    def copy(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        names = {parameter: name for name, parameter in module.named_parameters()}
        (optimizer,) = trainer.optimizers
        found: dict[str, Any] = {f"weights.{name}": value.clone() for name, value in module.state_dict().items()}
        for parameter, state in optimizer.state.items():
            found |= {f"state.{names[parameter]}.{key}": value.clone() for key, value in state.items()}
        found["order"] = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        found["rate"] = optimizer.param_groups[0]["lr"]
        for average in averaged_modules(trainer):
            found |= {f"average.{name}": value.clone() for name, value in average.state_dict().items()}
        for callback in trainer.callbacks:
            if isinstance(callback, EMAWeightAveraging):
                found["n_averaged"] = int(callback._average_model.n_averaged)
        return found


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        assert same, name


def scheduled(module: pl.LightningModule) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    tmp_path: Path,
    max_epochs: int,
    *,
    ema: str | None = "before",
    module: Lit | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> tuple[pl.Trainer, TimestepAwarePruner, State]:
    """Four steps an epoch, the switch at step 6; a checkpoint after each epoch."""
    pruner = TimestepAwarePruner(**({"regions": REGIONS, "round_to": 4, "dirpath": tmp_path / "tickets"} | settings))
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)
    state = State()
    callbacks: list[pl.Callback] = [detector, pruner, state]
    if ema is not None:
        callbacks.insert(0 if ema == "before" else 2, EMAWeightAveraging(decay=0.8))
    callbacks.append(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False))
    module = Repeatable(configure=scheduled) if module is None else module
    trainer = fit(module, *callbacks, max_epochs=max_epochs, ckpt_path=ckpt_path, enable_checkpointing=True)
    return trainer, pruner, state


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", ["before", "after", None])
def test_a_fit_resumes_after_the_switch_as_if_it_had_not_been_interrupted(ema: str | None, tmp_path: Path) -> None:
    trainer, whole, state = run(tmp_path, 4, ema=ema)
    resumed_trainer, resumed, again = run(tmp_path, 4, ema=ema, ckpt_path=tmp_path / "epoch=1.ckpt")
    # The epoch's copy was taken when its checkpoint was saved: nothing is lost on the way.
    assert_equal(again.at_start, state.epochs[1])
    for ours, theirs in zip(again.epochs, state.epochs[2:], strict=True):
        assert_equal(ours, theirs)
    assert resumed.switched_at == whole.switched_at == 6 and resumed.facts == whole.facts
    assert resumed.phase == "tickets" and resumed.detector.found is None
    assert resumed.detector.emerged == whole.detector.emerged == {0.25: 6, 0.5: 6}
    ours, theirs = resumed_trainer.lightning_module.model.record, trainer.lightning_module.model.record
    assert (ours.denoiser, ours.edits, ours.facts) == (theirs.denoiser, theirs.edits, theirs.facts)
    for mine, its in zip(ours.masks, theirs.masks, strict=True):
        assert mine.distance(its) == 0


@pytest.mark.parametrize("rewind", [None, "init"])
def test_a_fit_resumes_within_the_search_as_if_it_had_not_been_interrupted(rewind: Any, tmp_path: Path) -> None:
    _, whole, state = run(tmp_path, 3, rewind=rewind)
    _, resumed, again = run(tmp_path, 3, rewind=rewind, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_equal(again.at_start, state.epochs[0])
    for ours, theirs in zip(again.epochs, state.epochs[1:], strict=True):
        assert_equal(ours, theirs)
    assert resumed.switched_at == 6 and resumed.facts == whole.facts


def test_a_fit_without_averages_resumes_from_a_checkpoint_with_them_and_the_other_way_round(tmp_path: Path) -> None:
    _, _, averaged = run(tmp_path / "with", 2)
    _, _, plain = run(tmp_path / "without", 2, ema=None)
    _, _, state = run(tmp_path / "with", 3, ema=None, ckpt_path=tmp_path / "with" / "epoch=1.ckpt")
    weights = {name: value for name, value in state.at_start.items() if name.startswith("weights")}
    # Lightning puts the averages where the weights are, for whoever loads them without the callback.
    assert_equal(weights, {name: averaged.epochs[1][name.replace("weights", "average")] for name in weights})
    with pytest.warns(UserWarning, match="The checkpoint was not created with WeightAveraging"):
        _, _, state = run(tmp_path / "without", 3, ckpt_path=tmp_path / "without" / "epoch=1.ckpt")
    for kind in ("weights", "average"):
        names = [name for name in state.at_start if name.startswith(kind)]
        assert_equal(
            {name.removeprefix(kind): state.at_start[name] for name in names},
            {name.removeprefix(kind): plain.epochs[1][name.replace(kind, "weights")] for name in names},
        )


def test_a_checkpoint_loads_without_unpickling(tmp_path: Path) -> None:
    run(tmp_path, 2, rewind="init")
    for epoch in (0, 1):
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert (CHECKPOINT_KEY in checkpoint) == (epoch == 1)
    structure = checkpoint[CHECKPOINT_KEY]
    assert structure["format_version"] == 2 and structure["denoiser"] == "model"
    assert len(structure["masks"]) == 2


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "diff_pruning", "callable"])
def test_checkpoints_load_without_unpickling_whatever_scores_channels_and_numbers_are_numpys(
    criterion: str, tmp_path: Path
) -> None:
    score = (lambda network, plan: torch.rand(plan.num_channels)) if criterion == "callable" else criterion
    low, middle, high = np.linspace(0.0, 1000.0, 3)
    sparsities = [np.float64(0.25), np.float64(0.5)]
    detector = EarlyBirdDetector(
        sparsities, criterion=score, every_n_train_steps=2, window=2, threshold=1.0, score_batches=1
    )
    pruner = TimestepAwarePruner(
        [(low, middle, sparsities[0]), (middle, high, sparsities[1])],
        overlap=np.float64(10),
        min_width=np.float64(0.1),
        round_to=4,
        rewind="init",
        dirpath=tmp_path / "tickets",
    )
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings = {"enable_checkpointing": True, "max_steps": 6}
    fit(Lit(), EMAWeightAveraging(decay=0.8), detector, pruner, saving, **settings)
    for step in (2, 4, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert (CHECKPOINT_KEY in checkpoint) == (step == 6) == (pruner.switched_at < step)


@pytest.mark.parametrize(("whose", "version"), [("EarlyBirdDetector", 2), ("TimestepAwarePruner", None)])
def test_a_callbacks_state_of_another_format_is_refused_by_name(
    whose: str, version: Any, sides_of_a_switch: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(sides_of_a_switch / "step=8.ckpt", weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith(whose))
    state["format_version"] = version
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    message = rf"ckpt_path: the state of {whose} has format_version={version!r}, and this .* reads 1 to 1. Upgrade"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Lit(), *masking(tmp_path), max_epochs=3, ckpt_path=tmp_path / "odd.ckpt")


def test_a_compiled_denoiser_resumes_with_its_tickets(tmp_path: Path) -> None:
    torch._dynamo.reset()

    def compiled() -> Repeatable:
        module = Repeatable(configure=scheduled)
        module.model = torch.compile(module.model, backend="eager")
        return module

    _, _, state = run(tmp_path, 2, module=compiled())
    trainer, _, again = run(tmp_path, 3, module=compiled(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(again.at_start, state.epochs[1])
    assert all(ticket._compiled_call_impl is not None for ticket in trainer.lightning_module.model.tickets)


def test_the_modules_own_hook_still_sees_the_checkpoint(tmp_path: Path) -> None:
    class Hooked(Repeatable):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 7

        def on_load_checkpoint(self, checkpoint):
            self.own = checkpoint["own"]
            self.kind = type(self.model)

    run(tmp_path, 2, module=Hooked(configure=scheduled))
    module = Hooked(configure=scheduled)
    run(tmp_path, 3, module=module, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert module.own == 7 and module.kind is TicketEnsemble
    assert "on_load_checkpoint" not in vars(module)  # nothing of the callbacks stays behind


@pytest.mark.parametrize("kind", ["pruner", "detector"])
def test_a_module_whose_fit_broke_off_can_load_a_checkpoint_later(kind: str, tmp_path: Path) -> None:
    """Gradients of the dense weights are left over, and must not be taken for the tickets'."""

    class Broken(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise ZeroDivisionError("in the middle")

    def callback() -> pl.Callback:
        if kind == "detector":
            return EarlyBirdDetector([0.5], window=2, threshold=1.0, round_to=4, on_emergence="prune")
        return TimestepAwarePruner([(0, 1000, 0.5)], max_search_steps=4, round_to=4, dirpath=tmp_path / "tickets")

    module = Repeatable()
    with pytest.raises(ZeroDivisionError):
        fit(module, callback(), EMAWeightAveraging(), Broken(), max_epochs=2)
    assert module.model.conv_in.weight.grad is not None
    assert "on_load_checkpoint" not in vars(module)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TimestepAwarePruner|max_search_steps")
        other = Repeatable()
        fit(other, callback(), max_epochs=2).save_checkpoint(tmp_path / "tickets.ckpt")
    trainer = fit(module, callback(), max_epochs=3, ckpt_path=tmp_path / "tickets.ckpt")
    assert trainer.global_step == 12 and isinstance(module.model, TicketEnsemble)


class MadeEarly(Repeatable):
    """Its optimizer is made with the module, and is then that of the dense network for ever."""

    def __init__(self) -> None:
        super().__init__(configure=lambda module: module.early)
        self.early = torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["pruner", "detector"])
def test_a_resumed_fit_whose_optimizers_do_not_know_its_one_ticket_is_refused(kind: str, tmp_path: Path) -> None:
    """Torch would not: one ticket has as many parameters as the dense network. Nothing would be trained."""

    def callback() -> pl.Callback:
        if kind == "detector":
            return EarlyBirdDetector([0.5], window=2, threshold=1.0, round_to=4, on_emergence="prune")
        return TimestepAwarePruner([(0, 1000, 0.5)], max_search_steps=4, round_to=4, dirpath=tmp_path / "tickets")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TimestepAwarePruner|max_search_steps|`configure_optimizers` does not give")
        fit(MadeEarly(), callback(), max_epochs=3).save_checkpoint(tmp_path / "tickets.ckpt")
    with pytest.raises(
        MisconfigurationException, match=r"hold none of the parameters of the tickets in 'model', which"
    ):
        fit(MadeEarly(), callback(), max_epochs=4, ckpt_path=tmp_path / "tickets.ckpt")


# --- testing ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_tickets_can_be_tested_by_the_trainer_that_made_it(tmp_path: Path) -> None:
    trainer, _, state = run(tmp_path, 3)
    module = trainer.lightning_module
    data = loader(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    (results,) = trainer.test(module, data, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    # Lightning's averaging callback, which still is there, puts the weights that go with the averages into the module.
    for name, value in module.state_dict().items():
        assert torch.equal(value, state.epochs[1][f"weights.{name}"])
    assert 0 < results["test_loss"] < float("inf")


def test_a_checkpoint_of_tickets_can_be_tested_in_a_fresh_module(tmp_path: Path) -> None:
    _, _, state = run(tmp_path, 2)
    noisy, steps = torch.randn(4, 1, 4, 4), torch.tensor([0, 299, 300, 999])
    outputs = []
    for callbacks in (
        [TimestepAwarePruner(REGIONS)],
        [EMAWeightAveraging(), TimestepAwarePruner(REGIONS)],
    ):
        module = Repeatable(configure=scheduled)
        trainer = quiet_trainer(*callbacks)
        trainer.test(module, loader(module), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
        assert isinstance(module.model, TicketEnsemble)
        for name, value in module.state_dict().items():
            assert torch.equal(value, state.epochs[1][f"average.{name}"])
        outputs.append(module.model(noisy, steps))
    assert torch.equal(*outputs)
    assert module.model.record.facts[0].step == 6


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_dense_checkpoint_is_refused_by_a_module_with_tickets(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path, 2)
    module = trainer.lightning_module
    message = "ckpt_path: the checkpoint was taken before the switch, but 'model' already holds tickets"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.test(module, loader(module), ckpt_path=tmp_path / "epoch=0.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, 3, module=module, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_tickets_of_other_shapes_are_refused(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path / "one", 2)
    module = trainer.lightning_module
    run(tmp_path / "other", 2, regions=[(0, 300, 0.5), (300, 1000, 0.25)])
    with pytest.raises(MisconfigurationException, match="ckpt_path: its tickets have other shapes than those"):
        trainer.test(module, loader(module), ckpt_path=tmp_path / "other" / "epoch=1.ckpt")


def test_tickets_of_the_same_shapes_bring_their_own_regions_and_masks(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path / "one", 2)
    module = trainer.lightning_module
    other = Repeatable(configure=lambda module: torch.optim.Adam(module.parameters(), 0.3))
    run(tmp_path / "other", 2, module=other, regions=[(0, 500, 0.25), (500, 1000, 0.5)], overlap=10)
    assert module.model.record.masks[0].distance(other.model.record.masks[0]) > 0
    trainer.test(module, loader(module), ckpt_path=tmp_path / "other" / "epoch=1.ckpt", verbose=False)
    assert module.model.partition == other.model.partition
    assert module.model.record.facts == other.model.record.facts
    for ours, theirs in zip(module.model.record.masks, other.model.record.masks, strict=True):
        assert ours.distance(theirs) == 0


def test_ragged_norms_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    trainer, _, _ = run(tmp_path, 3, ema=None, norm="exact")
    tickets = trainer.lightning_module.model.tickets
    fresh = Repeatable(configure=scheduled)
    run(tmp_path / "resumed", 3, ema=None, module=fresh, ckpt_path=tmp_path / "epoch=1.ckpt", norm="exact")

    assert any(isinstance(ticket.norm, RaggedGroupNorm) for ticket in tickets)
    call = torch.randn(4, 1, 4, 4), torch.tensor([0, 299, 300, 999])
    with torch.no_grad():
        for ours, theirs in zip(fresh.model.tickets, tickets, strict=True):
            assert repr(ours) == repr(theirs)
            assert torch.equal(ours.eval()(*call), theirs.eval()(*call))


def test_tickets_with_other_norm_groups_in_the_same_shapes_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "shrunk", 2)
    module = run(tmp_path / "exact", 2, norm="exact")[0].lightning_module
    message = "ckpt_path: its tickets have other attention heads or norm groups than those in 'model'. Build a fresh"
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(TimestepAwarePruner(REGIONS)).test(
            module, loader(module), ckpt_path=tmp_path / "shrunk" / "epoch=1.ckpt", verbose=False
        )


def test_other_regions_than_those_of_the_tickets_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 2)
    message = r"regions=.* differ from those of the tickets in 'model', .*Resume with the regions"
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, 3, regions=[(0, 500, 0.25), (500, 1000, 0.5)], ckpt_path=tmp_path / "epoch=1.ckpt")


def test_tickets_of_another_denoiser_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 2)

    class Elsewhere(Repeatable):
        def __init__(self) -> None:
            super().__init__(configure=scheduled)
            self.net = self.model
            del self.model

        def loss(self, samples: Tensor) -> Tensor:
            return self.net(samples, torch.arange(len(samples))).square().mean()

    message = "ckpt_path: the tickets in the checkpoint do not fit this module's denoiser 'model': .* Build the module"
    for module in (Elsewhere(), Repeatable(Mlp, scheduled), Repeatable(lambda: ConvNet(8), scheduled)):
        with pytest.raises(MisconfigurationException, match=message):
            run(tmp_path, 3, module=module, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 2)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    checkpoint[CHECKPOINT_KEY]["format_version"] = 3
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    message = r"newer.ckpt: field 'lightning_earlybird.format_version' is 3, but .* reads up to 2; upgrade it"
    with pytest.raises(EnsembleFormatError, match=message):
        run(tmp_path, 3, ckpt_path=tmp_path / "newer.ckpt")


def test_a_module_without_the_callbacks_keeps_lightnings_own_error(tmp_path: Path) -> None:
    run(tmp_path, 2)
    module = Repeatable(configure=scheduled)
    before = deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*model.conv_in.weight"):
        fit(module, max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not isinstance(module.model, nn.ModuleList)


@pytest.fixture(scope="module")
def sides_of_a_switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one fit: step=4.ckpt of the search, step=8.ckpt of its tickets."""
    path = tmp_path_factory.mktemp("sides")
    saving = ModelCheckpoint(path, filename="{step}", save_top_k=-1, enable_version_counter=False)
    fit(Lit(), *masking(path), saving, max_epochs=2, enable_checkpointing=True)
    return path


def masking(path: Path, criterion: str = "magnitude", **settings: Any) -> list[pl.Callback]:
    detector = EarlyBirdDetector([0.25, 0.5], criterion=criterion, every_n_train_steps=3, window=2, threshold=1.0)
    return [detector, TimestepAwarePruner(REGIONS, **({"round_to": 4, "dirpath": path / "tickets"} | settings))]


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "random"},
        {"target": "macs"},
        {"scope": "global"},
        {"round_to": 8},
        {"min_width": 4},
        {"heads": "whole"},
        {"norm": "exact"},
    ],
)
def test_a_fit_does_not_resume_under_other_settings_than_its_masks_were_made_with(
    step: int, settings: dict[str, Any], sides_of_a_switch: Path, tmp_path: Path
) -> None:
    ((name, value),) = settings.items()
    module = Lit()
    with pytest.raises(MisconfigurationException, match=f"{name}={value!r} does not fit the checkpoint, .* {name}="):
        fit(module, *masking(tmp_path, **settings), max_epochs=3, ckpt_path=sides_of_a_switch / f"step={step}.ckpt")
    assert module.losses == []


@pytest.mark.parametrize("step", [4, 8])
def test_a_fit_resumes_from_a_checkpoint_that_says_nothing_of_settings(
    step: int, sides_of_a_switch: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(sides_of_a_switch / f"step={step}.ckpt", weights_only=True)
    states = [state for state in checkpoint["callbacks"].values() if state.pop("settings", None)]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    detector, pruner = masking(tmp_path)
    fit(Lit(), detector, pruner, max_epochs=3, ckpt_path=tmp_path / "old.ckpt")
    assert len(states) == 2 and pruner.switched_at == 6 and detector.emerged == {0.25: 6, 0.5: 6}
