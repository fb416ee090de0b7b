"""The output folder of an example: what it goes on from, and that no run is written over."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from shared.outputs import make_output, mistakes_told, prepare_output

from lightning_earlybird import TimestepPartition


def settings(output: Path, *, resume: object = False, overwrite: bool = False) -> DictConfig:
    return OmegaConf.create({"output": str(output), "resume": resume, "overwrite": overwrite})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"callbacks": {}}, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


def test_a_new_run_writes_down_its_settings(tmp_path: Path) -> None:
    config = settings(tmp_path / "new" / "run")
    assert prepare_output(config) == (tmp_path / "new" / "run", None)
    assert not (tmp_path / "new").exists()  # before the data have been read
    make_output(config)
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
    make_output(settings(run, overwrite=True))
    assert not last.exists()  # what is killed now must not be resumed from there


def test_overwriting_removes_the_old_run_and_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [
        "checkpoints/step=2.ckpt",
        "checkpoints/step=4.ckpt",
        "samples/step_0000002.png",
        "switch/config.json",
        "ensemble/config.json",
        "dense/config.json",
        "metrics.csv",
        "interrupted/ticket_0.ckpt",
    ]
    others = ["checkpoints/notes.txt", "samples/mine.txt", "thesis.tex", "wandb/run"]
    for name in (*old, *others, "config.yaml"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    config = settings(run, overwrite=True)
    prepare_output(config)
    assert all((run / name).exists() for name in old)  # as long as the new one may still be refused
    assert (run / "config.yaml").read_text() == ""
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    make_output(config)
    assert all((run / name).exists() for name in old)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 0)
    make_output(settings(run, resume=True, overwrite=True))
    assert all((run / name).exists() for name in old)
    make_output(config)
    assert [name for name in old if (run / name).exists()] == []
    assert all((run / name).exists() for name in others)
    assert OmegaConf.load(run / "config.yaml") == config


def test_overwriting_leaves_folders_alone_that_are_not_of_an_example(run: Path) -> None:
    (run / "samples").mkdir()
    (run / "samples" / "holiday.png").touch()
    make_output(settings(run, overwrite=True))
    assert (run / "samples" / "holiday.png").exists()


def test_a_run_does_not_replace_the_tickets_that_it_reads(run: Path) -> None:
    (run / "switch").mkdir()
    config = settings(run, overwrite=True)
    config.pruner = {"regions": str(run / "switch")}
    with pytest.raises(SystemExit, match=r"pruner.regions=.*switch belongs to the run in .* write elsewhere by output"):
        prepare_output(config)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "other"])
def test_damaged_checkpoints_end_the_program_before_anything_is_made(run: Path, tmp_path: Path, kind: str) -> None:
    last = run / "checkpoints" / "last.ckpt"
    if kind == "truncated":
        torch.save({"callbacks": {}, "weights": torch.zeros(10_000)}, last)
        last.write_bytes(last.read_bytes()[:20_000])
    elif kind == "other":
        torch.save({"weights": torch.zeros(2)}, last)
    else:
        last.write_text("notes" if kind == "text" else "")
    message = r"last.ckpt is damaged, or no checkpoint \(.*\); go on from another one by resume=FILE, or start anew"
    with pytest.raises(SystemExit, match=message):
        prepare_output(settings(run, resume=True))
    with pytest.raises(SystemExit, match=message):
        prepare_output(settings(tmp_path / "new", resume=str(last)))
    assert not (tmp_path / "new").exists()
    assert not (run / "config.yaml").exists()


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
