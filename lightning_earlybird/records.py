"""What is known about tickets besides their weights, and how their dense network is described and built again."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.files import Field
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepPartition, TimestepRegion

# More than any width, length or vocabulary in a configuration; what is built from it stays small enough to be refused.
_LARGEST_SETTING = 2**24

Edits = dict[str, dict[str, int | list[int]]]
"""Module name -> width attribute -> value: what a ticket differs in from the dense network besides its tensors."""


@dataclass(frozen=True)
class TicketFacts:
    """What is known about one ticket; pairs are (dense network, ticket).

    Args:
        region: The region that it serves.
        step: Optimizer step at which its ticket emerged, or at which the search limit ended the search; None for a mask
            that was not searched for. The mask is that of the switch, which may come later.
        emerged: Whether the mask had settled by then; False where the search limit ended the search.
        channels: Channels that the plan can prune, and how many of them are kept.
        parameters: Numbers of parameters.
        macs: Multiply-accumulate operations for one sample; None where they were not counted.
        target: What the region's sparsity is the fraction of: "channels", "params" or "macs".
    """

    region: TimestepRegion
    step: int | None
    emerged: bool
    channels: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    target: str = "channels"

    @property
    def achieved_channels(self) -> float:
        """Fraction of the channels removed."""
        return _removed(self.channels)

    @property
    def achieved_parameters(self) -> float:
        """Fraction of the parameters removed."""
        return _removed(self.parameters)

    @property
    def achieved_macs(self) -> float | None:
        """Fraction of the multiply-accumulate operations removed; None where they were not counted."""
        return None if self.macs is None else _removed(self.macs)

    def to_json(self) -> dict[str, Any]:
        """Plain containers that JSON can carry."""
        return {
            "region": TimestepPartition((self.region,)).to_json()["regions"][0],
            "step": self.step,
            "emerged": self.emerged,
            "channels": list(self.channels),
            "parameters": list(self.parameters),
            "macs": None if self.macs is None else list(self.macs),
            "target": self.target,
        }


@dataclass(frozen=True)
class EnsembleRecord:
    """What an ensemble's networks, partition and timestep argument do not tell, but saving it needs.

    Args:
        denoiser: How to build the dense network (see :func:`describe_denoiser`); None: only its owner knows.
        edits: One per ticket: the width attributes in which it differs from the dense network.
        masks: One per ticket, or none at all.
        facts: One per ticket, or none at all.
        sample_shape: Shape of one sample, without the batch: (C, H, W) for images.
    """

    denoiser: dict[str, Any] | None
    edits: tuple[Edits, ...]
    masks: tuple[TicketMask, ...] = ()
    facts: tuple[TicketFacts, ...] = ()
    sample_shape: tuple[int, ...] | None = None

    def check_masks(self) -> None:
        """Refuses masks that do not belong together, or not to the facts.

        Raises:
            ValueError: If two masks are over other channels, or the facts count other channels than a mask has.
        """
        for number, mask in enumerate(self.masks):
            self.masks[0].check_same_groups(mask)
            counted = (mask.num_channels, mask.num_kept)
            if self.facts and self.facts[number].channels != counted:
                raise ValueError(
                    f"the mask of ticket {number} keeps {counted[1]} of {counted[0]} channels, but its facts say "
                    f"{self.facts[number].channels[1]} of {self.facts[number].channels[0]}; they do not belong together"
                )

    def to_json(self) -> dict[str, Any]:
        """Everything but the masks, in plain containers that JSON and Lightning checkpoints can carry."""
        return {
            "denoiser": copy.deepcopy(self.denoiser),
            "edits": copy.deepcopy(list(self.edits)),
            "facts": [facts.to_json() for facts in self.facts],
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], masks: Sequence[TicketMask] = ()) -> EnsembleRecord:
        """Inverse of :meth:`to_json`, with the masks beside it.

        Raises:
            EnsembleFormatError: If a field is missing or has the wrong type; the message names it.
        """
        root = Field(dict(data), "the ensemble's record")
        record = cls(
            denoiser=root["denoiser"].optional(read_denoiser),
            edits=tuple(read_edits(field) for field in root["edits"].elements()),
            masks=tuple(masks),
            facts=tuple(read_facts(field) for field in root["facts"].elements()),
            sample_shape=root["sample_shape"].optional(read_shape),
        )
        if {len(record.edits)} != {len(each) for each in (record.edits, record.masks, record.facts) if each}:
            root.fail(f"has {len(record.edits)} edits, {len(record.masks)} masks and {len(record.facts)} facts.")
        root["facts"].parsed(lambda _: record.check_masks())
        return record


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
            "pass denoiser=, a function without arguments that builds the dense network."
        )
    network = _diffusers_class(description["class"])
    if network is None:
        field["class"].fail(f"is {description['class']!r}, which is no model of the installed diffusers.")
    try:
        built: nn.Module = network(**description["config"])
    except Exception as error:  # a constructor may raise anything over values it was not made for
        field["config"].fail(f"does not build a {description['class']}: {error}")
    return built


def sketch_dense(field: Field, num_tensors: int) -> nn.Module:
    """The dense network of a description on the meta device: its names and shapes, at no cost in memory.

    Args:
        field: Where the description was read.
        num_tensors: How many tensors a ticket of it has; a network of many more is given up while it is being built.

    Raises:
        EnsembleFormatError: As for :func:`build_dense`, or if the network is far from having so few tensors.
    """
    # Modules count as well, and constructors may replace what they have built: 3.6 times as many as tensors is the most
    # that a model of diffusers 0.42 has.
    with torch.device("meta"), _no_more_parts(16 * num_tensors + 1000):
        return build_dense(None, field)


def read_denoiser(field: Field) -> dict[str, Any]:
    """A description of the dense network; whether it builds one is for :func:`build_dense` to see."""
    if field["library"].text() != "diffusers":
        field["library"].fail(f"is {field['library'].value!r}, expected 'diffusers' (or null for the whole denoiser).")
    config = field["config"]
    config.mapping()
    config.parsed(_check_settings)
    return {"library": "diffusers", "class": field["class"].text(), "config": config.value}


def read_edits(field: Field) -> Edits:
    """Width attributes, types only: which exist, and may be written, is for ``resize_`` to check."""
    edits: Edits = {}
    for module, attributes in field.members().items():
        edits[module] = {
            name: [number.integer(1) for number in value.elements()]
            if isinstance(value.value, list)
            else value.integer(1)
            for name, value in attributes.members().items()
        }
    return edits


def read_facts(field: Field) -> TicketFacts:
    """Inverse of :meth:`TicketFacts.to_json`."""
    return TicketFacts(
        region=field["region"].parsed(
            lambda region: TimestepPartition.from_json({"regions": [region], "overlap": 0}).regions[0]
        ),
        step=field["step"].optional(Field.integer),
        emerged=field["emerged"].boolean(),
        channels=_read_pair(field["channels"]),
        parameters=_read_pair(field["parameters"]),
        macs=field["macs"].optional(_read_pair),
        target=_read_target(field["target"]) if "target" in field.mapping() else "channels",
    )


def _read_target(field: Field) -> str:
    known = ("channels", "params", "macs")
    if field.text() not in known:
        field.fail(f"is {field.value!r}, expected one of {known}.")
    return field.text()


def read_shape(field: Field) -> tuple[int, ...]:
    """A shape: an array of positive integers, of a tensor that could exist."""
    shape = tuple(size.integer(1) for size in field.elements())
    if math.prod(shape) > 2**40 or len(shape) > 60:
        field.fail(f"is the shape of {math.prod(shape):.0e} numbers in {len(shape)} dimensions, which nothing has.")
    return shape


def _read_pair(field: Field) -> tuple[int, int]:
    numbers = [number.integer() for number in field.elements()]
    if len(numbers) != 2:
        field.fail(f"has {len(numbers)} entries, expected two: dense network, ticket.")
    return numbers[0], numbers[1]


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


def _removed(pair: tuple[int, int]) -> float:
    dense, kept = pair
    return (dense - kept) / dense if dense else 0.0
