"""Damage done to checkpoints of tickets: to what they say, to their tensors, to the pickle and to the archive."""

import functools
import itertools
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from modules import ConvNet
from mutations import Mutation, Payload, damaged_bytes, nodes, put, ragged_ensemble, variants
from torch import nn

from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.saved_structure import CHECKPOINT_KEY, write_structure

NAME = "last.ckpt"


Network = functools.partial(ConvNet, 8)


class Small(pl.LightningModule):
    """Holds the network that the tickets are made of, and something else."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.model: nn.Module = ConvNet(channels)
        self.other = nn.Linear(2, 2)


def small_checkpoint(ensemble: TicketEnsemble, *, averaged: bool = False) -> dict[str, Any]:
    """What a Trainer would save of a ``Small`` with these tickets."""
    module = Small()
    module.model = ensemble
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    checkpoint = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": pl.__version__,
        "state_dict": state,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"channels": 8},
        CHECKPOINT_KEY: write_structure("model", ensemble),
    }
    if averaged:
        checkpoint["current_model_state"] = {name: tensor + 1 for name, tensor in state.items()}
    return checkpoint


def cycle() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def laughs(levels: int) -> list[Any]:
    """A few lists that are ten to the power of ``levels`` lists if they are written out."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value] * 10
    return value


# What a pickle can hold, and JSON cannot.
ODD: list[Any] = [
    *(b"bytes", bytearray(b"x"), 1j, (1, 2), torch.float32, torch.Size([1]), torch.tensor(3), torch.zeros(2), cycle()),
    *(
        10**400,
        -(10**5000),
        OrderedDict(a=1),
        Counter("ab"),
        nn.Parameter(torch.zeros(1)),
        {1: 2},
        {None: 1},
    ),
    *({(1, 2): 3}, {"regions": cycle()}, torch.device("cpu"), torch.strided, float("nan")),
]


def other_tensors(tensor: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What might stand where a tensor is expected."""
    return {
        "wider": lambda: torch.cat([tensor] * 9),
        "narrower": lambda: tensor[:1].clone(),
        "empty": lambda: tensor[:0].clone(),
        "scalar": lambda: tensor.flatten()[0].clone(),
        "flat": lambda: tensor.flatten(),
        "one dimension more": lambda: tensor[None].clone(),
        "a terabyte by repetition": lambda: tensor.flatten()[:1].expand(2**40),
        "repeated": lambda: tensor.flatten()[:1].expand(tensor.shape),
        "upside down": lambda: tensor.movedim(0, -1),
        "sparse": lambda: tensor.float().to_sparse(),
        "on the meta device": lambda: tensor.to("meta"),
        "a parameter": lambda: nn.Parameter(tensor.float()),
        "a list": lambda: tensor.tolist(),
        "zeros": lambda: torch.zeros_like(tensor),
        "ones": lambda: torch.ones_like(tensor),
        "NaN": lambda: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else True),
        **{
            str(dtype): lambda dtype=dtype: tensor.to(dtype)
            for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
        },
        str(torch.float8_e4m3fn): lambda: tensor.float().to(torch.float8_e4m3fn),
        **{f"{value!r:.30}": lambda value=value: value for value in (None, 3, "x", [], {}, b"x", 1j)},
    }


def _saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Writes the checkpoint anew, changed; its bytes are in order."""

    def damage(folder: Path) -> None:
        checkpoint = torch.load(folder / NAME, weights_only=True)
        torch.save(change(checkpoint), folder / NAME)

    return damage


def structures(checkpoint: dict[str, Any], generator: random.Random) -> Iterator[Mutation]:
    """Every field of what the checkpoint says of tickets, with other values, or missing."""
    everything = [(path, value) for path, value in nodes(checkpoint[CHECKPOINT_KEY])]
    for path, value in everything:
        full = (CHECKPOINT_KEY, *path)
        place = ".".join(map(str, full))
        values: list[Any] = (
            [make() for make in other_tensors(value).values()]
            if isinstance(value, torch.Tensor)
            else variants(value, generator)
        )
        for other in [*values, *ODD, generator.choice(everything)[1]]:
            if not _writable(other):
                continue
            # The description is made before the value is written: some cannot be written out.
            described = type(other).__name__ if isinstance(other, list) else f"{other!r:.60}" if _short(other) else "?"
            yield Mutation(
                "what is said of tickets",
                f"{place} = {described}",
                _saved(lambda c, p=full, o=other: put(c, p, o)),
            )
        if path:
            yield Mutation("what is said of tickets", f"{place} missing", _saved(lambda c, p=full: _without(c, p)))


def _writable(value: Any) -> bool:
    """Whether torch.save, which recurses, gets through; cycles it knows."""
    depth, seen = 0, set()
    while isinstance(value, list) and value and id(value) not in seen:
        seen.add(id(value))
        value, depth = value[0], depth + 1
    return depth < 200


def _short(value: Any) -> bool:
    return not isinstance(value, int) or value.bit_length() < 1000


def _without(tree: Any, path: tuple[Any, ...]) -> Any:
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    del owner[path[-1]]
    return tree


def weights(checkpoint: dict[str, Any]) -> Iterator[Mutation]:
    """Every tensor exchanged, missing, or under another name."""
    for group in ("state_dict", "current_model_state"):
        if group not in checkpoint:
            continue
        for name, tensor in checkpoint[group].items():
            for text, make in other_tensors(tensor).items():
                yield Mutation(
                    "tensor of a checkpoint",
                    f"{group}.{name} {text}",
                    _saved(lambda c, g=group, n=name, m=make: put(c, (g, n), m())),
                )
            yield Mutation(
                "tensor of a checkpoint", f"{group}.{name} missing", _saved(lambda c, p=(group, name): _without(c, p))
            )
        first = next(name for name in checkpoint[group] if ".tickets.0." in name)
        rest = first.split(".tickets.0.")[1]
        for index in ("00", "-1", "+0", "2", "1e0", "0x0", "9" * 30, "9" * 5000, "", " 0", "\u0660", "0.0", "0/0"):
            yield Mutation(
                "ticket of another number",
                f"{group}: {index:.40}",
                _saved(lambda c, g=group, f=first, n=f"model.tickets.{index}.{rest}": _renamed(c, g, f, n)),
            )
        for odd in (
            3,
            None,
            (1, 2),
            b"x",
            "",
            "model",
            "model.",
            "model.tickets",
            "model.tickets.0",
            "model.tickets.0.",
        ):
            yield Mutation(
                "ticket of another number",
                f"{group}: {odd!r}",
                _saved(lambda c, g=group, f=first, o=odd: _renamed(c, g, f, o)),
            )
            yield Mutation(
                "ticket of another number",
                f"{group}: one more, {odd!r}",
                _saved(lambda c, g=group, o=odd: put(c, (g, o), torch.zeros(1))),
            )
        yield Mutation("tickets of a checkpoint swapped", group, _saved(lambda c, g=group: _swapped(c, g)))
    yield Mutation(
        "tickets of a checkpoint swapped",
        "masks",
        _saved(lambda c: put(c, (CHECKPOINT_KEY, "masks"), c[CHECKPOINT_KEY]["masks"][::-1])),
    )
    for key in ("edits", "facts"):
        yield Mutation(
            "tickets of a checkpoint swapped",
            key,
            _saved(lambda c, k=key: put(c, (CHECKPOINT_KEY, "record", k), c[CHECKPOINT_KEY]["record"][k][::-1])),
        )


def _renamed(checkpoint: dict[str, Any], group: str, old: Any, new: Any) -> dict[str, Any]:
    checkpoint[group][new] = checkpoint[group].pop(old)
    return checkpoint


def _swapped(checkpoint: dict[str, Any], group: str) -> dict[str, Any]:
    marks = {".tickets.0.": ".tickets.1.", ".tickets.1.": ".tickets.0."}
    state = checkpoint[group]
    for name in list(state):
        mark = next((mark for mark in marks if mark in name), None)
        if mark == ".tickets.0.":
            twin = name.replace(mark, marks[mark])
            state[name], state[twin] = state[twin], state[name]
    return checkpoint


def documents(checkpoint: dict[str, Any], others: dict[str, dict[str, Any]]) -> Iterator[Mutation]:
    """What stands at the top of the checkpoint, exchanged; and parts of other checkpoints."""
    # The arguments of the module's constructor are for the module to judge.
    keys = [key for key in checkpoint if key not in ("hyper_parameters", "hparams_name")]
    for key in keys:
        yield Mutation("part of a checkpoint", f"{key} missing", _saved(lambda c, k=key: _without(c, (k,))))
        for value in (None, True, 0, -1, 10**30, "x", "", [], {}, [1], {"a": 1}, {1: 2}, b"x", torch.zeros(2), cycle()):
            yield Mutation(
                "part of a checkpoint", f"{key} = {value!r:.40}", _saved(lambda c, k=key, v=value: {**c, k: v})
            )
        for text, other in others.items():
            if key in other:
                yield Mutation(
                    "part of another checkpoint", f"{key} of {text}", _saved(lambda c, k=key, o=other: {**c, k: o[k]})
                )
    for document in (None, 3, "x", [], {}, [checkpoint], torch.zeros(3), (1, 2), OrderedDict(a=1), b"x", cycle()):
        yield Mutation("another document", f"{document!r:.40}", _saved(lambda c, d=document: d))


# --- the pickle and the archive


def repacked(
    path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED, **more: bytes
) -> None:
    """Writes the archive anew with other contents, checksums in order."""
    with zipfile.ZipFile(path) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    prefix = next(iter(contents)).split("/")[0]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            new = change(name, data)
            if new is not None:
                archive.writestr(name, new)
        for name, data in more.items():
            archive.writestr(f"{prefix}/{name}" if not name.startswith("/") else name, data)


def _pickled(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: repacked(
        folder / NAME, lambda name, data: change(data) if name.endswith("/data.pkl") else data
    )


class Global:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def pickles(folder: Path, witness: Path) -> Iterator[Mutation]:
    """Objects whose unpickling would do something, alone and inside a checkpoint."""
    calls = {
        "os.mkdir": Payload(witness),
        "eval": Global(eval, f"__import__('os').mkdir({str(witness)!r})"),
        "exec": Global(exec, f"import os; os.mkdir({str(witness)!r})"),
        "os.system": Global(os.system, f"mkdir {witness}"),
        "open": Global(open, witness, "w"),
        "getattr": Global(getattr, "x", "upper"),
        "pickle.loads": Global(pickle.loads, pickle.dumps(Payload(witness))),
        "torch.load": Global(torch.load, folder / NAME),
        "torch.storage": Global(torch.storage._load_from_bytes, pickle.dumps(Payload(witness))),
        "bytearray": Global(bytearray, 2**40),
        "torch.zeros": Global(torch.zeros, 2**40),
        "Path": Path("/etc/passwd"),
        "Small": Global(Small),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for text, value in calls.items():
            data = pickle.dumps({"state_dict": {"x": value}}, protocol)
            yield Mutation("pickle with a call", f"{text}, protocol {protocol}, bare", lambda f, d=data: _bare(f, d))
            yield Mutation("pickle with a call", f"{text}, protocol {protocol}", _pickled(lambda _, d=data: d))
    for text, value in calls.items():
        for place in (("state_dict", "x"), ("hyper_parameters",), ("callbacks", "x"), (CHECKPOINT_KEY, "partition")):
            for new in (True, False):
                yield Mutation(
                    "checkpoint with a call",
                    f"{text} in {place}, zip={new}",
                    lambda folder, p=place, v=value, n=new: _with_call(folder, p, v, n),
                )
    rebuild, storage = torch._utils._rebuild_tensor_v2, torch.zeros(4).untyped_storage()
    for text, args in {
        "offset": (2**40, (2,), (1,)),
        "size": (0, (2**40,), (1,)),
        "sizes": (0, (2**40, 2**40), (1, 1)),
        "negative size": (0, (-2,), (1,)),
        "negative stride": (0, (2,), (-1,)),
        "stride": (0, (2, 2), (2**40, 1)),
        "no stride": (0, (2**40,), (0,)),
        "rank": (0, (1,) * 100, (1,) * 100),
    }.items():
        made = Global(
            rebuild, torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True), *args
        )
        made.call = (made.call[0], (*made.call[1], False, OrderedDict()))
        yield Mutation(
            "tensor with absurd numbers",
            text,
            lambda folder, m=made: _with_call(folder, ("state_dict", "model.tickets.0.conv_in.bias"), m, True),
        )


def _bare(folder: Path, data: bytes) -> None:
    (folder / NAME).write_bytes(data)


def _with_call(folder: Path, place: tuple[str, ...], value: Any, new: bool) -> None:
    checkpoint = torch.load(folder / NAME, weights_only=True)
    torch.save(put(checkpoint, place, value), folder / NAME, _use_new_zipfile_serialization=new)


def archives(folder: Path, outside: Path) -> Iterator[Mutation]:
    """Archives with other contents, and things that are no archives."""

    def archive(text: str, damage: Callable[[Path], Any]) -> Mutation:
        return Mutation("archive", text, lambda folder: damage(folder / NAME))

    yield archive("nothing", lambda path: path.unlink())
    yield archive("empty", lambda path: path.write_bytes(b""))
    yield archive("an empty archive", lambda path: zipfile.ZipFile(path, "w").close())
    yield archive("a directory", lambda path: (path.unlink(), path.mkdir()))
    yield archive("a queue", lambda path: (path.unlink(), os.mkfifo(path)))
    yield archive("a dangling link", lambda path: (path.unlink(), path.symlink_to("absent")))
    yield archive("a link to itself", lambda path: (path.unlink(), path.symlink_to(path)))
    for device in ("/dev/zero", "/dev/null", "/proc/self/mem"):
        yield archive(f"a link to {device}", lambda path, to=device: (path.unlink(), path.symlink_to(to)))
    yield archive("a sparse terabyte", lambda path: os.truncate(path, 1 << 40))
    yield archive("text", lambda path: path.write_text("hello"))
    yield archive("compressed", lambda path: repacked(path, lambda _, data: data, zipfile.ZIP_DEFLATED))
    yield archive("a bomb", lambda path: repacked(path, lambda _, data: data, zipfile.ZIP_LZMA, bomb=bytes(1 << 22)))
    yield archive("more in it", lambda path: repacked(path, lambda _, data: data, more=b"x" * 1000))
    yield archive("a name that leads out", lambda path: repacked(path, lambda _, d: d, **{"/../../../x": b"x"}))
    yield archive("code in it", lambda path: repacked(path, lambda _, d: d, **{"code/__torch__.py": b"import os"}))
    yield archive("constants in it", lambda path: repacked(path, lambda _, d: d, **{"constants.pkl": b"\x80\x02N."}))
    yield archive("old format", lambda path: _old(path))
    with zipfile.ZipFile(folder / NAME) as file:
        names = file.namelist()
    for name in (*(each for each in names if "/data/" not in each), *[each for each in names if "/data/" in each][:5]):
        for text, content in {"missing": None, "empty": b"", "short": b"\x00", "noise": b"\xff" * 1000}.items():

            def exchange(path: Path, name: str = name, content: bytes | None = content) -> None:
                repacked(path, lambda entry, data: content if entry == name else data)

            yield archive(f"{name} {text}", exchange)
    for where in (0, 4, 8, 12, 16, 20, 24, 26, 28):  # the first entry's header
        for value in (0, 0xFFFF, 0xFFFFFFFF, 1):
            yield archive(f"header[{where}] = {value}", lambda path, w=where, v=value: _poke(path, w, v))
    for where in (4, 6, 8, 10, 12, 16, 20):  # the end of the directory
        for value in (0, 1, 0xFFFF, 0xFFFFFFFF):
            yield archive(f"end[{where}] = {value}", lambda path, w=where, v=value: _poke(path, w - 22, v))


def _old(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def _poke(path: Path, where: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    where %= len(data)
    data[where : where + 4] = struct.pack("<I", value)[: len(data) - where]
    path.write_bytes(data)


def accidents(folder: Path, generator: random.Random) -> Iterator[Mutation]:
    """Without end: bytes of the archive changed, and bytes of the pickle in it with its checksum in order."""
    whole = (folder / NAME).read_bytes()
    with zipfile.ZipFile(folder / NAME) as file:
        inner = file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))
    while True:
        how, data = damaged_bytes(whole, generator)
        yield Mutation("bytes of a checkpoint", how, lambda f, d=data: _bare(f, d))
        how, data = damaged_bytes(inner, generator)
        yield Mutation("bytes of a pickle, checksum in order", how, _pickled(lambda _, d=data: d))


def all_mutations(
    folder: Path, outside: Path, witness: Path, number: int, seed: int, others: dict[str, dict[str, Any]]
) -> list[Mutation]:
    """About so many mutations of all kinds, in a random order; the same for the same seed."""
    generator = random.Random(seed)
    checkpoint = torch.load(folder / NAME, weights_only=True)
    chosen: list[Mutation] = []
    for share, group in (
        (0.1, archives(folder, outside)),
        (0.1, pickles(folder, witness)),
        (0.15, documents(checkpoint, others)),
        (0.15, weights(checkpoint)),
        (0.25, structures(checkpoint, generator)),
    ):
        every = list(group)
        chosen += generator.sample(every, min(len(every), round(share * number)))
    chosen += itertools.islice(accidents(folder, generator), max(0, number - len(chosen)))
    generator.shuffle(chosen)
    return chosen


def write(path: Path, seed: int = 0, channels: int = 8, *, averaged: bool = False) -> dict[str, Any]:
    """Saves a checkpoint, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    ensemble = ragged_ensemble(ConvNet(channels), (torch.zeros(2, 1, 4, 4), torch.tensor([100, 900])))
    checkpoint = small_checkpoint(ensemble, averaged=averaged)
    torch.save(checkpoint, path)
    return checkpoint


def fresh(good: Path, folder: Path) -> None:
    """The directory with the good checkpoint in it and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(good, folder / NAME)
