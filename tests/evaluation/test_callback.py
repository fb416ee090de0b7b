import copy
import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import REGIONS, ConvNet, Lit, OnStep, adamw, fit, frozen_sgd, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_earlybird import EarlyBirdDetector, SpacedDDIMScheduler, TicketEnsemble, TimestepAwarePruner
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.evaluation import SampleQuality, load_features, reference_statistics
from lightning_earlybird.evaluation.drawing import dense_sampler, drawn, finite_uint8
from lightning_earlybird.evaluation.scores import QualityMeter

pytestmark = [
    pytest.mark.filterwarnings("ignore:SampleQuality. num_samples=.* is below the 50000"),
    # Raised inside diffusers' schedulers against NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

REFERENCE = torch.randint(60, 200, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Halves(nn.Module):
    """Four features of 4x4 images."""

    def forward(self, images):
        return nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)


def logged_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value), as CSVLogger has written them."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in rows[0]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", str(tmp_path / "cache"))


def quality(reference=REFERENCE, **settings) -> SampleQuality:
    known = {"num_samples": 30, "batch_size": 16, "num_inference_steps": 3, "features": Halves, "kid_subsets": 3}
    return SampleQuality(reference, **(known | settings))


def pruner(tmp_path: Path) -> list:
    detector = EarlyBirdDetector([0.25, 0.5], window=2, threshold=1.0, every_n_train_steps=3)
    return [detector, TimestepAwarePruner(REGIONS, round_to=4, dirpath=tmp_path / "tickets")]


def scored_by_hand(denoiser, num_samples=30):
    """FID and KID of a dense denoiser, without a Trainer."""
    extractor = load_features(Halves)
    statistics = reference_statistics(REFERENCE, extractor, device=torch.device("cpu"), progress=False)
    sampler = dense_sampler(copy.deepcopy(denoiser), TimestepArgument("timesteps", 1), (1, 4, 4))
    meter = QualityMeter(statistics, 4, kid_subsets=3, kid_subset_size=30)
    settings = {"scheduler": SpacedDDIMScheduler(), "num_inference_steps": 3, "batch_size": 16, "seed": 0}
    for images in drawn(sampler, range(num_samples), **settings):
        meter.add(extractor(finite_uint8(images)[0]))
    return meter.compute(0)


def test_a_fit_is_scored_on_both_sides_of_the_switch_and_at_its_end(tmp_path: Path) -> None:
    score = quality(every_n_epochs=1)
    logger = CSVLogger(tmp_path, name="", version="log")
    trainer = fit(Lit(), *pruner(tmp_path), score, max_epochs=3, logger=logger, log_every_n_steps=1)
    assert [(each["step"], each["epoch"], each["network"]) for each in score.results] == [
        (4, 0, "dense"),
        (8, 1, "tickets"),
        (12, 2, "tickets"),
    ]
    assert all(each["seconds"] > 0 and each["kid_30_halves_std"] >= 0 for each in score.results)
    logged = logged_in(tmp_path / "log")
    for name in ("fid_30_halves", "kid_30_halves"):
        steps, values = zip(*logged[name], strict=True)
        assert steps == (3, 7, 11)  # Lightning's own count
        assert values == pytest.approx([each[name] for each in score.results])
        assert float(trainer.callback_metrics[name]) == pytest.approx(score.results[-1][name])
    assert not any(name.startswith("fid_30") and name != "fid_30_halves" for name in logged)


def test_the_score_is_that_of_the_denoiser_sampled_by_hand() -> None:
    module = Lit()
    score = quality()
    fit(module, score, max_epochs=1)
    (result,) = score.results
    expected = scored_by_hand(module.model)
    assert result["fid_30_halves"] == pytest.approx(expected.fid, rel=1e-9)
    assert result["kid_30_halves"] == pytest.approx(expected.kid, rel=1e-6)
    assert result["network"] == "dense"


def test_averaged_weights_are_scored_once_there_are_any() -> None:
    module, average = Lit(), EMAWeightAveraging(decay=0.9, update_starting_at_step=6)
    scored = []

    class Watch(SampleQuality):
        def _score(self, trainer, pl_module, sampler, statistics):
            scored.append((copy.deepcopy(sampler.tickets[0]), copy.deepcopy(pl_module.model)))
            return super()._score(trainer, pl_module, sampler, statistics)

    score = Watch(
        REFERENCE, num_samples=30, batch_size=16, num_inference_steps=3, features=Halves, every_n_train_steps=4,
        at_end=False, kid_subsets=3,
    )  # fmt: skip
    fit(module, average, score, max_epochs=2)
    differ = [not torch.equal(ours.hidden.weight, live.hidden.weight) for ours, live in scored]
    assert differ == [False, True]  # at step 4 the average is still that of nothing
    assert score.results[1]["fid_30_halves"] == pytest.approx(scored_by_hand(scored[1][0]).fid, rel=1e-9)


def test_the_noise_is_the_same_each_time() -> None:
    score = quality(every_n_train_steps=2)
    fit(Lit(configure=frozen_sgd), score, max_epochs=1)
    first, second = score.results
    assert first["step"], second["step"] == (2, 4)
    assert first["fid_30_halves"] == second["fid_30_halves"]
    assert first["kid_30_halves"] == second["kid_30_halves"]


class Noted(Lit):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


@pytest.mark.parametrize("switching", [False, True], ids=["dense", "tickets"])
def test_evaluations_do_not_change_the_course_of_a_training(tmp_path: Path, switching: bool) -> None:
    def train(name, *callbacks):
        module = Noted(lambda: ConvNet(dropout=0.3))
        logger = CSVLogger(tmp_path, name="", version=name)
        more = pruner(tmp_path / name) if switching else []
        fit(module, *more, *callbacks, max_epochs=3, logger=logger, log_every_n_steps=1)
        logged = logged_in(tmp_path / name)
        return module, {key: logged[key] for key in ("train_loss_step", "train_loss_epoch")}

    plain, plain_logged = train("plain")
    scored, scored_logged = train("scored", quality(every_n_train_steps=1, every_n_epochs=1))
    assert scored_logged == plain_logged
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scored.parameters(), strict=True))
    assert all(a.training == b.training for a, b in zip(plain.modules(), scored.modules(), strict=True))
    assert isinstance(scored.model, TicketEnsemble) == switching


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_resumed_fit_ends_with_the_results_of_a_whole_one(tmp_path: Path) -> None:
    def train(name, *callbacks, **settings):
        score = quality(every_n_epochs=1)
        fit(Lit(), *pruner(tmp_path / name), score, *callbacks, **settings)
        return [{key: value for key, value in each.items() if key != "seconds"} for each in score.results]

    keep = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    whole = train("whole", keep, max_epochs=3, enable_checkpointing=True)
    resumed = train("resumed", max_epochs=3, ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt")
    assert len(whole) == 3
    assert resumed == whole
    again = train("again", max_epochs=3, ckpt_path=tmp_path / "checkpoints" / "epoch=2.ckpt")
    assert again == whole


def test_another_fit_begins_with_no_results() -> None:
    score = quality()
    for _ in range(2):
        fit(Lit(), score, max_epochs=1)
        assert [each["step"] for each in score.results] == [4]


def test_checkpoints_can_be_kept_by_score(tmp_path: Path) -> None:
    score = quality(every_n_epochs=1)
    best = ModelCheckpoint(tmp_path / "best", monitor="fid_30_halves", filename="{epoch}")
    fit(Lit(configure=adamw), score, best, max_epochs=3, enable_checkpointing=True)
    fids = [each["fid_30_halves"] for each in score.results]
    assert Path(best.best_model_path).stem == f"epoch={fids.index(min(fids))}"
    assert float(best.best_model_score) == pytest.approx(min(fids))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    score = quality(every_n_train_steps=1, at_end=False)
    fit(Lit(), score, max_epochs=2, accumulate_grad_batches=2)
    assert [each["step"] for each in score.results] == [1, 2, 3, 4]


def test_the_reference_is_the_training_set_if_nobody_says() -> None:
    data = DataLoader(TensorDataset(REFERENCE.float() / 127.5 - 1), batch_size=8, shuffle=True)
    score = quality(None)
    quiet_trainer(score, max_epochs=1).fit(Lit(), data, data)
    given = quality()
    quiet_trainer(given, max_epochs=1).fit(Lit(), data, data)
    assert score._statistics is not None
    assert torch.equal(score._statistics.products, given._statistics.products)
    with pytest.raises(
        MisconfigurationException, match=r"SampleQuality: reference: 32 images of TensorDataset has values"
    ):
        fit(Lit(), quality(None), max_epochs=1)  # whose data reach beyond [-1, 1]


def test_samples_that_are_not_finite_are_told_of_and_do_not_end_the_fit() -> None:
    def spoil(trainer, module):
        if trainer.global_step == 2:
            nn.init.constant_(module.model.conv_out.bias, math.nan)

    score = quality(every_n_train_steps=2, at_end=False)
    with pytest.warns(UserWarning, match="30 of 30 samples at step 2 hold NaN or infinity"):
        trainer = fit(Lit(configure=frozen_sgd), OnStep(spoil), score, max_steps=3)
    assert trainer.global_step == 3
    assert [each["step"] for each in score.results] == [2]
    assert math.isnan(score.results[0]["fid_30_halves"])
    assert "fid_30_halves" not in trainer.callback_metrics


def test_development_runs_evaluate_nothing() -> None:
    score = quality(features="no.such:thing", every_n_train_steps=1)
    fit(Lit(), score, fast_dev_run=2)
    assert score.results == []


class Conditional(Lit):
    def __init__(self, **settings) -> None:
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
        small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, **blocks}
        super().__init__(lambda: UNet2DModel(4, 1, 1, **small, **settings))
        self.sample_shape = (1, 4, 4)
        self.noise = DDPMScheduler()

    def loss(self, samples):
        steps = torch.randint(1000, (len(samples),))
        return self.model(samples, steps, class_labels=steps % 3).sample.square().mean()


class Transforming(Conditional):
    def __init__(self, **settings) -> None:
        Lit.__init__(self, lambda: DiTTransformer2DModel(2, 8, 1, num_layers=1, sample_size=4, **settings))
        self.sample_shape = (1, 4, 4)
        self.noise = DDPMScheduler()


@pytest.mark.parametrize(
    ("conditional", "name"), [(Conditional, "num_class_embeds"), (Transforming, "num_embeds_ada_norm")]
)
def test_class_conditional_denoisers_are_given_each_class_equally_often(
    conditional: type[Conditional], name: str
) -> None:
    module, labels = conditional(**{name: 3}), []

    def watch(network, args, kwargs):
        if not network.training:
            labels.append(kwargs["class_labels"])

    module.model.register_forward_pre_hook(watch, with_kwargs=True)
    fit(module, quality(class_labels="uniform", num_inference_steps=1), max_epochs=1)
    assert torch.cat(labels).bincount().tolist() == [10, 10, 10]
    with pytest.raises(MisconfigurationException, match=rf"class-conditional \({name}=3\). Pass class_labels"):
        fit(conditional(**{name: 3}), quality(), max_epochs=1)
    with pytest.raises(
        MisconfigurationException,
        match="has no num_class_embeds or num_embeds_ada_norm, which would tell the number of classes",
    ):
        fit(Lit(), quality(class_labels="uniform"), max_epochs=1)


def test_latents_are_decoded() -> None:
    def decode(latents):
        return nn.functional.interpolate(latents, scale_factor=2)

    images = nn.functional.interpolate(REFERENCE, scale_factor=2)
    score = quality(images, decode=decode, features=Halves8)
    fit(Lit(), score, max_epochs=1)
    assert math.isfinite(score.results[0]["fid_30_halves8"])
    with pytest.raises(MisconfigurationException, match="reference=None with decode=: the training data are latents"):
        fit(Lit(), quality(None, decode=decode), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"shape \(1, 4, 4\), and samples have \(1, 8, 8\)"):
        fit(Lit(), quality(decode=decode), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"decode\(samples\): dict for 1 samples"):
        fit(Lit(), quality(decode=lambda x: {}), max_epochs=1)


class Halves8(nn.Module):
    def forward(self, images):
        return nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1)


def test_what_does_not_fit_is_said_in_the_first_batch() -> None:
    module = Lit()
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(MisconfigurationException, match=r"shape \(3, 8, 8\), and samples have \(1, 4, 4\).*decode="):
        fit(module, quality(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)), max_epochs=1)
    assert all(torch.equal(before[name], value) for name, value in module.model.state_dict().items())
    with pytest.raises(MisconfigurationException, match="denoiser='modle' is not a sub-module"):
        fit(Lit(), quality(denoiser="modle"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="SampleQuality: features='nothing' must be"):
        fit(Lit(), quality(features="nothing"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="SampleQuality: reference is a int, expected images"):
        fit(Lit(), quality(5), max_epochs=1)
    with pytest.raises(
        MisconfigurationException, match="strategy=SimpleNamespace: SampleQuality samples on every rank"
    ):
        quality().setup(SimpleNamespace(strategy=SimpleNamespace(), fast_dev_run=False), Lit(), "fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_inference_steps": 5000, "scheduler": DDPMScheduler()},
            "num_inference_steps=5000: SampleQuality cannot sample with the scheduler DDPMScheduler",
        ),
        ({"num_inference_steps": 5000}, "cannot sample with the scheduler SpacedDDIMScheduler"),
        ({"scheduler": "ddim"}, "scheduler str .*without set_timesteps"),
        (
            {"class_labels": "uniform", "num_classes": 20},
            r"num_classes=20 must be at most 3, .* \(num_class_embeds=3\)",
        ),
    ],
)
def test_what_cannot_be_sampled_is_said_in_the_first_batch(settings, message) -> None:
    module = Conditional(num_class_embeds=3)
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, quality(**({"class_labels": "uniform"} | settings)), max_epochs=1)
    assert all(torch.equal(before[name], value) for name, value in module.model.state_dict().items())


def test_fewer_classes_than_configured_are_fine_and_classes_of_an_unconditional_denoiser_are_not() -> None:
    score = quality(class_labels="uniform", num_classes=2, num_inference_steps=1)
    fit(Conditional(num_class_embeds=3), score, max_epochs=1)
    assert math.isfinite(score.results[0]["fid_30_halves"])
    with pytest.raises(MisconfigurationException, match="num_classes=2: the denoiser takes no class labels"):
        fit(Lit(), quality(class_labels="uniform", num_classes=2), max_epochs=1)


def test_few_samples_are_warned_of() -> None:
    with pytest.warns(
        UserWarning, match="num_samples=3 is below the 50000.*3 samples are not enough for the covariance"
    ):
        fit(Lit(), quality(num_samples=3), max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        ({"num_samples": 1}, "num_samples=1 must be at least 2"),
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1 must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be"),
        ({"kid_subsets": 0}, "kid_subsets=0 must be"),
        ({"kid_subset_size": 31}, "kid_subset_size=31 must lie between 2 and num_samples=30"),
        ({"class_labels": "all"}, "class_labels='all' must be one of None, 'uniform'"),
        ({"num_classes": 3}, "num_classes=3 has no effect without class_labels"),
        ({"at_end": False}, "nothing would ever be evaluated"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        quality(**settings)


def test_a_damaged_state_is_refused() -> None:
    score = quality()
    score.load_state_dict({"format_version": 1, "results": [{"step": 3}]})
    assert score.results == [{"step": 3}]
    for state in ({"format_version": 1}, {"format_version": 1, "results": [{}]}, {"format_version": 1, "results": {}}):
        with pytest.raises(MisconfigurationException, match="state of SampleQuality is damaged"):
            score.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match="format_version=2"):
        score.load_state_dict({"format_version": 2})
