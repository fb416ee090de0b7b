"""Samplers from Lightning checkpoints, without a Trainer and without the user's module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from modules import ConvNet, Lit, Tutorial, fit, tiny_unet
from torch import nn

from lightning_earlybird import EnsembleFormatError, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.checkpointing import save_structure
from lightning_earlybird.saved_structure import CHECKPOINT_KEY

pytestmark = [
    # Raised inside diffusers' schedulers against NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_search_steps=2 reached"),
    pytest.mark.filterwarnings(r"ignore:sparsity=.* of the channels cannot be met"),
]

REGIONS = [(0, 300, 0.25), (300, 600, 0.5), (600, 1000, 0.5)]
UNET_CALL = torch.linspace(-1, 1, 256).view(4, 1, 8, 8), torch.tensor([0, 299, 300, 999])
CONV_CALL = torch.linspace(-1, 1, 64).view(4, 1, 4, 4), torch.tensor([0, 299, 300, 999])


class Fit:
    """A fit of two epochs of four steps, with the switch before the third; its checkpoints and its sampler."""

    def __init__(self, path: Path, module: pl.LightningModule, ema: bool = True, **settings: Any) -> None:
        self.path = path
        callbacks: list[pl.Callback] = [EMAWeightAveraging(decay=0.8)] if ema else []
        pruner = TimestepAwarePruner(REGIONS, round_to=4, max_search_steps=2, dirpath=path / "tickets", **settings)
        saving = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        self.trainer = fit(module, *callbacks, pruner, saving, max_epochs=2, enable_checkpointing=True)
        self.last = path / "step=8.ckpt"

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.last, weights_only=True)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Of a diffusers model; the averaged weights are the last ones, and the module holds them after the fit."""
    return Fit(tmp_path_factory.mktemp("unet"), Tutorial())


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Of a network of the user's own, with norms that ``shrink`` does not make."""
    return Fit(tmp_path_factory.mktemp("conv"), Lit(), norm="exact")


def assert_same(one: nn.Module, other: nn.Module, call: Any) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        theirs = other.state_dict()[name]
        assert torch.equal(value, theirs) and value.dtype == theirs.dtype and value.stride() == theirs.stride(), name
    with torch.no_grad():
        ours, theirs = one(*call), other(*call)
    assert torch.equal(getattr(ours, "sample", ours), getattr(theirs, "sample", theirs))


def edited(run: Fit, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = run.checkpoint
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


def test_a_sampler_from_a_checkpoint_is_that_from_the_trainer(unet: Fit) -> None:
    state = torch.get_rng_state()
    sampler = TicketEnsembleSampler.from_checkpoint(unet.last)
    assert torch.equal(torch.get_rng_state(), state)
    expected = TicketEnsembleSampler.from_trainer(unet.trainer)
    assert type(sampler) is TicketEnsembleSampler and not any(module.training for module in sampler.modules())
    assert_same(sampler, expected, UNET_CALL)
    assert (sampler.partition, sampler.timesteps) == (expected.partition, expected.timesteps)
    ours, theirs = sampler.record, expected.record
    assert (ours.denoiser, ours.edits, ours.facts, ours.sample_shape) == (
        theirs.denoiser,
        theirs.edits,
        theirs.facts,
        theirs.sample_shape,
    )
    assert all(a.distance(b) == 0 for a, b in zip(ours.masks, theirs.masks, strict=True))
    images = [
        each.sample(2, scheduler=DDIMScheduler(), num_inference_steps=4, generator=torch.manual_seed(0), progress=False)
        for each in (sampler, expected)
    ]
    assert torch.equal(*images)


def test_a_sampler_from_a_checkpoint_can_be_saved_and_trained(unet: Fit, tmp_path: Path) -> None:
    sampler = TicketEnsembleSampler.from_checkpoint(str(unet.last))
    sampler.save_pretrained(tmp_path / "ensemble")
    assert_same(TicketEnsembleSampler.from_pretrained(tmp_path / "ensemble"), sampler, UNET_CALL)
    before = unet.last.read_bytes()
    sampler.train()
    sampler(*UNET_CALL).sample.square().mean().backward()
    torch.optim.SGD(sampler.parameters(), 0.1).step()
    assert unet.last.read_bytes() == before  # the file was mapped, and is let go of


def test_live_weights_are_had_by_name(conv: Fit, tmp_path: Path) -> None:
    def load(path: Path, weights: Any) -> TicketEnsembleSampler:
        return TicketEnsembleSampler.from_checkpoint(path, ConvNet, weights=weights)

    def forget(checkpoint: dict[str, Any]) -> None:
        del checkpoint["current_model_state"], checkpoint["averaging_state"]

    live, averaged = load(conv.last, "raw"), load(conv.last, "ema")
    assert_same(averaged, load(conv.last, "auto"), CONV_CALL)
    for name, value in live.state_dict().items():
        assert torch.equal(value, conv.checkpoint["current_model_state"][f"model.{name}"])
    assert any(not torch.equal(a, b) for a, b in zip(live.parameters(), averaged.parameters(), strict=True))
    # Without averages there are live weights only.
    path = edited(conv, tmp_path / "live.ckpt", forget)
    assert_same(load(path, "raw"), load(path, "auto"), CONV_CALL)
    with pytest.raises(ValueError, match=r"weights='ema': '.*live.ckpt' was saved without a WeightAveraging callback"):
        load(path, "ema")
    with pytest.raises(ValueError, match="weights='averaged' must be one of 'auto', 'raw', 'ema'"):
        load(path, "averaged")


def test_a_network_of_the_users_own_needs_its_factory(conv: Fit) -> None:
    with pytest.raises(ValueError, match=r"denoiser=None: .* pass denoiser="):
        TicketEnsembleSampler.from_checkpoint(conv.last)
    sampler = TicketEnsembleSampler.from_checkpoint(conv.last, denoiser=ConvNet)
    assert_same(sampler, TicketEnsembleSampler.from_trainer(conv.trainer), CONV_CALL)
    with pytest.raises(
        ValueError, match=r"path='.*step=8.ckpt': the tickets do not fit the network of denoiser=: tensor"
    ):
        TicketEnsembleSampler.from_checkpoint(conv.last, denoiser=lambda: ConvNet(8))


def test_dtype_and_memory_format_are_those_of_the_tickets(tmp_path: Path) -> None:
    module = Lit()
    module.model.to(memory_format=torch.channels_last)
    run = Fit(tmp_path, module, ema=False)
    trained = run.trainer.lightning_module.model.to(torch.bfloat16)
    assert any(not p.is_contiguous() for p in trained.parameters())
    run.trainer.save_checkpoint(tmp_path / "half.ckpt")
    sampler = TicketEnsembleSampler.from_checkpoint(tmp_path / "half.ckpt", ConvNet)
    assert_same(sampler, trained.eval(), (CONV_CALL[0].bfloat16(), CONV_CALL[1]))


def test_a_checkpoint_of_the_search_is_refused_with_what_to_do(unet: Fit) -> None:
    with pytest.raises(ValueError, match=r"path='.*step=1.ckpt' holds no tickets: .* Take a later checkpoint"):
        TicketEnsembleSampler.from_checkpoint(unet.path / "step=1.ckpt")


def test_what_is_no_checkpoint_is_refused(unet: Fit, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TicketEnsembleSampler.from_checkpoint(tmp_path / "nowhere.ckpt")
    with pytest.raises(IsADirectoryError):
        TicketEnsembleSampler.from_checkpoint(tmp_path)
    (tmp_path / "text.ckpt").write_text("no checkpoint at all")
    torch.save([1], tmp_path / "list.ckpt")
    for name, message in (("text", "cannot be read as a checkpoint"), ("list", r"the document is \[1\], expected an")):
        with pytest.raises(EnsembleFormatError, match=rf"{name}\.ckpt: {message}"):
            TicketEnsembleSampler.from_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(ValueError, match=r"path=\[\] must name at least one checkpoint"):
        TicketEnsembleSampler.from_checkpoint([])
    with pytest.raises(EnsembleFormatError, match=r"cannot be read .* not unpickled"):
        TicketEnsembleSampler.from_checkpoint(edited(unet, tmp_path / "o.ckpt", lambda c: c.update(note=Path("x"))))


def test_a_checkpoint_in_the_old_format_of_torch_is_read(conv: Fit, tmp_path: Path) -> None:
    torch.save(conv.checkpoint, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    sampler = TicketEnsembleSampler.from_checkpoint(tmp_path / "old.ckpt", ConvNet)
    assert_same(sampler, TicketEnsembleSampler.from_checkpoint(conv.last, ConvNet), CONV_CALL)


# --- tickets that were trained apart ----------------------------------------------------------------------------------


def parts(run: Fit, directory: Path, *groups: list[int]) -> list[Path]:
    """Checkpoints as groups of ranks write them, each with its own tickets."""
    paths = []
    for number, group in enumerate(groups):
        module = Lit()
        module.model = TicketEnsembleSampler.from_checkpoint(run.last, ConvNet)
        for index in set(range(len(REGIONS))) - set(group):
            module.model.tickets[index] = AbsentTicket(module.model.tickets[index])
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6"}
        save_structure(module, checkpoint)
        paths.append(directory / f"group_{number}.ckpt")
        torch.save(checkpoint, paths[-1])
    return paths


def test_checkpoints_of_all_groups_are_put_together(conv: Fit, tmp_path: Path) -> None:
    paths = parts(conv, tmp_path, [1], [0, 2])
    sampler = TicketEnsembleSampler.from_checkpoint(paths, ConvNet)
    assert_same(sampler, TicketEnsembleSampler.from_checkpoint(conv.last, ConvNet), CONV_CALL)
    assert sampler.hosted == (0, 1, 2)


def test_a_part_of_the_groups_is_refused_by_name(conv: Fit, tmp_path: Path) -> None:
    first, second, third = parts(conv, tmp_path, [1], [0, 2], [1, 2])
    message = r"path=\['.*group_0.ckpt'\]: the tickets \[0, 2\] of 3 are missing. .* give a checkpoint of each group"
    with pytest.raises(ValueError, match=message):
        TicketEnsembleSampler.from_checkpoint(first, ConvNet)
    with pytest.raises(ValueError, match=r"path: '.*group_1.ckpt' and '.*group_2.ckpt' both hold ticket 2; give one"):
        TicketEnsembleSampler.from_checkpoint([second, third], ConvNet)


def test_groups_of_different_fits_are_refused(conv: Fit, tmp_path: Path) -> None:
    first, second = parts(conv, tmp_path, [1], [0, 2])
    checkpoint = torch.load(second, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["partition"]["overlap"] = 20
    torch.save(checkpoint, second)
    with pytest.raises(ValueError, match=r"path='.*group_1.ckpt' is not of the same fit as the checkpoints before it"):
        TicketEnsembleSampler.from_checkpoint([first, second], ConvNet)


def test_the_dense_network_may_be_given_for_diffusers_models_too(unet: Fit, tmp_path: Path) -> None:
    def forget(checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY]["record"]["denoiser"] = None

    path = edited(unet, tmp_path / "undescribed.ckpt", forget)
    with pytest.raises(ValueError, match="denoiser=None"):
        TicketEnsembleSampler.from_checkpoint(path)
    sampler = TicketEnsembleSampler.from_checkpoint(path, denoiser=tiny_unet)
    assert_same(sampler, TicketEnsembleSampler.from_trainer(unet.trainer), UNET_CALL)
