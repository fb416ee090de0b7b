import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from killing import killed_before, killed_in_writing
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from modules import Lit, fit, loader, quiet_trainer

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner
from lightning_earlybird.checkpoint_io import WholeFileCheckpointIO
from lightning_earlybird.files import EnsembleFormatError

CHECKPOINT = {"state_dict": {"weight": torch.arange(3000.0)}, "epoch": 3}


class OwnCheckpointIO(TorchCheckpointIO):
    """A user's own plugin."""


def save(path: Path, value: float) -> None:
    WholeFileCheckpointIO().save_checkpoint({"weight": torch.full((3000,), value)}, path)


def saved_value(path: Path) -> float:
    (value,) = set(torch.load(path, weights_only=True)["weight"].tolist())
    return float(value)


def callback(name: str, tmp_path: Path) -> pl.Callback:
    return EarlyBirdDetector([0.5]) if name == "detector" else TimestepAwarePruner([(0, 1000, 0.0)], dirpath=tmp_path)


def fitted(tmp_path: Path, name: str, *plugins: TorchCheckpointIO | AsyncCheckpointIO) -> pl.Trainer:
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", filename="last", enable_version_counter=False)
    settings = {"max_epochs": 2, "plugins": list(plugins), "enable_checkpointing": True}
    return fit(Lit(), callback(name, tmp_path), checkpoints, batches=2, **settings)


def test_a_checkpoint_is_byte_for_byte_what_lightning_writes(tmp_path: Path) -> None:
    WholeFileCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "new" / "ours.ckpt")
    TorchCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "theirs.ckpt")
    assert (tmp_path / "new" / "ours.ckpt").read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_refuses_a_checkpoint_of_which_one_bit_has_changed(tmp_path: Path) -> None:
    fitted(tmp_path, "pruner")
    path = tmp_path / "checkpoints" / "last.ckpt"
    stored = bytearray(path.read_bytes())
    weight = max(torch.load(path, weights_only=True)["state_dict"].values(), key=torch.numel)
    stored[stored.index(weight.numpy().tobytes()) + 20] ^= 1
    path.write_bytes(stored)
    torch.load(path, weights_only=True)  # torch does not notice
    trainer = quiet_trainer(callback("pruner", tmp_path), max_epochs=3)
    with pytest.raises(EnsembleFormatError, match=r"last\.ckpt: .*is damaged: .* does not match its checksum"):
        trainer.fit(module := Lit(), loader(module), loader(module), ckpt_path=path)


def test_a_checkpoint_without_checksums_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.serialization.set_crc32_options(False)
    try:
        WholeFileCheckpointIO().save_checkpoint(CHECKPOINT, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert WholeFileCheckpointIO().load_checkpoint(path)["epoch"] == 3


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_does_not_unpickle_objects_unless_it_is_told_to(tmp_path: Path) -> None:
    fitted(tmp_path, "pruner")
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"own": Path("somewhere")}, path)
    module = Lit()
    with pytest.raises(EnsembleFormatError, match=r"last\.ckpt: cannot be read .* pass weights_only=False"):
        quiet_trainer(callback("pruner", tmp_path), max_epochs=3).fit(
            module, loader(module), loader(module), ckpt_path=path
        )
    trainer = quiet_trainer(callback("pruner", tmp_path), max_epochs=3)
    trainer.fit(module, loader(module, 2), loader(module), ckpt_path=path, weights_only=False)
    assert trainer.global_step == 6


@pytest.mark.skipif(os.name != "posix", reason="processes are killed by signals")
def test_a_checkpoint_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 0.0)
    seen, killed, act = set(), True, 0
    while killed:
        save(path, 1.0)
        killed = killed_before(act, lambda: save(path, 2.0))
        seen.add(saved_value(path))
        assert list(tmp_path.glob("*.ckpt")) == [path]
        act += 1
    assert act > 4
    assert seen == {1.0, 2.0}
    for size in (0, 100, 5000, 12000):
        assert killed_in_writing(size, lambda: save(path, 3.0))
        assert saved_value(path) == 2.0
    save(path, 3.0)
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("name", ["detector", "pruner"])
def test_the_callbacks_have_a_trainer_write_its_checkpoints_whole(tmp_path: Path, name: str) -> None:
    trainer = fitted(tmp_path, name)
    assert type(trainer.strategy.checkpoint_io) is WholeFileCheckpointIO
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_checkpoints_written_by_a_thread_are_written_whole_as_well(tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO()
    trainer = fitted(tmp_path, "pruner", plugin)
    assert trainer.strategy.checkpoint_io is plugin
    assert type(plugin.checkpoint_io) is WholeFileCheckpointIO
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_plugin_of_the_users_own_stays(tmp_path: Path) -> None:
    own = OwnCheckpointIO()
    assert fitted(tmp_path / "plain", "pruner", own).strategy.checkpoint_io is own
    inner = AsyncCheckpointIO(own)
    assert fitted(tmp_path / "wrapped", "detector", inner).strategy.checkpoint_io is inner
    assert inner.checkpoint_io is own


@pytest.mark.skipif(os.name != "posix", reason="the limit on the size of files is POSIX's")
@pytest.mark.parametrize("limit", [100, 5000, 12200])
def test_a_disk_that_is_full_is_said_and_the_old_checkpoint_stays(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="the checkpoint is not written, an older one there is whole") as error:
            save(path, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(path)
    assert saved_value(path) == 1.0
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_cannot_be_pickled_is_reported_as_ever(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError, RuntimeError), match="pickle"):
        WholeFileCheckpointIO().save_checkpoint({"function": lambda: None}, tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == []


def test_a_home_directory_and_a_relative_path_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/a.ckpt", "b.ckpt", "c/d.ckpt", f"file://{tmp_path}/e.ckpt"):
        WholeFileCheckpointIO().save_checkpoint(CHECKPOINT, path)
        TorchCheckpointIO().load_checkpoint(path, weights_only=True)
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["a.ckpt", "b.ckpt", "d.ckpt", "e.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        WholeFileCheckpointIO().save_checkpoint(CHECKPOINT, "b.ckpt", storage_options={})


def test_a_link_to_a_checkpoint_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    save(tmp_path / "epoch=1.ckpt", 1.0)
    shutil.copy(tmp_path / "epoch=1.ckpt", tmp_path / "copy.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    save(tmp_path / "last.ckpt", 2.0)
    assert saved_value(tmp_path / "epoch=1.ckpt") == 1.0
    assert saved_value(tmp_path / "last.ckpt") == 2.0


def test_a_last_checkpoint_that_is_a_link_is_warned_about(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_last="link")
    with pytest.warns(UserWarning, match=r"save_last='link'.*leaves no last checkpoint.*Use save_last=True"):
        fit(Lit(), EarlyBirdDetector([0.5]), saving, batches=2, max_epochs=1, enable_checkpointing=True)


@pytest.mark.skipif(os.name != "posix", reason="processes are killed by signals")
def test_there_is_a_last_checkpoint_whenever_the_process_is_killed_between_the_best_and_the_last(
    tmp_path: Path,
) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=1)
    trainer = quiet_trainer(EarlyBirdDetector([0.5]), saving, max_epochs=1, enable_checkpointing=True)
    module = Lit()
    trainer.fit(module, loader(module, 2), loader(module, 2))
    # What ModelCheckpoint does after each epoch: a new best file, the old best one removed, then the last.
    trainer.state.fn = TrainerFn.FITTING
    act, killed = 0, True
    while killed:

        def step() -> None:
            saving._save_none_monitor_checkpoint(trainer, {"epoch": torch.tensor(5), "step": torch.tensor(9)})
            saving._save_last_checkpoint(trainer, {})

        killed = killed_before(act, step)
        (last,) = tmp_path.glob("last*.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] == 2
        act += 1
    assert act > 10
