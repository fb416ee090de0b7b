import pytest
import torch
from safetensors.torch import save_file

from lightning_earlybird.evaluation.classifier import ClassifierFeatures, accuracy, train_features


def striped(count, seed, channels=1):
    """Two classes of noisy images: stripes across and stripes down."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    pattern = (torch.arange(8) % 2 * 120).expand(8, 8)
    images = torch.where(labels[:, None, None] == 1, pattern, pattern.T) + 60
    noise = torch.randint(-50, 50, (count, channels, 8, 8), generator=generator)
    return (images[:, None] + noise).clamp(0, 255).to(torch.uint8), labels


def test_it_learns_classes_and_its_features_tell_them_apart() -> None:
    held_out = striped(100, seed=1)
    network = train_features(*striped(300, seed=0), epochs=3, width=8, batch_size=50, test=held_out, progress=False)
    assert network.test_accuracy > 0.95
    assert network.test_accuracy == accuracy(network, *held_out)
    features = network(held_out[0])
    assert features.shape == (100, network.num_features) == (100, 32)
    centres = [features[held_out[1] == label].mean(0) for label in (0, 1)]
    spread = max(float(features[held_out[1] == label].std(0).norm()) for label in (0, 1))
    assert float((centres[0] - centres[1]).norm()) > spread
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_same_seed_gives_the_same_features_and_leaves_the_random_state() -> None:
    data = striped(60, seed=0)
    before = torch.get_rng_state()
    first = train_features(*data, epochs=1, width=4, batch_size=59, progress=False)  # the last batch has one image
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = train_features(*data, epochs=1, width=4, batch_size=59, progress=False)
    other = train_features(*data, epochs=1, width=4, batch_size=59, seed=1, progress=False)
    assert torch.equal(first(data[0]), again(data[0]))
    assert not torch.equal(first(data[0]), other(data[0]))


def test_a_file_gives_back_the_same_features(tmp_path) -> None:
    data = striped(60, seed=0, channels=3)
    network = train_features(*data, epochs=1, width=4, test=data, progress=False)
    network.save(tmp_path / "new" / "features.safetensors")
    loaded = ClassifierFeatures.load(tmp_path / "new" / "features.safetensors")
    assert torch.equal(loaded(data[0]), network(data[0]))
    assert torch.equal(loaded.logits(data[0]), network.logits(data[0]))
    assert loaded.test_accuracy == network.test_accuracy
    assert not loaded.training


def test_files_that_are_something_else_are_refused(tmp_path) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no such file\. Train a classifier"):
        ClassifierFeatures.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ClassifierFeatures.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no classifier that train_features made, but None"):
        ClassifierFeatures.load(path)
    ClassifierFeatures(1, 2, 4).save(path)
    whole = path.read_bytes()
    for old, new in (
        (b'"format_version":"1"', b'"format_version":"2"'),
        (b'"width":"4"', b'"width":"8"'),
        (b'"width":"4"', b'"width":"x"'),
        (b'"num_classes":"2"', b'"num_classes":"0"'),
        (b'"channels"', b'"shannels"'),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="is damaged or of a newer version"):
            ClassifierFeatures.load(path)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trained on images with 1 channel\(s\)"):
        ClassifierFeatures(1, 2, 4)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_what_cannot_be_learned_from_is_refused() -> None:
    images, labels = striped(10, seed=0)
    for wrong in (images.float(), images[0], images[:, :, :4], None):
        with pytest.raises(ValueError, match="expected uint8 images of shape"):
            train_features(wrong, labels, progress=False)
    for wrong in (None, labels[:5], labels.float()):
        with pytest.raises(ValueError, match="expected one integer per image"):
            train_features(images, wrong, progress=False)
    with pytest.raises(ValueError, match="expected one integer per image"):
        train_features(images, labels, test=(images, None), progress=False)
    with pytest.raises(ValueError, match="give at least two, with labels from 0 on"):
        train_features(images, labels - 5, progress=False)
    with pytest.raises(ValueError, match="at least two classes"):
        train_features(images, labels * 0, progress=False)
    with pytest.raises(ValueError, match="epochs=0 must be an integer of at least 1"):
        train_features(images, labels, epochs=0, progress=False)
