"""Settings of the examples: files, recipes and overrides, typed and checked."""

import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from shared.settings import (
    CONFIGS,
    FlowImageSettings,
    ImageSettings,
    LatentImageSettings,
    Settings,
    SettingsError,
    merge_settings,
    read_settings,
)

DIGITS = CONFIGS / "digits.yaml"
CIFAR10 = CONFIGS / "cifar10.yaml"
SCHEMAS = {
    "cifar10": ImageSettings,
    "celeba": ImageSettings,
    "flow": FlowImageSettings,
    "latent": LatentImageSettings,
}
RECIPES = [(path.parent.name, path.stem) for name in SCHEMAS for path in sorted((CONFIGS / name).glob("*.yaml"))]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_example_has_a_value_for_every_key(name: str) -> None:
    config = merge_settings(CONFIGS / f"{name}.yaml", [], SCHEMAS[name])
    assert not OmegaConf.missing_keys(config)
    assert config.output == f"runs/{name}"


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_every_recipe_fits_its_example(name: str, recipe: str) -> None:
    config = merge_settings(CONFIGS / f"{name}.yaml", [f"recipe={recipe}"], SCHEMAS[name])
    assert config.output == f"runs/{name}-{recipe}"  # beside the runs of other recipes


def test_the_defaults_of_cifar10_are_the_papers() -> None:
    config = merge_settings(CIFAR10, [], ImageSettings)
    assert (config.optimizer.learning_rate, config.optimizer.ema_decay, config.data.batch_size) == (2e-4, 0.9999, 128)
    assert (config.model.dropout, config.trainer.gradient_clip_val, config.data.flips) == (0.1, 1.0, True)
    assert [region[:3] for region in config.pruner.regions] == [[0, 240, 0.3], [240, 440, 0.6], [440, 1000, 0.8]]
    assert all(200_000 <= region[3] <= 350_000 for region in config.pruner.regions)
    assert (config.pruner.overlap, config.detector.window, config.detector.threshold) == (20, 5, 0.1)
    assert (config.sampling.num_inference_steps, config.sampling.spacing) == (100, "quadratic")
    assert (config.diffusion.beta_schedule, config.diffusion.beta_start, config.diffusion.beta_end) == (
        "linear",
        1e-4,
        0.02,
    )


def test_overrides_come_last_then_files_then_recipes(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("trainer:\n  max_steps: 7\npruner:\n  overlap: 5\n")
    config = merge_settings(CIFAR10, ["recipe=smoke", str(own), "pruner.overlap=10"], ImageSettings)
    assert (config.trainer.max_steps, config.pruner.overlap) == (7, 10)
    assert config.data.limit == 4096  # of the recipe
    assert config.detector.window == 5  # of the base


def test_recipes_are_combined_in_their_order() -> None:
    config = merge_settings(CIFAR10, ["recipe=smoke,conditional"], ImageSettings)
    assert (config.data.labels, config.data.limit, config.output) == (True, 4096, "runs/cifar10-conditional")
    again = merge_settings(CIFAR10, ["recipe=[conditional,smoke]"], ImageSettings)
    assert (again.data.labels, again.output) == (True, "runs/cifar10-smoke")
    assert merge_settings(CIFAR10, ["recipe=smoke,"], ImageSettings).output == "runs/cifar10-smoke"


def test_lists_and_strings_with_equal_signs_reach_the_configuration() -> None:
    config = merge_settings(
        CIFAR10, ["pruner.regions=[[0,500,0.5],[500,1000,0.8]]", "data.path='a=b.zip'"], ImageSettings
    )
    assert config.pruner.regions == [[0, 500, 0.5], [500, 1000, 0.8]]
    assert config.data.path == "a=b.zip"


@pytest.mark.parametrize(
    ("base", "schema", "argument", "message"),
    [
        (
            DIGITS,
            None,
            "trainer.max_epoch=3",
            "unknown key 'trainer.max_epoch'; the nearest one is 'trainer.max_epochs'",
        ),
        (DIGITS, None, "prunner.overlap=3", "unknown key 'prunner'; the nearest one is 'pruner'"),
        (DIGITS, None, "seedling=3", "unknown key 'seedling'; the nearest one is 'seed'"),
        (DIGITS, None, "pruner=3", "'pruner' is a section; set one of the keys in it"),
        (DIGITS, None, "seed.first=3", "'seed' is one value, not a section"),
        (DIGITS, None, "sampling.scheduler=euler", "sampling.scheduler=euler must be one of ddpm, ddim"),
        (DIGITS, None, "wandb.mode=of", "wandb.mode=of must be one of auto, online, offline, disabled"),
        (CIFAR10, ImageSettings, "optimizer.lr=1", "the nearest one is 'optimizer.learning_rate'"),
        (CIFAR10, ImageSettings, "optimizer.Learning_Rate=1", "the nearest one is 'optimizer.learning_rate'"),
        (CIFAR10, ImageSettings, "Seed=1", "the nearest one is 'seed'"),
        (CIFAR10, ImageSettings, "overlap=3", "unknown key 'overlap'; the nearest one is 'pruner.overlap'"),
        (
            CIFAR10,
            ImageSettings,
            "data.bacth_size=3",
            "unknown key 'data.bacth_size'; the nearest one is 'data.batch_size'",
        ),
        (
            CIFAR10,
            ImageSettings,
            "data.batch_size=many",
            r"data.batch_size='many' \(the command line\) has the wrong type: .*Integer",
        ),
        (
            CIFAR10,
            ImageSettings,
            "data.flips=perhaps",
            r"data.flips='perhaps' \(the command line\) has the wrong type: .*bool",
        ),
        (CIFAR10, ImageSettings, "optimizer.ema_decay=null", r"optimizer.ema_decay=None .* has the wrong type"),
        (CIFAR10, ImageSettings, "model.channels=[a,b]", r"model.channels.* has the wrong type: .*Integer"),
        (CIFAR10, ImageSettings, "sampling.spacing=cubic", "sampling.spacing=cubic must be one of quadratic, uniform"),
        (CIFAR10, ImageSettings, "optimizer.ema_decay=2", "optimizer.ema_decay=2.0 must be at least 0 and below 1"),
        (CIFAR10, ImageSettings, "recipe=smok", "recipe=smok: unknown; the nearest one is 'smoke', all are "),
        (CIFAR10, ImageSettings, "recipe=../cifar10", "recipe=../cifar10: unknown"),
        (CIFAR10, ImageSettings, "other.yaml", "'other.yaml' is neither key=value nor a YAML file that exists"),
        (CIFAR10, ImageSettings, "seed=[1", "is not key=value"),
        (DIGITS, None, "recipe=smoke", "unknown; this example has none"),
        (CIFAR10, ImageSettings, "recipe=true", "recipe=true: unknown; the nearest one is .* all are "),
        (CIFAR10, ImageSettings, "recipe=5", "recipe=5: unknown; the nearest one is .* all are "),
        (CIFAR10, ImageSettings, "data.batch_size=0", "data.batch_size=0 must be a whole number, at least 1"),
        (CIFAR10, ImageSettings, "data.num_workers=-1", "data.num_workers=-1 must be a whole number, at least 0"),
        (CIFAR10, ImageSettings, "seed=-1", "seed=-1 must be a whole number, at least 0 and below"),
        (CIFAR10, ImageSettings, "threads=0", "threads=0 must be a whole number, at least 1; or null"),
        (CIFAR10, ImageSettings, "optimizer.learning_rate=0", "optimizer.learning_rate=0.0 must be above 0"),
        (CIFAR10, ImageSettings, "optimizer.learning_rate=nan", "optimizer.learning_rate=nan must be above 0"),
        (CIFAR10, ImageSettings, "diffusion.beta_schedule=cosine", "cosine must be one of linear, scaled_linear"),
        (CIFAR10, ImageSettings, "model.dropout=1", "model.dropout=1.0 must be at least 0 and below 1"),
        (CIFAR10, ImageSettings, "model.channels=[]", r"model.channels=\[\] must be a list of one width or more"),
        (CIFAR10, ImageSettings, "model.norm_groups=0", "model.norm_groups=0 must be a whole number, at least 1"),
        (CONFIGS / "latent.yaml", LatentImageSettings, "model.patch_size=0", "model.patch_size=0 must be a whole"),
        (DIGITS, None, "data.batch_size=0", "data.batch_size=0 must be a whole number, at least 1"),
        (DIGITS, None, "optimizer.learning_rate=fast", "optimizer.learning_rate=fast must be above 0"),
        (DIGITS, None, "model.channels=32", "model.channels=32 must be a list of one width or more"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_says_what_to_write(
    base: Path, schema: type[Settings] | None, argument: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        merge_settings(base, [argument], schema)


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("a: [1\n")
    listed.write_text("- 1\n")
    with pytest.raises(SettingsError, match=re.escape(f"{str(broken)!r} is not valid YAML")):
        merge_settings(CIFAR10, [str(broken)], ImageSettings)
    with pytest.raises(SettingsError, match=re.escape(f"{str(listed)!r} holds a list")):
        merge_settings(CIFAR10, [str(listed)], ImageSettings)


def test_the_program_ends_with_the_sentence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["examples/cifar10.py"])
    with pytest.raises(SystemExit, match=r"^cifar10.py: unknown key 'sed'; the nearest one is 'seed'"):
        read_settings(CIFAR10, ["sed=1"], ImageSettings)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_there_is(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "What the script does.")
    with pytest.raises(SystemExit) as ended:
        read_settings(CIFAR10, ["seed=1", flag], ImageSettings)
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for each in ("What the script does.", "conditional, cpu, dense, smoke", str(CIFAR10)):
        assert each in said
