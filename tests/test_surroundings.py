"""Fits whose surroundings fail: disks, loggers and their services, workers that load data."""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, ConvNet, Lit, OnStep, Repeatable, fit, loader, quiet_trainer
from torch.utils.data import DataLoader, Dataset

from lightning_earlybird import EarlyBirdDetector, TicketEnsemble, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.parallel.phase import TicketPhase
from lightning_earlybird.tickets import load_ensemble

SWITCH = 6


def quick() -> EarlyBirdDetector:
    return EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)


def at_step(step: int, act: Callable[[], None]) -> OnStep:
    """To be placed first: acts after the batch of that step, before the other callbacks hear of it."""
    return OnStep(lambda trainer, module: act() if trainer.global_step == step else None)


def assert_same_network(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# --- disks ------------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own, which can be filled and made read-only."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fill(self) -> None:
        with (self.root / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass  # it is full now

    def clear(self) -> None:
        (self.root / "ballast").unlink()

    def freeze(self) -> None:
        self._remount("ro")

    def thaw(self) -> None:
        self._remount("rw")

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.root)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], capture_output=True)
    except OSError:
        pytest.skip("there is no command to mount a file system")
    if mounted.returncode:
        pytest.skip("this user may not mount file systems")
    yield Disk(root)
    subprocess.run(["umount", "--lazy", str(root)], check=True)


FAULTS = {
    "full": (Disk.fill, Disk.clear, "No space left on device"),
    "read-only": (Disk.freeze, Disk.thaw, "Read-only file system"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tickets_that_cannot_be_written_at_the_switch_do_not_end_the_training(fault, disk: Disk, tmp_path) -> None:
    begin, end, problem = FAULTS[fault]
    undisturbed = Lit()
    fit(undisturbed, quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "other"), max_epochs=3)
    module, directory = Lit(), disk.root / "tickets"
    pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=directory)
    spoil, mend = at_step(SWITCH - 1, lambda: begin(disk)), at_step(SWITCH + 2, lambda: end(disk))
    with pytest.warns(UserWarning) as warned:
        fit(module, spoil, mend, quick(), pruner, max_epochs=3)
    texts = [str(warning.message) for warning in warned]
    lost, *figures = [text for text in texts if "could not be written" in text]
    assert re.search(rf"tickets at the switch could not be written to '{directory}/switch' \(.*{problem}", lost)
    assert len(figures) == 3 and all("The figure" in text and problem in text for text in figures)
    # Nothing is half there, and the training is the one that it would have been.
    assert not (directory / "switch").exists() and not list(directory.glob(".*"))
    assert pruner.switched_at == SWITCH and module.losses == undisturbed.losses
    assert_same_network(load_ensemble(directory / "ensemble", ConvNet), module.model)


def test_a_file_in_the_way_of_the_tickets_does_not_end_the_training(tmp_path: Path) -> None:
    place = tmp_path / "tickets"
    in_the_way = at_step(SWITCH - 1, lambda: (place / "switch").write_text("notes") and None)
    place.mkdir()
    module = Lit()
    with pytest.warns(UserWarning, match="tickets at the switch could not be written .* a file is there"):
        fit(module, in_the_way, quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=place), max_epochs=3)
    assert (place / "switch").read_text() == "notes"
    assert_same_network(load_ensemble(place / "ensemble", ConvNet), module.model)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trained_ensemble_is_written_elsewhere_where_its_disk_refuses(fault, disk: Disk, tmp_path: Path) -> None:
    begin, end, problem = FAULTS[fault]
    module, directory, home = Lit(), disk.root / "tickets", tmp_path / "home"
    home.mkdir()
    ema = EMAWeightAveraging(decay=0.8)
    pruner = TimestepAwarePruner(REGIONS, round_to=4, dirpath=directory)
    spoil = at_step(SWITCH + 2, lambda: begin(disk))
    with pytest.warns(UserWarning, match=rf"ensemble could not be written to .*{problem}.* instead; move it") as warned:
        fit(module, ema, spoil, quick(), pruner, max_epochs=3, default_root_dir=home)
    end(disk)
    (place,) = home.iterdir()
    assert any(repr(str(place)) in str(warning.message) for warning in warned)
    assert_same_network(load_ensemble(place, ConvNet), ema._average_model.module.model)
    assert {"switch"} == {path.name for path in directory.iterdir() if path.suffix != ".png"}
    load_ensemble(directory / "switch", ConvNet)


def test_where_no_disk_takes_the_ensemble_the_error_says_where_it_still_is(
    disk: Disk, tmp_path: Path, monkeypatch
) -> None:
    directory = disk.root / "tickets"
    former = Lit()
    fit(former, quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=directory), max_epochs=2)

    class NowhereElse(pl.Callback):
        def on_train_end(self, trainer, pl_module):  # and not before: checkpoints go through the temporary directory
            monkeypatch.setattr(tempfile, "tempdir", str(disk.root))

    module, pruner = Lit(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=directory)
    saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}")
    callbacks = [at_step(SWITCH + 2, disk.fill), NowhereElse(), quick(), pruner, saving]
    trainer = quiet_trainer(*callbacks, max_epochs=3, enable_checkpointing=True, default_root_dir=disk.root)
    with pytest.raises(OSError, match=r"No space left .* Checkpoints of this fit: .*epoch=2.ckpt'. This process still"):
        trainer.fit(module, loader(module), loader(module))
    monkeypatch.undo()
    # What was there before is whole, and nothing half written lies about.
    assert_same_network(load_ensemble(directory / "ensemble", ConvNet), former.model)
    names = {path.name for path in (*disk.root.iterdir(), *directory.iterdir()) if path.suffix != ".png"}
    assert names == {"ballast", "tickets", "switch", "ensemble"}
    # The remedy that the error names, and the other one.
    TicketEnsembleSampler.from_trainer(trainer).save_pretrained(tmp_path / "rescued")
    assert_same_network(load_ensemble(tmp_path / "rescued", ConvNet), module.model)
    again = Lit()
    resumed = TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "again")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        fit(again, quick(), resumed, max_epochs=3, ckpt_path=tmp_path / "checkpoints" / "epoch=2.ckpt")
    assert_same_network(load_ensemble(tmp_path / "again" / "ensemble", ConvNet), module.model)


def test_a_directory_that_cannot_be_written_to_is_refused_before_training(disk: Disk) -> None:
    disk.freeze()
    module = Lit()
    with pytest.raises(MisconfigurationException, match=r"dirpath='.*/tickets': '.*/disk' cannot be written"):
        fit(module, quick(), TimestepAwarePruner(REGIONS, dirpath=disk.root / "deep" / "tickets"), max_epochs=1)
    assert module.losses == []


def test_a_directory_below_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    module = Lit()
    with pytest.raises(MisconfigurationException, match=r"dirpath='.*/notes/tickets': '.*/notes' is a file, so that"):
        fit(module, quick(), TimestepAwarePruner(REGIONS, dirpath=tmp_path / "notes" / "tickets"), max_epochs=1)
    assert module.losses == []


@pytest.mark.parametrize("step", [SWITCH - 3, SWITCH + 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_fit_with_the_one_before_to_go_on_from(
    step: int, disk: Disk, tmp_path: Path
) -> None:
    """Lightning's own error, in the search and after it: nothing of the callbacks hides it or is left behind."""

    def callbacks(name: str) -> list[pl.Callback]:
        return [quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / name)]

    def saving(root: Path) -> ModelCheckpoint:
        return ModelCheckpoint(root, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    module = Repeatable()
    with pytest.raises(OSError, match=r"No space left on device; the checkpoint is not written"):
        full = at_step(step, disk.fill)
        fit(module, full, *callbacks("a"), saving(disk.root), max_epochs=3, enable_checkpointing=True)
    assert "on_save_checkpoint" not in vars(module) and not module.model._forward_pre_hooks
    last = disk.root / f"step={(step - 1) // 2 * 2}.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that|Be aware that when using `ckpt_path`")
        fit(again := Repeatable(), *callbacks("b"), max_epochs=3, ckpt_path=last)
    whole = Repeatable()
    fit(whole, *callbacks("c"), max_epochs=3)
    assert_same_network(again, whole)


def test_a_ticket_that_a_group_of_ranks_cannot_write_is_gathered_all_the_same(tmp_path: Path) -> None:
    module = Lit()
    trainer = fit(module, quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "tickets"), max_epochs=2)
    (tmp_path / "finished").write_text("in the way")
    group = SimpleNamespace(leads=True, hosted=[1], directory=tmp_path, _trainer=trainer, _module=module, _name="model")
    with pytest.warns(UserWarning, match=r"the trained ticket 1 could not be written to '.*/finished/ticket_1' \("):
        TicketPhase.write_finished(group)  # type: ignore[arg-type]  # that of a running world


# --- loggers ----------------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """Counts what the callbacks give it, and fails on demand."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self, fail: Callable[[int], bool] = lambda call: False) -> None:
        super().__init__()
        self.fail = fail
        self.calls: list[tuple[int, set[str]]] = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, set(metrics)))
        if self.fail(len(self.calls)):
            raise ConnectionError("the service is gone")

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def logged_fit(tmp_path: Path, loggers: Any, max_epochs: int = 3) -> Lit:
    module, pruner = Lit(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "tickets")
    fit(module, quick(), pruner, max_epochs=max_epochs, logger=loggers)
    assert pruner.switched_at == SWITCH and isinstance(module.model, TicketEnsemble)
    return module


@pytest.mark.parametrize("broken", [lambda call: True, lambda call: call == 3], ids=["always", "once"])
def test_a_logger_that_raises_is_warned_about_once_and_training_goes_on(broken, tmp_path: Path) -> None:
    sound = logged_fit(tmp_path / "sound", whole := Recorder())
    failing, other = Recorder(broken), Recorder()
    with pytest.warns(UserWarning) as warned:
        module = logged_fit(tmp_path / "broken", [failing, other])
    texts = [str(warning.message) for warning in warned if "log" in str(warning.message)]
    texts = [text for text in texts if "logging interval" not in text]
    assert len(texts) == 1 and re.match(r"Recorder failed to log .* \(ConnectionError: the service is gone\)", texts[0])
    assert module.losses == sound.losses
    assert failing.calls == other.calls == whole.calls  # it is tried again, and the other misses nothing


def test_a_writer_that_fails_on_figures_and_texts_does_not_end_the_training(tmp_path: Path, monkeypatch) -> None:
    logger = TensorBoardLogger(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space for events")

    monkeypatch.setattr(logger.experiment, "add_image", refuse)
    monkeypatch.setattr(logger.experiment, "add_text", refuse)
    with pytest.warns(UserWarning, match=r"TensorBoardLogger failed to log .* \(OSError: no space for events\)"):
        logged_fit(tmp_path, logger)
    assert (tmp_path / "tickets" / "mask_distance.png").exists()


def test_loggers_are_called_at_checks_and_at_the_switch_and_not_at_every_step(tmp_path: Path) -> None:
    """What a slow logger costs: as many calls as there are events, however long the fit."""
    logged_fit(tmp_path / "short", short := Recorder(), max_epochs=3)
    logged_fit(tmp_path / "long", long := Recorder(), max_epochs=10)
    # Null lines, two checks, the switch and what the tickets are, the loss at it, that at the end, what it all cost.
    assert len(short.calls) == len(long.calls) == 8


SERVICE = '''
import json, os, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as pl
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from modules import Lit, OnStep, REGIONS, fit
from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner

root, told = sys.argv[2], {}

def callbacks(name):
    detector = EarlyBirdDetector([0.25, 0.5], every_n_train_steps=3, window=2, threshold=1.0)
    return detector, TimestepAwarePruner(REGIONS, round_to=4, dirpath=f"{root}/{name}")

def service():
    """Process ids of the W&B service of this process."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{entry}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if parent == os.getpid() and "wandb-core" in command:
            found.append(int(entry))
    return found

def run(name, act, logger=None):
    module = Lit()
    logger = WandbLogger(project="x", save_dir=root, offline=True) if logger is None else logger
    detector, pruner = callbacks(name)
    event = OnStep(lambda trainer, module: act() if trainer.global_step == 4 else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(module, event, detector, pruner, max_epochs=3, logger=logger)
            error = None
        except Exception as problem:
            error = type(problem).__name__
    texts = [str(each.message) for each in caught if "failed to log" in str(each.message)]
    told[name] = {"error": error, "switched_at": pruner.switched_at, "steps": len(module.losses), "warnings": texts}
    return logger

def signalled(number):
    def act():
        for process in service():
            os.kill(process, number)
    return act

class Talkative(Lit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

def leave():
    with open(f"{root}/told.json", "w") as file:
        json.dump(told, file)
    sys.stdout.flush()
    os._exit(0)  # the service is gone, and W&B's own exit handler would say so at length

if sys.argv[3] == "unreachable":
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    run("unreachable", lambda: None, WandbLogger(project="x", save_dir=root, settings=wandb.Settings(init_timeout=1)))
    run("again", lambda: None, False)
    leave()
run("finished", wandb.finish)
run("stalled", signalled(signal.SIGSTOP))
signalled(signal.SIGCONT)()
gone = run("killed", signalled(signal.SIGKILL))
saving = ModelCheckpoint(f"{root}/checkpoints", filename="last", every_n_train_steps=1, enable_version_counter=False)
detector, pruner = callbacks("talkative")
module = Talkative()
try:
    fit(module, detector, pruner, saving, max_epochs=3, logger=gone, log_every_n_steps=7, enable_checkpointing=True)
except Exception as problem:
    told["own"] = {"error": type(problem).__name__, "steps": len(module.losses)}
again = Talkative()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trainer = fit(again, *callbacks("again"), max_epochs=3, ckpt_path=f"{root}/checkpoints/last.ckpt")
told["resumed"] = {"steps": trainer.global_step, "kind": type(again.model).__name__}
leave()
'''


def run_service(tmp_path: Path, case: str) -> dict[str, Any]:
    pytest.importorskip("wandb")
    if not sys.platform.startswith("linux"):
        pytest.skip("the service's process is found in /proc")
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    environment = {**os.environ, "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_CACHE_DIR": str(tmp_path / "cache"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path), case]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "told.json").read_text())


@pytest.mark.slow
def test_training_goes_on_where_the_wandb_service_is_closed_stalled_or_killed(tmp_path: Path) -> None:
    told = run_service(tmp_path, "mid-run")
    for name, problem in (("finished", "UsageError"), ("stalled", None), ("killed", "Connection")):
        case = told[name]
        assert case["error"] is None and case["switched_at"] == SWITCH and case["steps"] == 12, (name, case)
        assert len(case["warnings"]) == (problem is not None) and all(problem in text for text in case["warnings"])
    # What the module logs itself fails in Lightning's hands; the last checkpoint is there to go on from.
    assert told["own"]["error"] and told["own"]["steps"] == 7
    assert told["resumed"] == {"steps": 12, "kind": "TicketEnsemble"}


@pytest.mark.slow
def test_a_wandb_server_that_is_out_of_reach_ends_the_fit_before_anything_is_learned(tmp_path: Path) -> None:
    """Lightning opens the run in ``setup``, and says so itself."""
    told = run_service(tmp_path, "unreachable")
    assert told["unreachable"]["error"] == "CommError" and told["unreachable"]["steps"] == 0
    assert told["again"]["error"] is None and told["again"]["switched_at"] == SWITCH


# --- workers ----------------------------------------------------------------------------------------------------------


class Deadly(Dataset):
    """Ends the worker process at one sample, while a file says so."""

    def __init__(self, shape: tuple[int, ...], sample: int, switch: Path) -> None:
        self.data = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
        self.sample, self.switch = sample, switch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        if index == self.sample and self.switch.exists():
            os._exit(7)
        return (self.data[index],)


@pytest.mark.parametrize("epoch", [1, 2])  # in the middle of the epoch of the switch, and after it
def test_a_worker_that_dies_ends_the_fit_and_the_same_callbacks_go_on_from_the_last_checkpoint(
    epoch: int, tmp_path: Path
) -> None:
    def run(name: str, *more: pl.Callback, callbacks: list[pl.Callback] | None = None, ckpt_path=None) -> Repeatable:
        nonlocal module, last
        module = Repeatable()
        last = callbacks or [quick(), TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / name)]
        data = DataLoader(Deadly(module.sample_shape, 17, tmp_path / "deadly"), batch_size=8, num_workers=1)
        saving = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(*more, *last, saving, max_epochs=4, enable_checkpointing=True)
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
            trainer.fit(module, data, data, ckpt_path=ckpt_path)
        return module

    module: Repeatable | None = None
    last: list[pl.Callback] = []
    whole = run("whole")
    arm = OnStep(lambda trainer, module: (tmp_path / "deadly").touch() if trainer.global_step == 4 * epoch else None)
    with pytest.raises((RuntimeError, ConnectionError), match=r"exited unexpectedly|Connection reset"):
        run("broken", arm)
    assert module is not None and not {"on_load_checkpoint", "on_save_checkpoint"} & vars(module).keys()
    assert all(not part._forward_pre_hooks for part in module.modules())
    (tmp_path / "deadly").unlink()
    with pytest.warns(UserWarning, match="Checkpoint directory .* exists and is not empty"):
        resumed = run("broken", callbacks=last, ckpt_path=tmp_path / "broken" / f"epoch={epoch - 1}.ckpt")
    assert last[1].switched_at == SWITCH
    assert_same_network(resumed, whole)
