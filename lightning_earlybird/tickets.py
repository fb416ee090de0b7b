"""Tickets on disk: networks, masks, regions and facts as safetensors and JSON; nothing is ever unpickled."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.descriptions import build_dense, describe_denoiser, read_denoiser, sketch_dense
from lightning_earlybird.durable import settle, written_aside
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.files import EnsembleFormatError, Field, is_plain_file, read_json, sha256_of
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.model_card import CARD_FILE, model_card
from lightning_earlybird.records import (
    Edits,
    EnsembleRecord,
    TicketFacts,
    read_edits,
    read_facts,
    read_shape,
)
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import resize_

__all__ = [
    "EnsembleFormatError",
    "EnsembleRecord",
    "TicketFacts",
    "check_target",
    "describe_denoiser",
    "load_ensemble",
    "save_ensemble",
    "save_one_ticket",
    "saved_partition",
    "tensor_names",
]

FORMAT = "lightning-earlybird ensemble"
FORMAT_VERSION = 1
INDEX_FILE = "ensemble.json"
MASKS_FILE = "masks.safetensors"

_LARGEST_CARD_BYTES = 1 << 20

# What layers compute in; a ticket may have another of these than its dense network.
_COMPUTING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_target(directory: str | os.PathLike[str]) -> None:
    """Makes sure that an ensemble may be written to ``directory``; call it before anything is computed.

    Raises:
        FileExistsError: If something is there that is neither an empty directory nor a saved ensemble and nothing else.
    """
    folder = Path(directory)
    settle(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    remedy = "choose another directory, or remove what is there"
    if not folder.is_dir():
        raise FileExistsError(f"directory={str(folder)!r} must be a directory, but a file is there; {remedy}.")
    try:
        index = _read_index(folder)
        named = {field["file"].text() for field in index["tickets"].elements()}
    except EnsembleFormatError as error:
        raise FileExistsError(
            f"directory={str(folder)!r} must be new, empty, or hold a saved ensemble to replace, and it holds "
            f"something else ({error}); {remedy}."
        ) from error
    ours = {path.name for path in folder.iterdir() if is_plain_file(path)} & (named | {INDEX_FILE, MASKS_FILE})
    if _card_in(folder) is not None:
        ours.add(CARD_FILE)  # whosever it is: what its owner has written is carried over
    if others := sorted({path.name for path in folder.iterdir()} - ours):
        raise FileExistsError(
            f"directory={str(folder)!r} holds a saved ensemble and other files, which replacing it would delete: "
            f"{others}; {remedy}."
        )


def save_ensemble(
    directory: str | os.PathLike[str],
    ensemble: TicketEnsemble,
    *,
    denoiser: dict[str, Any] | None,
    edits: Sequence[Edits],
    masks: Sequence[TicketMask] | None,
    facts: Sequence[TicketFacts] | None,
    sample_shape: Sequence[int] | None,
) -> None:
    """Writes an ensemble: ``ensemble.json``, ``ticket_<i>.safetensors``, ``README.md`` and any ``masks.safetensors``.

    The directory appears whole or not at all. An ensemble that was saved there before is replaced; of its ``README.md``
    only what this package wrote (see :mod:`~.model_card`).

    Args:
        directory: Where to write; new, empty, or a saved ensemble.
        ensemble: The tickets, their partition and their timestep argument.
        denoiser: See :class:`EnsembleRecord`; likewise the rest.
        edits: One per ticket.
        masks: One per ticket, or None.
        facts: One per ticket, or None.
        sample_shape: Shape of one sample, without the batch, or None.

    Raises:
        FileExistsError: See :func:`check_target`.
        OSError: The disk refuses; nothing is left behind, and what was saved there before is intact.
        ValueError: If there is not one entry per ticket, or a ticket's state holds something that is not a tensor.
    """
    check_target(directory)
    tickets = [unwrap(ticket) for ticket in ensemble.tickets]
    for name, values in (("edits", edits), ("masks", masks or None), ("facts", facts or None)):
        if values is not None and len(values) != len(tickets):
            raise ValueError(f"{name} has {len(values)} entries for {len(tickets)} tickets; pass one per ticket.")
    shape = None if sample_shape is None else tuple(sample_shape)
    described = EnsembleRecord(denoiser, tuple(edits), (), tuple(facts or ()), shape)
    record = described.to_json()
    card = _card_in(Path(directory))
    former = None if card is None else card.read_bytes()
    with written_aside(Path(directory)) as aside:
        entries = []
        for number, ticket in enumerate(tickets):
            entry = _write_tensors(aside / f"ticket_{number}.safetensors", _state_of(ticket, number))
            entry["memory_format"] = "channels_last" if _is_channels_last(ticket) else "contiguous"
            entry["edits"] = record["edits"][number]
            entry["facts"] = record["facts"][number] if facts else None
            entry["groups"] = list(masks[number].kept) if masks else None
            entries.append(entry)
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "partition": ensemble.partition.to_json(),
            "timesteps": asdict(ensemble.timesteps),
            "sample_shape": record["sample_shape"],
            "denoiser": record["denoiser"],
            "tickets": entries,
            "masks": None,
        }
        if masks:
            flat = {f"{number}/{name}": kept for number, mask in enumerate(masks) for name, kept in mask.kept.items()}
            index["masks"] = _write_tensors(aside / MASKS_FILE, flat)
        (aside / CARD_FILE).write_bytes(model_card(ensemble.partition, described, _package_version(), former))
        (aside / INDEX_FILE).write_text(json.dumps(index, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        check_target(directory)


def save_one_ticket(directory: str | os.PathLike[str], ensemble: TicketEnsemble, ticket: int) -> None:
    """Writes one ticket of an ensemble by itself: an ensemble of its one region, which :func:`load_ensemble` reads.

    Args:
        directory: As for :func:`save_ensemble`.
        ensemble: The ensemble, with its record.
        ticket: Index of the ticket.

    Raises:
        FileExistsError: See :func:`check_target`.
        ValueError: If the ensemble has no record.
    """
    record = ensemble.record
    if record is None:
        raise ValueError("record=None: the ensemble was put together by hand; set `record` to an EnsembleRecord.")
    partition = TimestepPartition((ensemble.regions[ticket],))
    save_ensemble(
        directory,
        TicketEnsemble([ensemble.tickets[ticket]], partition, ensemble.timesteps),
        denoiser=record.denoiser,
        edits=[record.edits[ticket]],
        masks=[record.masks[ticket]] if record.masks else None,
        facts=[record.facts[ticket]] if record.facts else None,
        sample_shape=record.sample_shape,
    )


def load_ensemble(directory: str | os.PathLike[str], denoiser: Callable[[], nn.Module] | None = None) -> TicketEnsemble:
    """Reads an ensemble that :func:`save_ensemble` wrote, without tracing and without unpickling; in evaluation mode.

    Outputs are bit-identical to those of the ensemble that was saved, weights that are not finite included. The random
    state of the CPU is left as it was.

    The files may come from anybody. Nothing of them is executed, links are not followed, nothing outside of the
    directory is read, and what they declare is compared with what they hold before memory is taken for it: at most
    256 MiB or 256 times the size of the tickets' files for the dense network.

    Args:
        directory: The ensemble's directory.
        denoiser: Builds the *dense* network that the tickets were made from. Needed for networks that are not diffusers
            models; where it is given, the stored class and configuration are not used.

    Returns:
        The ensemble, on the CPU (or where ``denoiser`` builds its network), with its ``record``.

    Raises:
        EnsembleFormatError: If the directory is damaged, truncated, foreign, malicious or of a newer format; the
            message names file and field.
        ValueError: If the network is not a diffusers model and ``denoiser`` is None.
    """
    folder = Path(directory)
    index = _read_index(folder)
    partition = index["partition"].parsed(TimestepPartition.from_json)
    entries = index["tickets"].elements()
    if len(entries) != len(partition):
        index["tickets"].fail(f"has {len(entries)} entries, but the partition has {len(partition)} regions.")
    place = {key: index["timesteps"][key] for key in ("name", "position", "trailing")}
    timesteps = index["timesteps"].parsed(
        lambda _: TimestepArgument(
            place["name"].optional(Field.text), place["position"].optional(Field.integer), place["trailing"].integer()
        )
    )
    facts = [entry["facts"].optional(read_facts) for entry in entries]
    record = EnsembleRecord(
        denoiser=index["denoiser"].optional(read_denoiser),
        edits=tuple(read_edits(entry["edits"]) for entry in entries),
        masks=_read_masks(index, entries, folder),
        facts=tuple(each for each in facts if each is not None),
        sample_shape=index["sample_shape"].optional(read_shape),
    )
    if record.facts and [each.region for each in record.facts] != list(partition):
        index["tickets"].fail("has facts that do not belong to the regions of the partition.")
    index["masks"].parsed(lambda _: record.check_masks())
    named: set[str] = set()
    for entry in entries:
        # One file in many entries would become many networks in memory.
        if entry["file"].text() in named:
            entry["file"].fail(f"names {entry['file'].text()!r}, as another ticket does; each has a file of its own.")
        named.add(entry["file"].text())
    states = [_read_tensors(entry, folder) for entry in entries]

    with torch.random.fork_rng(devices=[]):
        if denoiser is None and record.denoiser is not None:
            _rehearse(index["denoiser"], states, record.edits, entries)
        dense = build_dense(denoiser, index["denoiser"])
    tickets = [
        _restored(copy.deepcopy(dense), state, edits, entry)
        for state, edits, entry in zip(states, record.edits, entries, strict=True)
    ]
    ensemble = TicketEnsemble(tickets, partition, timesteps)
    ensemble.record = record
    return ensemble.eval()


def _rehearse(
    description: Field, states: Sequence[Mapping[str, Tensor]], edits: Sequence[Edits], entries: Sequence[Field]
) -> None:
    """Goes through with it on the meta device, so that a network that cannot become the tickets costs no memory."""
    sketch = sketch_dense(description, states)
    for state, each, entry in zip(states, edits, entries, strict=True):
        _resized(copy.deepcopy(sketch), state, each, entry)


def tensor_names(directory: str | os.PathLike[str]) -> set[str]:
    """Names of the tensors in a saved ensemble's tickets, which are those of its dense network.

    Raises:
        EnsembleFormatError: If the directory is not a saved ensemble.
    """
    entries = _read_index(Path(directory))["tickets"].elements()
    return {name for entry in entries for name in entry["tensors"].mapping()}


def saved_partition(directory: str | os.PathLike[str]) -> TimestepPartition:
    """The regions of a saved ensemble.

    Raises:
        EnsembleFormatError: If the directory is not a saved ensemble.
    """
    partition: TimestepPartition = _read_index(Path(directory))["partition"].parsed(TimestepPartition.from_json)
    return partition


def _read_index(folder: Path) -> Field:
    settle(folder)
    index = read_json(folder / INDEX_FILE)
    if index["format"].text() != FORMAT:
        index["format"].fail(f"is {index['format'].value!r}, expected {FORMAT!r}; this is something else.")
    version = index["format_version"].integer(minimum=1)
    if version > FORMAT_VERSION:
        index["format_version"].fail(
            f"is {version}, but this version of lightning-earlybird reads up to {FORMAT_VERSION}; upgrade it."
        )
    return index


def _read_masks(index: Field, entries: Sequence[Field], folder: Path) -> tuple[TicketMask, ...]:
    if index["masks"].value is None:
        return ()
    tensors = _read_tensors(index["masks"], folder)
    masks = []
    for number, entry in enumerate(entries):
        # The order of the groups is kept in the index: safetensors sorts its tensors.
        names = [name.text() for name in entry["groups"].elements()]
        if len(set(names)) < len(names):
            entry["groups"].fail("names a group twice.")
        if missing := [name for name in names if f"{number}/{name}" not in tensors]:
            entry["groups"].fail(f"names groups without a mask in {MASKS_FILE!r}: {missing}.")
        kept = {name: tensors.pop(f"{number}/{name}") for name in names}
        masks.append(Field(kept, entry.file, f"{entry.path}.groups").parsed(TicketMask))
    if tensors:
        index["masks"].fail(f"has masks of unknown tickets or groups: {sorted(tensors)}.")
    return tuple(masks)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes tensors and returns their entry in the index."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tied tensors; each name gets its values, and loading them ties them again.
        plain[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
    try:
        save_file(plain, path)
    except SafetensorError as error:  # which a full disk gives, too, and which is no OSError
        raise OSError(f"{str(path)!r} could not be written: {error}") from error
    return {"file": path.name, "sha256": sha256_of(path), "tensors": _kinds_in(path)}


def _read_tensors(entry: Field, folder: Path) -> dict[str, Tensor]:
    """The tensors of a file, after its header has been compared with the index and its bytes with the checksum."""
    path = entry["file"].file_in(folder)
    try:
        found = _kinds_in(path)
        tensors: dict[str, Tensor] = load_file(path)  # maps the file, whose header does not exceed it, into memory
    except Exception as error:  # the library raises anything over numbers that are too large for torch
        entry["file"].fail(f"names {path.name!r}, which is not a valid safetensors file ({error}); it is damaged.")
    expected = {name: field.text() for name, field in entry["tensors"].members().items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            entry["tensors"].fail(
                f"says {expected.get(name, 'nothing')} of {name!r}, but {path.name!r} has "
                f"{found.get(name, 'nothing')}; the files do not belong together."
            )
    if sha256_of(path) != entry["sha256"].text():
        entry["sha256"].fail(f"does not match {path.name!r}; the file was changed or damaged.")
    for name, tensor in tensors.items():
        # torch counts such bytes as true in one place and false in another.
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            entry["file"].fail(f"names {path.name!r}, where {name!r} holds bytes that are neither true nor false.")
    return tensors


def _kinds_in(path: Path) -> dict[str, str]:
    """Tensor name -> dtype and shape, such as ``F32[8, 1, 3, 3]``, from a file's header."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        return {name: f"{each.get_dtype()}{each.get_shape()}" for name, each in slices.items()}


def _state_of(ticket: nn.Module, number: int) -> dict[str, Tensor]:
    state = ticket.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"tickets[{number}]: its state holds {name!r}, a {type(value).__name__}, but only tensors can be "
                "saved; register it as a buffer."
            )
    return state


def _resized(network: nn.Module, state: Mapping[str, Tensor], edits: Edits, entry: Field) -> dict[str, Tensor]:
    """Turns a dense network into the ticket but for the values, in place, and returns its tensors."""
    entry.parsed(lambda _: resize_(network, {name: tensor.shape for name, tensor in state.items()}, edits))
    own: dict[str, Tensor] = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if own[name].dtype != tensor.dtype and not {own[name].dtype, tensor.dtype} <= set(_COMPUTING):
            entry["tensors"].fail(f"says {tensor.dtype} of {name!r}, but the network has {own[name].dtype} there.")
    if entry["memory_format"].text() not in ("channels_last", "contiguous"):
        entry["memory_format"].fail(f"is {entry['memory_format'].value!r}, expected 'channels_last' or 'contiguous'.")
    return own


def _restored(network: nn.Module, state: dict[str, Tensor], edits: Edits, entry: Field) -> nn.Module:
    """A dense network turned into the ticket, in place."""
    own = _resized(network, state, edits, entry)
    with torch.no_grad():
        for name, tensor in state.items():
            # Through `.data`, so that parameters stay the same objects: tied ones stay tied.
            own[name].data = own[name].data.to(tensor.dtype)
            own[name].copy_(tensor)
    if entry["memory_format"].text() == "channels_last":
        # mypy has no overload for a memory format alone.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _card_in(folder: Path) -> Path | None:
    """The model card in a directory, or what could be one."""
    path = folder / CARD_FILE
    return path if is_plain_file(path) and path.stat().st_size <= _LARGEST_CARD_BYTES else None


def _package_version() -> str:
    from lightning_earlybird import __version__  # which is set when all modules of the package have been imported

    return __version__


def _is_channels_last(module: nn.Module) -> bool:
    return any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in module.parameters()
    )
