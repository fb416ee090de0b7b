"""The switch inside real fits: everything that a Trainer keeps about the denoiser follows its replacement."""

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import lightning_earlybird
from lightning_earlybird.transition import check_supported, replace_denoiser
from lightning_earlybird.transition.compiled import compile_like

HIDDEN = 8
# Two tickets: one keeps every second hidden unit, the other keeps all (where a careless copy would share memory).
KEPT = (torch.arange(0, HIDDEN, 2), torch.arange(HIDDEN))


class Denoiser(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(2, hidden)
        self.drop = nn.Dropout(0.0)
        self.down = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.down(self.drop(torch.tanh(self.up(x) + t[:, None])))


class Ensemble(nn.Module):
    """Rows with t < 0.5 go to the first ticket, the others to the second; a ticket without rows is not called."""

    def __init__(self, tickets: list[Denoiser]) -> None:
        super().__init__()
        self.tickets = nn.ModuleList(tickets)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        region = (t >= 0.5).long()
        order = torch.argsort(region, stable=True)
        parts = []
        for index, ticket in enumerate(self.tickets):
            rows = (region == index).nonzero()[:, 0]
            if len(rows):
                parts.append(ticket(x[rows], t[rows]))
        return torch.cat(parts)[torch.argsort(order)]


def inherit(name: str, tensor: Tensor) -> Tensor:
    _, index, layer, kind = name.split(".")
    if (layer, kind) == ("down", "bias"):
        return tensor
    return tensor.index_select(1 if layer == "down" else 0, KEPT[int(index)].to(tensor.device))


def source(name: str) -> str:
    return name.split(".", 2)[2]


def build(dense: nn.Module) -> Ensemble:
    tickets = []
    for index, kept in enumerate(KEPT):
        ticket = Denoiser(len(kept))
        dense_state = dense.state_dict()
        ticket.load_state_dict({name: inherit(f"tickets.{index}.{name}", value) for name, value in dense_state.items()})
        tickets.append(ticket)
    return Ensemble(tickets)


def adamw(module: pl.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


class Lit(pl.LightningModule):
    """A LightningModule as a user writes it; `configure` stands for its `configure_optimizers`."""

    def __init__(self, configure: Callable = adamw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(1))  # something besides the denoiser
        self.model = Denoiser()
        self.configure = configure

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, t = batch
        return (self.model(x + self.scale, t) - x).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return self.configure(self)


class Switch(Callback):
    """Replaces the denoiser after a batch (or at the end of an epoch) and looks at the optimizers before and after."""

    def __init__(self, batch: int | None = 3, epoch: int | None = None, name: str = "model", **parts: Callable) -> None:
        self.batch, self.epoch, self.name = batch, epoch, name
        self.parts = {"build": build, "inherit": inherit, "source": source} | parts
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.replacement: nn.Module | None = None

    def on_fit_start(self, trainer, pl_module):
        check_supported(trainer, pl_module, self.name)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:
            self.losses.append(outputs["loss"].item())
        if len(self.rates) == self.batch:
            self.switch(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.switch(trainer, pl_module)

    def switch(self, trainer, pl_module):
        dense = getattr(pl_module.get_submodule(self.name), "_orig_mod", pl_module.get_submodule(self.name))
        self.before = {
            name: (weakref.ref(value), value.detach().clone(), value.grad.clone() if value.grad is not None else None)
            for name, value in dense.named_parameters()
        }
        self.optimizers = list(trainer.optimizers)
        self.schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        named = dict(dense.named_parameters())
        self.state = [
            {name: deepcopy(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}
            for optimizer in trainer.optimizers
        ]
        random = torch.get_rng_state()
        self.replacement = replace_denoiser(trainer, pl_module, self.name, **self.parts)
        assert torch.equal(random, torch.get_rng_state())


def loader(rows: int = 32) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(rows, 2, generator=generator), torch.rand(rows, generator=generator)
    return DataLoader(TensorDataset(x, t), batch_size=8)


def trainer_with(*callbacks: Callback, max_epochs: int = 3, **kwargs) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    kwargs = {"limit_val_batches": 0, "accelerator": "cpu", "devices": 1} | quiet | kwargs
    return pl.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **kwargs)


def fit(module: Lit, *callbacks: Callback, **kwargs) -> pl.Trainer:
    trainer = trainer_with(*callbacks, **kwargs)
    trainer.fit(module, loader(), loader())
    return trainer


def flat(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def assert_matches_a_fresh_configuration(trainer: pl.Trainer, module: Lit) -> None:
    """What resuming needs: optimizer states are stored by position."""
    fresh = module.configure(module)
    fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh
    fresh = fresh if isinstance(fresh, (list, tuple)) else [fresh]
    for live, new in zip(trainer.optimizers, fresh, strict=True):
        assert [id(p) for p in flat(live)] == [id(p) for p in flat(new)]
        assert [len(group["params"]) for group in live.param_groups] == [len(g["params"]) for g in new.param_groups]


# --- optimizers -------------------------------------------------------------------------------------------------------


def with_schedule(make: Callable) -> Callable:
    def configure(module: Lit) -> dict:
        optimizer = adamw(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    return configure


SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=12),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, T_max=10)], milestones=[4]
    ),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rates_are_those_of_a_fit_without_switch(schedule: str) -> None:
    switched, plain = Switch(), Switch(batch=None)
    trainer = fit(Lit(with_schedule(SCHEDULES[schedule])), switched)
    fit(Lit(with_schedule(SCHEDULES[schedule])), plain)
    assert switched.replacement is not None and plain.replacement is None
    assert switched.rates == plain.rates and len({rate for (rate,) in plain.rates}) > 6
    assert trainer.optimizers == switched.optimizers  # the very same objects
    assert [config.scheduler for config in trainer.lr_scheduler_configs] == switched.schedulers


def test_adamw_moments_are_the_dense_ones_cut_like_the_weights() -> None:
    switch, module = Switch(epoch=0, batch=None), Lit()
    module.on_train_epoch_start = lambda: None
    trainer = trainer_with(switch, max_epochs=1)
    trainer.fit(module, loader(), loader())
    (optimizer,), (dense,) = trainer.optimizers, switch.state
    assert len(dense) == 4
    for name, parameter in module.model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], inherit(name, dense[source(name)][key]))
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert len({value.data_ptr() for value in tensors}) == len(tensors) == 3 * (8 + 1)
    assert set(optimizer.state) == set(flat(optimizer)) == set(module.parameters())
    assert_matches_a_fresh_configuration(trainer, module)


def test_sgd_momentum_is_carried_over() -> None:
    switch = Switch(epoch=0, batch=None)
    module = Lit(lambda module: torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9))
    (optimizer,) = fit(module, switch, max_epochs=1).optimizers
    for name, parameter in module.model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.any() and torch.equal(momentum, inherit(name, switch.state[0][source(name)]["momentum_buffer"]))


def test_a_switch_that_cuts_nothing_leaves_the_training_unchanged() -> None:
    """One ticket with all units: weights, moments, order and randomness must be those of a fit without switch."""

    def whole(dense: nn.Module) -> Ensemble:
        ticket = Denoiser()
        ticket.load_state_dict(dense.state_dict())
        both = Ensemble([ticket])
        both.forward = ticket.forward
        return both

    switched, plain = Switch(build=whole, inherit=lambda name, tensor: tensor), Switch(batch=None)
    fit(Lit(), switched, gradient_clip_val=0.1)
    fit(Lit(), plain, gradient_clip_val=0.1)
    assert switched.replacement is not None
    assert switched.losses == plain.losses


def test_optimizers_whose_moments_are_factored_start_those_again_with_one_warning() -> None:
    module = Lit(lambda module: torch.optim.Adafactor(module.parameters(), lr=0.01))
    switch = Switch(epoch=0, batch=None)
    with pytest.warns(UserWarning, match="Adafactor keeps state that is not shaped like its parameters") as warned:
        trainer = fit(module, switch, max_epochs=1)
    assert sum("Adafactor" in str(warning.message) for warning in warned) == 1
    (optimizer,) = trainer.optimizers
    kept = {name for name, parameter in module.model.named_parameters() if parameter in optimizer.state}
    assert kept == {f"tickets.{index}.{layer}.bias" for index in (0, 1) for layer in ("up", "down")}
    with pytest.warns(UserWarning, match="Adafactor"):
        fit(module := Lit(module.configure), Switch(), max_epochs=2)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Quantised(Tensor):
    """Stands for tensors with data besides their values."""

    def __deepcopy__(self, memo):
        return self


class Peculiar(torch.optim.SGD):
    """SGD that keeps, for each parameter, whatever a test wants it to."""

    keep: Callable[[Tensor], object]

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in flat(self):
            self.state[parameter].setdefault("kept", self.keep(parameter.detach()))
        return loss


@pytest.mark.parametrize(
    "keep", [lambda p: torch.full((1,), 7.0), lambda p: {"rates": [7.0]}, lambda p: None, lambda p: torch.tensor(7)]
)
def test_state_that_has_no_shape_is_copied_for_each_heir(keep: Callable) -> None:
    class Watched(Switch):
        def switch(self, trainer, pl_module):  # at the end of the fit Lightning copies the states
            super().switch(trainer, pl_module)
            copies.extend(trainer.optimizers[0].state[parameter]["kept"] for parameter in pl_module.model.parameters())

    copies: list[object] = []
    module = Lit(lambda module: Peculiar(module.parameters(), lr=0.01))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peculiar, "keep", staticmethod(keep), raising=False)
        fit(module, Watched(), max_epochs=1)
    assert len(copies) == 8 and all(str(copy) == str(keep(module.scale)) for copy in copies)
    assert len({id(copy) for copy in copies}) == (1 if copies[0] is None else 8)


@pytest.mark.parametrize(
    "keep",
    [lambda p: [p.clone()], lambda p: {"flat": p.reshape(-1)}, lambda p: p.as_subclass(Quantised), lambda p: p[None]],
)
def test_state_that_cannot_be_cut_is_dropped_with_a_warning(keep: Callable) -> None:
    module, switch = Lit(lambda module: Peculiar(module.parameters(), lr=0.01)), Switch(epoch=0, batch=None)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="Peculiar keeps state that is not shaped"),
    ):
        patch.setattr(Peculiar, "keep", staticmethod(keep), raising=False)
        (optimizer,) = fit(module, switch, max_epochs=1).optimizers
    assert set(optimizer.state) == {module.scale}


def decay_by_name(module: Lit) -> torch.optim.Optimizer:
    named = list(module.named_parameters())
    groups = [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.1},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0, "lr": 0.02},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def test_parameter_groups_keep_members_settings_and_configured_order() -> None:
    module = Lit(decay_by_name)
    trainer = fit(module, Switch())
    heavy, light = trainer.optimizers[0].param_groups
    names = {parameter: name for name, parameter in module.named_parameters()}
    assert {names[p].rpartition(".")[2] for p in heavy["params"]} == {"scale", "weight"}
    assert {names[p].rpartition(".")[2] for p in light["params"]} == {"bias"}
    assert (heavy["weight_decay"], heavy["lr"], light["weight_decay"], light["lr"]) == (0.1, 0.01, 0.0, 0.02)
    assert_matches_a_fresh_configuration(trainer, module)


@pytest.mark.parametrize(
    "select",
    [
        lambda module: reversed(list(module.named_parameters())),
        lambda module: sorted(module.named_parameters()),
        lambda module: sorted(module.named_parameters(), key=lambda item: (item[1].ndim, item[0])),
        lambda module: [*module.model.named_parameters(), ("scale", module.scale)],
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_any_order_that_the_user_configures_is_adopted(select: Callable, named: bool) -> None:
    def configure(module: Lit) -> torch.optim.Optimizer:
        chosen = list(select(module))
        return torch.optim.AdamW(chosen if named else [parameter for _, parameter in chosen])

    module = Lit(configure)
    trainer = fit(module, Switch(), max_epochs=1)
    assert_matches_a_fresh_configuration(trainer, module)
    if named:
        assert trainer.optimizers[0].param_groups[0]["param_names"] == [name for name, _ in select(module)]


def test_a_checkpoint_after_the_switch_resumes_with_each_state_at_its_parameter(tmp_path: Path) -> None:
    module = Lit(decay_by_name)
    trainer = fit(module, Switch(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = Lit(decay_by_name)
    resumed.model = build(resumed.model)
    again = trainer_with(max_epochs=2)
    again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "after.ckpt")
    for (name, old), (_, new) in zip(module.named_parameters(), resumed.named_parameters(), strict=True):
        for key, value in trainer.optimizers[0].state[old].items():
            assert torch.equal(value, again.optimizers[0].state[new][key]), (name, key)


def dense_only(module: Lit) -> torch.optim.Optimizer:
    return torch.optim.SGD([*module.model.up.parameters(), *module.model.down.parameters(), module.scale], lr=0.01)


def by_layer(module: Lit) -> torch.optim.Optimizer:
    first = [item for item in module.named_parameters() if item[0].startswith("model.up")]
    rest = [item for item in module.named_parameters() if not item[0].startswith("model.up")]
    rest.append(("outside", module.outside[0]))
    return torch.optim.SGD([{"params": first}, {"params": rest, "lr": 0.1}] if first else rest, lr=0.01)


@pytest.mark.parametrize(
    ("configure", "problem"),
    [(dense_only, "it raises AttributeError"), (by_layer, "parameter group 0 of its SGD has other members")],
)
def test_a_configuration_that_needs_the_dense_structure_falls_back_with_a_warning(configure, problem) -> None:
    module = Lit(configure)
    module.outside = (nn.Parameter(torch.ones(1)),)  # an optimizer may hold what the module does not register
    with pytest.warns(UserWarning, match=f"does not give this fit's optimizers for the tickets: {problem}"):
        trainer = fit(module, Switch())
    (optimizer,) = trainer.optimizers
    assert set(flat(optimizer)) - set(module.outside) == set(module.parameters())
    if configure is by_layer:
        up, rest = optimizer.param_groups
        assert {id(p) for p in up["params"]} == {id(p) for name, p in module.named_parameters() if ".up." in name}
        names = {parameter: name for name, parameter in module.named_parameters()} | {module.outside[0]: "outside"}
        assert all([names[p] for p in group["params"]] == group["param_names"] for group in (up, rest))
        assert rest["lr"] == 0.1


@pytest.mark.parametrize(
    ("later", "problem"),
    [
        (lambda module: [adamw(module), adamw(module)], "it raises RuntimeError"),
        (lambda module: module.first, "it returns a AdamW that was made before it was called"),
    ],
)
def test_a_configuration_that_changes_when_called_again_falls_back_with_a_warning(later, problem) -> None:
    def configure(module: Lit):
        if hasattr(module, "first"):
            return later(module)
        module.first = adamw(module)
        return module.first

    module = Lit(configure)
    with pytest.warns(UserWarning, match=problem):
        trainer = fit(module, Switch())
    assert set(flat(trainer.optimizers[0])) == set(module.parameters())


def test_a_fit_with_another_number_of_optimizers_than_configured_falls_back_with_a_warning() -> None:
    calls = []

    def configure(module: Manual):
        calls.append(1)
        return [adamw(module)] * (1 if len(calls) > 1 else 2)

    with pytest.warns(UserWarning, match="it gives 1 optimizers where the fit has 2"):
        fit(Manual(configure), Switch())


def test_calling_configure_optimizers_again_leaves_no_trace() -> None:
    def configure(module: Lit):
        if module.log_of_calls:
            warnings.warn("again", stacklevel=1)  # an error in this suite
        torch.rand(3)
        optimizer = adamw(module)
        module.kept = CosineAnnealingLR(optimizer, T_max=module.trainer.estimated_stepping_batches)
        module.log_of_calls.append(optimizer)
        module.scale.requires_grad_(True)
        return [optimizer], [module.kept]

    module = Lit(configure)
    module.log_of_calls = []
    module.on_train_start = lambda: module.scale.requires_grad_(False) and None
    trainer = fit(module, Switch())
    assert module.kept is trainer.lr_scheduler_configs[0].scheduler
    assert module.log_of_calls == trainer.optimizers
    assert module.kept.optimizer is trainer.optimizers[0]
    assert not module.scale.requires_grad


class Lookahead(torch.optim.Optimizer):
    """An optimizer that wraps another and shows its groups, as look-ahead and sharpness-aware optimizers do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                slow.lerp_(parameter.detach(), 0.5)
        return loss


def test_wrapped_optimizers_follow_as_well() -> None:
    module = Lit(lambda module: Lookahead(adamw(module)))
    (outer,) = fit(module, Switch()).optimizers
    assert set(outer.state) == set(outer.inner.state) == set(module.parameters())
    assert all(outer.state[p]["slow"].shape == p.shape == outer.inner.state[p]["exp_avg"].shape for p in flat(outer))


class Manual(Lit):
    """Two optimizers, by hand: one for the biases and one for all else, toggled in turn."""

    def __init__(self, configure: Callable | None = None) -> None:
        def two(module: Lit) -> list[torch.optim.Optimizer]:
            named = list(module.named_parameters())
            return [
                torch.optim.SGD([p for name, p in named if name.endswith("bias")], lr=0.05, momentum=0.5),
                torch.optim.AdamW([p for name, p in named if not name.endswith("bias")], lr=0.01),
            ]

        super().__init__(configure or two)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()


def test_several_optimizers_under_manual_optimization_go_on() -> None:
    module, switch = Manual(), Switch(epoch=0, batch=None)
    trainer = fit(module, switch, max_epochs=1)
    assert_matches_a_fresh_configuration(trainer, module)
    for name, parameter in module.model.named_parameters():
        index, key = (0, "momentum_buffer") if name.endswith("bias") else (1, "exp_avg")
        cut = trainer.optimizers[index].state[parameter][key]
        assert torch.equal(cut, inherit(name, switch.state[index][source(name)][key]))
    weights = {name: value.detach().clone() for name, value in module.named_parameters()}
    module = Manual()
    fit(module, Switch(epoch=0, batch=None), max_epochs=2)
    assert all(not torch.equal(value, weights[name]) for name, value in module.named_parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_toggle_left_open_across_the_switch_is_undone_for_the_tickets() -> None:
    class Open(Manual):
        def training_step(self, batch, batch_idx):
            biases, _ = self.optimizers()
            if batch_idx == 3:
                self.toggle_optimizer(biases)
                self.manual_backward(self.loss(batch))

    module, switch = Open(), Switch(batch=4)
    trainer = fit(module, switch, max_epochs=1)
    assert {n for n, p in module.model.named_parameters() if p.requires_grad} == {
        n for n, p in module.model.named_parameters() if n.endswith("bias")
    }
    module.untoggle_optimizer(trainer.optimizers[0])
    assert all(parameter.requires_grad for parameter in module.parameters())


# --- gradients, memory, precision -------------------------------------------------------------------------------------


def test_pending_gradients_of_an_unfinished_accumulation_window_are_carried_over() -> None:
    class Watched(Switch):
        def switch(self, trainer, pl_module):
            dense = pl_module.model
            super().switch(trainer, pl_module)
            self.after = {name: p.grad.clone() for name, p in pl_module.model.named_parameters()}
            assert all(parameter.grad is None for parameter in dense.parameters())  # freed, whoever keeps the network

    switch = Watched(batch=2)  # between the second and the third of four batches
    fit(Lit(), switch, accumulate_grad_batches=4, max_epochs=1)
    assert len(switch.after) == 8
    for name, grad in switch.after.items():
        dense = switch.before[source(name)][2]
        assert dense.any() and torch.equal(grad, inherit(name, dense))


def test_clipping_accumulation_and_schedules_go_on_together() -> None:
    switch, module = Switch(batch=5), Lit(with_schedule(SCHEDULES["cosine"]))
    trainer = fit(module, switch, accumulate_grad_batches=2, gradient_clip_val=0.5, max_epochs=4)
    assert trainer.global_step == 8
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_nothing_keeps_the_dense_parameters() -> None:
    class Deaf(Switch):
        def switch(self, trainer, pl_module):
            super().switch(trainer, pl_module)
            gc.collect()
            self.alive = [name for name, (parameter, *_) in self.before.items() if parameter() is not None]

    switch, ema = Deaf(batch=3), EMAWeightAveraging(decay=0.5)
    twin: list[weakref.ref] = []
    switch.on_train_start = lambda trainer, pl_module: twin.append(weakref.ref(ema._average_model.module.model))
    fit(Lit(), ema, switch, accumulate_grad_batches=2)
    assert switch.alive == []
    assert twin[0]() is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    module, switch = Lit(), Switch()
    fit(module, switch, precision=precision, gradient_clip_val=1.0)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in switch.replacement.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_gradient_scaler_keeps_its_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    scales: list[float] = []

    class Watched(Switch):
        def switch(self, trainer, pl_module):
            scales.append(scaler.get_scale())
            super().switch(trainer, pl_module)
            scales.append(scaler.get_scale())

    module = Lit()
    fit(module, Watched(batch=5), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=1.0)
    assert scales == [1024.0, 1024.0] and scaler.get_scale() == 16384.0
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_frozen_parameters_and_modes_are_those_of_the_dense_network() -> None:
    class Frozen(Lit):
        def on_fit_start(self):
            self.model.up.requires_grad_(False)
            self.model.up.eval()

    module, switch = Frozen(), Switch(batch=2)
    trainer = trainer_with(switch, max_epochs=1, limit_train_batches=2)
    trainer.fit(module, loader(), loader())
    for ticket in module.model.tickets:
        assert not any(parameter.requires_grad for parameter in ticket.up.parameters())
        assert all(parameter.requires_grad for parameter in ticket.down.parameters())
        assert (ticket.up.training, ticket.down.training) == (False, True)
    evaluating = Lit()
    evaluating.on_train_batch_start = lambda *_: evaluating.model.eval() and None
    fit(evaluating, Switch(batch=2), max_epochs=1, limit_train_batches=2)
    assert not any(part.training for part in evaluating.model.modules())


# --- where the module holds the denoiser ------------------------------------------------------------------------------


def test_every_alias_gets_the_replacement() -> None:
    class Aliases(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.same = self.model
            self.listed = nn.ModuleList([nn.Identity(), self.model])
            self.wrapper = nn.Sequential(nn.Identity())
            self.wrapper.inner = self.model
            self.plain = [self.model, {"net": (self.model, 1)}]
            self.plain.append(self.plain)
            object.__setattr__(self.wrapper, "hidden", self.model)

    module, switch = Aliases(), Switch(name="wrapper.inner")
    fit(module, switch)
    new = switch.replacement
    assert isinstance(new, Ensemble)
    assert all(it is new for it in (module.model, module.same, module.listed[1], module.wrapper.inner))
    assert module.plain[0] is new and module.plain[1]["net"] == (new, 1) and module.wrapper.hidden is new
    assert not any(isinstance(m, Denoiser) for n, m in module.named_modules() if "tickets" not in n)


# Dynamo reads gradients of the denoiser's input while it makes its graph symbolic.
QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@QUIET
@pytest.mark.parametrize("form", ["wrapper", "wrapper, raw name", "in place", "beside"])
def test_a_compiled_denoiser_becomes_compiled_tickets(form: str) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    class Watched(Switch):
        def switch(self, trainer, pl_module):
            graphs.clear()
            super().switch(trainer, pl_module)

    module, switch = Lit(), Watched()
    if form == "in place":
        module.model.compile(backend=backend, fullgraph=True)
    elif form == "beside":
        module.fast = torch.compile(module.model, backend=backend, fullgraph=True)
        module.loss = lambda batch: (module.fast(*batch) - batch[0]).square().mean()
    else:
        module.model = torch.compile(module.model, backend=backend, fullgraph=True)
        switch.name = "model._orig_mod" if form.endswith("name") else "model"
    fit(module, switch, EMAWeightAveraging(decay=0.5))
    assert isinstance(module.model, Ensemble)
    assert not any(isinstance(part, OptimizedModule) for part in module.modules())
    assert not any("_orig_mod" in name for name, _ in module.named_parameters())
    assert all(ticket._compiled_call_impl is not None for ticket in module.model.tickets)
    assert graphs  # by the same backend, for the smaller ticket; the other may use what was compiled for its like
    gc.collect()
    assert [name for name, (parameter, *_) in switch.before.items() if parameter() is not None] == []


def test_tickets_do_not_use_up_each_others_recompilations() -> None:
    torch._dynamo.reset()
    ensemble = Ensemble([Denoiser(hidden) for hidden in range(2, 8)])
    compile_like(ensemble, torch.compile(Denoiser(), backend="eager", fullgraph=True).dynamo_ctx)
    with torch._dynamo.config.patch(recompile_limit=2):  # for all tickets together it would be reached, and raise
        for rows in (5, 7):
            for ticket in ensemble.tickets:
                ticket(torch.randn(rows, 2), torch.rand(rows))


def test_unknown_compile_settings_give_the_defaults_with_a_message(caplog, monkeypatch) -> None:
    module, switch = Lit(), Switch()
    defaults: list[nn.Module] = []
    monkeypatch.setattr(Denoiser, "compile", lambda self: defaults.append(self), raising=False)
    module.model._compiled_call_impl = module.model._call_impl
    with caplog.at_level("INFO"):
        fit(module, switch)
    assert defaults == list(module.model.tickets)
    assert "How the denoiser was compiled cannot be recovered" in caplog.text


@QUIET
def test_a_replacement_without_tickets_is_compiled_itself() -> None:
    def smaller(dense: nn.Module) -> Denoiser:
        return build(dense).tickets[0]

    module = Lit()
    module.model = torch.compile(module.model, backend="eager")
    fit(module, Switch(build=smaller, inherit=lambda n, x: inherit(f"tickets.0.{n}", x), source=lambda name: name))
    assert isinstance(module.model, Denoiser) and module.model._compiled_call_impl is not None


@QUIET
def test_a_compiled_lightning_module_goes_on() -> None:
    torch._dynamo.reset()
    module, switch = Lit(), Switch()
    trainer = trainer_with(switch)
    trainer.fit(torch.compile(module, backend="eager"), loader(), loader())
    assert isinstance(module.model, Ensemble)
    assert set(flat(trainer.optimizers[0])) == set(module.parameters())


# --- averaged copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("batch", [1, 3])
def test_averaged_weights_are_cut_like_the_live_ones_and_go_on(order: str, batch: int) -> None:
    class Watched(Switch):
        def switch(self, trainer, pl_module):
            self.averaged = deepcopy(ema._average_model)
            super().switch(trainer, pl_module)
            self.rebuilt = deepcopy(ema._average_model)

    decay = 0.75
    ema, switch, module = EMAWeightAveraging(decay=decay), Watched(batch=batch), Lit()
    live: list[dict[str, Tensor]] = []
    module.on_before_zero_grad = lambda _: live.append({n: p.detach().clone() for n, p in module.named_parameters()})
    fit(module, *([ema, switch] if order == "before" else [switch, ema]), max_epochs=2, limit_val_batches=1)
    dense, rebuilt = switch.averaged.module.model, switch.rebuilt.module.model
    expected = build(dense).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in rebuilt.state_dict().items())
    assert switch.rebuilt.n_averaged == switch.averaged.n_averaged == batch - (order == "after")
    assert ema._average_model.n_averaged == 8
    assert [n for n, _ in ema._average_model.module.named_parameters()] == [n for n, _ in module.named_parameters()]
    # At its end the fit copies the averages to the module.
    for ours, theirs in zip(ema._average_model.module.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_averages_after_the_switch_follow_the_formula() -> None:
    class Trace(Callback):
        def __init__(self) -> None:
            self.live: list[Tensor] = []
            self.average: list[Tensor] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if isinstance(pl_module.model, Ensemble):
                self.live.append(pl_module.model.tickets[0].up.weight.detach().clone())
                self.average.append(ema._average_model.module.model.tickets[0].up.weight.detach().clone())

    ema, trace = EMAWeightAveraging(decay=0.75), Trace()
    fit(Lit(), Switch(batch=3), ema, trace)
    assert len(trace.live) == 10
    for old, new, live in zip(trace.average, trace.average[1:], trace.live[1:], strict=False):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * live)


def test_a_checkpoint_with_averages_holds_the_tickets(tmp_path: Path) -> None:
    module, ema = Lit(), WeightAveraging()
    trainer = fit(module, ema, Switch())
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    saved = torch.load(tmp_path / "average.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == set(module.state_dict())
    assert saved["averaging_state"]["n_averaged"] == 12


def test_stochastic_weight_averaging_follows() -> None:
    module, swa = Lit(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    fit(module, swa, Switch(), max_epochs=4)
    assert isinstance(swa._average_model.model, Ensemble)
    for ours, theirs in zip(swa._average_model.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_average_inside_the_module_follows() -> None:
    class Inside(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.model)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.average.update_parameters(self.model)

    module = Inside()
    trainer = fit(module, Switch())
    assert isinstance(module.average.module, Ensemble) and module.average.module is not module.model
    assert module.average.n_averaged == 12
    assert set(flat(trainer.optimizers[0])) == set(module.parameters())
    assert_matches_a_fresh_configuration(trainer, module)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_build_that_depends_on_the_weights_is_refused() -> None:
    def moody(dense: nn.Module) -> nn.Module:
        new = build(dense)
        if not dense.up.weight.requires_grad or moody.calls:
            new.tickets[1].drop.weight = nn.Parameter(torch.ones(1))
        moody.calls += 1
        return new

    moody.calls = 0
    with pytest.raises(ValueError, match="gave the averaged denoiser another structure than the live one"):
        fit(Lit(), EMAWeightAveraging(), Switch(build=moody, source=lambda n: "up.bias" if "drop" in n else source(n)))


def test_a_parameter_without_dense_parent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source\('tickets.0.up.weight'\) is 'nowhere', which is not a parameter"):
        fit(Lit(), Switch(source=lambda name: "nowhere"))


def test_a_cut_that_does_not_fit_the_weights_is_refused() -> None:
    message = r"inherit\('tickets.0.up.weight', ...\) gives the shape \(8, 2\), but .* shape \(4, 2\)"
    with pytest.raises(ValueError, match=message):
        fit(Lit(), Switch(inherit=lambda name, tensor: tensor))


def test_a_switch_during_validation_is_refused() -> None:
    class Early(Switch):
        def on_validation_start(self, trainer, pl_module):
            self.switch(trainer, pl_module)

    with pytest.raises(RuntimeError, match=r"replace_denoiser was called while the fit was .*averaged weights may"):
        fit(Lit(), Early(batch=None), limit_val_batches=1)


def supported(trainer: pl.Trainer, module: pl.LightningModule | None = None, name: str | None = None) -> None:
    check_supported(trainer, module or Lit(), name)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_parameters_are_refused(strategy: type) -> None:
    trainer = trainer_with()
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=f"strategy={strategy.__name__}.*strategy='ddp'"):
        supported(trainer)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
@pytest.mark.parametrize("devices", [1, 2])
def test_processes_that_are_not_started_as_scripts_are_refused(strategy: str, devices: int) -> None:
    with pytest.raises(MisconfigurationException, match=r"start_method='(fork|spawn)'.*would stay in the worker"):
        supported(trainer_with(strategy=strategy, devices=devices))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"ddp_comm_state": SimpleNamespace()}, "ddp_comm_state=.*Leave `ddp_comm_state` at None"),
        ({"model_averaging_period": 4}, "model_averaging_period=4 of DDPStrategy"),
        ({"static_graph": True}, "static_graph=True of DDPStrategy: .*not static"),
    ],
)
def test_ddp_settings_that_are_bound_to_the_dense_parameters_are_refused(argument: dict, message: str) -> None:
    supported(trainer_with(strategy=DDPStrategy(), devices=2))
    with pytest.raises(MisconfigurationException, match=message):
        supported(trainer_with(strategy=DDPStrategy(**argument), devices=2))


def test_synchronised_batch_norms_are_refused_on_several_processes() -> None:
    module = Lit()
    module.model.norm = nn.BatchNorm1d(2)
    supported(trainer_with(strategy="ddp", devices=2), module)
    supported(trainer_with(sync_batchnorm=True), module)
    supported(trainer_with(strategy="ddp", devices=2, sync_batchnorm=True))
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True with the batch norm 'model.norm'"):
        supported(trainer_with(strategy="ddp", devices=2, sync_batchnorm=True), module)
    module.model.norm = nn.SyncBatchNorm(2)
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True with the batch norm 'model.norm'"):
        supported(trainer_with(strategy="ddp", devices=2), module)


def test_quantising_precision_plugins_are_refused() -> None:
    trainer = trainer_with()
    trainer.strategy.precision_plugin = object.__new__(BitsandbytesPrecision)
    with pytest.raises(MisconfigurationException, match="plugins=BitsandbytesPrecision: it changes the layers"):
        supported(trainer)


class Flat(torch.optim.SGD):
    """Keeps a view of each parameter, as optimizers that work on one flat buffer do."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.1)
        self.views = {"all": [parameter.detach().view(-1) for parameter in flat(self)]}


@pytest.mark.parametrize(("optimizer", "attribute"), [(torch.optim.LBFGS, "_params"), (Flat, "views")])
def test_optimizers_that_hold_parameters_elsewhere_are_refused_at_fit_start(optimizer, attribute) -> None:
    module = Lit(lambda module: optimizer(module.parameters()))
    message = f"configure_optimizers gives {optimizer.__name__}: it keeps parameters in its attribute '{attribute}'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, Switch())


def encoder_twice(module: Lit) -> None:
    module.encoder = module.model.up


def shared_weight(module: Lit) -> None:
    module.other = nn.Linear(2, HIDDEN)
    module.other.weight = module.model.up.weight


def parameter_list(module: Lit) -> None:
    module.kept = {"params": list(module.model.parameters())}


def method(module: Lit) -> None:
    module.kept = module.model.forward


def compiled_method(module: Lit) -> None:
    module.kept = torch.compile(module.model.forward, backend="eager")


def shadow(module: Lit) -> None:
    module.ema = SimpleNamespace(shadow_params=[p.detach().clone() for p in module.model.parameters()])


def copied(module: Lit) -> None:
    module.ema = nn.Sequential(deepcopy(module.model))


def hooked(module: Lit) -> None:
    module.model.up.weight.register_hook(lambda grad: grad.clamp(-1, 1))


@pytest.mark.parametrize(
    ("hold", "message"),
    [
        (encoder_twice, "a part of it is also held as 'encoder'"),
        (shared_weight, "it shares the parameter 'other.weight'"),
        (parameter_list, "the attribute 'kept' keeps parameters, parts or methods of it"),
        (method, "the attribute 'kept' keeps parameters, parts or methods of it"),
        (compiled_method, "the attribute 'kept' keeps parameters, parts or methods of it"),
        (shadow, r"'ema' \(SimpleNamespace\) averages parameters in a list.*EMAWeightAveraging"),
        (copied, "'ema.0' is a copy of it with the same weights, .*EMAWeightAveraging"),
        (hooked, "its parameter 'up.weight' has gradient hooks"),
    ],
)
def test_ways_of_holding_the_denoiser_that_would_leave_dense_pieces_are_refused(hold: Callable, message: str) -> None:
    module = Lit()
    supported(trainer_with(), module, "model")
    hold(module)
    supported(trainer_with(), module)  # without the denoiser's name nothing can be said
    with pytest.raises(MisconfigurationException, match=f"denoiser='model': {message}"):
        supported(trainer_with(), module, "model")


def test_averages_in_the_list_of_a_callback_are_refused() -> None:
    class Ema(Callback):
        def __init__(self) -> None:
            self.ema = SimpleNamespace(shadow_params=[])

    with pytest.raises(MisconfigurationException, match=r"'Ema.ema' \(SimpleNamespace\) averages parameters in a list"):
        supported(trainer_with(Ema()), name="model")


def test_a_second_network_like_the_denoiser_stays_as_it_is() -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Denoiser().requires_grad_(False)
            self.frozen_config = ReadOnly(widths=(1, 2), net=None)

    module = Two()
    weights = deepcopy(module.teacher.state_dict())
    fit(module, Switch())
    assert isinstance(module.model, Ensemble)
    assert all(torch.equal(value, weights[name]) for name, value in module.teacher.state_dict().items())


class ReadOnly(dict):
    """Like the configurations of diffusers models."""

    def __setitem__(self, key, value):
        raise TypeError("read-only")


def test_a_full_graph_around_the_denoiser_is_refused() -> None:
    module = Lit()
    module.wrapper = torch.compile(nn.Sequential(module.model), backend="eager")
    supported(trainer_with(), module, "model")
    module.wrapper = torch.compile(nn.Sequential(module.model), backend="eager", fullgraph=True)
    with pytest.raises(MisconfigurationException, match="'wrapper' around it is compiled with fullgraph=True"):
        supported(trainer_with(), module, "model")


# --- two processes ----------------------------------------------------------------------------------------------------


class Ranks(Callback):
    """After the fit: the same weights on every rank; written down by rank 0."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_fit_end(self, trainer, pl_module):
        weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        everywhere = trainer.strategy.all_gather(weights)
        if trainer.is_global_zero:
            torch.save({"weights": everywhere, "world": trainer.world_size}, self.out)


class OneSided(Lit):
    """From the third batch on, rank 1 sees only early timesteps: it misses a ticket in each of its steps."""

    def training_step(self, batch, batch_idx):
        x, t = batch
        return self.loss([x, t * 0.4 if self.global_rank == 1 and self.global_step > 2 else t])


class OneSidedManual(Manual):
    training_step_loss = OneSided.training_step

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.training_step_loss(batch, batch_idx))
            optimizer.step()


def run_two_processes(out: Path) -> None:
    for kind, accumulate in ((OneSided, 1), (OneSided, 2), (OneSidedManual, 1)):
        switch, module = Switch(batch=5), kind()
        ranks = Ranks(out / f"{kind.__name__}{accumulate}.pt")
        trainer = trainer_with(  # 64 rows on two ranks are four batches an epoch on each
            switch, EMAWeightAveraging(decay=0.5), ranks, strategy="ddp", devices=2, accumulate_grad_batches=accumulate
        )
        trainer.fit(module, loader(64), loader())
        assert isinstance(module.model, Ensemble)
        gc.collect()
        assert [name for name, (parameter, *_) in switch.before.items() if parameter() is not None] == []


@pytest.mark.slow
def test_two_processes_train_the_same_tickets_though_one_misses_a_ticket(tmp_path: Path) -> None:
    package = Path(lightning_earlybird.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(path, weights_only=True) for path in tmp_path.iterdir()]
    assert len(results) == 3
    for result in results:
        assert result["world"] == 2 and result["weights"].isfinite().all()
        assert torch.equal(*result["weights"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two_processes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
