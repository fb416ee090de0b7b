"""Reads damaged ensembles under supervision, and judges what came of it."""

import contextlib
import itertools
import json
import random
import re
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from mutations import (
    CALL,
    INDEX,
    Mutation,
    accidents,
    attributes,
    descriptions,
    fields,
    files,
    headers,
    payloads,
    small_ensemble,
    swaps,
    tensors,
    write,
)
from safetensors.torch import load_file

from lightning_earlybird import tickets
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.tickets import (
    EnsembleFormatError,
    check_target,
    load_ensemble,
    saved_partition,
    tensor_names,
)

# What a file may say differently and still be an ensemble: it is loaded as what it says.
MEANINGS = re.compile(
    r"partition(\.regions(\.\d+(\.(start|stop|sparsity|max_steps))?)?|\.overlap)?"
    r"|timesteps(\.(name|position|trailing))?"
    r"|sample_shape(\.\d+)?"
    r"|denoiser\.config(\..*)?"
    r"|masks(\..*)?"
    r"|tickets\.\d+\.(memory_format|facts(\..*)?|groups(\..*)?|edits(\..*)?|file|sha256|tensors(\..*)?)"
    r"|tickets(\.\d+)?"
)
# With these the network may be one that cannot be called as it was.
CALLED_OTHERWISE = re.compile(
    r"denoiser\.config.*|timesteps.*|tickets\.\d+\.(edits|tensors|sha256|file).*|tickets(\.\d+)?"
)

FORBIDDEN = {
    *("exec", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *(
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.putenv",
    ),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile", "tempfile.mkstemp", "tempfile.mkdtemp"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "pickle.find_class", "marshal.loads"),
}
LIMIT_S = 120  # far more than anything takes; only what hangs does not end


class Supervisor:
    """Notes what a block opens and starts; there is one for the process, as Python's audit hooks stay for good."""

    _instance: "Supervisor | None" = None

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.violations: list[str] = []
        self.links = False
        sys.addaudithook(self._hear)

    @classmethod
    def get(cls) -> "Supervisor":
        cls._instance = cls._instance or cls()
        return cls._instance

    @contextlib.contextmanager
    def confined_to(self, folder: Path, *, links: bool = False) -> Iterator[list[str]]:
        """Gives the list of what is done in the block besides reading files in the folder; ``links`` are files, too."""
        self.folder, self.violations, self.links = folder, [], links
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LIMIT_S)
        try:
            yield self.violations
        finally:
            signal.alarm(0)
            self.folder = None

    def look(self, path: Any, mode: Any = "r") -> None:
        """Notes the opening of a file, if it must not be opened."""
        if self.folder is None or isinstance(path, int):
            return
        name = str(path)
        # Modules that are imported at their first use are no concern of the files.
        imported = name.startswith(sys.prefix) or name.startswith(sys.base_prefix) or name.endswith((".py", ".pyc"))
        inside = Path(name).parent == self.folder and (self.links or not Path(name).is_symlink())
        if not (imported or inside) or set(str(mode)) & set("wax+"):
            self.violations.append(f"open {name} {mode}")

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            self.look(args[0], args[1])
        elif event in FORBIDDEN and not (event in ("exec", "marshal.loads") and _importing()):
            self.violations.append(f"{event} {args!r:.200}")


def _importing() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"nothing came of it within {LIMIT_S} s")


class Victim:
    """A saved ensemble that is damaged over and over, with good ones beside it that must not be touched.

    Attributes:
        folder: The directory that is damaged.
        good: The same, whole.
        outside: The same again, for links and names that lead out of the directory.
        others: Other ensembles: of the same network with other weights, and of another network.
        witness: What code out of a file would make.
        counts: (kind, outcome) -> number of mutations.
        growth_bytes: By how much the memory of the process has grown at most.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.good, self.folder, self.outside = root / "good", root / "victim", root / "outside"
        self.witness = root / "executed"
        self.others = {"same": root / "same", "wider": root / "wider"}
        write(self.good, small_ensemble())
        write(self.others["same"], small_ensemble(seed=1))
        write(self.others["wider"], small_ensemble(channels=16))
        shutil.copytree(self.good, self.outside)
        self.index = json.loads((self.good / INDEX).read_text())
        self.original = essence(load_ensemble(self.good))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.growth_bytes = 0
        self._before = self._surroundings()

    def mutations(self, number: int, seed: int = 0) -> list[Mutation]:
        """About so many mutations of all kinds, in a random order; the same for the same seed."""
        generator = random.Random(seed)
        # Few enough to try them all.
        chosen = [
            *headers(self.good),
            *files(self.good, self.outside),
            *swaps(self.good, self.others),
            *payloads(self.good, self.witness),
        ]
        left = number - len(chosen)
        for share, group in (
            (0.04, tensors(self.good)),
            (0.04, attributes(self.index)),
            (0.06, descriptions(self.index)),
            (0.5, fields(self.index, generator)),
        ):
            every = list(group)
            chosen += generator.sample(every, min(len(every), round(share * left)))
        chosen += itertools.islice(accidents(self.good, generator), max(0, number - len(chosen)))
        generator.shuffle(chosen)
        return chosen

    def run(self, mutations: Iterable[Mutation]) -> None:
        """Tries all, and counts the outcomes.

        Raises:
            AssertionError: With the mutations that ended in anything but a refusal or a correct load.
        """
        failures = []
        forget_peak()
        before = peak_bytes()
        with self._tensor_files_watched():
            for mutation in mutations:
                try:
                    self.counts[mutation.kind, self.outcome(mutation)] += 1
                except Exception as error:
                    failures.append(f"{mutation.kind}: {mutation.name}\n    {type(error).__name__}: {error!s:.500}")
        assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:40])
        assert self._surroundings() == self._before
        self.growth_bytes = max(self.growth_bytes, peak_bytes() - before)

    def outcome(self, mutation: Mutation) -> str:
        """``refused`` or ``loaded``; anything else raises."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)
        mutation.damage(self.folder)
        names = sorted(path.name for path in self.folder.iterdir())
        loaded = None
        with Supervisor.get().confined_to(self.folder) as violations, warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                loaded = load_ensemble(self.folder)
            except EnsembleFormatError as error:
                self._check_message(str(error))
            except ValueError as error:
                # No fault of the directory: it may hold a network of one's own.
                assert type(error) is ValueError and "pass denoiser=, a function" in str(error), error
                assert self._said()["denoiser"] is None
            for ask in (saved_partition, tensor_names, check_target):
                try:
                    ask(self.folder)
                except EnsembleFormatError as error:
                    self._check_message(str(error))
                except FileExistsError as error:
                    assert ask is check_target
                    assert str(error).isprintable()
        assert not violations, violations
        assert not self.witness.exists(), "code was executed"
        assert sorted(path.name for path in self.folder.iterdir()) == names
        if loaded is None:
            return "refused"
        self._check_loaded(loaded)
        return "loaded"

    def _check_message(self, message: str) -> None:
        assert message.startswith(f"{self.folder / INDEX}: "), message
        assert len(message) < 6000 and message.isprintable(), message
        message.encode()

    def _said(self) -> Any:
        return json.loads((self.folder / INDEX).read_text())

    def _check_loaded(self, loaded: TicketEnsemble) -> None:
        """The ensemble is the one that was saved, or exactly what the files say instead."""
        said = self._said()
        found = essence(loaded)
        differing = {key for key in found if found[key] != self.original[key]}
        changed = set(changes(self.index, said))
        if differing:
            assert all(MEANINGS.fullmatch(path) for path in changed), (differing, changed)
        record = loaded.record
        assert record is not None
        for entry, ticket in zip(said["tickets"], loaded.tickets, strict=True):
            in_file = load_file(self.folder / entry["file"])
            assert bits(ticket.state_dict()) == bits(in_file)
        assert loaded.partition.to_json() == complete(said)["partition"]
        written = record.to_json()
        assert written["denoiser"] == said["denoiser"] and written["sample_shape"] == said["sample_shape"]
        assert written["edits"] == [entry["edits"] for entry in said["tickets"]]
        reset = CALL[1].new_tensor([_inside(region) for region in loaded.partition])
        try:
            with torch.no_grad():
                output = loaded(CALL[0], reset).sample
            assert output.shape == CALL[0].shape
        except Exception:
            assert any(CALLED_OTHERWISE.fullmatch(path) for path in changed), changed

    def _surroundings(self) -> dict[str, bytes]:
        places = (self.good, self.outside, *self.others.values())
        files = {str(path): path.read_bytes() for place in places for path in place.iterdir()}
        return files | {path.name: b"" for path in self.root.iterdir() if path != self.folder}

    @contextlib.contextmanager
    def _tensor_files_watched(self) -> Iterator[None]:
        # safetensors opens its files by itself, unseen by Python's audit.
        before = tickets.safe_open, tickets.load_file

        def watched(function: Any) -> Any:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                Supervisor.get().look(path)
                return function(path, *args, **kwargs)

            return call

        tickets.safe_open, tickets.load_file = map(watched, before)
        try:
            yield
        finally:
            tickets.safe_open, tickets.load_file = before


def forget_peak() -> None:
    """So that memory taken before does not hide what is taken now; only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as what can be compared, NaN included."""
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in sorted(tensors.items())
    }


def essence(ensemble: TicketEnsemble) -> dict[str, Any]:
    """All that there is to an ensemble, comparable."""
    record = ensemble.record
    assert record is not None
    return {
        "partition": ensemble.partition,
        "timesteps": ensemble.timesteps,
        "record": record.to_json(),
        "masks": [(list(mask.kept), bits(dict(mask.kept))) for mask in record.masks],
        "states": [bits(ticket.state_dict()) for ticket in ensemble.tickets],
        "networks": [str(ticket) for ticket in ensemble.tickets],
    }


def complete(tree: Any) -> Any:
    """A JSON tree with what may be left out filled in."""
    if isinstance(tree, dict):
        tree = {key: complete(value) for key, value in tree.items()}
        if {"start", "stop", "sparsity"} <= tree.keys():
            tree.setdefault("max_steps", None)
        if {"region", "emerged"} <= tree.keys():
            tree.setdefault("target", "channels")
        return tree
    return [complete(value) for value in tree] if isinstance(tree, list) else tree


def changes(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Paths at which two JSON trees differ."""
    if type(before) is type(after) and isinstance(before, dict):
        for key in before.keys() | after.keys():
            inner = f"{path}.{key}".strip(".")
            if key in before and key in after:
                yield from changes(before[key], after[key], inner)
            elif key in before:
                yield inner
            # Keys that mean nothing are not looked at.
    elif type(before) is type(after) and isinstance(before, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from changes(*pair, f"{path}.{number}")
    elif before != after or type(before) is not type(after):
        yield path


def _inside(region: Any) -> float:
    return 0.0 if region.start < 0 < region.stop else max(region.start, min(region.stop, 1e6) - 1)
