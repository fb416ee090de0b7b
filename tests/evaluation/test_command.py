import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from torch import nn

import lightning_earlybird
from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.evaluation.classifier import ClassifierFeatures
from lightning_earlybird.evaluation.command import main
from lightning_earlybird.evaluation.drawing import dense_sampler
from lightning_earlybird.evaluation.report import Evaluation, check_output
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.structure import attribute_edits, extract, trace_plan
from lightning_earlybird.tickets import EnsembleRecord, describe_denoiser

# Raised inside diffusers' schedulers against NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.5)]


def unet(**settings) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False, **blocks}
    return UNet2DModel(8, 1, 1, **(small | settings)).eval()


def saved_ensemble(directory: Path, dense: UNet2DModel) -> None:
    plan = trace_plan(dense, (torch.randn(2, 1, 8, 8), torch.tensor([3, 700])))
    partition = TimestepPartition.of(REGIONS)
    scores = torch.rand(plan.num_channels, generator=torch.Generator().manual_seed(1))
    masks = [draw_mask(plan, scores, region.sparsity, round_to=4) for region in partition]
    tickets = [extract(dense, plan, mask) for mask in masks]
    sampler = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", 1))
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    sampler.record = EnsembleRecord(describe_denoiser(dense), edits, sample_shape=(1, 8, 8))
    sampler.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble, its dense network in both forms, images in folders of classes, and a classifier."""
    root = tmp_path_factory.mktemp("evaluated")
    dense = unet()
    saved_ensemble(root / "ensemble", dense)
    dense.save_pretrained(root / "dense")
    state = {f"model.{name}": value for name, value in dense.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__, "loops": {}}, root / "dense.ckpt")
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 8)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = root / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = level + generator.integers(-50, 50, (8, 8))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    ClassifierFeatures(1, 2, 4).save(root / "features.safetensors")
    return root


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", str(place / "cache"))


def evaluate(place: Path, output: Path, *more: str, model: str = "ensemble") -> int:
    images = ["--reference", str(place / "images"), "--channels", "L"]
    features = ["--features", f"classifier:{place / 'features.safetensors'}"]
    short = ["--samples", "20", "--steps", "10", "--timing-images", "2", "--timing-repeats", "1", "--no-progress"]
    return main([str(place / model), *images, *features, *short, "--device", "cpu", "--output", str(output), *more])


def report(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_the_command_evaluates_an_ensemble_beside_its_dense_network(place: Path, tmp_path: Path) -> None:
    features = tmp_path / "trained.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(Path(lightning_earlybird.__file__).parents[1])}

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "lightning_earlybird.evaluation", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    images = place / "images"
    trained = run("features", "--data", images, "--test", images, "--channels", "L", "--output", features, "--width", 4)
    assert trained.startswith("16 features of 60 images in 2 classes, test accuracy ")
    table = run(
        place / "ensemble", "--reference", images, "--channels", "L", "--features", f"classifier:{features}",
        "--samples", 20, "--steps", 10, "--timing-images", 2, "--dense", place / "dense", "--output", tmp_path / "out",
    )  # fmt: skip
    for line in (
        "fid_20_classifier",
        "kid_20_classifier",
        "seconds for 2 images",
        "calls in [240, 440)",
        "below the 50000",
    ):
        assert line in table
    found = report(tmp_path / "out")
    assert set(found["metrics"]) == {"tickets", "dense"}
    assert found["metrics"]["tickets"]["fid_20_classifier"] > 0
    assert found["metrics"]["tickets"] != found["metrics"]["dense"]
    assert set(found["sampling"]["seconds"]) == {"tickets", "dense"}
    assert len(found["sampling"]["all_seconds"]["dense"]) == 3
    for name in ("samples.png", "samples_dense.png"):
        with Image.open(tmp_path / "out" / name) as grid:
            assert grid.size == (8 * 10 + 2, 3 * 10 + 2)  # 20 images, eight in a row


def test_calls_are_counted_and_the_dense_network_of_the_record_is_timed(place: Path, tmp_path: Path, capsys) -> None:
    assert evaluate(place, tmp_path / "out", "--steps", "100") == 0
    found = report(tmp_path / "out")
    assert [each["calls"] for each in found["calls"]] == [55, 19, 26]
    assert set(found["metrics"]) == {"tickets"}
    assert found["sampling"]["dense_weights"] == "random"
    assert found["sampling"]["seconds"]["dense"] > 0
    assert "The dense network has random weights" in capsys.readouterr().out
    assert evaluate(place, tmp_path / "out", "--steps", "100", "--spacing", "uniform", "--samples", "2") == 0
    found = report(tmp_path / "out")  # the earlier report has been replaced
    assert [each["calls"] for each in found["calls"]] == [24, 20, 56]
    assert next(iter(found["metrics"]["tickets"])) == "fid_2_classifier"


def test_dense_weights_are_the_same_from_a_checkpoint_a_directory_and_by_themselves(
    place: Path, tmp_path: Path
) -> None:
    assert evaluate(place, tmp_path / "a", "--dense", str(place / "dense.ckpt")) == 0
    assert evaluate(place, tmp_path / "b", "--dense", str(place / "dense")) == 0
    assert evaluate(place, tmp_path / "c", model="dense") == 0
    found = [report(tmp_path / name)["metrics"]["dense"] for name in "abc"]
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "c" / "samples_dense.png").exists()


def test_a_reference_that_was_measured_serves_like_its_images(place: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--data", str(place / "images"), "--channels", "L", "--device", "cpu", "--no-progress"]
    arguments += ["--features", f"classifier:{place / 'features.safetensors'}"]
    assert main(["reference", *arguments, "--output", str(tmp_path / "images.safetensors")]) == 0
    assert "16 features of 60 images of shape (1, 8, 8)" in capsys.readouterr().out
    assert evaluate(place, tmp_path / "a") == 0
    assert evaluate(place, tmp_path / "b", "--reference", str(tmp_path / "images.safetensors")) == 0
    assert report(tmp_path / "a")["metrics"] == report(tmp_path / "b")["metrics"]


def test_a_saved_scheduler_brings_its_betas(place: Path, tmp_path: Path) -> None:
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample").save_pretrained(tmp_path / "cosine")
    assert evaluate(place, tmp_path / "a", "--scheduler", str(tmp_path / "cosine")) == 0
    config = report(tmp_path / "a")["scheduler"]["config"]
    assert (config["beta_schedule"], config["prediction_type"], config["spacing"]) == (
        "squaredcos_cap_v2",
        "sample",
        "quadratic",
    )
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow")
    assert evaluate(place, tmp_path / "b", "--scheduler", str(tmp_path / "flow"), "--samples", "2") == 0
    assert report(tmp_path / "b")["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = unet()

    def forward(self, x, timestep):
        return self.body(x, timestep).sample


def test_networks_that_diffusers_does_not_know_are_built_by_a_function(place: Path, tmp_path: Path, capsys) -> None:
    sys.modules.setdefault("test_command", sys.modules[__name__])
    sampler = TicketEnsembleSampler([Plain()], TimestepPartition.whole(0.0), TimestepArgument("timestep", 1))
    sampler.record = EnsembleRecord(None, ({},), sample_shape=(1, 8, 8))
    sampler.save_pretrained(tmp_path / "plain")
    plain = os.path.relpath(tmp_path / "plain", place)
    assert evaluate(place, tmp_path / "out", model=plain) == 2
    assert "denoiser=" in capsys.readouterr().err
    assert evaluate(place, tmp_path / "out", "--denoiser", "test_command:Plain", model=plain) == 0
    assert set(report(tmp_path / "out")["sampling"]["seconds"]) == {"tickets", "dense"}


def refused(place: Path, output: Path, capsys, *more: str, model: str = "ensemble") -> str:
    assert evaluate(place, output, *more, model=model) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("python -m lightning_earlybird.evaluation: ")
    assert written.err.count("\n") == 1
    return written.err


def test_what_cannot_be_evaluated_is_said_in_a_sentence(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert "there is no such directory or file" in refused(place, out, capsys, model="nothing")
    assert "ensemble.json" in refused(place, out, capsys, model="images")
    assert "holds no tickets" in refused(place, out, capsys, model="dense.ckpt")
    assert "is dense itself" in refused(place, out, capsys, "--dense", str(place / "dense"), model="dense")
    assert "--device tpu cannot be used here" in refused(place, out, capsys, "--device", "tpu")
    assert "samples=1 must be at least 2" in refused(place, out, capsys, "--samples", "1")
    assert "batch_size=0 must be at least 1" in refused(place, out, capsys, "--batch-size", "0")
    assert "steps=0 must be at least 1" in refused(place, out, capsys, "--steps", "0")
    assert "features='incepton' must be" in refused(place, out, capsys, "--features", "incepton")
    assert "must be 'package.module:Factory'" in refused(place, out, capsys, "--denoiser", "nothing")
    assert "trained on images with 1 channel" in refused(place, out, capsys, "--channels", "RGB")
    message = refused(place, out, capsys, "--size", "16")
    assert "have shape (1, 16, 16), and samples have (1, 8, 8)" in message
    assert "is not the directory of a diffusers scheduler" in refused(place, out, capsys, "--scheduler", str(tmp_path))
    assert not out.exists()


def test_classes_are_those_of_the_configuration_and_others_are_refused_before_the_reference_is_read(
    place: Path, tmp_path: Path, capsys
) -> None:
    unet(num_class_embeds=2).save_pretrained(tmp_path / "two")
    unet(class_embed_type="timestep").save_pretrained(tmp_path / "open")
    two, unknown = (os.path.relpath(tmp_path / name, place) for name in ("two", "open"))
    assert evaluate(place, tmp_path / "a", model=two) == 0
    assert evaluate(place, tmp_path / "b", "--classes", "2", model=two) == 0
    assert evaluate(place, tmp_path / "c", "--classes", "1", model=two) == 0
    capsys.readouterr()
    first, second, third = (report(tmp_path / name)["metrics"] for name in "abc")
    assert first == second != third
    unread = ("--reference", str(tmp_path / "nothing"))
    message = refused(place, tmp_path / "d", capsys, "--classes", "5", *unread, model=two)
    assert "--classes 5 must be at most 2, the classes of the dense network (num_class_embeds=2)" in message
    for given in ("2", "1"):
        message = refused(place, tmp_path / "d", capsys, "--classes", given, *unread)
        assert f"--classes {given}: the tickets network takes no class labels" in message
    assert "--classes 0 must be at least 1" in refused(place, tmp_path / "d", capsys, "--classes", "0", model=two)
    message = refused(place, tmp_path / "d", capsys, *unread, model=unknown)
    assert "does not tell the number of classes. Pass --classes" in message
    # Nothing is said of a network of one's own, which may be of any kind.
    network = Loose()
    evaluation = Evaluation(
        "", {"dense": dense_sampler(network, TimestepArgument("timestep", 1), None)}, (), *[None] * 4
    )
    assert evaluation.count_classes(None) is None
    assert evaluation.count_classes(7) == 7


class Loose(nn.Module):
    def forward(self, x, timestep, **kwargs):
        return x


def test_held_out_images_must_have_the_classes_of_the_others(place: Path, tmp_path: Path, capsys) -> None:
    test = tmp_path / "test"
    for label in ("light", "white"):
        shutil.copytree(place / "images" / "test" / "light", test / label)
    shutil.copytree(place / "images" / "test" / "light", tmp_path / "one" / "light")

    def train(data: Path, held_out: Path) -> str:
        arguments = ["features", "--data", str(data), "--test", str(held_out), "--channels", "L", "--width", "4"]
        assert main([*arguments, "--device", "cpu", "--no-progress", "--output", str(tmp_path / "f.safetensors")]) == 2
        assert not (tmp_path / "f.safetensors").exists()
        return capsys.readouterr().err

    message = train(place / "images", test)
    assert "it has 'light', 'white', and --data has 'dark', 'light'" in message and message.count("\n") == 1
    assert f"--test {tmp_path / 'one'} has no classes" in train(place / "images", tmp_path / "one")
    assert "Images that lie in a single folder" in train(tmp_path / "one", test)


def test_dense_weights_of_another_network_are_refused(place: Path, tmp_path: Path, capsys) -> None:
    wider = {f"model.{name}": value for name, value in unet(block_out_channels=(16,)).state_dict().items()}
    torch.save({"state_dict": wider, "pytorch-lightning_version": pl.__version__, "loops": {}}, tmp_path / "wide.ckpt")
    message = refused(place, tmp_path / "out", capsys, "--dense", str(tmp_path / "wide.ckpt"))
    assert "does not hold the weights of the ensemble's dense network" in message
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"_class_name": "Nothing"}')
    assert "is not a directory of a diffusers model" in refused(
        place, tmp_path / "out", capsys, "--dense", str(tmp_path / "model")
    )


def test_a_network_that_has_diverged_is_not_scored(place: Path, tmp_path: Path, capsys) -> None:
    broken = unet()
    nn.init.constant_(broken.conv_out.bias, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    model = os.path.relpath(tmp_path / "broken", place)
    assert "20 of 20 samples of the dense network hold NaN" in refused(place, tmp_path / "out", capsys, model=model)


def test_the_output_directory_replaces_nothing_but_a_report(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    check_output(out)
    out.mkdir()
    check_output(out)
    (out / "thesis.tex").touch()
    assert "it holds thesis.tex; choose another directory" in refused(place, out, capsys)
    (out / "thesis.tex").rename(out / "samples.png")
    assert "must be new, empty, or hold an earlier evaluation" in refused(place, out, capsys)
    (out / "evaluation.json").write_text('{"format": "something else"}')
    assert "must be new, empty, or hold an earlier evaluation" in refused(place, out, capsys)
    (out / "evaluation.json").write_text('{"format": "lightning-earlybird evaluation"}')
    check_output(out)
    assert "must be a directory, but a file is there" in refused(place, out / "samples.png", capsys)
