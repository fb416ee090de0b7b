"""How the dense network of tickets is described in a file, and built again from there without trust."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.files import Field

# More than any width, length or vocabulary in a configuration; what is built from it stays small enough to be refused.
_LARGEST_SETTING = 2**24

# How large a dense network a description may build: so many bytes, or so many times the bytes of its tickets.
_ALWAYS_BUILT_BYTES = 1 << 28
_LARGEST_GROWTH = 256


def describe_denoiser(module: nn.Module) -> dict[str, Any] | None:
    """How to build a network of the same class and configuration again: ``{"library", "class", "config"}``.

    Args:
        module: The dense denoiser, before it is pruned; a ``torch.compile`` wrapper is looked through.

    Returns:
        A description that JSON can carry; None for networks that are not diffusers models, and for diffusers models
        that their configuration does not describe (a layer was exchanged, a value is not JSON). Those are loaded with
        a factory.
    """
    module = unwrap(module)
    # A module of diffusers cannot exist before diffusers has been imported, by whoever built it.
    if not type(module).__module__.startswith("diffusers."):
        return None
    network = _diffusers_class(type(module).__name__)
    if network is not type(module):
        return None
    try:
        # Through JSON at once, so that the description does not change when it is written and read back.
        arguments = inspect.signature(network.__init__).parameters
        values = {name: value for name, value in dict(module.config).items() if name in arguments}
        config = json.loads(json.dumps(values, allow_nan=False))
        _check_settings(config)
        with torch.device("meta"):
            twin = network(**config)
    except Exception:  # a constructor may raise anything; the network then needs a factory
        return None
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (twin, module)]
    if shapes[0] != shapes[1]:
        return None
    return {"library": "diffusers", "class": network.__name__, "config": config}


def build_dense(factory: Callable[[], nn.Module] | None, field: Field) -> nn.Module:
    """The dense network, from its owner's factory or else from a description that was read from a file.

    Args:
        factory: Builds the network; goes first.
        field: Where the description was read: what :func:`describe_denoiser` gave, or null.

    Raises:
        ValueError: If there is neither, or the factory returns something else than a module.
        EnsembleFormatError: If the description names no diffusers model, or does not build one.
    """
    if factory is not None:
        dense: Any = factory()
        if not isinstance(dense, nn.Module):
            raise ValueError(f"denoiser must return a torch module, but it returned a {type(dense).__name__}.")
        return unwrap(dense)
    description = field.optional(read_denoiser)
    if description is None:
        raise ValueError(
            "denoiser=None: the ensemble's network is not one that diffusers can build from its configuration; "
            "pass denoiser=, a function without arguments that builds the dense network. A diffusers pipeline is then "
            "loaded with the sampler given to it: from_pretrained(directory, unet=sampler)."
        )
    network = _diffusers_class(description["class"])
    if network is None:
        field["class"].fail(f"is {description['class']!r}, which is no model of the installed diffusers.")
    try:
        built: nn.Module = network(**description["config"])
    except Exception as error:  # a constructor may raise anything over values it was not made for
        field["config"].fail(f"does not build a {description['class']}: {error}")
    return built


def sketch_dense(field: Field, states: Sequence[Mapping[str, torch.Tensor]]) -> nn.Module:
    """The dense network of a description on the meta device: its names and shapes, at no cost in memory.

    Args:
        field: Where the description was read.
        states: The tickets' tensors; a network of many more is given up while it is being built.

    Raises:
        EnsembleFormatError: As for :func:`build_dense`, or if the network is far too large for its tickets: above 256
            MiB, and above 256 times their size.
    """
    num_tensors = max(len(state) for state in states)
    # Modules count as well, and constructors may replace what they have built: 3.6 times as many as tensors is the most
    # that a model of diffusers 0.42 has.
    with torch.device("meta"), _no_more_parts(16 * num_tensors + 1000), _CountedBytes() as taken:
        network = build_dense(None, field)
    # By storages: those of a checkpoint may be claimed by many tensors, and a tensor may repeat what little it has.
    storages = [tensor.untyped_storage() for state in states for tensor in state.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if taken.total > max(_ALWAYS_BUILT_BYTES, _LARGEST_GROWTH * stored):
        field.fail(
            f"builds a network of {taken.total:,} bytes for tickets of {stored:,} bytes; if that is meant, pass "
            "denoiser=, a function without arguments that builds it."
        )
    return network


def read_denoiser(field: Field) -> dict[str, Any]:
    """A description of the dense network; whether it builds one is for :func:`build_dense` to see."""
    if field["library"].text() != "diffusers":
        field["library"].fail(f"is {field['library'].value!r}, expected 'diffusers' (or null for the whole denoiser).")
    config = field["config"]
    config.mapping()
    config.parsed(_check_settings)
    return {"library": "diffusers", "class": field["class"].text(), "config": config.value}


def _diffusers_class(name: str) -> Callable[..., nn.Module] | None:
    """A model class of diffusers by its public name; None for any other name."""
    diffusers: Any = importlib.import_module("diffusers")
    # Capitals only: diffusers resolves its sub-modules' names, too, by importing them.
    if not re.fullmatch("[A-Z][A-Za-z0-9]*", name):
        return None
    try:
        # Among the models only: a name of a pipeline would have that imported, and transformers with it.
        found: Any = getattr(importlib.import_module("diffusers.models"), name)
    except (AttributeError, RuntimeError):  # RuntimeError: the class needs a library that is not installed
        return None
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin) and issubclass(found, diffusers.ConfigMixin):
        return found
    return None


def _check_settings(config: Any) -> None:
    """Refuses a configuration with a number that no network is built with; whatever is nested in it, too."""
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, int) and abs(value) > _LARGEST_SETTING:
            raise ValueError(
                f"a setting is above {_LARGEST_SETTING:,}; pass denoiser=, a function that builds the dense network, "
                "if that is meant"
            )


class _CountedBytes(TorchDispatchMode):
    """Adds up the sizes of all tensors that are made; not only parameters and buffers need memory."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(result is each for each in args):
            self.total += result.nbytes
        return result


class _TooManyPartsError(Exception):
    """A network under construction cannot be the one that it should be."""


@contextmanager
def _no_more_parts(limit: int) -> Iterator[None]:
    """Gives up the construction of networks, in this thread and block, at more tensors and modules than ``limit``."""
    thread, count = threading.get_ident(), 0

    def visit(module: nn.Module, name: str, part: Any) -> None:
        nonlocal count
        # torch knows hooks for all modules only; other threads may be building theirs.
        if threading.get_ident() != thread:
            return
        count += 1
        if count > limit:
            raise _TooManyPartsError("it has many more layers than its tickets have tensors")

    handles = [
        register_module_parameter_registration_hook(visit),
        register_module_module_registration_hook(visit),
        register_module_buffer_registration_hook(visit),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
