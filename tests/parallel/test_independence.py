"""Three ranks, a ticket each: what a rank holds in memory, who waits for whom, and where metrics arrive.

In the first fit rank 2 takes ten times as long as the others for each step, and collectives may wait for seconds only;
in the second one nobody is slow; in the third the logger of rank 0 is.
"""

import csv
import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from modules import ConvNet, Lit, OnStep, quiet_trainer
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from worlds import run

from lightning_earlybird import EarlyBirdDetector, MultiTicketStrategy, TimestepAwarePruner

SLOW_STEPS = (14, 14, 36)
REGIONS = [(0, 240, 0.25, 14), (240, 440, 0.5, 14), (440, 1000, 0.75)]
WIDTH = 320  # 930,000 parameters, 3.7 MB
TIMEOUT_S = 4
STEPS = {"slow": 36, "quick": 12, "slow_logger": 12}
SWITCH = 2


class Wide(Lit):
    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__(lambda: ConvNet(WIDTH))
        self.pause_s = pause_s

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.strategy.is_split:
            time.sleep(self.pause_s)
        self.log("train_loss", loss, prog_bar=True)
        return loss


class SlowLogger(CSVLogger):
    """As one that writes to the other end of a bad line."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        time.sleep(0.1)
        super().log_metrics(metrics, step)


def storages() -> dict[int, int]:
    """Address -> bytes of the memory of all tensors that Python can reach."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    held = [each.untyped_storage() for each in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def resident() -> int:
    """Bytes of memory that the process occupies, Python's and others'."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Watch(OnStep):
    """Notes times and memory."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.times: list[float] = []
        self.memory: dict[str, int] = {}
        self.wrappers: list[int] = []

    def on_train_start(self, trainer, pl_module):
        # Of the groups: processes may start, and come together, as slowly as ever.
        trainer.strategy._timeout = timedelta(seconds=TIMEOUT_S)

    def note(self, trainer: Any, module: Any) -> None:
        if trainer.strategy.is_split:
            self.times.append(time.time())
        if trainer.global_step in (SWITCH, SWITCH + 3):
            phase = "tickets" if trainer.strategy.is_split else "dense"
            self.memory[phase] = sum(storages().values())
            self.wrappers.append(sum(type(each) is DistributedDataParallel for each in gc.get_objects()))
            self.memory[f"{phase}_rss"] = resident()
            own = list(module.model.parameters())
            self.memory[f"{phase}_parameters"] = sum(each.nbytes for each in own)
            if trainer.strategy.is_split:
                # What is late now times out within seconds.
                _set_pg_timeout(timedelta(seconds=TIMEOUT_S), trainer.strategy._phase.groups._world)


def train(out: Path) -> None:
    """The scenario."""
    images = torch.randn(240, *ConvNet.sample_shape, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(images), batch_size=1)
    watches = {}

    def fit(name: str, pruner: Any, pauses: dict[int, float], loggers: Any, *callbacks: Any) -> None:
        watches[name] = watch = Watch()
        strategy = MultiTicketStrategy({0: 0, 1: 1, 2: 2})
        trainer = quiet_trainer(
            *callbacks,
            pruner,
            watch,
            strategy=strategy,
            devices=3,
            max_steps=STEPS[name] + (SWITCH if name == "slow" else 0),
            logger=loggers,
            log_every_n_steps=1,
        )
        trainer.fit(Wide(pauses.get(trainer.global_rank, 0.02)), data)
        torch.save(
            {"times": watch.times, "memory": watch.memory, "wrappers": watch.wrappers, "steps": trainer.global_step},
            out / f"{name}_{trainer.global_rank}.pt",
        )

    loggers = [
        CSVLogger(out, name="", version="csv"),
        TensorBoardLogger(out, name="", version="tensorboard"),
        WandbLogger(project="test", save_dir=out, offline=True),
    ]
    fit(
        "slow",
        TimestepAwarePruner(REGIONS, round_to=4, overlap=50, dirpath=out / "slow"),
        {2: 0.2},
        loggers,
        EarlyBirdDetector([0.25, 0.5, 0.75], every_n_train_steps=1, window=2, threshold=1.0, criterion="magnitude"),
        EMAWeightAveraging(decay=0.9),
        LearningRateMonitor("step"),
    )
    for logger in loggers:
        logger.finalize("success")
    saved = out / "slow" / "switch"
    fit("quick", TimestepAwarePruner(saved, dirpath=out / "quick"), {}, False)
    fit(
        "slow_logger",
        TimestepAwarePruner(saved, dirpath=out / "slow_logger"),
        {},
        SlowLogger(out, name="", version="slow_logger"),
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("independence")
    run(__file__, folder)
    return folder


def states(out: Path, name: str) -> list[dict]:
    return [torch.load(out / f"{name}_{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.slow
def test_after_the_switch_a_rank_holds_what_its_own_ticket_needs(out):
    for state in states(out, "slow"):
        dense, own = state["memory"]["dense_parameters"], state["memory"]["tickets_parameters"]
        assert dense > 3.5e6
        # Parameters, gradients, two moments and the average: five times the parameters. Then batches and masks.
        spare = 200_000
        assert 5 * dense <= state["memory"]["dense"] < 5 * dense + 4 * spare
        assert 5 * own <= state["memory"]["tickets"] < 5 * own + spare
        assert state["wrappers"] == [1, 0]
    for state in states(out, "slow")[1:]:  # rank 0 has loaded what it draws figures with
        seen, occupied = (state["memory"][f"dense{kind}"] - state["memory"][f"tickets{kind}"] for kind in ("", "_rss"))
        assert occupied > 0.5 * seen
    sizes = [state["memory"]["tickets_parameters"] for state in states(out, "slow")]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


@pytest.mark.slow
def test_a_slow_group_slows_nobody_and_nobody_s_wait_for_it_times_out(out):
    slow, quick = states(out, "slow"), states(out, "quick")

    def pace(state: dict) -> float:
        times = state["times"]
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    for rank in (0, 1):
        assert (len(slow[rank]["times"]), len(slow[2]["times"])) == (14, 36)
        assert pace(slow[rank]) < 2 * pace(quick[rank]) + 0.02
        assert pace(slow[rank]) < pace(slow[2]) / 2
    # Had they waited in a collective, it would have timed out.
    waited = slow[2]["times"][-1] - max(slow[rank]["times"][-1] for rank in (0, 1))
    assert waited > TIMEOUT_S


def read_csv(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    found[name][int(row["step"])] = float(value)
    return found


@pytest.mark.slow
def test_the_metrics_of_all_tickets_reach_the_csv_logger_of_rank_0(out):
    found = read_csv(out / "csv" / "metrics.csv")
    for ticket in range(3):
        steps = list(range(SWITCH, SWITCH + SLOW_STEPS[ticket]))
        assert sorted(found[f"ticket_{ticket}/train_loss"]) == steps
        assert sorted(found[f"ticket_{ticket}/lr-AdamW"]) == steps[1:]  # the first was logged before the switch
        assert found[f"ticket_{ticket}/steps_per_second"]
        assert min(found[f"ticket_{ticket}/remaining_seconds"].values()) >= 0
    assert sorted(found["train_loss"]) == list(range(SWITCH))
    losses = [tuple(found[f"ticket_{ticket}/train_loss"].values()) for ticket in range(3)]
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_the_metrics_of_all_tickets_reach_tensorboard(out):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"), {"scalars": 0})
    events.Reload()
    for ticket in range(3):
        steps = [event.step for event in events.Scalars(f"ticket_{ticket}/train_loss")]
        assert sorted(steps) == list(range(SWITCH, SWITCH + SLOW_STEPS[ticket]))


def wandb_records(path: Path) -> list[bytes]:
    """What is in a file of wandb, which is a LevelDB log: blocks of 32 KiB with records, or parts of them."""
    content, offset, records, parts = path.read_bytes(), 7, [], b""
    while offset + 7 <= len(content):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        parts += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


@pytest.mark.slow
def test_the_metrics_of_all_tickets_reach_wandb(out):
    from wandb.proto import wandb_internal_pb2

    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, list[int]] = defaultdict(list)
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        for name in row:
            found[name].append(int(row.get("trainer/global_step", -1)))
    for ticket in range(3):
        assert sorted(found[f"ticket_{ticket}/train_loss"]) == list(range(SWITCH, SWITCH + SLOW_STEPS[ticket]))


@pytest.mark.slow
def test_a_slow_logger_blocks_rank_0_alone_and_loses_nothing(out):
    found, quick, slow = read_csv(out / "slow_logger" / "metrics.csv"), states(out, "quick"), states(out, "slow_logger")
    for ticket in range(3):
        assert sorted(found[f"ticket_{ticket}/train_loss"]) == list(range(STEPS["slow_logger"]))
    for rank in (1, 2):
        durations = [state["times"][-1] - state["times"][0] for state in (slow[rank], quick[rank])]
        assert durations[0] < 2 * durations[1] + 0.5
    assert slow[0]["times"][-1] - slow[0]["times"][0] > 0.1 * (STEPS["slow_logger"] - 1)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
