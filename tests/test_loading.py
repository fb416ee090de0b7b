"""Modules from checkpoints on either side of the switch, without our callbacks: by a function, and by a mixin."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, ConvNet, Lit, Mlp, Repeatable, fit, loader, quiet_trainer
from torch import Tensor, nn

from lightning_earlybird import (
    EarlyBirdDetector,
    EnsembleFormatError,
    TicketCheckpoints,
    TicketEnsemble,
    TimestepAwarePruner,
    load_from_checkpoint,
)
from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.saved_structure import CHECKPOINT_KEY
from lightning_earlybird.transition import averaged_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]

CALL = torch.linspace(-1, 1, 64).view(4, 1, 4, 4), torch.tensor([0, 299, 300, 999])


class Plain(Repeatable):
    """Knows nothing of us, and remembers its arguments."""

    def __init__(self, width: int = 16, rate: float = 0.01) -> None:
        super().__init__(lambda: ConvNet(width), lambda module: torch.optim.AdamW(module.parameters(), lr=module.rate))
        self.rate = rate
        self.save_hyperparameters()

    def loss(self, samples: Tensor) -> Tensor:
        if self.training:
            return super().loss(samples)
        torch.manual_seed(7)  # the same from whichever Trainer evaluates
        return Lit.loss(self, samples)

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0], torch.arange(len(batch[0])) * 100)


class Forgetful(Repeatable):
    """Has arguments, and does not save them."""

    def __init__(self, width: int, *, name: str = "") -> None:
        super().__init__(lambda: ConvNet(width))
        self.name = name


class Ours(TicketCheckpoints, Plain):
    """The same as ``Plain``, with the mixin."""


def callbacks(path: Path) -> list[pl.Callback]:
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)
    return [detector, TimestepAwarePruner(REGIONS, round_to=4, dirpath=path / "tickets")]


def saving(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, filename="{step}", save_top_k=-1, save_last=True, enable_version_counter=False)


class Weights(pl.Callback):
    """Copies of the live and the averaged weights at the end of each epoch."""

    def __init__(self) -> None:
        self.live: list[dict[str, Tensor]] = []
        self.averaged: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.live.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        for average in averaged_modules(trainer):
            self.averaged.append({name: value.clone() for name, value in average.state_dict().items()})


class Fit:
    """A fit of three epochs of four steps, with the switch at step 6, and its checkpoints."""

    def __init__(self, path: Path, module: Callable[..., pl.LightningModule] = Plain, ema: bool = True) -> None:
        self.path, self.weights = path, Weights()
        extra = [EMAWeightAveraging(decay=0.8)] if ema else []
        self.trainer = fit(
            module(), *extra, *callbacks(path), self.weights, saving(path), max_epochs=3, enable_checkpointing=True
        )

    def at(self, step: int) -> Path:
        return self.path / f"step={step}.ckpt"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return Fit(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return Fit(tmp_path_factory.mktemp("ours"), Ours)


def assert_weights(module: nn.Module, expected: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == expected.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name


def edited(path: Path, change: Callable[[dict[str, Any]], None], target: Path) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


# --- the function -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_search_gives_the_dense_module(plain: Fit) -> None:
    module = load_from_checkpoint(Plain, plain.at(4))
    assert type(module) is Plain and type(module.model) is ConvNet
    assert_weights(module, plain.weights.averaged[0])
    own = Plain.load_from_checkpoint(plain.at(4))
    assert_weights(own, plain.weights.averaged[0])


def test_a_checkpoint_of_tickets_gives_the_module_with_its_ensemble(plain: Fit) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = load_from_checkpoint(Plain, plain.at(8))
    assert type(module) is Plain and isinstance(module.model, TicketEnsemble) and module.training
    assert_weights(module, plain.weights.averaged[1])
    assert any(not torch.equal(value, plain.weights.live[1][name]) for name, value in module.state_dict().items())
    trained = plain.trainer.lightning_module.model
    assert module.model.partition == trained.partition and module.model.timesteps == trained.timesteps
    assert module.model.record.edits == trained.record.edits and module.model.record.facts == trained.record.facts
    for mine, its in zip(module.model.record.masks, trained.record.masks, strict=True):
        assert mine.distance(its) == 0
    # The live weights are there for whoever wants them.
    live = torch.load(plain.at(8), weights_only=True)["current_model_state"]
    module.load_state_dict(live)
    assert_weights(module, plain.weights.live[1])


def test_a_loaded_module_computes_what_the_trained_one_does(plain: Fit) -> None:
    module = load_from_checkpoint(Plain, str(plain.at(12))).eval()
    average = averaged_modules(plain.trainer)[0].eval()
    with torch.no_grad():
        assert torch.equal(module.model(*CALL), average.model(*CALL))


def test_a_class_is_left_as_it_was(plain: Fit) -> None:
    class Hooked(Plain):
        def on_load_checkpoint(self, checkpoint):
            self.kind = type(self.model)

    hook = vars(Hooked)["on_load_checkpoint"]
    assert load_from_checkpoint(Hooked, plain.at(8)).kind is TicketEnsemble
    assert vars(Hooked)["on_load_checkpoint"] is hook and "on_load_checkpoint" not in vars(Plain)
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Plain, plain.path / "nowhere.ckpt")
    assert "on_load_checkpoint" not in vars(Plain)
    with pytest.raises(RuntimeError, match=r"Missing key.*model.conv_in.weight"):
        Plain.load_from_checkpoint(plain.at(8))


def test_saved_arguments_are_used_and_given_ones_go_before_them(tmp_path: Path) -> None:
    run = Fit(tmp_path, lambda: Plain(width=8, rate=0.02))
    module = load_from_checkpoint(Plain, run.at(8))
    assert module.rate == 0.02 and dict(module.hparams) == {"width": 8, "rate": 0.02}
    assert load_from_checkpoint(Plain, run.at(8), rate=0.5).rate == 0.5
    with pytest.raises(MisconfigurationException, match="checkpoint_path: the tickets in the checkpoint do not fit"):
        load_from_checkpoint(Plain, run.at(8), width=4)


def test_arguments_that_were_not_saved_are_given(tmp_path: Path) -> None:
    run = Fit(tmp_path, lambda: Forgetful(8), ema=False)
    module = load_from_checkpoint(Forgetful, run.at(8), width=8, name="loaded")
    assert module.name == "loaded"
    assert_weights(module, run.weights.live[1])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        load_from_checkpoint(Forgetful, run.at(8))
    (tmp_path / "arguments.yaml").write_text("width: 8\nname: file\n")
    assert load_from_checkpoint(Forgetful, run.at(8), hparams_file=tmp_path / "arguments.yaml").name == "file"


def test_a_file_like_object_and_a_device_are_taken_as_lightning_takes_them(plain: Fit) -> None:
    module = load_from_checkpoint(Plain, io.BytesIO(plain.at(8).read_bytes()), map_location=torch.device("cpu"))
    assert_weights(module, plain.weights.averaged[1])


def test_names_must_match_unless_the_caller_says_otherwise(plain: Fit, tmp_path: Path) -> None:
    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["extra.weight"] = torch.zeros(2)

    odd = edited(plain.at(8), rename, tmp_path / "odd.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"extra.weight\""):
        load_from_checkpoint(Plain, odd)
    with pytest.warns(UserWarning, match=r"not in the model state dict but in the checkpoint: .*extra.weight"):
        module = load_from_checkpoint(Plain, odd, strict=False)
    assert_weights(module, plain.weights.averaged[1])


def test_the_one_ticket_of_a_detector_is_loaded_as_well(tmp_path: Path) -> None:
    detector = EarlyBirdDetector(
        [0.5], every_n_train_steps=2, window=2, threshold=1.0, round_to=4, on_emergence="prune"
    )
    weights = Weights()
    fit(Plain(), detector, weights, saving(tmp_path), max_epochs=2, enable_checkpointing=True)
    module = load_from_checkpoint(Plain, tmp_path / "step=8.ckpt")
    assert len(module.model.tickets) == 1
    assert_weights(module, weights.live[1])


def test_a_denoiser_that_the_module_compiles_is_loaded_compiled(plain: Fit) -> None:
    class Compiled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")

    torch._dynamo.reset()
    module = load_from_checkpoint(Compiled, plain.at(8))
    assert_weights(module, plain.weights.averaged[1])
    assert all(ticket._compiled_call_impl is not None for ticket in module.model.tickets)


def test_layers_that_configure_model_makes_are_there_in_time(plain: Fit) -> None:
    class Late(Plain):
        def __init__(self) -> None:
            super().__init__()
            del self.model

        def configure_model(self):
            if not hasattr(self, "model"):
                self.model = ConvNet()

    assert_weights(load_from_checkpoint(Late, plain.at(8)), plain.weights.averaged[1])


def test_a_class_that_the_checkpoint_names_may_have_a_hook_of_its_own(plain: Fit) -> None:
    """LightningCLI's checkpoints name the class below the one that is asked for."""

    class Asked(Plain):
        chosen: type

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls.chosen)

    class Below(Asked):
        def on_load_checkpoint(self, checkpoint):
            self.kind = type(self.model)

    Asked.chosen = Below
    module = load_from_checkpoint(Asked, plain.at(8))
    assert type(module) is Below and module.kind is TicketEnsemble


@pytest.mark.parametrize("who", ["pruner", "nobody"])
def test_a_loaded_module_can_be_trained_on(who: str, plain: Fit, tmp_path: Path) -> None:
    module = load_from_checkpoint(Plain, plain.at(8))
    found = callbacks(tmp_path) if who == "pruner" else []
    fit(module, EMAWeightAveraging(decay=0.8), *found, max_epochs=1)
    assert isinstance(module.model, TicketEnsemble)
    assert any(not torch.equal(value, plain.weights.averaged[1][name]) for name, value in module.state_dict().items())
    assert (tmp_path / "tickets" / "ensemble").exists() == (who == "pruner")


def test_a_part_of_an_ensemble_is_refused_by_name(plain: Fit, tmp_path: Path) -> None:
    module = load_from_checkpoint(Plain, plain.at(8))
    module.model.tickets[1] = AbsentTicket(module.model.tickets[1])
    trainer = quiet_trainer(*callbacks(tmp_path))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    message = (
        r"checkpoint_path: the checkpoint lacks the tickets \[1\] of 2, which other ranks trained .* put the groups"
    )
    for load in (lambda path: load_from_checkpoint(Plain, path), Ours.load_from_checkpoint):
        with pytest.raises(MisconfigurationException, match=message):
            load(tmp_path / "part.ckpt")
    message = message.replace("checkpoint_path", "ckpt_path")
    with pytest.raises(MisconfigurationException, match=message):
        fit(Ours(), max_epochs=1, ckpt_path=tmp_path / "part.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        settled().test(Ours(), loader(module), ckpt_path=tmp_path / "part.ckpt")


def test_tickets_of_another_network_are_refused(plain: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"checkpoint_path: the tickets .* do not fit .*'model'"):
        load_from_checkpoint(Lit, plain.at(8), denoiser=Mlp)


# --- the mixin --------------------------------------------------------------------------------------------------------


def test_the_mixin_loads_either_side_of_the_switch(ours: Fit) -> None:
    assert_weights(Ours.load_from_checkpoint(ours.at(4)), ours.weights.averaged[0])
    module = Ours.load_from_checkpoint(ours.at(8), rate=0.5)
    assert_weights(module, ours.weights.averaged[1])
    assert module.rate == 0.5 and module.model.record.facts == ours.trainer.lightning_module.model.record.facts
    assert_weights(load_from_checkpoint(Ours, ours.at(8)), ours.weights.averaged[1])


@pytest.mark.parametrize("order", ["mixin first", "mixin last", "hook below"])
def test_the_mixin_acts_before_a_modules_own_hooks_wherever_they_are(order: str, plain: Fit, tmp_path: Path) -> None:
    class Hooks(Plain):
        def on_load_checkpoint(self, checkpoint):
            self.kind = type(self.model)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["seen"] = CHECKPOINT_KEY in checkpoint

    if order == "mixin first":

        class Module(TicketCheckpoints, Hooks):
            pass

    elif order == "mixin last":

        class Module(Hooks, TicketCheckpoints):
            pass

    else:

        class Module(Ours):
            on_load_checkpoint = Hooks.on_load_checkpoint
            on_save_checkpoint = Hooks.on_save_checkpoint

    module = Module.load_from_checkpoint(plain.at(8))
    assert module.kind is TicketEnsemble
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    checkpoint = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert checkpoint["seen"] is True
    assert_weights(Module.load_from_checkpoint(tmp_path / "again.ckpt"), plain.weights.averaged[1])


def test_an_ensemble_that_the_module_builds_itself_is_no_concern_of_the_mixin(plain: Fit, tmp_path: Path) -> None:
    class Own(TicketCheckpoints, Plain):
        def __init__(self) -> None:
            super().__init__()
            trained = plain.trainer.lightning_module.model
            self.model = TicketEnsemble([ConvNet(), ConvNet()], trained.partition, trained.timesteps)

    module = Own()
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert CHECKPOINT_KEY not in torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert_weights(Own.load_from_checkpoint(tmp_path / "own.ckpt"), module.state_dict())


# --- Trainers ---------------------------------------------------------------------------------------------------------


def run_all(trainer: pl.Trainer, module: pl.LightningModule, path: Any) -> tuple[float, float, Tensor]:
    """What validation, test and prediction give, each in its turn."""
    data = loader(module)
    torch.manual_seed(3)
    (validated,) = trainer.validate(module, data, ckpt_path=path, verbose=False)
    (tested,) = trainer.test(module, data, ckpt_path=path, verbose=False)
    predicted = trainer.predict(module, data, ckpt_path=path)
    return validated["val_loss"], tested["test_loss"], torch.cat(predicted)


def settled(*callbacks: pl.Callback) -> pl.Trainer:
    return quiet_trainer(*callbacks, limit_val_batches=1.0)


@pytest.mark.parametrize("who", ["pruner", "ema and pruner", "mixin", "mixin and ema", "mixin and pruner"])
def test_fresh_trainers_validate_test_and_predict(who: str, plain: Fit, ours: Fit, tmp_path: Path) -> None:
    extra: list[pl.Callback] = [EMAWeightAveraging()] if "ema" in who else []
    extra += callbacks(tmp_path) if "pruner" in who else []
    kind = Ours if "mixin" in who else Plain
    found = run_all(settled(*extra), kind(), (ours if "mixin" in who else plain).at(8))
    reference = load_from_checkpoint(Plain, plain.at(8))
    expected = run_all(settled(), reference, None)
    assert found[:2] == expected[:2] and torch.equal(found[2], expected[2])


def test_a_trainer_without_us_cannot_load_tickets_into_a_module_without_the_mixin(plain: Fit) -> None:
    for name in ("validate", "test", "predict"):
        module = Plain()
        with pytest.raises(RuntimeError, match=r"Missing key.*model.conv_in.weight"):
            getattr(settled(), name)(module, loader(module), ckpt_path=plain.at(8))
        assert type(module.model) is ConvNet


@pytest.mark.parametrize("who", ["pruner", "detector"])
@pytest.mark.parametrize("ema", [False, True])
def test_the_trainer_of_the_fit_finds_its_best_and_last_checkpoints(who: str, ema: bool, tmp_path: Path) -> None:
    def found() -> list[pl.Callback]:
        settings: dict[str, Any] = {"every_n_train_steps": 2, "window": 2, "threshold": 1.0, "round_to": 4}
        detector = EarlyBirdDetector([0.5], on_emergence="prune", **settings)
        return callbacks(tmp_path) if who == "pruner" else [detector]

    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    extra = [EMAWeightAveraging(decay=0.8)] if ema else []
    module = Plain()
    trainer = fit(module, *extra, *found(), best, max_epochs=3, enable_checkpointing=True, limit_val_batches=1.0)
    assert isinstance(module.model, TicketEnsemble)
    for path, exact in (("best", best.best_model_path), ("last", best.last_model_path)):
        fresh = load_from_checkpoint(Plain, exact)
        validated, *_ = expected = run_all(settled(), fresh, None)
        if ema:
            # Lightning's callback, which still is there, puts the live weights over the averaged ones, and takes the
            # averaged ones for validation only.
            fresh.load_state_dict(torch.load(exact, weights_only=True)["current_model_state"])
            expected = (validated, *run_all(settled(), fresh, None)[1:])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        assert (result := run_all(trainer, module, path))[:2] == expected[:2]
        assert torch.equal(result[2], expected[2])
    # A fresh Trainer whose callbacks look into the same directory finds the last one, too.
    other = Plain()
    last = ModelCheckpoint(tmp_path, save_last=True)
    fresh_trainer = quiet_trainer(*found(), last, limit_val_batches=1.0, enable_checkpointing=True)
    fresh_trainer.test(other, loader(other), ckpt_path="last", verbose=False)
    assert isinstance(other.model, TicketEnsemble)


@pytest.mark.parametrize("ema", [False, True])
def test_a_fit_of_tickets_goes_on_without_a_pruner_where_the_module_has_the_mixin(ema: bool, tmp_path: Path) -> None:
    whole = Fit(tmp_path, Ours, ema)
    extra: list[pl.Callback] = [EMAWeightAveraging(decay=0.8)] if ema else []
    weights, module = Weights(), Ours()
    fit(
        module,
        *extra,
        weights,
        saving(tmp_path / "resumed"),
        max_epochs=3,
        ckpt_path=whole.at(8),
        enable_checkpointing=True,
    )
    for ours, theirs in ((weights.live, whole.weights.live), (weights.averaged, whole.weights.averaged)):
        assert len(ours) == (1 if theirs else 0)
        for name, value in (ours[0] if ours else {}).items():
            assert torch.equal(value, theirs[2][name]), name
    again = Ours.load_from_checkpoint(tmp_path / "resumed" / "step=12.ckpt")
    assert_weights(again, (weights.averaged or weights.live)[0])


# --- what nobody vouches for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 10, 1000, -100])
def test_a_truncated_file_is_refused_by_name(length: int, plain: Fit, tmp_path: Path) -> None:
    content = plain.at(8).read_bytes()
    (tmp_path / "short.ckpt").write_bytes(content[:length])
    with pytest.raises(EnsembleFormatError, match=r"short\.ckpt: cannot be read as a checkpoint"):
        load_from_checkpoint(Plain, tmp_path / "short.ckpt")


def test_a_file_in_which_a_bit_was_flipped_is_refused(plain: Fit, tmp_path: Path) -> None:
    content = bytearray(plain.at(8).read_bytes())
    weights = torch.load(plain.at(8), weights_only=True)["state_dict"]["model.tickets.0.conv_in.weight"]
    content[content.index(weights.numpy().tobytes()) + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    with pytest.raises(
        EnsembleFormatError, match=r"flipped\.ckpt: the document is damaged: .* does not match its check"
    ):
        load_from_checkpoint(Plain, tmp_path / "flipped.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("state_dict"), "field 'state_dict' is missing"),
        (lambda c: c.pop("pytorch-lightning_version"), "field 'pytorch-lightning_version' is missing"),
        (
            lambda c: c.update({"pytorch-lightning_version": "soon"}),
            "field 'pytorch-lightning_version' is not valid: Invalid",
        ),
        (lambda c: c.update(state_dict=[1]), r"field 'state_dict' is \[1\], expected an object"),
        (lambda c: c.update(hyper_parameters=3), "field 'hyper_parameters' is not a mapping"),
        (lambda c: c["state_dict"].update({3: torch.zeros(1)}), "field 'state_dict' has the key 3"),
        (lambda c: c["lightning_earlybird"].pop("masks"), "field 'lightning_earlybird.masks' is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_field(change: Any, message: str, plain: Fit, tmp_path: Path) -> None:
    odd = edited(plain.at(8), change, tmp_path / "odd.ckpt")
    with pytest.raises(EnsembleFormatError, match=r"odd\.ckpt: " + message):
        load_from_checkpoint(Plain, odd)


def test_objects_are_not_unpickled_unless_the_caller_trusts_them(plain: Fit, tmp_path: Path) -> None:
    odd = edited(plain.at(8), lambda c: c.update(note=Path("x")), tmp_path / "objects.ckpt")
    with pytest.raises(EnsembleFormatError, match=r"objects\.ckpt: cannot be read .* not unpickled"):
        load_from_checkpoint(Plain, odd)
    assert_weights(load_from_checkpoint(Plain, odd, weights_only=False), plain.weights.averaged[1])


def test_a_refused_checkpoint_leaves_a_module_as_it_was(plain: Fit, tmp_path: Path) -> None:
    def swap(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["model.tickets.0.time.weight"] = torch.zeros(12, 1, dtype=torch.long)

    odd = edited(plain.at(8), swap, tmp_path / "odd.ckpt")
    for module in (Plain(), load_from_checkpoint(Plain, plain.at(12))):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        record = getattr(module.model, "record", None)
        trainer = settled(*callbacks(tmp_path))
        with pytest.raises((MisconfigurationException, EnsembleFormatError), match=r"time\.weight"):
            trainer.test(module, loader(module), ckpt_path=odd)
        assert_weights(module, before)
        assert getattr(module.model, "record", None) is record


def test_an_error_of_the_modules_own_is_passed_on(plain: Fit) -> None:
    class Broken(Plain):
        def on_load_checkpoint(self, checkpoint):
            raise ZeroDivisionError("its own")

    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError, match="its own"):
        load_from_checkpoint(Broken, plain.at(8))
