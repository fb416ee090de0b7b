"""Running a module's own training step on the side, and leaving everything as it was."""

from __future__ import annotations

import contextlib
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

_REGISTRIES = ("_parameters", "_buffers", "_modules")

# Plain tensors above it are data, such as a data set that the module holds, and not worth a second copy.
_LARGEST_COPY_BYTES = 2**26


def seed_everything_by(*where: int) -> None:
    """Seed torch, numpy and Python by numbers such as (step, rank, batch); to be used under :func:`isolated_rng`."""
    seed = random.Random("/".join(map(str, where))).getrandbits(32)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random states of torch, its accelerators, numpy and Python, also after an exception."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)


@contextlib.contextmanager
def untouched(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Undo what training steps do besides returning a loss.

    Restored are the random states, buffers, attributes of the module and its sub-modules (numbers, lists and
    dictionaries, states of metrics, generators, modes), ``requires_grad``, and which gradients are pending; nothing is
    logged meanwhile. Parameters are for :func:`parameters_set_aside`.
    """
    loggers = trainer.loggers
    parameters = list(module.parameters())
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
    kept = [_Attributes(part) for part in module.modules()]
    # Values that go to a logger of their own making stay out of the run's; past nn.Module's bookkeeping.
    vars(module).update(log=_ignore, log_dict=_ignore)
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with isolated_rng():
            yield
    finally:
        trainer.loggers = loggers
        for attributes in kept:
            attributes.restore()
        for parameter, gradient, required in gradients:
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def parameters_set_aside(module: nn.Module, network: nn.Module, values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let training steps write to the parameters, and give a network other weights meanwhile.

    Trainable parameters and those of the network stand on copies. Where other parameters are written to, as by averages
    that a training step keeps by hand, nothing can be restored.

    Args:
        module: What the training step belongs to.
        network: The denoiser in it.
        values: Weights for it by parameter name; None for its own.

    Raises:
        MisconfigurationException: Another parameter was changed.
    """
    own = {id(parameter): name for name, parameter in network.named_parameters()}
    moved: list[tuple[nn.Parameter, Tensor]] = []
    watched: dict[str, tuple[nn.Parameter, int]] = {}
    for path, parameter in module.named_parameters():
        if id(parameter) in own or parameter.requires_grad:
            moved.append((parameter, parameter.data))
        else:
            watched[path] = (parameter, parameter._version)
    # Saved tensors of a backward pass that is still to come are checked by version.
    with _unsafe_preserve_version_counter(tuple(parameter for parameter, _ in moved)):
        try:
            for parameter, data in moved:
                name = own.get(id(parameter))
                source = data if values is None or name is None else values[name].detach()
                parameter.data = torch.empty_like(data).copy_(source)
            yield
        finally:
            for parameter, data in moved:
                parameter.data = data
    changed = [name for name, (parameter, version) in watched.items() if parameter._version != version]
    if changed:
        raise MisconfigurationException(
            f"training_step changes the frozen parameter {changed[0]!r} ({len(changed)} in all), which scoring "
            "channels by gradients would do once more at every check. Change it in on_train_batch_end, or use "
            "criterion='magnitude'."
        )


class _Attributes:
    """What one module holds besides parameters and sub-modules, to be restored.

    Tensors are written back past the version counter: a backward pass that is still to come may have saved them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.plain = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
        self.buffers = dict(module._buffers)
        self.contents = [_Content(value, largest=_LARGEST_COPY_BYTES) for value in self.plain.values()]
        self.contents += [_Content(value) for value in self.buffers.values()]

    def restore(self) -> None:
        present = vars(self.module)
        for key in [key for key in present if key not in _REGISTRIES and key not in self.plain]:
            del present[key]
        present.update(self.plain)
        if any(self.module._buffers.get(name) is not buffer for name, buffer in self.buffers.items()):
            self.module._buffers.update(self.buffers)
        for content in self.contents:
            content.restore()


class _Content:
    """What a value holds, where it can be changed in place: tensors, flat containers, generators."""

    def __init__(self, value: Any, largest: float = math.inf) -> None:
        self.value = value
        self.kept: Any = None
        if type(value) is Tensor:
            if value.layout == torch.strided and not value.is_meta and value.nbytes <= largest:
                self.kept = value.detach().clone()
        elif type(value) in (list, deque, set):
            self.kept = list(value)
        elif type(value) in (dict, OrderedDict):
            self.kept = dict(value)
        elif isinstance(value, torch.Generator):
            self.kept = value.get_state()
        elif isinstance(value, np.random.Generator):
            self.kept = value.bit_generator.state
        elif isinstance(value, random.Random):
            self.kept = value.getstate()

    def restore(self) -> None:
        value, kept = self.value, self.kept
        if kept is None:
            return
        if isinstance(value, Tensor):
            if value.shape == kept.shape and not torch.equal(value.detach(), kept):
                value.data.copy_(kept)
        elif isinstance(value, list | deque | set):
            if len(value) != len(kept) or any(new is not old for new, old in zip(value, kept, strict=True)):
                value.clear()
                value.update(kept) if isinstance(value, set) else value.extend(kept)
        elif isinstance(value, dict):
            if len(value) != len(kept) or any(value.get(key, self) is not old for key, old in kept.items()):
                value.clear()
                value.update(kept)
        elif isinstance(value, torch.Generator):
            value.set_state(kept)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = kept
        elif isinstance(value, random.Random):
            value.setstate(kept)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands for `self.log`."""
