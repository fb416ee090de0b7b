"""Evaluations of fits on two ranks: the scores of one process, on every rank, and no rank waits for another forever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from modules import REGIONS, ConvNet, Lit, loader, quiet_trainer
from torch import nn

import lightning_earlybird
from lightning_earlybird import EarlyBirdDetector, SpacedDDIMScheduler, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.evaluation import SampleQuality, load_features, reference_statistics
from lightning_earlybird.evaluation.drawing import drawn, finite_uint8
from lightning_earlybird.evaluation.scores import QualityMeter

REFERENCE = torch.randint(60, 200, (21, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SAMPLES, BATCH, STEPS = 22, 4, 3  # six batches, the last of two samples; the reference has six, the last of one


class Halves(nn.Module):
    """Four features of 4x4 images."""

    def forward(self, images):
        return nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)


class Ranks(pl.Callback):
    """After the fit: the results of every rank, and the ensemble, written down by the first."""

    def __init__(self, out: Path, score: SampleQuality) -> None:
        self.out, self.score = out, score

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        everywhere = [None] * trainer.world_size
        torch.distributed.all_gather_object(everywhere, self.score.results)
        if trainer.is_global_zero:
            self.out.write_text(json.dumps(everywhere))


def two_processes(out: Path, strategy: str) -> None:
    os.environ["LIGHTNING_EARLYBIRD_CACHE"] = str(out / "cache")
    score = SampleQuality(
        REFERENCE, num_samples=SAMPLES, batch_size=BATCH, num_inference_steps=STEPS, features=Halves, kid_subsets=4,
        kid_subset_size=8, every_n_epochs=1,
    )  # fmt: skip
    module = Lit()
    torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", "0")))
    callbacks = [
        score,  # first, so that what it does at the end comes before the others
        EMAWeightAveraging(decay=0.8),
        EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0),
        TimestepAwarePruner(REGIONS, round_to=4, dirpath=out / "tickets"),
        Ranks(out / "results.json", score),
    ]
    settings = {"strategy": strategy, "devices": 2, "max_epochs": 4, "default_root_dir": out}
    quiet_trainer(*callbacks, **settings).fit(module, loader(module, 8), loader(module, 8))


def scored_alone(directory: Path):
    """The ensemble on disk, scored in this process."""
    extractor = load_features(Halves)
    statistics = reference_statistics(REFERENCE, extractor, device=torch.device("cpu"), batch_size=5, progress=False)
    meter = QualityMeter(statistics, 4, kid_subsets=4, kid_subset_size=8)
    sampler = TicketEnsembleSampler.from_pretrained(directory, denoiser=ConvNet)
    settings = {"scheduler": SpacedDDIMScheduler(), "num_inference_steps": STEPS, "batch_size": BATCH, "seed": 0}
    for images in drawn(sampler, range(SAMPLES), **settings):
        meter.add(extractor(finite_uint8(images)[0]))
    return meter.compute(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("strategy", ["ddp", "multi_ticket"])
def test_two_ranks_come_to_the_scores_of_one_process(tmp_path: Path, strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(lightning_earlybird.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, package / "tests")))}
    command = [sys.executable, __file__, str(tmp_path), strategy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("is below the 50000 of published scores") == 1, done.stderr[-3000:]

    first, second = json.loads((tmp_path / "results.json").read_text())
    assert [{**each, "seconds": 0} for each in first] == [{**each, "seconds": 0} for each in second]
    # The world is split after the second epoch: with groups of ranks, only the search and the end can be scored.
    networks = [(each["epoch"], each["network"]) for each in first]
    if strategy == "ddp":
        assert networks == [(0, "dense"), (1, "dense"), (2, "tickets"), (3, "tickets")]
    else:
        assert [network for _, network in networks] == ["dense", "dense", "tickets"]
        assert done.stderr.count("ranks train different tickets, and none can sample with all of them") == 1

    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", str(tmp_path / "other"))
    alone = scored_alone(tmp_path / "tickets" / "ensemble")
    assert first[-1]["fid_22_halves"] == pytest.approx(alone.fid, rel=1e-9)
    assert first[-1]["kid_22_halves"] == pytest.approx(alone.kid, rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_processes(Path(sys.argv[1]), sys.argv[2])
    torch.distributed.destroy_process_group()  # what ends by itself with the process may abort it
