"""LightningCLI builds the callbacks and the strategy from YAML and command lines, and runs whole fits with them."""

import contextlib
import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from lightning.pytorch.cli import LightningCLI
from modules import ConvNet, Lit, loader
from torch import nn

from lightning_earlybird import (
    EarlyBirdDetector,
    MultiTicketStrategy,
    SampleLogger,
    SpacedDDIMScheduler,
    TicketEnsemble,
    TicketEnsembleSampler,
    TimestepAwarePruner,
    TimestepPartition,
    TimestepRegion,
)
from lightning_earlybird.evaluation import SampleQuality
from lightning_earlybird.strategy import MultiTicketStrategy as Strategy

ROOT = Path(__file__).parent.parent
REGIONS = "[[0,300,0.25],[300,1000,0.5]]"
PRUNER = ("--trainer.callbacks=lightning_earlybird.TimestepAwarePruner",)
DETECTOR = ("--trainer.callbacks=lightning_earlybird.EarlyBirdDetector", "--trainer.callbacks.sparsities=[0.25,0.5]")
STRATEGY = "lightning_earlybird.MultiTicketStrategy"
# A search that ends as soon as it may.
SEARCH = """
    - class_path: lightning_earlybird.EarlyBirdDetector
      init_args: {sparsities: [0.25, 0.5], every_n_train_steps: 2, window: 2, threshold: 1.0}
    - class_path: lightning_earlybird.TimestepAwarePruner
      init_args: {regions: [[0, 300, 0.25], [300, 1000, 0.5]], overlap: 20, dirpath: tickets}
"""


class Module(Lit):
    """Its optimizer comes from the command line."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(lambda: ConvNet(width))
        self.drawn: list[tuple[float, float]] = []

    configure_optimizers = pl.LightningModule.configure_optimizers


class Drawing(Module):
    """Draws its timesteps by itself, and notes the bounds that it is given."""

    def sample_timesteps(self, batch_size: int, start: float = 0, stop: float = 1000) -> torch.Tensor:
        self.drawn.append((start, stop))
        return torch.randint(int(start), int(stop), (batch_size,))

    def loss(self, samples: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(samples, self.sample_timesteps(len(samples))), samples)


class Data(pl.LightningDataModule):
    def __init__(self, batches: int = 4) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return loader(ConvNet(), self.batches)

    def val_dataloader(self):
        return loader(ConvNet(), 1)


def magnitudes(denoiser, plan):
    """A criterion; without annotations, as users write them."""
    return torch.arange(plan.num_channels).float()


class Powers:
    """A criterion with a setting."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, denoiser, plan):
        return torch.arange(plan.num_channels).float() ** self.power


@pytest.fixture(autouse=True)
def _a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # LightningCLI warns about arguments of the test runner
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning 2.6 itself calls
    yield
    if torch.distributed.is_initialized():  # of a strategy, which leaves it to the end of the process
        torch.distributed.destroy_process_group()


def command_line(*arguments: str, module: type[pl.LightningModule] = Module, run: bool = False) -> LightningCLI:
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False}
    return LightningCLI(
        module,
        Data,
        args=list(arguments),
        run=run,
        trainer_defaults=quiet,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
    )


def built(*arguments: str, kind: type = TimestepAwarePruner):
    """The callback of that kind which the arguments make."""
    (found,) = [each for each in command_line(*arguments).trainer.callbacks if isinstance(each, kind)]
    return found


def refusal(*arguments: str) -> str:
    """What is said about wrong arguments, by the parser or by what it builds."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises((SystemExit, ValueError)) as caught:
        command_line(*arguments)
    return said.getvalue() + str(caught.value)


@pytest.mark.parametrize(
    "regions",
    [
        REGIONS,
        "[[0,300,0.25,null],[300,1000,0.5]]",
        "[{start: 0, stop: 300, sparsity: 0.25}, {start: 300, stop: 1000, sparsity: 0.5}]",
        "[{class_path: lightning_earlybird.TimestepRegion, init_args: {start: 0, stop: 300, sparsity: 0.25}},"
        " {class_path: lightning_earlybird.TimestepRegion, init_args: {start: 300, stop: 1000, sparsity: 0.5}}]",
        "[[0,300,0.25],{start: 300, stop: 1000, sparsity: 0.5}]",
    ],
)
def test_regions_are_read_in_every_notation_and_integers_stay_integers(regions):
    pruner = built(*PRUNER, f"--trainer.callbacks.regions={regions}", "--trainer.callbacks.overlap=20")
    partition = TimestepPartition.of(pruner.regions, pruner.overlap)
    assert partition.regions == (TimestepRegion(0, 300, 0.25), TimestepRegion(300, 1000, 0.5))
    assert [type(bound) for bound in partition.training_bounds(0)] == [int, int]


def test_max_steps_infinite_bounds_and_fractions_are_read():
    pruner = built(*PRUNER, "--trainer.callbacks.regions=[[-.inf,0.5,0.25,7],[0.5,.inf,0.5]]")
    partition = TimestepPartition.of(pruner.regions)
    assert partition.regions == (TimestepRegion(-math.inf, 0.5, 0.25, 7), TimestepRegion(0.5, math.inf, 0.5))


def test_regions_may_be_the_path_of_saved_tickets():
    assert built(*PRUNER, "--trainer.callbacks.regions=runs/tickets/switch").regions == "runs/tickets/switch"


def test_callbacks_are_known_by_their_short_names_and_appended():
    callbacks = command_line(
        "--trainer.callbacks+=EarlyBirdDetector",
        "--trainer.callbacks.sparsities=[0.25,0.5]",
        "--trainer.callbacks.window=3",
        "--trainer.callbacks+=TimestepAwarePruner",
        f"--trainer.callbacks.regions={REGIONS}",
        "--trainer.callbacks.min_width=0.1",
        "--trainer.callbacks.target=macs",
    ).trainer.callbacks
    detector, pruner = callbacks[:2]
    assert isinstance(detector, EarlyBirdDetector)
    assert (detector.sparsities, detector.window) == ([0.25, 0.5], 3)
    assert isinstance(pruner, TimestepAwarePruner)
    assert (pruner.min_width, pruner.target) == (0.1, "macs")


def test_a_criterion_is_a_name_a_function_or_a_class():
    name = f"{__name__}.magnitudes"
    assert built(*DETECTOR, "--trainer.callbacks.criterion=taylor", kind=EarlyBirdDetector).criterion == "taylor"
    by_name = built(*DETECTOR, f"--trainer.callbacks.criterion={name}", kind=EarlyBirdDetector)
    assert by_name.criterion is magnitudes
    spec = f"{{class_path: {__name__}.Powers, init_args: {{power: 3}}}}"
    powers = built(*DETECTOR, f"--trainer.callbacks.criterion={spec}", kind=EarlyBirdDetector).criterion
    assert isinstance(powers, Powers)
    assert powers.power == 3


def decoded(latents: torch.Tensor) -> torch.Tensor:
    return latents / 2


def test_the_logger_of_samples_is_built_with_its_scheduler_and_decoder():
    samples = built(
        "--trainer.callbacks=SampleLogger",
        "--trainer.callbacks.scheduler={class_path: lightning_earlybird.SpacedDDIMScheduler}",
        f"--trainer.callbacks.decode={__name__}.decoded",
        "--trainer.callbacks.class_labels=[0,1]",
        "--trainer.callbacks.num_samples=2",
        kind=SampleLogger,
    )
    assert isinstance(samples.scheduler, SpacedDDIMScheduler)
    assert samples.decode is decoded
    assert samples.class_labels == [0, 1]


def test_sample_quality_is_built_with_its_scheduler():
    quality = built(
        "--trainer.callbacks=lightning_earlybird.evaluation.SampleQuality",
        "--trainer.callbacks.reference=images.zip",
        "--trainer.callbacks.num_samples=100",
        "--trainer.callbacks.features=classifier:features.safetensors",
        "--trainer.callbacks.scheduler={class_path: diffusers.DDIMScheduler, init_args: {beta_end: 0.01}}",
        kind=SampleQuality,
    )
    assert (quality.reference, quality.num_samples) == ("images.zip", 100)
    assert quality.features == "classifier:features.safetensors"
    assert isinstance(quality.scheduler, DDIMScheduler)
    assert quality.scheduler.config.beta_end == 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trainer.strategy=multi_ticket",),
        (f"--trainer.strategy={STRATEGY}", "--trainer.strategy.assignment=[0,0]"),
        ("--trainer.strategy=MultiTicketStrategy", "--trainer.strategy.timeout=0:02:00"),
        (f"--trainer.strategy={{class_path: {STRATEGY}, init_args: {{assignment: {{0: 0, 1: 0}}, patience_s: 9}}}}",),
    ],
)
def test_the_strategy_is_built_by_name_and_by_class(arguments):
    strategy = command_line(*arguments).trainer.strategy
    assert type(strategy) is Strategy is MultiTicketStrategy
    text = " ".join(arguments)
    assert strategy.assignment == ([0, 0] if "[0,0]" in text else {0: 0, 1: 0} if "{0: 0" in text else None)
    assert strategy.patience_s == (9 if "patience" in text else 30)
    assert strategy._timeout.total_seconds() == (120 if "timeout" in text else 1800)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PRUNER, "--trainer.callbacks.regions=[[0,300,0.25],[310,1000,0.5]]"), "leave a gap: set start=300"),
        (
            (*PRUNER, "--trainer.callbacks.regions=[[0,300,1.5]]"),
            r"regions\[0\]: .*sparsity=1.5\) must lie in \[0, 1\)",
        ),
        (
            (*PRUNER, "--trainer.callbacks.regions=[{start: 0, stop: 300, sparsity: 1.5}]"),
            r"regions\[0\]: .*sparsity=1.5\) must lie in \[0, 1\)",
        ),
        (
            (*PRUNER, "--trainer.callbacks.regions=[{start: 0, end: 300, sparsity: 0.5}]"),
            r"regions\[0\] = .*'end'.* must be a TimestepRegion, a triple",
        ),
        (
            (*PRUNER, "--trainer.callbacks.regions=[[0,a,b]]"),
            "is text, which stands for the path of saved tickets, but",
        ),
        ((*PRUNER, "--trainer.callbacks.regions=[[0,300]]"), r"regions\[0\] = \[0, 300\] must be a TimestepRegion"),
        (
            (*PRUNER, f"--trainer.callbacks.regions={REGIONS}", "--trainer.callbacks.round_to=0"),
            "round_to=0 must be an integer of at least 1",
        ),
        (
            (*PRUNER, f"--trainer.callbacks.regions={REGIONS}", "--trainer.callbacks.target=flops"),
            r"Literal\['channels', 'params', 'macs'\]. Got value: flops",
        ),
        (
            (*PRUNER, f"--trainer.callbacks.regions={REGIONS}", "--trainer.callbacks.overlaps=3"),
            "'overlaps' is not acc",
        ),
        (PRUNER, "the following arguments are required: regions"),
        ((*DETECTOR, "--trainer.callbacks.sparsities=[1.3]"), r"1.3 must lie in \(0, 1\)"),
        ((*DETECTOR, "--trainer.callbacks.threshold=2"), r"threshold=2.0 must lie in \[0, 1\]"),
        ((*DETECTOR, "--trainer.callbacks.criterion=magnitudes"), "Literal.*'magnitude', 'random', 'taylor'"),
        ((f"--trainer.strategy={STRATEGY}", "--trainer.strategy.patience_s=0"), "patience_s=0.0 must be above 0"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence_that_says_why(arguments, message):
    assert re.search(message, refusal(*arguments), re.DOTALL)


def test_a_fit_passes_the_switch_and_its_saved_configuration_runs_again(tmp_path: Path):
    Path("fit.yaml").write_text(f"trainer:\n  max_epochs: 3\n  callbacks:{SEARCH}", encoding="utf-8")
    optimizer = (
        "--optimizer=AdamW",
        "--optimizer.lr=0.01",
        "--lr_scheduler=CosineAnnealingLR",
        "--lr_scheduler.T_max=3",
    )
    given = ("fit", "--config=fit.yaml", *optimizer, "--trainer.callbacks.overlap", "50")
    first = command_line(*given, run=True)
    ensemble = first.model.model
    assert isinstance(ensemble, TicketEnsemble)
    assert ensemble.partition == TimestepPartition.of([(0, 300, 0.25), (300, 1000, 0.5)], 50)
    (group,) = first.trainer.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0, abs=1e-9)  # the schedule of the command line went on across the switch
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in first.model.parameters()}

    saved = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    pruner = saved["trainer"]["callbacks"][-1]["init_args"]
    assert pruner["regions"] == [[0, 300, 0.25], [300, 1000, 0.5]]
    assert pruner["overlap"] == 50
    again = command_line("fit", "--config=config.yaml", run=True)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    sampler = TicketEnsembleSampler.from_pretrained(tmp_path / "tickets" / "ensemble", denoiser=ConvNet)
    assert sampler.partition == ensemble.partition


SAVING = """
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, filename: "{epoch}", save_top_k: -1}
"""
ALONE = """
    - class_path: lightning_earlybird.EarlyBirdDetector
      init_args: {sparsities: [0.5], every_n_train_steps: 2, window: 2, threshold: 1.0, on_emergence: prune}
"""


@pytest.mark.parametrize(
    ("search", "strategy", "checkpoint"),
    [
        (SEARCH, "auto", "checkpoints/epoch=1.ckpt"),
        (ALONE, "auto", "checkpoints/epoch=1.ckpt"),
        (SEARCH, "multi_ticket", "checkpoints/tickets_0_1/epoch=1.ckpt"),
    ],
)
def test_a_fit_with_an_optimizer_from_the_command_line_resumes_after_the_switch_to_the_bit(
    search, strategy, checkpoint
):
    """LightningCLI makes that optimizer of the dense network, before it looks at any checkpoint."""
    Path("fit.yaml").write_text(f"trainer:\n  callbacks:{search}{SAVING}", encoding="utf-8")
    given = ("fit", "--config=fit.yaml", "--optimizer=AdamW", "--optimizer.lr=0.01", "--trainer.max_epochs=3")
    given += ("--trainer.enable_checkpointing=true", f"--trainer.strategy={strategy}")
    given += ("--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5")
    whole = command_line(*given, run=True)
    resumed = command_line(*given, f"--ckpt_path={checkpoint}", run=True)
    assert isinstance(resumed.model.model, TicketEnsemble)
    assert resumed.trainer.global_step == whole.trainer.global_step
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    states = [cli.trainer.optimizers[0].state_dict() for cli in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][index][key]) for key, value in state.items())


def test_what_print_config_prints_makes_the_same_callbacks(capsys: pytest.CaptureFixture[str]):
    Path("fit.yaml").write_text(f"trainer:\n  callbacks:{SEARCH}", encoding="utf-8")
    criterion = "--trainer.callbacks={class_path: EarlyBirdDetector, init_args: {sparsities: [0.1], criterion: "
    criterion += f"{__name__}.magnitudes}}}}"
    with pytest.raises(SystemExit):
        command_line("fit", "--config=fit.yaml", "--print_config", run=True)
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert "lightning_earlybird.TimestepAwarePruner" in Path("printed.yaml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        command_line("fit", "--config=printed.yaml", "--print_config", run=True)
    assert capsys.readouterr().out == Path("printed.yaml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        command_line("fit", criterion, "--print_config", run=True)
    assert f"criterion: {__name__}.magnitudes" in capsys.readouterr().out


def test_the_strategy_trains_both_tickets_on_one_device_with_bounds_in_integers():
    strategy = f"\n  strategy:\n    class_path: {STRATEGY}\n    init_args: {{assignment: [0, 0]}}"
    Path("fit.yaml").write_text(f"trainer:\n  max_epochs: 3{strategy}\n  callbacks:{SEARCH}", encoding="utf-8")
    cli = command_line("fit", "--config=fit.yaml", "--optimizer=Adam", module=Drawing, run=True)
    assert isinstance(cli.trainer.strategy, MultiTicketStrategy)
    assert cli.trainer.strategy.plan is not None
    # In the search, in training with the overlap, in validation without it.
    assert set(cli.model.drawn) == {(0, 1000), (0, 320), (300, 1000), (0, 300)}
    assert {type(bound) for bounds in cli.model.drawn for bound in bounds} == {int}
    assert isinstance(cli.model.model, TicketEnsemble)


def test_the_example_configuration_runs_as_the_documentation_says(tmp_path: Path):
    """``docs/cli.md``'s ``train.py`` as a process of its own, with ``examples/configs/cli.yaml``."""
    (script,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.DOTALL)
    Path("train.py").write_text(script, encoding="utf-8")
    shutil.copy(ROOT / "examples/configs/cli.yaml", "cli.yaml")
    short = ["--trainer.max_epochs=7", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command = [
        sys.executable,
        "train.py",
        "fit",
        "--config=cli.yaml",
        "--optimizer=AdamW",
        "--optimizer.lr=2e-4",
        *short,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the denoiser has become 3 tickets" in done.stderr + done.stdout
    (ensemble,) = tmp_path.glob("lightning_logs/version_0/tickets/ensemble")
    assert (tmp_path / "lightning_logs/version_0/config.yaml").exists()
    assert "regions: " in (ROOT / "examples/configs/cli.yaml").read_text(encoding="utf-8")
    assert ensemble.is_dir()
