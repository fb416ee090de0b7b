"""Damage done to saved ensembles: of every part of their files, by accident or on purpose, reproducible by a seed."""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save, save_file
from torch import nn

from lightning_earlybird.descriptions import describe_denoiser
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.records import EnsembleRecord, TicketFacts
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import attribute_edits, extract, trace_plan, verify_plan
from lightning_earlybird.tickets import save_ensemble

INDEX = "ensemble.json"
CALL = (torch.zeros(2, 1, 8, 8), torch.tensor([100, 900]))


@dataclass(frozen=True)
class Mutation:
    """One way to damage a saved ensemble.

    Attributes:
        kind: What the table of results counts it under.
        name: What exactly is done, for messages.
        damage: Does it to a directory.
    """

    kind: str
    name: str
    damage: Callable[[Path], None]


def small_network(channels: int = 8) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(channels,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
    )


def small_ensemble(seed: int = 0, channels: int = 8) -> TicketEnsemble:
    """Two tickets of a small network of diffusers, one of them with fewer attention heads."""
    torch.manual_seed(seed)
    return ragged_ensemble(small_network(channels), CALL)


def ragged_ensemble(dense: nn.Module, call: tuple[Any, ...]) -> TicketEnsemble:
    """Two tickets of a network, one of them with ragged norms, and their record."""
    plan = verify_plan(dense, trace_plan(dense, call), call).plan
    partition = TimestepPartition.of([(0, 400, 0.25), (400, 1000, 0.5, 700)], overlap=20)
    masks = []
    for gone in (0, 1):
        kept = {}
        for group in plan.groups:
            rows = torch.arange(group.rows) != gone
            columns = torch.arange(group.width) % 4 != gone
            kept[group.name] = (
                (rows[:, None] & columns).flatten() if group.can_lose_rows else columns.repeat(group.rows)
            )
        masks.append(TicketMask(kept))
    tickets = [extract(dense, plan, mask, norm=norm) for mask, norm in zip(masks, ("exact", "shrink"), strict=True)]
    facts = tuple(
        TicketFacts(region, 100, True, (mask.num_channels, mask.num_kept), (1000, 250), (9, 3))
        for region, mask in zip(partition, masks, strict=True)
    )
    ensemble = TicketEnsemble(tickets, partition, TimestepArgument("timestep", 1)).eval()
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    ensemble.record = EnsembleRecord(describe_denoiser(dense), edits, tuple(masks), facts, (1, 8, 8))
    return ensemble


def write(directory: Path, ensemble: TicketEnsemble) -> None:
    record = ensemble.record
    assert record is not None
    names = ("denoiser", "edits", "masks", "facts", "sample_shape")
    save_ensemble(directory, ensemble, **{name: getattr(record, name) for name in names})


# --- the index


def read_index(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text())


def write_index(folder: Path, index: Any) -> None:
    text = json.dumps(index)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    (folder / INDEX).write_text(text)


# What json.dumps does not write.
_RAW = {"@huge": "1e999", "@digits": "9" * 5000, "@negative": "-1e999", "@dup": '"format"'}

Path_ = tuple[str | int, ...]


def nodes(tree: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value in a JSON tree with its path."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


def put(tree: Any, path: Path_, value: Any) -> Any:
    """A copy of the tree with another value at the path."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


ANYTHING = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e300, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "@huge", "@negative", "@digits"),
    *(
        "",
        "x",
        "0",
        "..",
        "../saved",
        "/etc/passwd",
        "__class__",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "\u202egnp.x",
        "é" * 300,
    ),
    *([], {}, [[]], [{}], {"": {}}, {"__class__": 1}, [0] * 1000, "A" * 100_000, deep(60), deep(600)),
]


def variants(value: Any, generator: random.Random) -> list[Any]:
    """Other values for a field, with respect to what it holds."""
    near: list[Any] = []
    if isinstance(value, int) and not isinstance(value, bool):
        near = [value + 1, value - 1, 2 * value, -value, float(value), str(value), [value], 10 * value]
    elif isinstance(value, float):
        near = [-value, value + 1, value / 2, 1 - value, int(value), str(value)]
    elif isinstance(value, str):
        near = [value + "x", value[:-1], value.upper(), "../" + value, "./" + value, value + "\x00", value * 2, [value]]
    elif isinstance(value, list):
        near = [value[:-1], value[1:], value + value[-1:], value[::-1], [value], value * 2, value * 300]
        near += [dict(enumerate(value)), generator.sample(value, len(value))]
    elif isinstance(value, dict):
        near = [dict(list(value.items())[::-1]), list(value.items()), value | {"odd": 1}, value | {"__init__": None}]
        near += [{key.upper(): inner for key, inner in value.items()}, {"a": value}]
        if len(value) > 1:
            keys = list(value)
            near += [dict(zip(keys, [value[key] for key in keys[1:] + keys[:1]], strict=True))]
    return near + ANYTHING


def fields(index: Any, generator: random.Random) -> Iterator[Mutation]:
    """Every field of the index with other values, missing, twice, or with another field's value."""
    everything = list(nodes(index))
    for path, value in everything:
        place = ".".join(map(str, path)) or "the document"
        for other in [*variants(value, generator), generator.choice(everything)[1]]:
            name = f"{place} = {other!r:.60}"
            yield Mutation("field of the index changed", name, _indexed(lambda i, p=path, o=other: put(i, p, o)))
        if not path:
            continue
        yield Mutation("field of the index missing", place, _indexed(lambda i, p=path: _without(i, p)))
        if isinstance(path[-1], str):
            yield Mutation("key of the index twice", place, lambda folder, p=path: _twice(folder, p))
            yield Mutation(
                "key of the index renamed", place, _indexed(lambda i, p=path: _renamed(i, p, f"{p[-1]}\u200b"))
            )


def _indexed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, change(read_index(folder)))


def _owner(tree: Any, path: Path_) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _without(tree: Any, path: Path_) -> Any:
    del _owner(tree, path)[path[-1]]
    return tree


def _renamed(tree: Any, path: Path_, key: str) -> Any:
    owner = _owner(tree, path)
    owner[key] = owner.pop(path[-1])
    return tree


def _twice(folder: Path, path: Path_) -> None:
    index = read_index(folder)
    owner = _owner(index, path)
    items = list(owner.items())
    owner.clear()
    for key, value in items:
        if key == path[-1]:
            owner["@twice"] = None
        owner[key] = value
    (folder / INDEX).write_text(json.dumps(index).replace('"@twice"', json.dumps(path[-1])))


# --- bytes


def repair(folder: Path, *, kinds: bool = False) -> None:
    """Has the index say of the tensor files what they are, as a careful attacker would."""
    index = read_index(folder)
    for entry in (*index["tickets"], index["masks"]):
        data = (folder / entry["file"]).read_bytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
        if kinds:
            header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
            header.pop("__metadata__", None)
            entry["tensors"] = {name: f"{each['dtype']}{each['shape']}" for name, each in header.items()}
    write_index(folder, index)


def damaged_bytes(data: bytes, generator: random.Random) -> tuple[str, bytes]:
    """Bytes after an accident."""
    place = generator.randrange(len(data))
    # Half of the accidents happen where the structure is: at the beginning.
    place = generator.randrange(min(len(data), 4000)) if generator.random() < 0.5 else place
    length = generator.choice([1, 2, 8, 64, 1000])
    stretch = data[place : place + length]
    noise = generator.randbytes(len(stretch))
    how = generator.choice(["cut", "bit", "byte", "noise", "zeros", "removed", "doubled", "inserted", "appended"])
    bit = bytes([data[place] ^ 1 << generator.randrange(8)])
    changed = {
        "cut": data[:place],
        "bit": data[:place] + bit + data[place + 1 :],
        "byte": data[:place] + generator.randbytes(1) + data[place + 1 :],
        "noise": data[:place] + noise + data[place + length :],
        "zeros": data[:place] + bytes(len(stretch)) + data[place + length :],
        "removed": data[:place] + data[place + length :],
        "doubled": data[:place] + stretch + data[place:],
        "inserted": data[:place] + noise + data[place:],
        "appended": data + noise,
    }
    return f"{how} at {place}", changed[how]


def accidents(folder: Path, generator: random.Random) -> Iterator[Mutation]:
    """Without end: bytes of files changed, and for some of the tensor files with their checksum."""
    files = sorted(folder.iterdir())
    while True:
        file = generator.choice(files)
        how, data = damaged_bytes(file.read_bytes(), generator)
        level = 0 if file.name == INDEX else generator.randrange(3)
        kind = ["bytes changed", "bytes changed, checksum repaired", "bytes changed, checksum and index repaired"][
            level
        ]

        def damage(folder: Path, name: str = file.name, data: bytes = data, level: int = level) -> None:
            (folder / name).write_bytes(data)
            if level:
                try:
                    repair(folder, kinds=level == 2)
                except (ValueError, struct.error, AttributeError, KeyError, TypeError, RecursionError, MemoryError):
                    repair(folder)

        yield Mutation(kind, f"{file.name}: {how}", damage)


# --- tensor files


def headers(folder: Path) -> Iterator[Mutation]:
    """Headers of tensor files that declare what is not so, each with and without the index going along."""
    changes: dict[str, Callable[[Any], Any]] = {}
    for place, name in enumerate(("conv_in.weight", "conv_in.bias")):
        for key, values in {
            "dtype": [
                *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16"),
                *("BF16", "I32", "U32", "F64", "I64", "U64", "C64", "X", "", 5),
            ],
            "shape": [
                [],
                [0],
                [-1],
                [1],
                [2**31],
                [2**63],
                [2**64],
                [2**32, 2**32],
                [0, 2**63],
                [1] * 100,
                [0.5],
                "8",
                None,
            ],
            "data_offsets": [
                [0, 0],
                [0, 4],
                [4, 0],
                [-4, 0],
                [0, 2**40],
                [2**63, 2**63 + 4],
                [2**70, 2**71],
                [0],
                None,
            ],
        }.items():
            for value in values:
                changes[f"{name}.{key} = {value!r:.40}"] = lambda h, n=name, k=key, v=value: h[n].update({k: v})
        changes[f"{name} missing"] = lambda h, n=name: h.pop(n)
        for odd in ("", "\x00", "\ud800", "../../x", "__class__", "conv_in", "conv_in.", ".weight", "x" * 100_000):
            changes[f"{name} called {odd!r:.20}"] = lambda h, n=name, o=odd: h.update({o: h.pop(n)})
        changes[f"{place} tied by overlapping"] = lambda h, p=place: h["conv_in.bias"].update(
            data_offsets=h["conv_norm_out.bias"]["data_offsets"][: 2 - p] * (1 + p)
        )
    changes["metadata of numbers"] = lambda h: h.update(__metadata__={"a": 5})
    changes["metadata nested"] = lambda h: h.update(__metadata__=deep(50))
    changes["metadata of text"] = lambda h: h.update(__metadata__={"a": "x" * 100_000})
    changes["many empty tensors"] = lambda h: h.update(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
    )
    for text, change in changes.items():
        for level in range(3):

            def damage(folder: Path, change: Callable[[Any], Any] = change, level: int = level) -> None:
                _reheaded(folder / "ticket_0.safetensors", change)
                if level:
                    repair(folder, kinds=level == 2)

            suffix = ["", ", checksum repaired", ", checksum and index repaired"][level]
            yield Mutation(f"tensor header changed{suffix}", text, damage)
    for number in (0, 1, 7, 8, 2**20, 100_000_000, 100_000_001, 2**31, 2**32 - 1, 2**63, 2**64 - 1):

        def declare(folder: Path, number: int = number) -> None:
            path = folder / "ticket_0.safetensors"
            path.write_bytes(struct.pack("<Q", number) + path.read_bytes()[8:])
            repair(folder)

        yield Mutation("tensor header changed, checksum repaired", f"length = {number}", declare)


def _reheaded(path: Path, change: Callable[[Any], Any]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def tensors(folder: Path) -> Iterator[Mutation]:
    """Valid tensor files with other tensors, described as they are."""

    def ticket(text: str, change: Callable[[dict[str, Any]], Any]) -> Mutation:
        return Mutation("tensors of a ticket exchanged", text, _resaved("ticket_0.safetensors", change))

    def masks(text: str, change: Callable[[dict[str, Any]], Any]) -> Mutation:
        return Mutation("masks exchanged", text, _resaved("masks.safetensors", change))

    names = list(load_file(folder / "ticket_0.safetensors"))
    for name in names:
        yield ticket(f"{name} missing", lambda t, n=name: t.pop(n))
        yield ticket(f"{name} renamed", lambda t, n=name: t.update({n + "_": t.pop(n)}))
        yield ticket(f"{name} wider", lambda t, n=name: t.update({n: torch.cat([t[n]] * 9)}))
        yield ticket(f"{name} narrower", lambda t, n=name: t.update({n: t[n][:1].clone()}))
        yield ticket(f"{name} empty", lambda t, n=name: t.update({n: t[n][:0]}))
        yield ticket(f"{name} scalar", lambda t, n=name: t.update({n: t[n].sum()}))
        yield ticket(f"{name} flat", lambda t, n=name: t.update({n: t[n].flatten()}))
        yield ticket(f"{name} upside down", lambda t, n=name: t.update({n: t[n].movedim(0, -1).contiguous()}))
        yield ticket(f"{name} NaN", lambda t, n=name: t[n].fill_(float("nan")))
        yield ticket(f"{name} infinite", lambda t, n=name: t[n].fill_(-float("inf")))
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint16):
            yield ticket(f"{name} {dtype}", lambda t, n=name, d=dtype: t.update({n: t[n].to(d)}))
        for dtype in (torch.complex64, torch.float8_e4m3fn, torch.int8):
            yield ticket(f"{name} {dtype}", lambda t, n=name, d=dtype: t.update({n: t[n].to(d)}))
    yield ticket("none at all", lambda t: t.clear())
    yield ticket("one more", lambda t: t.update(more=torch.zeros(1)))
    for group in load_file(folder / "masks.safetensors"):
        yield masks(f"{group} missing", lambda t, g=group: t.pop(g))
        yield masks(f"{group} keeps nothing", lambda t, g=group: t[g].fill_(False))
        yield masks(f"{group} keeps everything", lambda t, g=group: t[g].fill_(True))
        yield masks(f"{group} inverted", lambda t, g=group: t.update({g: ~t[g]}))
        yield masks(f"{group} longer", lambda t, g=group: t.update({g: torch.cat([t[g], t[g]])}))
        yield masks(f"{group} shorter", lambda t, g=group: t.update({g: t[g][:-1].clone()}))
        yield masks(f"{group} empty", lambda t, g=group: t.update({g: t[g][:0]}))
        yield masks(f"{group} scalar", lambda t, g=group: t.update({g: t[g].any()}))
        yield masks(f"{group} square", lambda t, g=group: t.update({g: t[g][None]}))
        yield masks(f"{group} neither", lambda t, g=group: t[g].view(torch.uint8).fill_(7))
        for dtype in (torch.uint8, torch.int64, torch.float32, torch.complex64):
            yield masks(f"{group} {dtype}", lambda t, g=group, d=dtype: t.update({g: t[g].to(d)}))
        for odd in ("x", "0/", "/0", "9/x", "-1/x", "0/../1/x", "0/x\ud800".encode("utf-8", "replace").decode()):
            yield masks(f"{group} called {odd!r}", lambda t, g=group, o=odd: t.update({o: t.pop(g)}))


def _resaved(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(found)
        save_file(found, folder / file)
        repair(folder, kinds=True)

    return damage


# --- files


def files(folder: Path, outside: Path) -> Iterator[Mutation]:
    """Something else in the place of a file; ``outside`` holds a good ensemble that must not be reached."""

    def replaced(text: str, make: Callable[[Path], Any]) -> Iterator[Mutation]:
        for name in sorted(each.name for each in folder.iterdir()):

            def damage(folder: Path, name: str = name) -> None:
                (folder / name).rename(folder / f"former_{name}")
                make(folder / name)

            yield Mutation("something else in a file's place", f"{name}: {text}", damage)

    yield from replaced("nothing", lambda path: None)
    yield from replaced("an empty file", lambda path: path.touch())
    yield from replaced("a directory", lambda path: path.mkdir())
    yield from replaced("a full directory", lambda path: shutil.copytree(outside, path))
    yield from replaced("a queue", lambda path: os.mkfifo(path))
    yield from replaced("a socket", _socket)
    yield from replaced("a link to its good self elsewhere", lambda path: path.symlink_to(outside / path.name))
    yield from replaced("a link to its good self", lambda path: path.symlink_to(f"former_{path.name}"))
    yield from replaced("a hard link", lambda path: path.hardlink_to(path.parent / f"former_{path.name}"))
    yield from replaced("a link to itself", lambda path: path.symlink_to(path))
    yield from replaced("a dangling link", lambda path: path.symlink_to("absent"))
    yield from replaced("a link to a directory", lambda path: path.symlink_to(outside))
    for device in ("/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "/etc/passwd"):
        yield from replaced(f"a link to {device}", lambda path, to=device: path.symlink_to(to))
    yield from replaced("a sparse file of a terabyte", lambda path: _sparse(path, 1 << 40))
    yield from replaced("its beginning in a sparse file", lambda path: _sparse(path, 1 << 40, keep=True))
    for other in sorted(each.name for each in folder.iterdir()):
        yield from replaced(f"{other}", lambda path, o=other: _copied(path, o))

    good = "ticket_0.safetensors"
    for name in (
        *(
            f"../{outside.name}/{good}",
            str(outside / good),
            f"./{good}",
            f"{good}/",
            f"{good}\x00",
            f"{good}\n",
            f" {good}",
        ),
        *(
            "",
            ".",
            "..",
            "~",
            "/",
            "\\",
            "C:x",
            "a\\..\\b",
            "nul",
            "*",
            "?",
            "-",
            "x" * 255,
            "x" * 256,
            "x" * 5000,
            INDEX,
        ),
        *(
            f"file://{outside / good}",
            f"http://127.0.0.1:9/{good}",
            f"|cat {good}",
            f"$HOME/{good}",
            "%2e%2e/x",
            "\uff0e\uff0e/x",
        ),
        *(good.upper(), f"{good}\ud800", f"\u202e{good}", "masks.safetensors", "ticket_1.safetensors", f"..{good}"),
    ):
        for place in (("tickets", 0, "file"), ("masks", "file")):
            yield Mutation("file name", f"{place}: {name!r:.60}", _indexed(lambda i, p=place, n=name: put(i, p, n)))


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        former = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(former)


def _sparse(path: Path, size: int, keep: bool = False) -> None:
    path.write_bytes((path.parent / f"former_{path.name}").read_bytes() if keep else b"")
    os.truncate(path, size)


def _copied(path: Path, other: str) -> None:
    source = path.parent / other
    shutil.copy(source if source.exists() else path.parent / f"former_{other}", path)


def swaps(folder: Path, others: dict[str, Path]) -> Iterator[Mutation]:
    """Parts of an ensemble exchanged among each other, and with those of other ensembles."""
    for level in range(3):

        def swap(folder: Path, level: int = level) -> None:
            first, second = folder / "ticket_0.safetensors", folder / "ticket_1.safetensors"
            data = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(data)
            if level:
                repair(folder, kinds=level == 2)

        yield Mutation("tickets swapped", f"the files, level {level}", swap)
    for keys in [
        ("file",),
        ("edits",),
        ("facts",),
        ("groups",),
        ("memory_format",),
        ("sha256",),
        ("tensors",),
        ("file", "sha256"),
        ("file", "sha256", "tensors"),
        ("file", "sha256", "tensors", "edits"),
        ("file", "sha256", "tensors", "edits", "groups"),
        ("file", "sha256", "tensors", "edits", "groups", "facts"),
        ("facts", "edits"),
    ]:

        def exchange(index: Any, keys: tuple[str, ...] = keys) -> Any:
            first, second = index["tickets"]
            for key in keys:
                first[key], second[key] = second[key], first[key]
            return index

        yield Mutation("tickets swapped", f"{keys}", _indexed(exchange))
    for text, other in others.items():
        for name in sorted(each.name for each in folder.iterdir()):
            for level in range(1 if name == INDEX else 3):

                def foreign(folder: Path, name: str = name, other: Path = other, level: int = level) -> None:
                    shutil.copy(other / name, folder / name)
                    if level:
                        repair(folder, kinds=level == 2)

                yield Mutation("files of another ensemble", f"{name} of {text}, level {level}", foreign)
        for key in read_index(other):

            def field(index: Any, key: str = key, other: Path = other) -> Any:
                return index | {key: read_index(other)[key]}

            yield Mutation("files of another ensemble", f"index[{key!r}] of {text}", _indexed(field))


# --- code


class Payload:
    """Unpickling it makes a directory: the proof that something was executed."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


def payloads(folder: Path, witness: Path) -> Iterator[Mutation]:
    """Pickles in the place of every file."""
    dangerous: dict[str, bytes] = {}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        dangerous[f"pickle of protocol {protocol}"] = pickle.dumps({"weight": Payload(witness)}, protocol)
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save({"weight": Payload(witness)}, buffer, _use_new_zipfile_serialization=new)
        dangerous[f"torch.save, zip={new}"] = buffer.getvalue()
    code = pickle.dumps(Payload(witness))
    good = save({"a": torch.zeros(2)})
    dangerous |= {"tensors, then a pickle": good + code, "a pickle, then tensors": code + good}
    dangerous["a pickle as header"] = struct.pack("<Q", len(code)) + code
    dangerous["a pickle as metadata"] = save({"a": torch.zeros(2)}, {"format": "pt", "code": code.hex()})
    dangerous["source text"] = f"import os; os.mkdir({str(witness)!r})".encode()
    for text, data in dangerous.items():
        for name in sorted(each.name for each in folder.iterdir()):

            def damage(folder: Path, name: str = name, data: bytes = data) -> None:
                (folder / name).write_bytes(data)
                if name != INDEX:
                    repair(folder)

            yield Mutation("a pickle in a file's place", f"{name}: {text}", damage)


CLASSES = (
    *("os", "sys", "builtins", "eval", "exec", "open", "print", "object", "type", "Exception", "Path", "Popen"),
    *("os.system", "subprocess.Popen", "__import__('os')", "__class__", "__init__", "__main__", "diffusers", "models"),
    *("DDPMPipeline", "DiffusionPipeline", "StableDiffusionPipeline", "DDPMScheduler", "EMAModel", "ModelMixin"),
    *(
        "ConfigMixin",
        "AutoModel",
        "UNet2DModel()",
        "UNet2DModel.from_pretrained",
        "unet2dmodel",
        "UNet2DModel ",
        "UNet2D",
    ),
    *("ModelMixin.from_pretrained", "AutoencoderKL", "UNet1DModel", "UNet2DConditionModel", "DiTTransformer2DModel"),
    *(
        "VQModel",
        "ControlNetModel",
        "MultiControlNetModel",
        "MultiAdapter",
        "T2IAdapter",
        "PriorTransformer",
        "UVit2DModel",
    ),
    *(
        "OnnxRuntimeModel",
        "FlaxUNet2DModel",
        "ConsistencyDecoderVAE",
        "AutoencoderTiny",
        "T5FilmDecoder",
        "Kandinsky3UNet",
    ),
    *(
        "A" * 10_000,
        "Ünet",
        "\u202eUNet2DModel",
        "UNet2DModel\n",
        "UNet2DModel\x00",
        "0",
        "-",
        "..",
        "/",
        "Tensor",
        "Module",
    ),
)


def descriptions(index: Any) -> Iterator[Mutation]:
    """Networks that are something else, gigantic, or impossible."""
    for name in CLASSES:
        for config in (index["denoiser"]["config"], {}):

            def change(index: Any, name: str = name, config: Any = config) -> Any:
                return put(index, ("denoiser",), {"library": "diffusers", "class": name, "config": config})

            yield Mutation("class of the network", f"{name:.30}({len(config)})", _indexed(change))
    for library in ("os", "torch", "transformers", "Diffusers", "diffusers.models", "", ".", "..", "diffusers\x00"):
        yield Mutation(
            "class of the network",
            f"library {library!r}",
            _indexed(lambda i, v=library: put(i, ("denoiser", "library"), v)),
        )
    for key, value in index["denoiser"]["config"].items():
        bombs: list[Any] = [
            1,
            3,
            1000,
            10**5,
            2**24,
            2**24 + 1,
            2**31,
            2**62,
            -1,
            1e9,
            1e300,
            "../x",
            "http://127.0.0.1:9/",
        ]
        if isinstance(value, list):
            bombs += [[bomb for _ in value] for bomb in (10**4, 10**5, 2**24, -8, 0)]
            bombs += [value * 50_000, [value], [*value, "x"], [None]]
        for bomb in bombs:
            yield Mutation(
                "setting of the network",
                f"{key} = {bomb!r:.40}",
                _indexed(lambda i, k=key, b=bomb: put(i, ("denoiser", "config", k), b)),
            )
    for key in (
        "self",
        "kwargs",
        "_class_name",
        "_name_or_path",
        "quantization_config",
        "pretrained_model_name_or_path",
    ):
        for value in ("x", None, 1, {"a": 1}):
            yield Mutation(
                "setting of the network",
                f"{key} = {value!r}",
                _indexed(lambda i, k=key, v=value: put(i, ("denoiser", "config", k), v)),
            )


def attributes(index: Any) -> Iterator[Mutation]:
    """Attributes that a file must not set."""
    modules = [
        "",
        ".",
        "conv_in",
        "conv_norm_out",
        "mid_block",
        "mid_block.attentions.0",
        "__class__",
        "_modules",
        "absent",
    ]
    names = [
        "forward",
        "__class__",
        "__dict__",
        "_modules",
        "_parameters",
        "weight",
        "bias",
        "training",
        "padding",
        "config",
    ]
    names += ["out_channels", "num_groups", "group_sizes", "heads", "eps", "register_parameter", "\ud800", "", "_slots"]
    for module in modules:
        for name in names:
            for value in (1, 2, 10**6, [1], [2] * 4):

                def change(index: Any, module: str = module, name: str = name, value: Any = value) -> Any:
                    index["tickets"][0]["edits"].setdefault(module, {})[name] = value
                    return index

                yield Mutation("attribute", f"{module}.{name} = {value}", _indexed(change))
