"""Reads damaged checkpoints of tickets under supervision, and judges what came of it."""

import json
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoint_mutations import NAME, Network, Small, all_mutations, fresh, write
from hostile import Supervisor, bits, complete, forget_peak, peak_bytes
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from mutations import Mutation

from lightning_earlybird import EnsembleFormatError, TicketEnsemble, TicketEnsembleSampler, load_from_checkpoint
from lightning_earlybird.checkpoint_files import read_checkpoint
from lightning_earlybird.checkpointing import restore_structure
from lightning_earlybird.saved_structure import CHECKPOINT_KEY

REFUSALS = (EnsembleFormatError, MisconfigurationException)


class CheckpointVictim:
    """A checkpoint that is damaged over and over.

    Attributes:
        folder: The directory with the damaged checkpoint.
        good: The checkpoint, whole.
        witness: What code out of a file would make.
        counts: (kind, outcome) -> number of mutations.
        growth_bytes: By how much the memory of the process has grown at most.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.good, self.folder, self.witness = root / "good" / NAME, root / "victim", root / "executed"
        write(self.good, averaged=True)
        self.others = {"same": write(root / "same" / NAME, 1), "wider": write(root / "wider" / NAME, 0, 16)}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.growth_bytes = 0
        self.dense, self.pruned = Small(), load_from_checkpoint(Small, self.good)
        self._hook = Small.on_load_checkpoint

    def mutations(self, number: int, seed: int = 0) -> list[Mutation]:
        """About so many mutations of all kinds."""
        return all_mutations(self.good.parent, self.root, self.witness, number, seed, self.others)

    def run(self, mutations: Iterable[Mutation]) -> None:
        """Tries all, and counts the outcomes.

        Raises:
            AssertionError: With the mutations that ended in anything but a refusal or a correct load.
        """
        failures = []
        forget_peak()
        before = peak_bytes()
        for mutation in mutations:
            try:
                self.counts[mutation.kind, self.outcome(mutation)] += 1
            except Exception as error:
                trace = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{trace.filename.rsplit('/', 1)[-1]}:{trace.lineno}"
                failures.append(f"{mutation.kind}: {mutation.name}\n    {type(error).__name__} {where}: {error!s:.500}")
        self.growth_bytes = max(self.growth_bytes, peak_bytes() - before)
        assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:40])

    def outcome(self, mutation: Mutation) -> str:
        """``refused`` or ``loaded``; anything else raises."""
        fresh(self.good, self.folder)
        mutation.damage(self.folder)
        path = self.folder / NAME
        names = sorted(each.name for each in self.folder.iterdir())
        with Supervisor.get().confined_to(self.folder, links=True) as violations, warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = self._sampler(path)
            module = self._module(path)
            self._restored_in_place(path)
        assert not violations, violations
        assert not self.witness.exists(), "code was executed"
        assert sorted(each.name for each in self.folder.iterdir()) == names
        assert Small.on_load_checkpoint is self._hook
        if sampler is None and module is None:
            return "refused"
        stored = read_checkpoint(path)
        if sampler is not None:
            self._check(sampler, stored, "state_dict")
        if module is not None and isinstance(module.model, TicketEnsemble):
            self._check(module.model, stored, "state_dict")
        return "loaded"

    def _sampler(self, path: Path) -> TicketEnsembleSampler | None:
        try:
            return TicketEnsembleSampler.from_checkpoint(path, Network)
        except EnsembleFormatError as error:
            self._check_message(str(error))
        except OSError:
            assert not path.is_file()
        except ValueError as error:
            # The file is in order, and is not what was asked for.
            assert type(error) is ValueError, error
            assert "holds no tickets" in str(error) or "do not fit the network of denoiser=" in str(error), error
        return None

    def _module(self, path: Path) -> Small | None:
        try:
            return load_from_checkpoint(Small, path)
        except REFUSALS as error:
            self._check_message(str(error), path="ckpt_path" if isinstance(error, MisconfigurationException) else None)
        except OSError:
            assert not path.is_file()
        except RuntimeError as error:
            # What torch says of tensors outside of the tickets.
            assert "Error(s) in loading state_dict for Small" in str(error), error
            assert ".tickets." not in str(error), error
        return None

    def _restored_in_place(self, path: Path) -> None:
        """As in a Trainer, whose module is there already: after a refusal it must be as it was."""
        try:
            checkpoint = read_checkpoint(path)
        except (EnsembleFormatError, OSError):
            return
        for module in (self.dense, self.pruned):
            before, model = look(module), module.model
            try:
                restore_structure(None, module, checkpoint)
            except REFUSALS as error:
                assert str(error).isprintable() and len(str(error)) < 6000
                assert module.model is model
                assert look(module) == before
            else:
                module.model = model
            if isinstance(model, TicketEnsemble):
                model.partition, model.timesteps, model.record = before["ensemble"]

    def _check_message(self, message: str, path: str | None = None) -> None:
        assert path is not None or str(self.folder / NAME) in message, message
        assert len(message) < 6000 and message.isprintable(), message

    def _check(self, ensemble: TicketEnsemble, stored: dict[str, Any], group: str) -> None:
        """The ensemble is exactly what the file says."""
        described = stored[CHECKPOINT_KEY]
        found = {f"model.{name}": tensor for name, tensor in ensemble.state_dict().items()}
        # Lightning copies what it reads into the module's tensors; a sampler has the very ones.
        cast = not isinstance(ensemble, TicketEnsembleSampler)
        tensors = {name: stored[group][name] for name in found}
        assert bits(found) == bits({n: each.to(found[n].dtype) if cast else each for n, each in tensors.items()})
        assert found.keys() == {name for name in stored[group] if name.startswith("model.")}
        assert ensemble.partition.to_json() == complete(plain(described["partition"]))
        record = ensemble.record
        assert record is not None
        written, said = record.to_json(), complete(plain(described["record"]))
        said["facts"] = [  # with keys that mean nothing left out
            {key: facts.get(key) for key in each} for each, facts in zip(written["facts"], said["facts"], strict=True)
        ]
        assert written == {key: said[key] for key in written}
        assert [bits(dict(mask.kept)) for mask in record.masks] == [bits(mask) for mask in described["masks"]]


def look(module: Small) -> dict[str, Any]:
    """All that must not change, comparable."""
    model = module.model
    return {
        "text": str(module),
        "state": bits(module.state_dict()),
        "grad": [parameter.requires_grad for parameter in module.parameters()],
        "ensemble": (model.partition, model.timesteps, model.record) if isinstance(model, TicketEnsemble) else None,
    }


def plain(value: Any) -> Any:
    """As JSON would carry it."""
    return json.loads(json.dumps(value))
