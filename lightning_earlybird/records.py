"""What is known about tickets besides their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_earlybird.descriptions import read_denoiser as read_denoiser
from lightning_earlybird.files import Field
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepPartition, TimestepRegion

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
        denoiser: How to build the dense network (see :func:`~.descriptions.describe_denoiser`); None: only its owner
            knows.
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
        root = Field(data, "the ensemble's record")
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


def _removed(pair: tuple[int, int]) -> float:
    dense, kept = pair
    return (dense - kept) / dense if dense else 0.0
