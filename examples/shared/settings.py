"""Settings of an example: YAML files and dot-list overrides, typed and checked.

A base file holds every key; recipes are smaller files beside it, laid over it by name; overrides come last:

    python examples/cifar10.py recipe=smoke trainer.devices=3 "data.path='my images.zip'"
"""

import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parents[1] / "configs"

# Written in YAML files, never here: a key without a default is missing until a file gives it.
MISSING: Any = "???"


@dataclass
class DataSettings:
    path: str | None = None  # folder, zip or archive on disk; null: the hub's data set
    hub: str | None = None
    split: str = "train"
    size: int = MISSING
    crop: Any = None  # before resizing: null, the side of a centre crop, a box, or a name that read_images knows
    channels: str = "RGB"
    labels: bool = False
    limit: int | None = None
    cache_dir: str | None = None
    batch_size: int = MISSING
    num_workers: int = 0
    flips: bool = True


@dataclass
class LatentSettings:
    path: str | None = None  # what encode_latents.py wrote
    labels: bool = True
    limit: int | None = None
    batch_size: int = MISSING
    num_workers: int = 0


@dataclass
class ModelSettings:
    channels: list[int] = MISSING  # widths of the levels
    layers_per_block: int = 2
    attention: list[int] = MISSING  # sides of the feature maps that attention works on
    attention_head_dim: int | None = None  # null: one head
    dropout: float = 0.0
    norm_groups: int = 32
    channels_last: bool = False
    compile: bool = False


@dataclass
class TransformerSettings:
    layers: int = MISSING
    heads: int = MISSING
    head_dim: int = MISSING
    patch_size: int = 2
    dropout: float = 0.0
    compile: bool = False


@dataclass
class DiffusionSettings:
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1.0e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"  # epsilon, v_prediction or sample
    antithetic: bool = True
    clip_sample: bool = True  # sampling keeps predicted images within [-1, 1]; latents know no such bounds


@dataclass
class FlowSettings:
    num_train_timesteps: int = 1000  # the unit of time: data at 0, noise at 1000, every real number between
    shift: float = 1.0
    density: str = "logit_normal"  # or uniform


@dataclass
class OptimizerSettings:
    learning_rate: float = MISSING
    warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.9999


@dataclass
class DetectorSettings:
    every_n_epochs: int = 1
    every_n_train_steps: int | None = None
    window: int = 5
    threshold: float = 0.1
    criterion: str = "magnitude"
    weights: str = "auto"


@dataclass
class PrunerSettings:
    regions: Any = MISSING  # [[start, stop, sparsity, steps of the ticket (multi_ticket only)], ...], or a path
    overlap: float = 0
    max_search_steps: int | None = None
    on_search_limit: str = "prune"
    rewind: str | None = None
    target: str = "channels"
    scope: str = "uniform"
    norm: str = "shrink"
    heads: str = "equal"
    round_to: int = 8


@dataclass
class TrainerSettings:
    max_epochs: int = -1
    max_steps: int = -1
    accelerator: str = "auto"
    devices: Any = "auto"  # a number, a list of indices, or auto
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    gradient_clip_val: float | None = 1.0
    accumulate_grad_batches: int = 1
    log_every_n_steps: int = 50
    benchmark: bool = False


@dataclass
class SamplingSettings:
    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None
    num_samples: int = 64
    num_inference_steps: int = 100
    spacing: str = "quadratic"  # or uniform
    batch_size: int = 64


@dataclass
class EvaluationSettings:
    num_samples: int = 10_000  # 0: none
    every_n_epochs: int | None = None  # null: at the end only
    batch_size: int = 250
    reference: str | None = None  # what samples are compared with: images, or saved statistics; null: the training data
    features: str = "inception"  # or classifier:FILE, or package.module:Factory
    weights_path: str | None = None  # of Inception, for a machine without a network
    kid: bool = True


@dataclass
class CheckpointSettings:
    every_n_epochs: int | None = 1
    every_n_train_steps: int | None = None
    keep_all: bool = False  # every checkpoint, instead of the last one only


@dataclass
class WandbSettings:
    mode: str = "auto"  # online when logged in, else offline; or online, offline, disabled
    project: str = "lightning-earlybird"
    name: str | None = None


@dataclass
class Settings:
    """What all examples have. One that differs has a subclass of its own."""

    recipe: Any = None
    seed: int = 0
    threads: int | None = None  # of PyTorch; null leaves them as they are
    output: str = MISSING
    resume: Any = False  # true: from the output folder's last checkpoint, where there is one; or a checkpoint's path
    overwrite: bool = False
    tensorboard: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    pruner: PrunerSettings = field(default_factory=PrunerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class ImageSettings(Settings):
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)


@dataclass
class FlowImageSettings(Settings):
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)


@dataclass
class LatentImageSettings(Settings):
    data: LatentSettings = field(default_factory=LatentSettings)
    model: TransformerSettings = field(default_factory=TransformerSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    vae: str | None = None  # decodes samples; null: the one that the latents were encoded with


CHOICES = {
    "diffusion.prediction": ("epsilon", "v_prediction", "sample"),
    "flow.density": ("logit_normal", "uniform"),
    "sampling.spacing": ("quadratic", "uniform"),
    "sampling.scheduler": ("ddpm", "ddim"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
    "data.channels": ("RGB", "L"),
    "diffusion.beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}


def _whole(lowest: int, limit: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and lowest <= value < limit


# What numbers must be, where null is not meant.
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_whole(0, 2**32), "a whole number, at least 0 and below 2**32"),
    "threads": (_whole(1), "a whole number, at least 1; or null"),
    "data.batch_size": (_whole(1), "a whole number, at least 1"),
    "data.num_workers": (_whole(0), "a whole number, at least 0"),
    "optimizer.learning_rate": (lambda value: 0 < value < math.inf, "above 0, for example 2.0e-4"),
    "optimizer.ema_decay": (lambda value: 0 <= value < 1, "at least 0 and below 1, for example 0.9999"),
    "model.dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1, for example 0.1"),
    "model.channels": (
        lambda value: len(value) > 0 and all(map(_whole(1), value)),
        "a list of one width or more, each at least 1, for example [64,128]",
    ),
    "model.norm_groups": (_whole(1), "a whole number, at least 1"),
    "model.patch_size": (_whole(1), "a whole number, at least 1"),
}


class SettingsError(Exception):
    """An override or a file that cannot be what was meant; the message says what to write instead."""


def read_settings(base: Path, arguments: list[str], schema: type[Settings] | None = None) -> DictConfig:
    """The settings of an example; a mistake ends the program with a sentence, and ``--help`` with an explanation.

    Args:
        base: The YAML file with all keys. Recipes are files in the folder beside it that has its name.
        arguments: Of the command line: ``key=value``, and names of further YAML files.
        schema: The types of the keys; None takes the keys of ``base``, and any values.
    """
    if {"-h", "--help"} & set(arguments):
        print((sys.modules["__main__"].__doc__ or Path(sys.argv[0]).name).strip())
        print(f"\nRecipes (recipe=NAME, or several with commas): {', '.join(_recipes(base)) or 'none'}.")
        print(f"Keys, to be set by section.key=VALUE, are in {base}; those with defaults in {__file__}.")
        sys.exit(0)
    try:
        return merge_settings(base, arguments, schema)
    except SettingsError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def merge_settings(base: Path, arguments: list[str], schema: type[Settings] | None = None) -> DictConfig:
    """Like :func:`read_settings`.

    Raises:
        SettingsError: A key is unknown (the message names the nearest), a value has the wrong type or is not one of
            those that are possible, or a file or recipe does not exist.
    """
    defaults = _load(base)
    config = OmegaConf.merge(OmegaConf.structured(schema), defaults) if schema is not None else defaults
    files = [(argument, _load(Path(argument))) for argument in arguments if "=" not in argument]
    written = [argument for argument in arguments if "=" in argument]
    try:
        overrides = OmegaConf.from_dotlist(written)
    except Exception as error:  # of YAML's parser
        raise SettingsError(f"{' '.join(written)!r} is not key=value: {_first_line(error)}") from error
    layers = [*files, ("the command line", overrides)]
    names = next((layer["recipe"] for _, layer in reversed(layers) if layer.get("recipe") is not None), None)
    layers = [(f"recipe={name}", _recipe(base, name)) for name in _listed(names)] + layers
    for origin, layer in layers:
        _check_keys(config, layer, base)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = error.full_key or "?"
            value = OmegaConf.select(layer, key)
            raise SettingsError(f"{key}={value!r} ({origin}) has the wrong type: {_first_line(error)}.") from error
    for key, possible in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value is not None and value not in possible:
            raise SettingsError(f"{key}={value} must be one of {', '.join(possible)}.")
    for key, (fits, meant) in BOUNDS.items():
        value = OmegaConf.select(config, key)
        if value is not None and not _holds(fits, value):
            raise SettingsError(f"{key}={value} must be {meant}.")
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise SettingsError(f"{', '.join(missing)}: not set; write {missing[0]}=VALUE.")
    assert isinstance(config, DictConfig)
    return config


def _holds(fits: Callable[[Any], bool], value: Any) -> bool:
    try:
        return fits(value)
    except TypeError:  # no number, in a file without types
        return False


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise SettingsError(f"{str(path)!r} is neither key=value nor a YAML file that exists.")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # of YAML's parser, or of the file's encoding
        raise SettingsError(f"{str(path)!r} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise SettingsError(f"{str(path)!r} holds a list; settings are `key: value` pairs.")
    return loaded


def _recipe(base: Path, name: str) -> DictConfig:
    known = _recipes(base)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
        hint = f"the nearest one is {nearest[0]!r}, all are {', '.join(known)}" if known else "this example has none"
        raise SettingsError(f"recipe={name}: unknown; {hint}.")
    return _load(base.with_suffix("") / f"{name}.yaml")


def _recipes(base: Path) -> list[str]:
    return sorted(each.stem for each in base.with_suffix("").glob("*.yaml"))


def _listed(names: Any) -> list[str]:
    """One name, several with commas between them, or a list."""
    if names is None:
        return []
    if isinstance(names, str):
        names = names.split(",")
    elif not OmegaConf.is_list(names):
        names = [names]
    # As they are written: true, not True.
    words = [str(name).lower() if isinstance(name, bool) else str(name).strip() for name in names]
    return [word for word in words if word]


def _check_keys(config: DictConfig, layer: DictConfig, base: Path) -> None:
    known = _keys(config)
    for key in _keys(layer):
        if key not in known:
            found = _nearest(key, config, OmegaConf.is_dict(OmegaConf.select(layer, key)))
            raise SettingsError(f"unknown key {key!r}; the nearest one is {found!r}. All are in {base}.")
        old, new = (OmegaConf.is_dict(OmegaConf.select(node, key)) for node in (config, layer))
        if old != new:
            kind = "a section; set one of the keys in it" if old else "one value, not a section"
            raise SettingsError(f"{key!r} is {kind}. All are in {base}.")


def _nearest(key: str, config: DictConfig, section: bool) -> str:
    """The known section, or single value, that an unknown key is likely meant to be."""
    known = [each for each in _keys(config) if OmegaConf.is_dict(OmegaConf.select(config, each)) == section]
    folder, _, word = key.lower().rpartition(".")
    words = {each: each.rpartition(".")[2].lower() for each in known}
    # The last word of a nested key is what is usually mistyped, or remembered without its section.
    within = [each for each in known if folder and each.startswith(f"{folder}.")]
    if same := [each for each in (*within, *known) if words[each] == word]:
        return same[0]
    if within:
        return max(within, key=lambda each: difflib.SequenceMatcher(None, words[each], word).ratio())
    return max(known, key=lambda each: difflib.SequenceMatcher(None, each.lower(), key.lower()).ratio())


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in node:
        found.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            found += _keys(node[key], f"{prefix}{key}.")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
