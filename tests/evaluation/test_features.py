import sys
import urllib.error

import pytest
import torch
import torchmetrics.image.fid
from torch import nn

from lightning_earlybird.evaluation.classifier import ClassifierFeatures
from lightning_earlybird.evaluation.features import FeatureExtractor, imported, load_features

IMAGES = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).reshape(2, 3, 8, 8)


class PixelMeans(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.drop = nn.Dropout(0.9)

    def forward(self, images):
        return self.drop(images.float().mean((2, 3))) * self.scale


def test_a_network_is_taken_in_evaluation_mode_and_left_in_its_own() -> None:
    network = PixelMeans()
    extractor = load_features(network)
    assert extractor.label == "pixel_means"
    assert torch.equal(extractor(IMAGES), IMAGES.float().mean((2, 3)))
    assert network.training
    assert network.drop.training


@pytest.mark.parametrize("features", [PixelMeans, PixelMeans(), lambda: PixelMeans(), "test_features:PixelMeans"])
def test_networks_factories_and_names_mean_the_same(features) -> None:
    sys.modules.setdefault("test_features", sys.modules[__name__])
    extractor = load_features(features)
    assert extractor.label == "pixel_means"
    assert torch.equal(extractor(IMAGES), IMAGES.float().mean((2, 3)))


def test_a_classifier_is_read_from_its_file(tmp_path) -> None:
    network = ClassifierFeatures(3, 2, 4).eval()
    network.save(tmp_path / "f.safetensors")
    extractor = load_features(f"classifier:{tmp_path / 'f.safetensors'}")
    assert extractor.label == "classifier"
    assert torch.equal(extractor(IMAGES), network(IMAGES))
    assert extractor.identity == FeatureExtractor(network, "classifier").identity


def test_the_identity_is_that_of_class_structure_and_weights() -> None:
    assert load_features(PixelMeans()).identity == load_features(PixelMeans()).identity
    assert load_features(PixelMeans()).identity != load_features(PixelMeans(2.0)).identity
    assert load_features(nn.Flatten(1)).identity != load_features(nn.Flatten(2)).identity


def test_grey_images_are_repeated_for_inception_only() -> None:
    inception = FeatureExtractor(PixelMeans(), "", colours=True)
    assert inception(IMAGES[:, :1]).shape == (2, 3)
    assert load_features(PixelMeans())(IMAGES[:, :1]).shape == (2, 1)
    with pytest.raises(ValueError, match=r"images have 4 channels, and Inception takes 3 .* decode="):
        inception(IMAGES[:, [0, 1, 2, 0]])


def test_without_torch_fidelity_inception_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'lightning-earlybird\[fid\]'.*features='classifier:FILE'"
    ):
        load_features("inception")


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), ConnectionResetError(), TimeoutError()])
def test_without_a_network_inception_says_how_to_do_without(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", failing)
    with pytest.raises(ConnectionError, match="inception_weights=PATH; or features='classifier:FILE'"):
        load_features("inception")


def test_files_of_weights_are_looked_at_before_anything_is_unpickled(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_features("inception", path)
    torch.save(PixelMeans(), path)  # a whole module, which only unpickling could read
    with pytest.raises(ValueError, match="is not a plain file of weights"):
        load_features("inception", path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="it holds other things"):
        load_features("inception", path)
    torch.save({"a": torch.zeros(1)}, path)

    def failing(*args, **kwargs):
        raise RuntimeError("Missing keys")

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", failing)
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception: Missing keys"):
        load_features("inception", path)
    with pytest.raises(ValueError, match="has no effect with features='classifier:x'"):
        load_features("classifier:x", path)


def test_arguments_that_mean_nothing_are_refused() -> None:
    for name in ("incepton", "no.such.module:X", "torch:nothing", "torch:float32"):
        with pytest.raises(ValueError, match=f"features='{name}' must be 'inception', 'classifier:FILE' or"):
            load_features(name)
    with pytest.raises(ValueError, match=r"it gave a dict\."):
        load_features(dict)
    with pytest.raises(ValueError, match=r"it gave a int\."):
        load_features(5)
    assert imported("features", "torch.nn:Flatten") is nn.Flatten


def test_features_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(N, C, H, W\)"):
        load_features(PixelMeans())(IMAGES.float())
    with pytest.raises(ValueError, match=r"Flatten returned \(384,\) for 2 images"):
        load_features(nn.Flatten(0))(IMAGES)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        load_features(PixelMeans(float("nan")))(IMAGES)
