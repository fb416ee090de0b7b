"""The output folder of an example: what it goes on from, and that no run is written over."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from shared.outputs import mistakes_told, prepare_output

from lightning_earlybird import TimestepPartition


def settings(output: Path, *, resume: object = False, overwrite: bool = False) -> DictConfig:
    return OmegaConf.create({"output": str(output), "resume": resume, "overwrite": overwrite})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    return tmp_path / "run"


def test_a_new_run_writes_down_its_settings(tmp_path: Path) -> None:
    config = settings(tmp_path / "new" / "run")
    assert prepare_output(config) == (tmp_path / "new" / "run", None)
    assert OmegaConf.load(tmp_path / "new" / "run" / "config.yaml") == config


def test_what_resume_means(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    assert prepare_output(settings(tmp_path / "other", resume=True)) == (tmp_path / "other", None)
    assert prepare_output(settings(run, resume=True)) == (run, last)
    assert prepare_output(settings(tmp_path / "other", resume=str(last))) == (tmp_path / "other", last)
    assert last.exists()


def test_a_run_is_not_written_over_unless_told_to(run: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    with pytest.raises(
        SystemExit, match=r"holds a run already \(checkpoints\). Go on with it by resume=true, replace it by"
    ):
        prepare_output(settings(run))
    assert last.exists()
    assert prepare_output(settings(run, overwrite=True)) == (run, None)
    assert not last.exists()  # what is killed now must not be resumed from there


def test_what_cannot_be_an_output_folder_or_a_checkpoint_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file is a file; give the name of a folder"):
        prepare_output(settings(tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"cannot be written to .* write elsewhere by output=FOLDER"):
        prepare_output(settings(tmp_path / "file" / "below"))
    with pytest.raises(SystemExit, match=r"resume=nowhere.ckpt must be true, false or a checkpoint; there is no such"):
        prepare_output(settings(tmp_path / "new", resume="nowhere.ckpt"))


def test_only_mistakes_in_settings_become_sentences() -> None:
    with pytest.raises(SystemExit, match=r"leave a gap"), mistakes_told():
        TimestepPartition.of([(0, 240, 0.3), (300, 1000, 0.8)])
    with pytest.raises(ValueError, match="invalid literal"), mistakes_told():
        int("a mistake in code")
