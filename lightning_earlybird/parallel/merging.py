"""One checkpoint for the tickets of a rank, out of the checkpoints of the groups that have trained them so far."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_earlybird.parallel.fit_record import SplitRecord
from lightning_earlybird.saved_structure import CHECKPOINT_KEY


@dataclass(frozen=True)
class Part:
    """A loaded checkpoint, and what it says of the tickets that it holds."""

    checkpoint: dict[str, Any]
    split: SplitRecord


def merge(base: Part, parts: Mapping[int, Part], num_tickets: int) -> dict[str, Any]:
    """A checkpoint like the first, with the tickets of others.

    Args:
        base: Where everything comes from that is not a ticket's own: loops, schedules, callbacks, other parameters.
        parts: Ticket -> the checkpoint that it comes from, for every ticket that the rank is to train.
        num_tickets: Tickets that there are.

    Returns:
        The merged checkpoint. The optimizers' states are left to :class:`MergedOptimizers`.
    """
    patterns = [re.compile(rf"(?:{re.escape(name)})\.tickets\.(\d+)\.") for name in base.split.ensembles]

    def ticket_of(key: Any) -> int | None:
        found = [match for pattern in patterns if isinstance(key, str) and (match := pattern.match(key))]
        return int(found[0][1]) if found else None

    def merged(value: Any, others: Mapping[int, Any]) -> Any:
        """`others` are what stands in the place of the value in the checkpoints of the tickets."""
        if not isinstance(value, Mapping):
            return value
        others = {ticket: other for ticket, other in others.items() if isinstance(other, Mapping)}
        result = {}
        for key, own in value.items():
            if ticket_of(key) is None:
                result[key] = merged(own, {t: other[key] for t, other in others.items() if key in other})
        for ticket, other in others.items():
            result |= {key: own for key, own in other.items() if ticket_of(key) == ticket}
        if isinstance(value, OrderedDict):  # a state dict, which may know versions of its modules
            ordered: OrderedDict[Any, Any] = OrderedDict(result)
            ordered.__dict__.update(vars(value))
            return ordered
        return result

    whole = {ticket: part.checkpoint for ticket, part in parts.items()}
    checkpoint = {
        key: merged(value, {ticket: each[key] for ticket, each in whole.items() if key in each})
        for key, value in base.checkpoint.items()
        if key not in ("optimizer_states", "loops", CHECKPOINT_KEY)
    }
    for key, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and "losses_by_ticket" in state:  # the pruner's, around the switch
            known = {str(t): part.checkpoint["callbacks"][key]["losses_by_ticket"] for t, part in parts.items()}
            state["losses_by_ticket"] = {ticket: own[ticket] for ticket, own in known.items() if ticket in own}
    for key in ("optimizer_states", "loops"):
        checkpoint[key] = base.checkpoint[key]
    structure = dict(base.checkpoint[CHECKPOINT_KEY])
    prefix = f"{structure['denoiser']}.tickets."
    sources = [base.checkpoint, *whole.values()]
    structure["absent"] = {
        str(ticket): _shapes(ticket, prefix, sources) for ticket in range(num_tickets) if ticket not in parts
    }
    checkpoint[CHECKPOINT_KEY] = structure
    return checkpoint


def _shapes(ticket: int, prefix: str, checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a ticket that the rank will not hold."""
    for checkpoint in checkpoints:
        known = checkpoint[CHECKPOINT_KEY].get("absent", {}).get(str(ticket))
        if known is not None:
            return dict(known)
    own = f"{prefix}{ticket}."
    return {
        key.removeprefix(own): list(value.shape)
        for key, value in checkpoints[0]["state_dict"].items()
        if key.startswith(own)
    }


class MergedOptimizers:
    """The optimizers' states of several checkpoints, by the names of the parameters.

    Args:
        base: Where learning rates and the like come from, and the states of what is no ticket's.
        parts: As for :func:`merge`.

    Raises:
        MisconfigurationException: For optimizers whose state is not that of their parameters.
    """

    def __init__(self, base: Part, parts: Mapping[int, Part]) -> None:
        self._groups: list[list[dict[str, Any]]] = []
        self._states: list[dict[str, Any]] = []
        for number, saved in enumerate(base.checkpoint["optimizer_states"]):
            if set(saved) != {"state", "param_groups"}:
                raise MisconfigurationException(
                    f"ckpt_path: optimizer {number} keeps {sorted(set(saved) - {'state', 'param_groups'})} besides the "
                    "states of its parameters, which cannot be shared out anew among ranks. Resume with the same "
                    "number of ranks."
                )
            self._groups.append(saved["param_groups"])
            states = _by_name(base, number)
            for part in {id(part): part for part in parts.values()}.values():
                if part is not base:
                    own = [ticket for ticket, other in parts.items() if other is part]
                    marks = [f"{name}.tickets.{ticket}." for name in part.split.ensembles for ticket in own]
                    states |= {
                        name: state
                        for name, state in _by_name(part, number).items()
                        if any(name.startswith(mark) for mark in marks)
                    }
            self._states.append(states)

    def load(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Give the states to a rank's optimizers."""
        names = {parameter: name for name, parameter in module.named_parameters()}
        for optimizer, saved_groups, states in zip(optimizers, self._groups, self._states, strict=True):
            present = optimizer.state_dict()
            if len(saved_groups) != len(present["param_groups"]):
                raise MisconfigurationException(
                    f"ckpt_path: {type(optimizer).__name__} has {len(present['param_groups'])} parameter groups, and "
                    f"the checkpoint {len(saved_groups)}. Make the same groups in configure_optimizers."
                )
            state, groups = {}, []
            for live, group, saved in zip(
                optimizer.param_groups, present["param_groups"], saved_groups, strict=True
            ):  # fmt: skip
                own = ("params", "param_names")
                groups.append({key: value for key, value in saved.items() if key not in own})
                groups[-1] |= {key: group[key] for key in own if key in group}
                for index, parameter in zip(group["params"], live["params"], strict=True):
                    if names.get(parameter) in states:
                        state[index] = states[names[parameter]]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def _by_name(part: Part, number: int) -> dict[str, Any]:
    saved, names = part.checkpoint["optimizer_states"][number], part.split.names[number]
    return {
        name: saved["state"][index]
        for group, group_names in zip(saved["param_groups"], names, strict=True)
        for index, name in zip(group["params"], group_names, strict=True)
        if index in saved["state"]
    }


def begin_folders_anew(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Have every ``ModelCheckpoint`` begin in its new directory with nothing, as when the world is first split."""
    callbacks = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.state_key in callbacks:
            fresh = copy.copy(callbacks[callback.state_key])
            fresh |= {"dirpath": callback.dirpath, "best_k_models": {}, "best_model_score": None}
            fresh |= dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), "")
            fresh["kth_value"] = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callbacks[callback.state_key] = fresh


def drop_loader_states(checkpoint: dict[str, Any]) -> None:
    """Forget how far loaders had come, which other ranks will share otherwise."""
    loops = copy.deepcopy(checkpoint["loops"])
    loops["fit_loop"].get("state_dict", {}).pop("combined_loader", None)
    checkpoint["loops"] = loops
