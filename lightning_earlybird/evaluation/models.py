"""Saved models to evaluate: ensembles, checkpoints with tickets, and dense denoisers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.checkpoint_files import read_checkpoint
from lightning_earlybird.descriptions import _diffusers_class, build_dense
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.evaluation.drawing import dense_sampler
from lightning_earlybird.files import Field
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.tickets import INDEX_FILE

Factory = Callable[[], nn.Module]


def load_model(path: str | os.PathLike[str], denoiser: Factory | None = None) -> tuple[TicketEnsembleSampler, bool]:
    """A saved model as a sampler, and whether it is dense.

    Args:
        path: Directory of an ensemble; Lightning checkpoint with tickets; or directory of a diffusers model, dense.
        denoiser: Builds the dense network, where it is not a diffusers model.

    Raises:
        EnsembleFormatError: If the file is damaged.
        FileNotFoundError: If nothing is there.
        ValueError: If it is something else.
    """
    source = Path(path)
    if source.is_file():
        return TicketEnsembleSampler.from_checkpoint(source, denoiser), False
    if not source.is_dir():
        raise FileNotFoundError(f"{str(source)!r}: there is no such directory or file.")
    if (source / "config.json").is_file() and not (source / INDEX_FILE).exists():
        return dense_sampler(load_diffusers(source), TimestepArgument("timestep", 1), None), True
    return TicketEnsembleSampler.from_pretrained(source, denoiser), False


def load_diffusers(directory: Path) -> nn.Module:
    """A diffusers model from a directory with its configuration and safetensors.

    Raises:
        ValueError: If it is none.
    """
    try:
        name = json.loads((directory / "config.json").read_text(encoding="utf-8"))["_class_name"]
        network: Any = _diffusers_class(str(name))
        if network is None:
            raise ValueError(f"{name!r} is no model of the installed diffusers")
        model: nn.Module = network.from_pretrained(str(directory), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{str(directory)!r} is not a directory of a diffusers model ({error}).") from error
    return model.eval()


def load_dense(
    path: str | os.PathLike[str] | None, beside: TicketEnsembleSampler, denoiser: Factory | None = None
) -> TicketEnsembleSampler | None:
    """The dense network that an ensemble was made from, as a sampler.

    Args:
        path: Its weights: a Lightning checkpoint from before the switch or of a dense training, or the directory of a
            diffusers model. None builds the network with random weights, which is enough to see what it costs.
        beside: The ensemble.
        denoiser: Builds the network, where it is not a diffusers model.

    Returns:
        The sampler; None where there are no weights and nothing that builds the network.

    Raises:
        EnsembleFormatError: If a checkpoint is damaged.
        ValueError: If the weights are not of this network.
    """
    record = beside.record
    shape = None if record is None else record.sample_shape
    if path is not None and Path(path).is_dir():
        return dense_sampler(load_diffusers(Path(path)), beside.timesteps, shape)
    description = None if record is None else record.denoiser
    if description is None and denoiser is None:
        if path is not None:
            raise ValueError(
                f"dense={str(path)!r}: the ensemble does not say how its dense network is built. Give a function that "
                "builds it, --denoiser package.module:function."
            )
        return None
    with torch.random.fork_rng(devices=[]):
        network = build_dense(denoiser, Field(description, "ensemble", "denoiser"))
    if path is not None:
        network.load_state_dict(_weights_of(read_checkpoint(path), network.state_dict(), str(path)))
    return dense_sampler(network.eval(), beside.timesteps, shape)


def _weights_of(checkpoint: Mapping[str, Any], expected: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weights of a network inside a LightningModule, whatever it is called there."""
    state = Field(checkpoint, path)["state_dict"].mapping()
    longest = max(expected, key=len)
    prefixes = [name.removesuffix(longest) for name in state if name == longest or name.endswith(f".{longest}")]
    for prefix in prefixes:
        found = {name: state.get(prefix + name) for name in expected}
        if all(isinstance(value, Tensor) and value.shape == expected[name].shape for name, value in found.items()):
            return {name: value for name, value in found.items() if value is not None}
    raise ValueError(
        f"dense={path!r} does not hold the weights of the ensemble's dense network (no part of its state has the names "
        f"and shapes of {len(expected)} tensors such as {longest!r}). Give a checkpoint from before the switch, or of "
        "a dense training with the same architecture."
    )
