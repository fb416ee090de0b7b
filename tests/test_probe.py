"""Finding the denoiser: by watching one training step, whatever else that step calls."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import ConvNet, Lit, Mlp, Tutorial, fit, loader
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.optim.swa_utils import AveragedModel

from lightning_earlybird import EarlyBirdDetector
from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.importance import channel_scores
from lightning_earlybird.probe import DenoiserCall, DenoiserProbe

NOISY = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
STEPS = torch.arange(6) * 100


def watch(root: nn.Module, step: Callable[[], Any], name: str | None = None) -> DenoiserCall:
    """What the probe makes of one training step."""
    probe = DenoiserProbe(root, name)
    probe.start()
    try:
        step()
    finally:
        probe.stop()
    return probe.resolve()


def holding(**networks: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(networks)


def hooks_of(root: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in root.modules())


def stance() -> str:
    return eval_frame._stance.stance


# --- what is found ----------------------------------------------------------------------------------------------------


def test_the_denoiser_of_lightnings_diffusion_tutorial_is_found() -> None:
    module = Tutorial()
    (images,) = next(iter(loader(module)))
    module.log = lambda *args, **kwargs: None
    call = watch(module, lambda: module.training_step([images], 0))
    assert call.name == "model"
    assert call.timesteps == TimestepArgument("timestep", 1)
    assert call.sample_shape == (1, 8, 8)
    noisy, steps = call.args
    assert noisy.shape == (1, 1, 8, 8) and steps.shape == (1,) and steps.dtype == torch.long


def test_the_call_is_cut_to_its_first_sample_in_copies_of_its_own() -> None:
    class Conditional(Mlp):
        def forward(self, x, timesteps, extra=None, scale=1.0):
            return super().forward(x, timesteps) * scale + extra["bias"] + extra["rows"][0]

    root = holding(net=Conditional())
    noisy = NOISY.clone().requires_grad_()
    extra = {"bias": torch.ones(2), "rows": (torch.arange(12.0).view(6, 2),)}
    call = watch(root, lambda: root["net"](noisy, STEPS, extra=extra, scale=2.0))
    assert torch.equal(call.args[0], NOISY[:1]) and not call.args[0].requires_grad
    assert call.args[0].data_ptr() != noisy.data_ptr()
    assert torch.equal(call.args[1], STEPS[:1])
    assert call.kwargs["scale"] == 2.0
    assert call.kwargs["extra"]["bias"].shape == (2,)  # not one row per sample: whole
    assert torch.equal(call.kwargs["extra"]["rows"][0], torch.tensor([[0.0, 1.0]]))


def test_a_wrapper_around_the_network_is_the_denoiser() -> None:
    class Preconditioned(nn.Module):
        """As in EDM: scales inputs and outputs, and tells the inner network a transformed noise level."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Mlp(64)

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            scale = (sigma.view(-1, 1) ** 2 + 1).rsqrt()
            return self.inner(x * scale, sigma.flatten().log() / 4)

    root = holding(net=Preconditioned())
    call = watch(root, lambda: root["net"](NOISY, torch.rand(6, 1) + 0.1))
    assert call.name == "net"
    assert call.timesteps == TimestepArgument("sigma", 1, trailing=1)


def test_timesteps_may_come_as_a_keyword() -> None:
    root = holding(net=Mlp())
    assert watch(root, lambda: root["net"](NOISY, timesteps=STEPS)).timesteps == TimestepArgument("timesteps", 1)
    assert watch(root, lambda: root["net"](timesteps=STEPS, x=NOISY)).timesteps == TimestepArgument("timesteps", 1)


def test_timesteps_may_come_as_a_keyword_that_the_signature_does_not_name() -> None:
    class Open(Mlp):
        def forward(self, *args, **kwargs):
            return super().forward(args[0], kwargs["t"])

    root = holding(net=Open())
    assert watch(root, lambda: root["net"](NOISY, t=STEPS)).timesteps == TimestepArgument("t", None)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 1, 1)])
def test_noise_levels_may_have_the_shape_of_broadcasting(shape: tuple[int, ...]) -> None:
    class Broadcast(ConvNet):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return super().forward(x, sigma.flatten())

    root = holding(net=Broadcast())
    call = watch(root, lambda: root["net"](torch.randn(6, 1, 4, 4), torch.rand(6).view(shape)))
    assert call.timesteps == TimestepArgument("sigma", 1, trailing=len(shape) - 1)
    assert call.sample_shape == (1, 4, 4)
    assert call.args[1].shape == (1, *shape[1:])


def test_class_labels_are_not_mistaken_for_timesteps() -> None:
    class Labelled(Mlp):
        def forward(self, x, class_labels, noise_labels):
            return super().forward(x, noise_labels + class_labels)

    root = holding(net=Labelled())
    labels = torch.zeros(6, dtype=torch.long)
    assert watch(root, lambda: root["net"](NOISY, labels, STEPS)).timesteps == TimestepArgument("noise_labels", 2)
    call = watch(root, lambda: root["net"](NOISY, class_labels=labels, noise_labels=STEPS))
    assert call.timesteps == TimestepArgument("noise_labels", 2)


def test_a_classifier_with_labels_is_not_mistaken_for_the_denoiser() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 500)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.layer(x), labels)

    root = holding(classifier=Classifier(), net=Mlp())

    def step() -> None:
        root["classifier"](NOISY, torch.zeros(6, dtype=torch.long))
        root["net"](NOISY, STEPS)

    assert watch(root, step).name == "net"


def test_an_argument_of_unknown_name_is_taken_where_nothing_better_is_there() -> None:
    class Unnamed(Mlp):
        def forward(self, x, progress):
            return super().forward(x, progress)

    root = holding(net=Unnamed())
    assert watch(root, lambda: root["net"](NOISY, STEPS)).timesteps == TimestepArgument("progress", 1)


def test_labels_are_not_taken_for_timesteps_where_no_name_tells() -> None:
    class Labelled(Mlp):
        def forward(self, x, y, progress):
            return super().forward(x, progress)

    root = holding(net=Labelled())
    with pytest.raises(
        MisconfigurationException, match=r"denoiser='net' takes 2 arguments .* sample, y, progress, and"
    ):
        watch(root, lambda: root["net"](NOISY, torch.arange(6), STEPS))


def test_a_frozen_teacher_is_ignored() -> None:
    root = holding(teacher=Mlp(32).requires_grad_(False), student=Mlp())

    def step() -> None:
        root["teacher"](NOISY, STEPS)
        root["student"](NOISY, STEPS)

    assert watch(root, step).name == "student"


@pytest.mark.parametrize("frozen", [False, True])
def test_an_averaged_copy_that_the_step_calls_is_ignored(frozen: bool) -> None:
    network = Mlp()
    root = holding(average=AveragedModel(network).requires_grad_(not frozen), net=network)

    def step() -> None:
        with torch.no_grad():
            root["average"](NOISY, STEPS)
        root["net"](NOISY, STEPS)

    assert watch(root, step).name == "net"


def test_a_network_that_toggle_optimizer_has_frozen_for_now_counts_as_trained() -> None:
    class Gan(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.critic = Mlp(), nn.Linear(2, 1)

    module = Gan()
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (module.generator, module.critic)]
    module._trainer = type("Optimizers", (), {"optimizers": optimizers})()

    def critic_step() -> None:
        module.toggle_optimizer(optimizers[1])
        module.critic(module.generator(NOISY, STEPS))

    assert watch(module, critic_step).name == "generator"


def test_several_calls_in_one_step_are_one_denoiser() -> None:
    root = holding(net=Mlp())

    def step() -> None:
        first = root["net"](NOISY[:4], STEPS[:4])
        root["net"](torch.cat([first, NOISY]), torch.cat([STEPS[:4], STEPS]))

    call = watch(root, step)
    assert call.name == "net" and torch.equal(call.args[0], NOISY[:1])


def test_arguments_are_cast_to_the_dtype_of_the_network() -> None:
    root = holding(net=Mlp())
    call = watch(root, lambda: root["net"](NOISY, timesteps=STEPS))
    args, kwargs = call.for_network(Mlp().double())
    assert args[0].dtype == torch.float64
    assert kwargs["timesteps"].dtype == torch.long


# --- what is refused --------------------------------------------------------------------------------------------------


def test_two_candidates_are_both_named() -> None:
    root = holding(small=Mlp(8), large=Mlp(16))

    def step() -> None:
        root["small"](NOISY, STEPS)
        root["large"](NOISY, STEPS)

    message = (
        r"denoiser=None: 2 sub-modules were called.*'small' \(Mlp, 42 parameters, samples of shape \(2,\)\); "
        r"'large' \(Mlp, 82 parameters, .*Say which one.*denoiser='large'"
    )
    with pytest.raises(MisconfigurationException, match=message):
        watch(root, step)
    assert watch(root, step, name="small").name == "small"


def test_a_pinned_inner_network_is_taken_instead_of_its_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mlp()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x, t)

    root = holding(net=Wrapper())
    call = watch(root, lambda: root["net"](NOISY, STEPS), name="net.inner")
    assert call.timesteps.name == "timesteps" and torch.equal(call.seen, STEPS)


def test_a_pinned_network_is_taken_though_it_is_frozen() -> None:
    root = holding(net=Mlp().requires_grad_(False))
    assert watch(root, lambda: root["net"](NOISY, STEPS), name="net").name == "net"


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    root = holding(model=Mlp(), teacher=Mlp())
    message = r"denoiser='unet' is not a sub-module of ModuleDict. Its sub-modules are \['model', 'teacher'\]"
    with pytest.raises(MisconfigurationException, match=message):
        DenoiserProbe(root, "unet")


def test_a_pinned_network_that_gets_no_timesteps_is_refused() -> None:
    root = holding(net=Mlp(), plain=nn.Linear(2, 2))

    def step() -> None:
        root["plain"](NOISY)
        root["net"](NOISY, STEPS[:1])

    for name in ("plain", "net"):
        with pytest.raises(MisconfigurationException, match=f"denoiser='{name}' was called, but without one timestep"):
            watch(root, step, name=name)


def test_a_pinned_network_that_is_not_called_is_refused() -> None:
    root = holding(net=Mlp(), other=Mlp())
    with pytest.raises(MisconfigurationException, match="denoiser='other' was not called in the first training step"):
        watch(root, lambda: root["net"](NOISY, STEPS), name="other")


def test_a_step_without_timesteps_is_refused() -> None:
    root = holding(net=nn.Linear(2, 2))
    message = "denoiser=None: no trainable sub-module was called with a batch of samples and one timestep per sample"
    with pytest.raises(MisconfigurationException, match=message):
        watch(root, lambda: root["net"](NOISY))
    with pytest.raises(MisconfigurationException, match=message):
        watch(holding(net=Mlp()), lambda: None)


def test_one_timestep_for_the_whole_batch_is_refused() -> None:
    root = holding(net=Mlp())
    with pytest.raises(MisconfigurationException, match="one timestep per sample"):
        watch(root, lambda: root["net"](NOISY, torch.tensor([7])))


class TwoNetworks(Lit):
    """Trains two denoisers in one step."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.second = Mlp(4)

    def loss(self, samples: Tensor) -> Tensor:
        steps = torch.randint(1000, (len(samples),))
        return (self.model(samples, steps) + self.second(samples, steps)).square().mean()


class WithoutTimesteps(Lit):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(2, 2))

    def loss(self, samples: Tensor) -> Tensor:
        return self.model(samples).square().mean()


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (TwoNetworks, None, "denoiser=None: 2 sub-modules.*'model' .*'second' .*denoiser='model'"),
        (WithoutTimesteps, None, "denoiser=None: no trainable sub-module"),
        (WithoutTimesteps, "model", "denoiser='model' was called, but without one timestep per sample"),
        (Lit, "net", r"denoiser='net' is not a sub-module of Lit. Its sub-modules are \['model'\]"),
        (TwoNetworks, "second.up", "denoiser='second.up' was called, but without one timestep per sample"),
    ],
)
def test_a_fit_without_a_clear_denoiser_ends_before_anything_is_learned(module, name, message) -> None:
    module = module()
    before = deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, EarlyBirdDetector([0.5], denoiser=name), max_epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert hooks_of(module) == 0 and stance() == "default"


def test_a_denoiser_that_is_built_in_configure_model_can_be_named() -> None:
    class Late(Lit):
        def __init__(self) -> None:
            super().__init__(nn.Identity)
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Mlp()

        def loss(self, samples: Tensor) -> Tensor:
            return self.net(samples, torch.randint(1000, (len(samples),))).square().mean()

    detector = EarlyBirdDetector([0.5], denoiser="net", round_to=2)
    fit(Late(), detector, max_epochs=1)
    assert detector.found is not None and detector.found.call.name == "net"
    with pytest.raises(MisconfigurationException, match="denoiser='unet' is not a sub-module of Late"):
        fit(Late(), EarlyBirdDetector([0.5], denoiser="unet"), max_epochs=1)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class LabelCritic(Mlp):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels)


class TimedCritic(Mlp):
    pass


class CriticFirst(Lit):
    """Trained by hand: the critic takes a step before the denoiser is called for the first time."""

    def __init__(self, critic: type[nn.Module] = Critic) -> None:
        super().__init__(Mlp)
        self.automatic_optimization = False
        self.critic = critic()
        self.teacher = Mlp().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        optimizer, critic_optimizer = self.optimizers()
        (samples,) = batch
        steps = torch.randint(1000, (len(samples),))
        more = () if type(self.critic) is Critic else (steps,)
        critic_optimizer.zero_grad()
        self.manual_backward(self.critic(self.teacher(samples, steps), *more).square().mean())
        critic_optimizer.step()
        optimizer.zero_grad()
        self.critic(self.model(samples, steps), *more).square().mean().backward()  # without telling Lightning
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.model, self.critic)]


def test_a_denoiser_that_is_called_after_another_network_has_learned_is_found_before_it_learns_itself() -> None:
    module, detector = CriticFirst(), EarlyBirdDetector([0.5], round_to=2)
    initial = deepcopy(module.model)
    fit(module, detector, max_epochs=1)
    assert detector.found is not None and detector.found.call.name == "model"
    scores = channel_scores(dict(initial.named_parameters()), detector.found.plan)
    started = detector.windows[0.5].pairwise()[0][0], detector.windows[0.5]._start[1]
    assert started[0] == 1  # the critic's step
    assert torch.equal(started[1].flat(), draw_mask(detector.found.plan, scores, 0.5, round_to=2).flat())


def test_another_network_with_timesteps_that_learns_first_is_refused_after_the_first_step() -> None:
    message = "denoiser=None: 2 sub-modules were called.*'critic' .*'model' "
    with pytest.raises(MisconfigurationException, match=message):
        fit(CriticFirst(TimedCritic), EarlyBirdDetector([0.5], round_to=2), max_epochs=1)
    detector = EarlyBirdDetector([0.5], denoiser="model", round_to=2)
    fit(CriticFirst(TimedCritic), detector, max_epochs=1)
    assert detector.found is not None and detector.found.call.name == "model"


def test_a_network_with_labels_that_learns_first_is_not_taken_for_the_denoiser() -> None:
    message = "denoiser=None: 'critic' was called .* before the first backward pass, 'model' .*denoiser='model'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(CriticFirst(LabelCritic), EarlyBirdDetector([0.5], round_to=2), max_epochs=1)


# --- what is left behind ----------------------------------------------------------------------------------------------


def compiled_wrapper(module: Lit) -> None:
    module.model = torch.compile(module.model, backend="eager")


def compiled_in_place(module: Lit) -> None:
    module.model.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:.*profiler.*function:UserWarning")
@pytest.mark.parametrize("compiled", [compiled_wrapper, compiled_in_place])
def test_a_compiled_denoiser_is_found_and_goes_on_compiled(compiled: Callable[[Lit], None]) -> None:
    torch._dynamo.reset()
    module, detector = Lit(), EarlyBirdDetector([0.5], round_to=2)
    compiled(module)
    seen: list[tuple[int, str]] = []

    class Look(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            seen.append((hooks_of(pl_module), stance()))

    fit(module, detector, Look(), max_epochs=1)
    assert detector.found is not None and detector.found.call.name == "model"
    assert seen == [(0, "default")] * 4
    assert "_orig_mod" not in detector.found.plan.groups[0].name
    # The steps after the first ran the compiled code: dynamo holds entries for it.
    network = getattr(module.model, "_orig_mod", module.model)
    assert torch._dynamo.eval_frame._debug_get_cache_entry_list(type(network).forward.__code__)


def test_probes_that_overlap_leave_no_stance() -> None:
    first, second = DenoiserProbe(holding(net=Mlp())), DenoiserProbe(holding(net=Mlp()))
    first.start()
    second.start()
    first.stop()
    assert stance() == "force_eager"
    second.stop()
    assert stance() == "default"
    fit(Lit(Mlp), EarlyBirdDetector([0.5], round_to=2), EarlyBirdDetector([0.25], round_to=2), max_epochs=1)
    assert stance() == "default"


@pytest.mark.parametrize("compiled", [compiled_wrapper, compiled_in_place])
def test_an_exception_in_the_first_step_leaves_no_hook_and_no_stance(compiled: Callable[[Lit], None]) -> None:
    class Failing(Lit):
        def loss(self, samples: Tensor) -> Tensor:
            assert stance() == "force_eager" and hooks_of(self) > 0
            raise ZeroDivisionError("the user's own")

    module = Failing()
    compiled(module)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        fit(module, EarlyBirdDetector([0.5], round_to=2), max_epochs=1)
    assert hooks_of(module) == 0 and stance() == "default"


def test_a_first_batch_that_is_skipped_leaves_no_hook() -> None:
    class Skipping(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.trainer.current_epoch == 0 else None

    module, detector = Skipping(Mlp), EarlyBirdDetector([0.5], round_to=2)
    fit(module, detector, max_epochs=2)
    assert detector.found is not None and len(module.losses) == 4
    assert hooks_of(module) == 0 and stance() == "default"


def test_a_step_without_a_loss_still_shows_the_denoiser() -> None:
    class Lossless(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return None

    module, detector = Lossless(Mlp), EarlyBirdDetector([0.5], round_to=2)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(module, detector, max_epochs=1)
    assert detector.found is not None and hooks_of(module) == 0
