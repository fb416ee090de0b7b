"""The examples run as their users run them, on small data in the original formats."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from image_files import write_celeba, write_cifar10_binary, write_cifar10_python, write_image_folder

from lightning_earlybird import TicketEnsembleSampler

EXAMPLES = Path(__file__).parents[2] / "examples"

# A few steps on either side of the switch; samples at the end of each epoch, scores at the end.
TINY = [
    "recipe=smoke",
    "data.batch_size=16",
    "data.limit=null",
    "data.cache_dir=cache",
    "model.channels=[16,32]",
    "detector.every_n_train_steps=2",
    "detector.window=2",
    "pruner.max_search_steps=4",
    "trainer.max_steps=10",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "sampling.every_n_epochs=1",
    "sampling.num_samples=4",
    "sampling.num_inference_steps=4",
    "evaluation.num_samples=16",
    "output=run",
]


def run_example(folder: Path, name: str, *arguments: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(EXAMPLES.parent),
        "OMP_NUM_THREADS": "1",
        "LIGHTNING_EARLYBIRD_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == expected, run.stdout[-1000:] + run.stderr[-3000:]
    return run


def check_run(folder: Path, regions: list[tuple[float, float, float]], run: subprocess.CompletedProcess[str]) -> None:
    """What every run leaves behind."""
    output = folder / "run"
    sampler = TicketEnsembleSampler.from_pretrained(output / "ensemble")
    assert [(region.start, region.stop, region.sparsity) for region in sampler.regions] == regions
    for name in ("mask_distance.png", "mask_overlap.png", "widths.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    assert list((output / "samples").glob("*.png"))
    assert json.loads((output / "dense" / "config.json").read_text())["_class_name"]
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = {name for row in rows for name, value in row.items() if value}
    assert {"train_loss", "earlybird/switch_step"} <= metrics
    for heading in ("training cost", "Written to run"):
        assert heading in run.stdout


@pytest.mark.slow
def test_cifar10_trains_on_the_original_archive_and_goes_on(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "cifar-10-python.tar.gz", per_batch=16)
    arguments = [
        *TINY,
        "recipe=smoke,conditional",
        "data.path=cifar-10-python.tar.gz",
        "checkpoint.every_n_train_steps=4",
    ]
    run = run_example(tmp_path, "cifar10.py", *arguments, "checkpoint.every_n_epochs=null")
    check_run(tmp_path, [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)], run)
    assert "80 images" in run.stderr + run.stdout
    assert (tmp_path / "run" / "data.png").exists()
    assert "fid_16_pixels" in run.stdout

    refused = run_example(tmp_path, "cifar10.py", *arguments, expected=1)
    assert "cifar10.py: output=run holds a run already" in refused.stderr
    assert "Traceback" not in refused.stderr
    again = run_example(
        tmp_path, "cifar10.py", *arguments, "checkpoint.every_n_epochs=null", "resume=true", "trainer.max_steps=12"
    )
    assert "Restored all states from the checkpoint" in again.stderr
    assert "wandb/offline" in again.stdout + again.stderr


@pytest.mark.slow
def test_celeba_trains_on_the_original_archive(tmp_path: Path) -> None:
    archive = write_celeba(tmp_path, count=48, zipped=True, partition=False) / "img_align_celeba.zip"
    run = run_example(tmp_path, "celeba.py", *TINY, f"data.path={archive}", "wandb.mode=disabled", "tensorboard=true")
    check_run(tmp_path, [(0, 440, 0.3), (440, 1000, 0.8)], run)
    arguments = [f"data.path={archive}", "wandb.mode=disabled", "pruner.regions=run/switch", "output=again"]
    again = run_example(tmp_path, "celeba.py", *TINY, *arguments, "trainer.max_steps=2")
    assert "2 tickets from 'run/switch' have replaced the denoiser" in again.stdout + again.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))


@pytest.mark.slow
def test_flow_matching_trains_in_continuous_time(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", per_batch=16)
    run = run_example(tmp_path, "flow.py", *TINY, "data.path=cifar-10-binary.tar.gz", "wandb.mode=disabled")
    check_run(tmp_path, [(0, 480, 0.3), (480, 710, 0.6), (710, 1000, 0.8)], run)


@pytest.mark.slow
def test_a_transformer_trains_on_latents_that_were_encoded_before(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "cifar-10-python.tar.gz", per_batch=16)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=32, **kinds)
    vae.save_pretrained(tmp_path / "vae")
    source = ["--data", "cifar-10-python.tar.gz", "--vae", "vae", "--output", "latents.safetensors"]
    run_example(tmp_path, "encode_latents.py", *source)
    tiny = [each for each in TINY if not each.startswith(("model.channels", "data.limit", "data.cache_dir"))]
    scores = ["evaluation.reference=cifar-10-python.tar.gz", "evaluation.features=shared.features:Pixels"]
    arguments = [*tiny, *scores, "data.path=latents.safetensors", "wandb.mode=disabled"]
    run = run_example(tmp_path, "latent.py", *arguments)
    check_run(tmp_path, [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)], run)
    assert "fid_16_pixels" in run.stdout  # of decoded samples


def test_mistakes_end_with_one_sentence_before_anything_is_made(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images")
    mistakes = [
        (["data.path=nowhere.zip"], "nowhere.zip"),
        (["data.path=images", "pruner.regions=[[0,240,0.3],[300,1000,0.8]]"], "leave a gap: set start=240"),
        (["data.path=images", "data.batch_size=512"], "batch_size=512 is larger than the 6 samples"),
    ]
    if find_spec("torch_fidelity") is None:
        inception = ["data.path=images", "data.batch_size=2", "evaluation.features=inception"]
        mistakes.append((inception, "needs the package torch-fidelity"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    for arguments, message in mistakes:
        run = run_example(tmp_path, "cifar10.py", *TINY, *arguments, "overwrite=true", expected=1)
        assert message in run.stderr
        assert "Traceback" not in run.stderr
        if "evaluation.features=inception" not in arguments:  # which is looked for when the fit begins
            assert last.exists()
            assert [path.name for path in last.parents[1].iterdir()] == ["checkpoints"]
