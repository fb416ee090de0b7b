"""What a run shows: the right step for every logger, figures without pyplot, tables that say what was achieved."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_earlybird.convergence import MaskWindow
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.records import TicketFacts
from lightning_earlybird.regions import TimestepRegion
from lightning_earlybird.reporting import (
    TICKET_COLUMNS,
    distance_figure,
    figures,
    log_figure,
    log_metrics,
    log_ticket_table,
    logger_step,
    overlap_figure,
    save_figure,
    ticket_rows,
    ticket_table,
)


def mask_keeping(*channels: int, size: int = 10) -> TicketMask:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[list(channels)] = True
    return TicketMask({"stem": kept})


def settled_window(pushes: int = 6) -> MaskWindow:
    """One mask at initialisation and then always another one: distance 0.4 to the start, 0 within the FIFO."""
    masks = MaskWindow(window=3, threshold=0.1)
    masks.start(mask_keeping(0, 1))
    for check in range(1, pushes + 1):
        masks.push(mask_keeping(2, 3), step=100 * check)
    return masks


FACTS = (
    TicketFacts(
        region=TimestepRegion(0, 240, sparsity=0.3),
        step=400,
        emerged=True,
        channels=(1000, 700),
        parameters=(650_000, 325_000),
        macs=(4_000, 1_000),
    ),
    TicketFacts(
        region=TimestepRegion(240, 1000, sparsity=0.8),
        step=1200,
        emerged=False,
        channels=(1000, 280),
        parameters=(650_000, 65_000),
        macs=None,
    ),
)


class StepRecorder(DummyLogger):
    """Keeps (step, names) of everything that any part of Lightning logs."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.logged.append((step, dict(metrics)))


class Regressor(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AlternatingRegressor(Regressor):
    """Two optimizers step on each batch, so that trainer.global_step runs twice as fast as the loggers' step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = self.layer(batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss, on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.layer.weight], lr=0.1), torch.optim.SGD([self.layer.bias], lr=0.1)]


class Reporter(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        log_metrics(trainer, {"mine_step": 1.0})

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        log_metrics(trainer, {"mine_epoch": 1.0})

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        log_metrics(trainer, {"mine_end": 1.0})


def fitted_trainer(tmp_path: Path, logger: Any, module: LightningModule | None = None, **kwargs: Any) -> Trainer:
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=logger,
        max_epochs=2,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **kwargs,
    )
    data = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    trainer.fit(module or Regressor(), data)
    return trainer


def idle_trainer(tmp_path: Path, logger: Any) -> Trainer:
    return Trainer(default_root_dir=tmp_path, logger=logger, accelerator="cpu", enable_progress_bar=False)


class TestLogMetrics:
    @pytest.mark.parametrize(
        ("module", "accumulate"), [(Regressor, 1), (Regressor, 3), (AlternatingRegressor, 1)], ids=str
    )
    def test_steps_ascend_and_equal_those_of_self_log(
        self, tmp_path: Path, module: type[LightningModule], accumulate: int
    ) -> None:
        recorder = StepRecorder()
        fitted_trainer(tmp_path, recorder, module(), callbacks=[Reporter()], accumulate_grad_batches=accumulate)
        steps = [step for step, _ in recorder.logged]
        assert steps == sorted(steps)

        def steps_of(name: str) -> list[int]:
            return [step for step, metrics in recorder.logged if name in metrics]

        # With accumulation Lightning logs only the batches that stepped.
        assert set(steps_of("loss_step")) <= set(steps_of("mine_step"))
        assert steps_of("mine_epoch") == steps_of("loss_epoch")
        assert steps_of("mine_end") == steps_of("loss_epoch")[-1:]

    def test_every_logger_gets_them_and_none_is_left_out(self, tmp_path: Path) -> None:
        recorders = [StepRecorder(), StepRecorder()]
        trainer = idle_trainer(tmp_path, recorders)
        log_metrics(trainer, {"a": torch.tensor(0.5), "b": None, "c": 0}, step=7)  # type: ignore[dict-item]
        assert [recorder.logged for recorder in recorders] == [[(7, {"a": 0.5, "c": 0.0})]] * 2

    def test_nothing_known_logs_nothing(self, tmp_path: Path) -> None:
        recorder = StepRecorder()
        log_metrics(idle_trainer(tmp_path, recorder), {"b": None}, step=7)
        assert recorder.logged == []

    def test_csv_files_carry_the_metrics(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        fitted_trainer(tmp_path, logger, callbacks=[Reporter()])
        lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        assert {"step", "loss_step", "mine_step", "mine_epoch"} <= set(lines[0].split(","))

    def test_before_training_the_step_is_zero(self, tmp_path: Path) -> None:
        assert logger_step(idle_trainer(tmp_path, False)) == 0


class TestTicketTable:
    def test_text_has_nominal_and_achieved_side_by_side(self) -> None:
        assert ticket_table(FACTS) == (
            "region       sparsity  channels  parameters    MACs  step  found\n"
            "-----------  --------  --------  ----------  ------  ----  ------------\n"
            "[0, 240)          0.3    -30.0%      -50.0%  -75.0%   400  emerged\n"
            "[240, 1000)       0.8    -72.0%      -90.0%       -  1200  search limit"
        )

    def test_rows_match_the_columns(self) -> None:
        rows = ticket_rows(FACTS)
        assert dict(zip(TICKET_COLUMNS, rows[0], strict=True)) == {
            "region": "[0, 240)",
            "sparsity": 0.3,
            "target": "channels",
            "channels_removed": pytest.approx(0.3),
            "parameters_removed": 0.5,
            "macs_removed": 0.75,
            "parameters": 325_000,
            "macs": 1_000,
            "step": 400,
            "found": "emerged",
        }
        assert dict(zip(TICKET_COLUMNS, rows[1], strict=True))["macs_removed"] is None

    def test_what_the_sparsity_counts_is_said_where_it_is_not_channels(self) -> None:
        facts = [replace(FACTS[0], target="params"), FACTS[1]]
        lines = ticket_table(facts).splitlines()[2:]
        assert [line.split("  -")[0].rstrip() for line in lines] == [
            "[0, 240)     0.3 of params",
            "[240, 1000)            0.8",
        ]

    def test_an_unbounded_region_and_an_unknown_step_are_readable(self) -> None:
        whole = TicketFacts(
            region=TimestepRegion(float("-inf"), float("inf"), sparsity=0.5),
            step=None,
            emerged=True,
            channels=(4, 2),
            parameters=(8, 4),
            macs=None,
        )
        assert ticket_table([whole]).splitlines()[-1].split("  ")[0] == "(-inf, inf)"
        assert ticket_rows([whole])[0][TICKET_COLUMNS.index("step")] is None


class TestFigures:
    def test_distance_figure_has_a_panel_per_sparsity_in_order_with_every_line(self) -> None:
        figure = distance_figure({0.6: settled_window(), 0.3: settled_window()}, threshold=0.1)
        assert [axis.get_title() for axis in figure.axes] == [
            "sparsity 0.3: emerged at step 300",
            "sparsity 0.6: emerged at step 300",
        ]
        lines = {str(line.get_label()): line for line in figure.axes[0].lines}
        assert set(lines) == {
            "largest distance in the FIFO",
            "to initialisation",
            "to half the training so far",
            "threshold 0.1",
            "two random masks",
            "emerged",
        }
        assert list(lines["largest distance in the FIFO"].get_xdata()) == [300, 400, 500, 600]
        assert list(lines["to initialisation"].get_ydata()) == [0.4] * 6
        # Half of step 100 lies nearer to step 0 by the rule that the earlier of equals counts.
        assert list(lines["to half the training so far"].get_ydata()) == [0.4, 0.0, 0.0, 0.0, 0.0, 0.0]
        assert list(lines["two random masks"].get_ydata()) == [pytest.approx(0.32)] * 2
        assert list(lines["threshold 0.1"].get_ydata()) == [0.1] * 2
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == set(lines)

    def test_panels_of_regions_come_along_the_time_axis_and_name_region_and_sparsity(self) -> None:
        windows = {TimestepRegion(300, 1000, 0.5): settled_window(), TimestepRegion(0, 300, 0.5): MaskWindow()}
        titles = [axis.get_title() for axis in distance_figure(windows, threshold=0.1).axes]
        assert titles == [
            "region [0, 300) of sparsity 0.5\nnot emerged",
            "region [300, 1000) of sparsity 0.5\nemerged at step 300",
        ]
        titles = [axis.get_title() for axis in overlap_figure(windows).axes[:2]]
        assert titles == ["region [0, 300) of sparsity 0.5", "region [300, 1000) of sparsity 0.5"]

    def test_panels_share_limits_that_show_the_lines_of_all(self) -> None:
        far = MaskWindow(window=2)
        far.start(mask_keeping(0, 1, 2, 3, 4))
        far.push(mask_keeping(5, 6, 7, 8, 9), step=900)
        figure = distance_figure({0.3: settled_window(), 0.6: far}, threshold=0.1)
        for axis in figure.axes:
            assert axis.get_ylim()[0] == axis.get_xlim()[0] == 0
            assert axis.get_ylim()[1] >= 1
            assert axis.get_xlim()[1] >= 900

    def test_a_window_that_is_not_yet_full_is_drawn_too(self) -> None:
        figure = distance_figure({0.3: settled_window(pushes=1), 0.6: MaskWindow()}, threshold=0.1)
        assert [axis.get_title() for axis in figure.axes] == ["sparsity 0.3: not emerged", "sparsity 0.6: not emerged"]

    def test_overlap_figure_shows_the_pairwise_distances_on_one_scale(self) -> None:
        figure = overlap_figure({0.3: settled_window(), 0.6: MaskWindow()})
        first, second = figure.axes[:2]
        image = first.images[0].get_array()
        assert image is not None
        assert image.shape == (7, 7)
        assert image[0, 1] == pytest.approx(0.4)
        assert first.images[0].get_clim() == (0.0, pytest.approx(0.4))
        assert [text.get_text() for text in second.texts] == ["no masks yet"]
        assert [label.get_text() for label in first.get_xticklabels()] == ["0", "200", "400", "600"]

    def test_drawing_leaves_pyplot_and_its_settings_alone(self, tmp_path: Path) -> None:
        import matplotlib

        before = dict(matplotlib.rcParams)
        loaded = "matplotlib.pyplot" in sys.modules
        save_figure(distance_figure({0.3: settled_window()}, threshold=0.1), tmp_path / "figure.png")
        assert ("matplotlib.pyplot" in sys.modules) == loaded
        assert dict(matplotlib.rcParams) == before

    @pytest.mark.parametrize("draw", [overlap_figure, lambda windows: distance_figure(windows, 0.1)])
    def test_no_windows_is_an_error(self, draw: Any) -> None:
        with pytest.raises(ValueError, match=r"windows=\{\} must hold at least one sparsity"):
            draw({})

    def test_without_matplotlib_the_error_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(figures, "MATPLOTLIB_AVAILABLE", False)
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            overlap_figure({0.3: settled_window()})


class RecordingRun:
    """Stands in for a W&B run: keeps what it is told to log."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


class TestLoggers:
    def wandb_logger(self, run: RecordingRun) -> WandbLogger:
        logger = WandbLogger(offline=True)
        logger._experiment = run  # type: ignore[assignment]
        return logger

    def test_wandb_gets_figures_as_images_and_the_table_at_the_global_step(self, tmp_path: Path) -> None:
        wandb = pytest.importorskip("wandb")
        run = RecordingRun()
        trainer = idle_trainer(tmp_path, self.wandb_logger(run))
        log_figure(trainer, "earlybird/overlap", overlap_figure({0.3: settled_window()}), step=9)
        log_ticket_table(trainer, "earlybird/tickets", FACTS, step=9)
        image, table = run.logged
        assert image["trainer/global_step"] == table["trainer/global_step"] == 9
        assert isinstance(image["earlybird/overlap"][0], wandb.Image)
        assert table["earlybird/tickets"].columns == list(TICKET_COLUMNS)
        assert table["earlybird/tickets"].data == ticket_rows(FACTS)

    def test_tensorboard_gets_images_and_text(self, tmp_path: Path) -> None:
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        logger = TensorBoardLogger(tmp_path)
        trainer = idle_trainer(tmp_path, logger)
        log_figure(trainer, "earlybird/overlap", overlap_figure({0.3: settled_window()}), step=9)
        log_ticket_table(trainer, "earlybird/tickets", FACTS, step=9)
        logger.experiment.flush()
        events = event_accumulator.EventAccumulator(logger.log_dir)
        events.Reload()
        (image,) = events.Images("earlybird/overlap")
        assert image.step == 9
        assert image.width > image.height > 300
        (text,) = events.Tensors("earlybird/tickets/text_summary")
        assert "    [0, 240)" in text.tensor_proto.string_val[0].decode()

    def test_a_folder_gets_a_png_whatever_the_loggers(self, tmp_path: Path) -> None:
        trainer = idle_trainer(tmp_path, CSVLogger(tmp_path))
        log_figure(
            trainer, "earlybird/overlap", overlap_figure({0.3: settled_window()}), folder=tmp_path / "new" / "folder"
        )
        assert (tmp_path / "new" / "folder" / "overlap.png").read_bytes().startswith(b"\x89PNG")

    def test_other_ranks_write_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = RecordingRun()
        trainer = idle_trainer(tmp_path, self.wandb_logger(run))
        monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda self: False))
        log_figure(trainer, "overlap", overlap_figure({0.3: settled_window()}), folder=tmp_path / "out")
        log_ticket_table(trainer, "tickets", FACTS)
        assert run.logged == []
        assert not (tmp_path / "out").exists()
