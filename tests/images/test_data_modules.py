"""The examples' DataModules: what batches hold, in one process and in several, and what they refuse."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_files as files
import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import quiet_trainer
from resuming import Natural
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_earlybird import EarlyBirdDetector

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", str(tmp_path / "cache"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("shared", "encode_latents")]:
        del sys.modules[name]


class Recorder(L.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.weight * batch[0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class ValidatingRecorder(Recorder):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch)


def fit(data: L.LightningDataModule, epochs: int = 1, module: Recorder | None = None, **settings: Any) -> Recorder:
    module = Recorder() if module is None else module
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"devices": 1, "num_sanity_val_steps": 0, **quiet, **settings}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", **settings)
    trainer.fit(module, data)
    return module


def rows(batches: Any) -> set[bytes]:
    """The samples of batches, whatever their order."""
    return {sample.numpy().tobytes() for batch in batches for sample in batch[0]}


def test_batches_are_images_in_the_range_of_a_diffusion_model_and_labels(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    path = files.write_cifar10_python(tmp_path / "cifar-10-python.tar.gz", 8)
    data = ImageDataModule(str(path), batch_size=10, labels=True, flips=False)
    module = fit(data, epochs=2)
    assert len(module.batches) == 8
    images, labels = module.batches[0]
    assert images.dtype == torch.float32
    assert images.shape == (10, 3, 32, 32)
    assert labels.dtype == torch.long
    assert data.train is not None
    expected = data.train.images.float() / 127.5 - 1
    # Each image once an epoch, in another order, with its own label.
    first, second = module.batches[:4], module.batches[4:]
    assert rows(first) == rows(second) == {sample.numpy().tobytes() for sample in expected}
    assert not torch.equal(first[0][0], second[0][0])
    by_image = dict(zip([sample.numpy().tobytes() for sample in expected], data.train.labels.tolist(), strict=True))
    assert all(
        by_image[sample.numpy().tobytes()] == label for batch in first for sample, label in zip(*batch, strict=True)
    )


def test_without_labels_batches_hold_images_alone_also_where_there_are_classes(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    data = ImageDataModule(str(files.write_zip(tmp_path / "data.zip")), batch_size=2, size=8, channels="L")
    module = fit(data)
    assert [[tuple(each.shape) for each in batch] for batch in module.batches] == [[(2, 1, 8, 8)]] * 3


def test_training_images_are_flipped_at_random_and_a_resumed_generator_flips_them_alike(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    path = files.write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", 40)
    plain = ImageDataModule(str(path), batch_size=200, flips=False)
    runs = []
    for _ in range(2):
        L.seed_everything(3, verbose=False)
        data = ImageDataModule(str(path), batch_size=200, validation_split="test")
        data.batch_size = 40
        runs.append(fit(data, module=ValidatingRecorder()))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(runs[0].batches, runs[1].batches, strict=True))
    plain.setup()
    originals = {sample.numpy().tobytes() for sample in next(iter(plain.train_dataloader()))[0]}
    images = torch.cat([batch[0] for batch in runs[0].batches])
    kept = [sample.numpy().tobytes() in originals for sample in images]
    mirrored = [sample.flip(-1).contiguous().numpy().tobytes() in originals for sample in images]
    assert all(one != two for one, two in zip(kept, mirrored, strict=True))
    assert 60 < sum(mirrored) < 140  # of 200
    # What validates is not flipped, and none of it is left out.
    data.batch_size = 40
    held_out = {sample.numpy().tobytes() for sample in data.validation.images.float() / 127.5 - 1}
    assert rows(runs[1].validated) == held_out


def test_a_resumed_fit_has_the_same_order_and_flips(tmp_path: Path) -> None:
    """To the last bit, as `docs/reliability.md` promises of what is drawn in the main process."""
    from shared.data import ImageDataModule

    path = str(files.write_cifar10_binary(tmp_path / "cifar-10-binary.tar.gz", 8))

    def trained(seed: int, flips: bool = True, checkpoint: Path | None = None) -> dict[str, Tensor]:
        module = Natural("cosine")
        L.seed_everything(seed, verbose=False)
        data = ImageDataModule(path, size=4, channels="L", batch_size=8, flips=flips, validation_split="test")
        keeper = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
        detector = EarlyBirdDetector(sparsities=[0.5])
        trainer = quiet_trainer(detector, keeper, max_epochs=3, enable_checkpointing=True)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module.state_dict()

    whole = trained(1)
    resumed = trained(99, checkpoint=tmp_path / "checkpoints" / "epoch=0.ckpt")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    unflipped = trained(1, flips=False)
    assert not all(torch.equal(tensor, whole[name]) for name, tensor in unflipped.items())


def test_half_precision_gets_images_of_half_precision(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    data = ImageDataModule(str(files.write_zip(tmp_path / "data.zip")), batch_size=2)
    module = fit(data, precision="bf16-true")
    assert module.batches[0][0].dtype == torch.bfloat16


class WritingRecorder(Recorder):
    """Writes down what its process was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self) -> None:
        torch.save([batch[0] for batch in self.batches], self.folder / f"{self.global_rank}.pt")


def test_several_ranks_share_the_images_out(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    path = files.write_zip(tmp_path / "data.zip", files.folder_files(per_class=8))
    data = ImageDataModule(str(path), batch_size=4, flips=False)
    fit(data, module=WritingRecorder(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [4, 4]
    images = torch.from_numpy(files.pictures(16)).permute(0, 3, 1, 2) / 127.5 - 1
    own, other = rows((batch,) for batch in first), rows((batch,) for batch in second)
    assert own | other == {image.contiguous().numpy().tobytes() for image in images}
    assert not own & other


def test_worker_processes_give_the_same_batches(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    path = str(files.write_zip(tmp_path / "data.zip"))
    found = []
    for workers in (0, 2):
        L.seed_everything(0, verbose=False)
        data = ImageDataModule(path, batch_size=2, flips=False, num_workers=workers)
        data.setup()
        found.append([batch[0] for batch in data.train_dataloader()])
    assert rows((batch,) for batch in found[0]) == rows((batch,) for batch in found[1])


def test_the_first_look_is_said_and_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from PIL import Image
    from shared.data import ImageDataModule

    data = ImageDataModule(str(files.write_zip(tmp_path / "data.zip")), batch_size=2, first_look=tmp_path / "look")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data.setup()
    assert "6 images, 3 x 32 x 32" in caplog.text
    with Image.open(tmp_path / "look" / "data.png") as image:
        assert image.width > 300


def test_data_that_do_not_suit_the_settings_are_refused(tmp_path: Path) -> None:
    from shared.data import ImageDataModule

    flat = files.write_image_folder(tmp_path / "flat", {"1.png": files.encoded(files.pictures(1)[0], "png")})
    with pytest.raises(
        MisconfigurationException, match=r"batch_size=4 is larger than the 1 samples of .* lower batch_size"
    ):
        ImageDataModule(str(flat), batch_size=4).setup()
    with pytest.raises(
        MisconfigurationException, match=r"labels=True, but .* has no classes; give a source with one folder"
    ):
        ImageDataModule(str(flat), batch_size=1, labels=True).setup()


def test_latents_are_scaled_by_the_factors_of_their_file(tmp_path: Path) -> None:
    from shared.data import LatentDataModule

    latents = torch.randn(10, 4, 4, 4)
    facts = {"scaling_factor": "0.5", "shift_factor": "0.25", "class_names": '["a", "b"]', "autoencoder": "some/vae"}
    save_file({"latents": latents, "labels": torch.arange(10) % 2}, tmp_path / "latents.safetensors", metadata=facts)
    data = LatentDataModule(str(tmp_path / "latents.safetensors"), batch_size=5, labels=True)
    module = fit(data)
    scaled = (latents - 0.25) * 0.5
    assert rows(module.batches) == {sample.numpy().tobytes() for sample in scaled}
    by_latent = {sample.numpy().tobytes(): label % 2 for label, sample in enumerate(scaled)}
    assert all(
        by_latent[s.numpy().tobytes()] == label for batch in module.batches for s, label in zip(*batch, strict=True)
    )
    assert (data.class_names, data.autoencoder) == (("a", "b"), ("some/vae", None))


def test_latents_of_several_files_are_one_data_set(tmp_path: Path) -> None:
    from shared.data import LatentDataModule

    latents = torch.randn(12, 4, 2, 2).half()
    for number, part in enumerate(latents.split([3, 7, 2])):
        save_file({"latents": part.contiguous()}, tmp_path / f"part{number}.safetensors")
    data = LatentDataModule(str(tmp_path), batch_size=4)
    module = fit(data)
    assert module.batches[0][0].dtype == torch.float32
    assert rows(module.batches) == {sample.numpy().tobytes() for sample in latents.float()}
    assert data.train is not None
    assert data.train.samples.shape == (12, 4, 2, 2)
    # Within a batch the order is that of the indices, whichever files they are in.
    assert torch.equal(data.train.__getitems__([11, 0, 5, 5])[0], latents[[11, 0, 5, 5]].float())
    few = LatentDataModule(str(tmp_path), batch_size=1, limit=3)
    few.setup()
    assert few.train is not None
    assert torch.equal(few.train.samples, latents[[0, 4, 8]])


def test_latents_that_are_none_are_refused(tmp_path: Path) -> None:
    from shared.data import LatentDataModule

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            LatentDataModule(str(path), batch_size=2, **settings).setup()

    path = tmp_path / "none.safetensors"
    refused("there are no latents; expected a .safetensors file or a folder of such files")
    path.write_bytes(b"\0" * 100)
    refused(r"none\.safetensors cannot be read .* encode it again")
    save_file({"x": torch.zeros(2)}, path)
    refused(r"expected a tensor 'latents' of shape \(N, C, H, W\), found \['x'\]")
    save_file({"latents": torch.zeros(4, 4)}, path)
    refused(r"its latents are torch.float32 of shape \(4, 4\)")
    save_file({"latents": torch.zeros(4, 4, 2, 2)}, path)
    refused("labels=True, but .* holds no labels", labels=True)
    path = tmp_path / "parts"
    path.mkdir()
    refused("there are no latents")
    save_file({"latents": torch.zeros(4, 4, 2, 2), "labels": torch.zeros(4)}, path / "1.safetensors")
    save_file({"latents": torch.zeros(4, 4, 2, 2)}, path / "2.safetensors")
    refused("not every latent has a label")
    save_file({"latents": torch.zeros(4, 4, 2, 2)}, path / "2.safetensors", metadata={"scaling_factor": "2"})
    refused(r"expected floats of shape \(N, C, H, W\) like those of .*1\.safetensors.*same autoencoder")


def small_autoencoder(path: Path) -> AutoencoderKL:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    autoencoder.save_pretrained(path)
    return autoencoder.eval()


@pytest.fixture
def encoding(tmp_path: Path) -> dict[str, Any]:
    autoencoder = small_autoencoder(tmp_path / "vae")
    path = files.write_zip(tmp_path / "data.zip", files.folder_files(per_class=5))
    images = torch.from_numpy(files.pictures(10)).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = autoencoder.encode(images / 127.5 - 1).latent_dist.mean
    arguments = ["--data", str(path), "--vae", str(tmp_path / "vae"), "--batch-size", "4", "--dtype", "float32"]
    return {"arguments": arguments, "latents": latents, "autoencoder": autoencoder, "images": images}


def test_images_are_encoded_into_a_file_that_trains_and_decodes(encoding: dict[str, Any], tmp_path: Path) -> None:
    import encode_latents
    from shared.data import LatentDataModule

    encode_latents.main([*encoding["arguments"], "--output", str(tmp_path / "latents.safetensors")])
    with safe_open(tmp_path / "latents.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("latents"), encoding["latents"])
        assert file.get_tensor("labels").tolist() == [0] * 5 + [1] * 5
        facts = file.metadata()
    assert facts["autoencoder"] == str(tmp_path / "vae")
    assert json.loads(facts["class_names"]) == ["cat", "dog"]
    data = LatentDataModule(str(tmp_path / "latents.safetensors"), batch_size=5, labels=True)
    data.setup()
    assert data.train is not None
    assert (data.train.scaling_factor, data.train.shift_factor) == (0.7, 0.1)
    batch = data.train.__getitems__([2])[0]
    with torch.no_grad():
        back = encoding["autoencoder"].decode(batch / data.train.scaling_factor + data.train.shift_factor).sample
        torch.testing.assert_close(back, encoding["autoencoder"].decode(encoding["latents"][2:3]).sample)


def test_latents_name_their_autoencoder_for_whoever_trains_elsewhere(
    encoding: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import encode_latents

    monkeypatch.chdir(tmp_path)
    encode_latents.main([*encoding["arguments"], "--vae", "vae", "--output", "latents.safetensors", "--limit", "2"])
    with safe_open("latents.safetensors", "pt") as file:
        assert file.metadata()["autoencoder"] == str(tmp_path / "vae")
    with pytest.raises(SystemExit, match=r"^latent\.py: vae='\./nowhere' cannot be loaded .* cache is found\.$"):
        encode_latents.load_autoencoder("./nowhere", None, "latent.py: vae")


def test_encoding_in_parts_goes_on_where_it_stopped(
    encoding: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import encode_latents
    from shared.data import read_latents

    arguments = [*encoding["arguments"], "--output", str(tmp_path / "parts"), "--part-size", "4"]
    encode_latents.main(arguments)
    names = sorted(path.name for path in (tmp_path / "parts").glob("*"))
    assert names == [f"latents-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    latents, labels, _ = read_latents(tmp_path / "parts")
    torch.testing.assert_close(latents[torch.arange(10)], encoding["latents"])
    assert labels is not None
    assert labels.tolist() == [0] * 5 + [1] * 5
    kept, gone, damaged = (tmp_path / "parts" / name for name in names)
    before = kept.stat().st_mtime_ns
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-5])
    encode_latents.main(arguments)
    assert kept.stat().st_mtime_ns == before
    assert (
        "latents-00003-of-00003.safetensors was written with other settings, or is damaged" in capsys.readouterr().out
    )
    latents, _, _ = read_latents(tmp_path / "parts")
    torch.testing.assert_close(latents[torch.arange(10)], encoding["latents"])
    with pytest.raises(
        SystemExit, match=r"holds latents-00001-of-00003\.safetensors, which is no part of these latents"
    ):
        encode_latents.main([*arguments[:-1], "5"])


def test_mirror_images_are_encoded_with_their_labels(encoding: dict[str, Any], tmp_path: Path) -> None:
    import encode_latents

    encode_latents.main([*encoding["arguments"], "--output", str(tmp_path / "l.safetensors"), "--flips"])
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        latents, labels = file.get_tensor("latents"), file.get_tensor("labels")
    mirrored = encoding["images"].flip(-1) / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(latents[10:], encoding["autoencoder"].encode(mirrored).latent_dist.mean)
    assert labels.tolist() == ([0] * 5 + [1] * 5) * 2


def test_an_autoencoder_without_a_distribution_encodes_too(encoding: dict[str, Any], tmp_path: Path) -> None:
    import encode_latents

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "pipeline" / "vae")
    arguments = ["--data", encoding["arguments"][1], "--vae", str(tmp_path / "pipeline"), "--subfolder", "vae"]
    encode_latents.main([*arguments, "--output", str(tmp_path / "l.safetensors"), "--limit", "4"])
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        assert file.get_tensor("latents").dtype == torch.float16
        assert file.get_slice("latents").get_shape() == [4, 4, 16, 16]
        assert file.metadata()["shift_factor"] == "0.0"


def test_what_cannot_encode_is_refused_in_a_sentence(encoding: dict[str, Any], tmp_path: Path) -> None:
    import encode_latents
    from diffusers import UNet2DModel

    output = ["--output", str(tmp_path / "l.safetensors")]
    data = encoding["arguments"][:2]
    with pytest.raises(SystemExit, match=r"--vae='.*/none' cannot be loaded .* Give a folder that holds config\.json"):
        encode_latents.main([*data, "--vae", str(tmp_path / "none"), *output])
    UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(SystemExit, match=r"is a UNet2DModel, which encodes no images; give an AutoencoderKL"):
        encode_latents.main([*data, "--vae", str(tmp_path / "unet"), *output])
    with pytest.raises(SystemExit, match=r"encode_latents\.py: '.*missing\.zip' does not exist"):
        encode_latents.main(["--data", str(tmp_path / "missing.zip"), *encoding["arguments"][2:], *output])
    with pytest.raises(SystemExit, match="2"):
        encode_latents.main([*encoding["arguments"], *output, "--crop", "middle"])
    for wrong, told in (
        (["--size", "0"], "size=.* must be a number of pixels"),
        (["--crop", "1,2,3"], "crop="),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--output", str(tmp_path / "data.zip" / "l.safetensors")], "cannot be written to"),
    ):
        with pytest.raises(SystemExit, match=rf"^encode_latents\.py: .*{told}"):
            encode_latents.main([*encoding["arguments"], *output, *wrong])
    autoencoder = encoding["autoencoder"]
    nn.init.constant_(autoencoder.quant_conv.bias, 1e6)
    autoencoder.save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit, match="some latents are not finite in float16; use --dtype float32 or bfloat16"):
        encode_latents.main([*encoding["arguments"], *output, "--dtype", "float16"])
    assert not (tmp_path / "l.safetensors").exists()
