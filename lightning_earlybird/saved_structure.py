"""What a checkpoint says of tickets besides their weights: written, read without trust, and built again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.absent import AbsentTicket, clone_structure
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.files import Field, plain_copy, presentable
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.records import EnsembleRecord
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import resize_

CHECKPOINT_KEY = "lightning_earlybird"
CHECKPOINT_VERSION = 2

_TICKET_KEY = re.compile(r"(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)


def write_structure(name: str, ensemble: TicketEnsemble) -> dict[str, Any]:
    """What is stored under ``CHECKPOINT_KEY``; plain containers and tensors only.

    Args:
        name: Dotted name of the ensemble in the LightningModule.
        ensemble: The ensemble, with its record.
    """
    record = ensemble.record
    assert record is not None
    described = {
        "format_version": CHECKPOINT_VERSION,
        "denoiser": name,
        "partition": ensemble.partition.to_json(),
        "timesteps": asdict(ensemble.timesteps),
        "record": record.to_json(),
        # Of tickets that other ranks train there are no tensors to tell their shapes.
        "absent": {
            str(index): {key: list(shape) for key, shape in ticket.shapes().items()}
            for index, ticket in enumerate(ensemble.tickets)
            if isinstance(ticket, AbsentTicket)
        },
    }
    # Through JSON, so that numbers of other libraries (a region's bounds may be NumPy's) become plain ones: a
    # checkpoint with those in it does not load with weights_only=True.
    plain: dict[str, Any] = json.loads(json.dumps(described, allow_nan=False))
    return {**plain, "masks": [mask.state_dict() for mask in record.masks]}


@dataclass(frozen=True)
class SavedStructure:
    """The structure of an ensemble as a checkpoint describes it; whether it fits a network is for :meth:`check`.

    Args:
        denoiser: Dotted name of the ensemble in the LightningModule.
        partition: The regions.
        timesteps: Where tickets take the timesteps.
        record: See :class:`EnsembleRecord`; one entry of edits per ticket, one mask and facts each or none at all.
        shapes: For each ticket: name of a tensor, relative to the ticket, -> its shape.
        dtypes: Likewise the dtypes; empty for absent tickets.
        absent: Indices of the tickets whose weights other checkpoints hold.
    """

    denoiser: str
    partition: TimestepPartition
    timesteps: TimestepArgument
    record: EnsembleRecord
    shapes: tuple[dict[str, torch.Size], ...]
    dtypes: tuple[dict[str, torch.dtype], ...]
    absent: frozenset[int]

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], file: str) -> SavedStructure | None:
        """The structure that is stored in a checkpoint; None in one of the dense denoiser.

        Args:
            checkpoint: A Lightning checkpoint that nobody vouches for.
            file: Where it was read, for messages.

        Raises:
            EnsembleFormatError: If something is missing, damaged, of a newer format, or does not belong together; the
                message names the field.
        """
        document = Field(checkpoint, file)
        if CHECKPOINT_KEY not in document.mapping():
            return None
        stored = document[CHECKPOINT_KEY]
        field = Field(_upgraded(stored), file, CHECKPOINT_KEY)
        name = field["denoiser"].text()
        if not name:
            field["denoiser"].fail("is empty, expected the dotted name of the denoiser in the LightningModule.")
        partition = field["partition"].parsed(TimestepPartition.from_json)
        absent = _read_absent(field["absent"], len(partition))
        weights = tensors_of_tickets(document["state_dict"], name, len(partition))
        for index, tensors in enumerate(weights):
            if bool(tensors) == (index in absent):
                document["state_dict"].fail(
                    f"holds {'weights' if tensors else 'no weights'} of ticket {index}, which is "
                    f"{'absent' if index in absent else 'not absent'} by '{CHECKPOINT_KEY}.absent'."
                )
        structure = cls(
            denoiser=name,
            partition=partition,
            timesteps=_read_timesteps(field["timesteps"]),
            record=_read_record(field["record"], stored["masks"], partition),
            shapes=tuple(
                absent.get(index) or {key: tensor.shape for key, tensor in tensors.items()}
                for index, tensors in enumerate(weights)
            ),
            dtypes=tuple({key: tensor.dtype for key, tensor in tensors.items()} for tensors in weights),
            absent=frozenset(absent),
        )
        if "current_model_state" in document.mapping():  # what WeightAveraging loads over the averaged weights
            live = tensors_of_tickets(document["current_model_state"], name, len(partition))
            if [_shapes(each) for each in live] != [_shapes(each) for each in weights]:
                document["current_model_state"].fail("holds tickets of other shapes than 'state_dict'.")
        return structure

    def build(self, dense: nn.Module) -> TicketEnsemble:
        """The ensemble with tickets cut from copies of the dense network; their values are undefined until loaded.

        Raises:
            ValueError: If the structure does not fit the network.
        """
        tickets: list[nn.Module] = []
        for index, (shapes, edits) in enumerate(zip(self.shapes, self.record.edits, strict=True)):
            ticket = resize_(copy.deepcopy(dense), shapes, edits)
            tickets.append(AbsentTicket(ticket) if index in self.absent else ticket)
        ensemble = TicketEnsemble(tickets, self.partition, self.timesteps)
        ensemble.record = self.record
        return ensemble

    def check(self, dense: nn.Module) -> None:
        """Tries the structure on a network, without changing it and without memory for weights.

        Raises:
            ValueError: If the structure, or a tensor's dtype, does not fit the network; the message says why.
        """
        try:
            ensemble = self.build(clone_structure(dense, torch.device("meta")))
        except Exception as error:  # anything may come of shapes and attributes that nobody vouches for
            raise ValueError(presentable(str(error))) from error
        for ticket, dtypes in zip(ensemble.tickets, self.dtypes, strict=True):
            if not isinstance(ticket, AbsentTicket):
                check_dtypes(ticket, dtypes)


def tensors_of_tickets(weights: Field, name: str, count: int) -> list[dict[str, Tensor]]:
    """The tickets' tensors in a state dict, by ticket; names are relative to the ticket.

    Args:
        weights: The state dict.
        name: Dotted name of the ensemble.
        count: How many tickets there are.

    Raises:
        EnsembleFormatError: If a name belongs to no ticket, or its value is no ordinary tensor.
    """
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    prefix = f"{name}."
    for key, value in weights.mapping().items():
        if not isinstance(key, str):
            weights.fail(f"has the key {key!r}, expected names of tensors only.")
        if not key.startswith(prefix):
            continue
        match = _TICKET_KEY.fullmatch(key.removeprefix(f"{prefix}tickets."))
        if not key.startswith(f"{prefix}tickets.") or match is None or int(match[1]) >= count:
            weights.fail(f"has the tensor {key!r}, which belongs to none of the {count} tickets of {name!r}.")
        found[int(match[1])][match[2]] = ordinary_tensor(Field(value, weights.file, f"{weights.path}.{key}"))
    return found


def ordinary_tensor(field: Field) -> Tensor:
    """The value, which must be a tensor with numbers of its own in memory: not sparse, quantized, nested or meta."""
    value = field.value
    if not isinstance(value, Tensor):
        field.fail(f"is a {type(value).__name__}, expected a tensor.")
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        field.fail(f"is a tensor of layout {value.layout} on {value.device}, expected an ordinary dense one.")
    return value


def check_dtypes(ticket: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuses tensors whose numbers would change their meaning in a network.

    Only floating dtypes may differ, of those that layers compute in: of 16 bits and more.

    Raises:
        ValueError: The message names the tensor.
    """
    own = ticket.state_dict()
    for name, dtype in dtypes.items():
        both = (dtype, own[name].dtype)
        if dtype != own[name].dtype and not all(each.is_floating_point and each.itemsize > 1 for each in both):
            raise ValueError(f"tensor {name!r} is {dtype}, but the network has {own[name].dtype} there.")


def _upgraded(stored: Field) -> dict[str, Any]:
    """Everything but the masks, as JSON would carry it, in the newest format."""
    version = stored["format_version"].integer(1)
    if version > CHECKPOINT_VERSION:
        stored["format_version"].fail(
            f"is {version}, but this version of lightning-earlybird reads up to {CHECKPOINT_VERSION}; upgrade it."
        )
    described = {key: value for key, value in stored.mapping().items() if key != "masks"}
    try:
        plain: dict[str, Any] = plain_copy(described)
    except ValueError as error:
        stored.fail(f"holds what no checkpoint of tickets does: {error}")
    for number in range(version, CHECKPOINT_VERSION):
        _UPGRADES[number](plain)
    return plain


def _from_1(described: dict[str, Any]) -> None:
    """Before ranks could train tickets apart, all were there; at first timesteps came as (B,) only."""
    described.setdefault("absent", {})
    if isinstance(described.get("timesteps"), dict):
        described["timesteps"].setdefault("trailing", 0)


# Version -> what makes the next one of it, in place. What is missing after it is found out when the fields are read.
_UPGRADES: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_1}


def _read_timesteps(field: Field) -> TimestepArgument:
    name, position = field["name"].optional(Field.text), field["position"].optional(Field.integer)
    trailing = field["trailing"].integer()
    return field.parsed(lambda _: TimestepArgument(name, position, trailing))


def _read_absent(field: Field, count: int) -> dict[int, dict[str, torch.Size]]:
    known = {str(index): index for index in range(count)}
    absent: dict[int, dict[str, torch.Size]] = {}
    for key, shapes in field.members().items():
        if key not in known:
            field.fail(f"names the ticket {key!r}, but there are {count}.")
        absent[known[key]] = {
            name: torch.Size([size.integer() for size in shape.elements()]) for name, shape in shapes.members().items()
        }
        if not absent[known[key]]:
            shapes.fail("is empty, expected the shapes of the ticket's tensors.")
    if len(absent) == count:
        field.fail("names every ticket: there is none in the checkpoint.")
    return absent


def _read_record(field: Field, masks: Field, partition: TimestepPartition) -> EnsembleRecord:
    kept = [_read_mask(each) for each in masks.elements()]
    record = field.parsed(lambda data: EnsembleRecord.from_json(data, kept))
    if len(record.edits) != len(partition):
        field["edits"].fail(f"has {len(record.edits)} entries, but the partition has {len(partition)} regions.")
    if record.facts and [each.region for each in record.facts] != list(partition):
        field["facts"].fail("does not belong to the regions of the partition.")
    return record


def _read_mask(field: Field) -> TicketMask:
    for name, group in field.members().items():
        if not isinstance(name, str):
            field.fail(f"has the key {name!r}, expected names of channel groups only.")
        tensor = ordinary_tensor(group)
        # A tensor may claim any number of elements that it repeats out of a few.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            group.fail(f"claims {tensor.numel()} channels, more than it holds.")
    return field.parsed(TicketMask)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}
