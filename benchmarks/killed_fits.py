"""Kills a small fit before one act upon files, resumes it, and compares what it comes to with a fit left alone.

    python benchmarks/killed_fits.py [--every N] [--first K]

The fit searches, switches, trains tickets, and writes a checkpoint after each epoch. It is run in a copy of this
process, which has imported everything but trained nothing, so that a kill costs half a second and no start of Python.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from killing import differences, files, killed_before  # noqa: E402 -- shared with the tests
from modules import REGIONS, Lit, quiet_trainer  # noqa: E402

from lightning_earlybird import TimestepAwarePruner  # noqa: E402
from lightning_earlybird.durable import settle  # noqa: E402
from lightning_earlybird.tickets import load_ensemble  # noqa: E402

EPOCHS = 5


def fit(folder: Path) -> None:
    """Train to the end, from the last checkpoint in the folder if there is one, as a user would write it."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module = Lit()
    samples = torch.randn(24, *module.sample_shape, generator=torch.Generator().manual_seed(1))
    pruner = TimestepAwarePruner(REGIONS, dirpath=folder, max_search_steps=7, round_to=4)
    saving = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    trainer = quiet_trainer(
        EMAWeightAveraging(decay=0.9),
        pruner,
        saving,
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=""),
    )
    loader = DataLoader(TensorDataset(samples), batch_size=8, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")


def check(folder: Path) -> int:
    """Whatever there is loads; the step of the last checkpoint, 0 without one."""
    for name in ("switch", "ensemble"):
        settle(folder / name)
        if (folder / name).exists():
            load_ensemble(folder / name, lambda: Lit().model)
    checkpoints = list(folder.rglob("*.ckpt"))
    assert len(checkpoints) <= 1, checkpoints
    return max((torch.load(path, weights_only=True)["global_step"] for path in checkpoints), default=0)


def compare(whole: Path, resumed: Path) -> list[str]:
    """What a fit that was killed has come to, against one that was not."""
    states = []
    for folder in (whole, resumed):
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        (key,) = (key for key in state["callbacks"] if key.startswith("ModelCheckpoint"))
        del state["callbacks"][key]  # holds the folder's name
        states.append(state)
    found = differences(*states)
    for name in ("switch", "ensemble"):
        found += differences(files(whole / name), files(resumed / name), place=name)
    return found + [f"left aside: {path}" for path in resumed.rglob(".*")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="kill before every N-th act")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, outcomes, killed, act = time.monotonic(), [], True, options.first
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root, "whole")
        assert not killed_before(-1, lambda: fit(whole))
        while killed:
            folder = Path(root, str(act))
            killed = killed_before(act, lambda folder=folder: fit(folder))
            if killed:
                aside = sorted({path.suffix for path in folder.rglob(".*")})
                step = check(folder)
                assert not killed_before(-1, lambda folder=folder: fit(folder))
                outcomes.append((act, step, aside, compare(whole, folder)))
            act += options.every
    for act, step, aside, found in outcomes:
        print(f"act {act:>3}: resumed at step {step:>2} {' '.join(aside):<16} {found[:5] or 'same result'}")
    failed = sum(bool(found) for *_, found in outcomes)
    hit = sum(bool(aside) for _, _, aside, _ in outcomes)
    print(
        f"{len(outcomes)} kills, {hit} of them in the middle of writing a checkpoint or tickets; {failed} fits came to "
        f"another result. {time.monotonic() - began:.0f} s."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)
