"""One fit across the switch, with the real clients, and what each of them holds afterwards, read back from disk."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from diffusers import DDIMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from modules import Lit, fit
from wandb_records import OfflineRun, offline_runs

from lightning_earlybird import EarlyBirdDetector, SampleLogger, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.reporting import search_figures

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_search_steps=. reached"),
]

REGIONS = [(0, 300, 0.25), (300, 1000, 0.5)]
SWITCH, END = 6, 10
FIGURES = ("mask_distance", "mask_overlap", "widths")


class Logged(Lit):
    """With hyperparameters of its own, one of which has the name of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 16, "earlybird/rewind": "mine"})

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of one fit with three loggers at once."""
    root = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(root / name.lower()))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        # A search this short would see no figure before its end.
        patch.setattr(search_figures, "SHARE_OF_TIME", 1e9)
        loggers = [
            WandbLogger(project="earlybird", save_dir=root, offline=True),
            TensorBoardLogger(root, name="board", version=""),
            CSVLogger(root, name="csv", version=""),
        ]
        fit(
            Logged(),
            EMAWeightAveraging(decay=0.5),
            EarlyBirdDetector([0.25, 0.5], every_n_train_steps=2, window=2, threshold=0.0),
            TimestepAwarePruner(
                REGIONS, round_to=1, min_width=4, overlap=20, max_search_steps=SWITCH, dirpath=root / "tickets"
            ),
            SampleLogger(
                4,
                every_n_train_steps=5,
                num_inference_steps=2,
                scheduler=DDIMScheduler(num_train_timesteps=1000),
            ),
            max_steps=END,
            logger=loggers,
            log_every_n_steps=2,
        )
        wandb.finish()
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> OfflineRun:
    (run,) = offline_runs(root)
    return run


def png(path: Path) -> tuple[int, int]:
    """Height and width, of a file that is really an image."""
    assert path.read_bytes().startswith(b"\x89PNG")
    image = imread(path)
    assert image.std() > 0.01, f"{path} is empty"
    return image.shape[:2]


class TestWandb:
    def test_the_search_is_in_the_history(self, run: OfflineRun) -> None:
        for sparsity, null in (("0.25", 0.375), ("0.5", 0.5)):
            assert run.values(f"earlybird/null_line/{sparsity}") == [(0, pytest.approx(null))]
            assert [step for step, _ in run.values(f"earlybird/distance_from_init/{sparsity}")] == [1, 3, 5]
            distances = run.values(f"earlybird/distance/{sparsity}")
            assert [step for step, _ in distances] == [3, 5] and all(0 <= value <= 1 for _, value in distances)
        assert run.values("earlybird/switch_step") == [(SWITCH, SWITCH)]

    def test_losses_come_by_region_on_both_sides_of_the_switch(self, run: OfflineRun) -> None:
        assert [step for step, _ in run.values("train_loss")] == [1, 3, 5, 7, 9]
        for region in ("0-300", "300-1000"):
            losses = run.values(f"earlybird/region_loss/{region}")
            assert [step for step, _ in losses] == [1, 3, 5, 7, 9] and all(0.2 < value < 5 for _, value in losses)

    def test_figures_are_drawn_during_the_search_and_at_the_switch(self, run: OfflineRun) -> None:
        steps = {name: [step for step, _ in run.values(f"earlybird/{name}")] for name in FIGURES}
        assert steps == {"mask_distance": [1, 3, 5, 6], "mask_overlap": [1, 3, 5, 6], "widths": [6]}
        for name in FIGURES:
            for path in run.files(f"earlybird/{name}"):
                height, width = png(path)
                assert 300 < height < 4000 and 500 < width < 4000

    def test_samples_are_sheets_of_images(self, run: OfflineRun) -> None:
        shown = run.values("samples")
        assert [step for step, _ in shown] == [4, 9]
        assert [value["captions"] for _, value in shown] == [["step 5, dense"], ["step 10, 2 tickets"]]
        assert [png(path) for path in run.files("samples")] == [(67, 67), (67, 67)]

    def test_the_ticket_table_has_its_numbers(self, run: OfflineRun) -> None:
        ((step, _),) = run.values("earlybird/tickets")
        assert step == SWITCH
        (path,) = run.files("earlybird/tickets")
        table = json.loads(path.read_text())
        first, second = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
        assert (first["region"], first["sparsity"], first["channels_removed"]) == ("[0, 300)", 0.25, 0.25)
        assert (second["region"], second["step"], second["channels_removed"]) == ("[300, 1000)", SWITCH, 0.5)

    def test_the_summary_says_what_came_of_it(self, run: OfflineRun) -> None:
        summary = run.summary
        assert summary["earlybird/switch_step"] == SWITCH
        assert [summary[f"ticket_{index}/channels"] for index in (0, 1)] == [24, 16]
        assert summary["ticket_0/parameters"] < summary["earlybird/dense_parameters"] == 2689
        assert summary["ticket_1/macs"] < summary["ticket_0/macs"] < summary["earlybird/dense_macs"]
        assert SWITCH / END < summary["earlybird/cost_of_dense"] < 1
        for sparsity in ("0.25", "0.5"):
            assert summary[f"earlybird/distance/{sparsity}"] == run.values(f"earlybird/distance/{sparsity}")[-1][1]
        losses = run.values("earlybird/region_loss/0-300")
        assert summary["earlybird/region_loss/0-300"] == {
            "last": losses[-1][1],
            "min": min(value for _, value in losses),
        }

    def test_tickets_are_versions_of_an_artifact_with_their_files(self, run: OfflineRun, root: Path) -> None:
        versions = [artifact for artifact in run.artifacts if artifact.type == "tickets"]
        assert [set(version.aliases) for version in versions] == [{"switch", "latest"}, {"final", "latest"}]
        assert len({version.name for version in versions}) == 1
        for version, folder, step in zip(versions, ("switch", "ensemble"), (SWITCH, END), strict=True):
            metadata = json.loads(version.metadata)
            assert metadata["step"] == step
            assert [ticket["region"]["sparsity"] for ticket in metadata["tickets"]] == [0.25, 0.5]
            files = {entry.path: Path(entry.local_path) for entry in version.manifest.contents}
            saved = {path.name: path for path in (root / "tickets" / folder).iterdir()}
            tickets = {f"ticket_{index}.safetensors" for index in (0, 1)}
            assert files.keys() == saved.keys() == {"README.md", "ensemble.json", "masks.safetensors"} | tickets
            assert all(files[name].read_bytes() == saved[name].read_bytes() for name in saved)

    def test_settings_are_in_the_configuration_and_nothing_of_the_users_is_overwritten(self, run: OfflineRun) -> None:
        config = run.config
        assert config["earlybird/regions"] == [list(region) for region in REGIONS]
        assert (config["earlybird/overlap"], config["earlybird/threshold"], config["earlybird/min_width"]) == (20, 0, 4)
        assert config["earlybird/sparsities"] == [0.25, 0.5]
        assert (config["width"], config["earlybird/rewind"]) == (16, "mine")

    def test_metrics_are_drawn_over_the_global_step(self, run: OfflineRun) -> None:
        for name in ("earlybird/*", "ticket_0/*", "ticket_1/*", "earlybird/region_loss/0-300"):
            assert run.metrics[name].step_metric == "trainer/global_step"
        summary = run.metrics["earlybird/region_loss/0-300"].summary
        assert summary.min and summary.last


@pytest.fixture(scope="module")
def events(root: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = (root / "board").glob("events.out.*")
    events = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


class TestTensorBoard:
    def test_scalars(self, events: Any, run: OfflineRun) -> None:
        """The same as W&B has."""
        for name in ("earlybird/distance/0.5", "earlybird/region_loss/0-300", "earlybird/switch_step", "train_loss"):
            assert [(event.step, event.value) for event in events.Scalars(name)] == [
                (step, pytest.approx(value)) for step, value in run.values(name)
            ]
        for name in ("earlybird/cost_of_dense", "ticket_1/macs"):
            (event,) = events.Scalars(name)
            assert event.value == pytest.approx(run.summary[name])

    def test_images_and_texts(self, events: Any) -> None:
        assert {name: len(events.Images(name)) for name in events.Tags()["images"]} == {
            "earlybird/mask_distance": 4,
            "earlybird/mask_overlap": 4,
            "earlybird/widths": 1,
            "samples": 2,
        }
        texts = {
            name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
            for name in ("earlybird/tickets", "earlybird/settings")
        }
        assert "[300, 1000)" in texts["earlybird/tickets"]
        assert "| earlybird/threshold | `0.0` |" in texts["earlybird/settings"]


@pytest.mark.parametrize("folder", ["board", "csv"])
def test_settings_are_in_the_hyperparameters_of_files(folder: str, root: Path) -> None:
    settings = yaml.safe_load((root / folder / "hparams.yaml").read_text())
    assert settings["earlybird/regions"] == [list(region) for region in REGIONS]
    assert (settings["width"], settings["earlybird/rewind"]) == (16, "mine")


def test_csv_has_the_metrics_and_figures_are_on_disk(root: Path, run: OfflineRun) -> None:
    with (root / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("earlybird/distance/0.5", "earlybird/region_loss/0-300", "ticket_0/macs_removed", "train_loss"):
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == [
            (step, pytest.approx(value)) for step, value in run.values(name)
        ]
    assert [float(row["earlybird/cost_of_dense"]) for row in rows if row["earlybird/cost_of_dense"]] == [
        pytest.approx(run.summary["earlybird/cost_of_dense"])
    ]
    for name in FIGURES:
        png(root / "tickets" / f"{name}.png")
    assert sorted(path.name for path in (root / "tickets" / "samples").iterdir()) == [
        "step_0000005.png",
        "step_0000010.png",
    ]


def test_the_artifact_of_the_trained_tickets_is_an_ensemble_that_samples(run: OfflineRun, tmp_path: Path) -> None:
    from modules import ConvNet

    version = next(artifact for artifact in run.artifacts if "final" in artifact.aliases)
    for entry in version.manifest.contents:
        shutil.copy(entry.local_path, tmp_path / entry.path)
    sampler = TicketEnsembleSampler.from_pretrained(tmp_path, ConvNet)
    images = sampler.sample(2, scheduler=DDIMScheduler(num_train_timesteps=1000), num_inference_steps=2, progress=False)
    assert images.shape == (2, 1, 4, 4) and torch.isfinite(images).all()


@pytest.mark.parametrize("choice", [False, "auto"])
def test_tickets_stay_out_of_wandb_where_they_are_not_wanted_or_too_large(
    choice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("lightning_earlybird.reporting.artifacts.LARGEST_BYTES", 1000)
    with caplog.at_level("INFO"):
        pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=1, log_tickets=choice)
        fit(Lit(), pruner, max_steps=2, logger=WandbLogger(save_dir=tmp_path, offline=True))
        wandb.finish()
    (run,) = offline_runs(tmp_path)
    assert [artifact.type for artifact in run.artifacts] == ["run_table"]
    assert caplog.text.count("log_tickets=True logs them all the same") == (2 if choice == "auto" else 0)


def test_without_a_logger_figures_are_on_disk_and_it_is_said_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=1, dirpath=tmp_path / "here")
        fit(Lit(), pruner, max_steps=2)
    for name in FIGURES:
        png(tmp_path / "here" / f"{name}.png")
    assert f"figures are in {str(tmp_path / 'here')!r}" in caplog.text


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="log_tickets='never' must be one of True, False, 'auto'"):
        TimestepAwarePruner(REGIONS, log_tickets="never")  # type: ignore[arg-type]
