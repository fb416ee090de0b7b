"""Finding the denoiser: the module that receives noisy samples with their timesteps in a training batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

from lightning_earlybird.arguments import reading_state, taken
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.ensemble import TimestepArgument

# Under which names published denoisers take their timesteps. Where none fits, the first per-sample argument is taken.
TIMESTEP_NAMES = frozenset(
    [
        "timestep",
        "timesteps",
        "tau",
        "time_step",
        "time_steps",
        "t",
        "ts",
        "time",
        "times",
        "sigma",
        "sigmas",
        "noise_level",
        "noise_levels",
        "noise_labels",
        "c_noise",
        "log_snr",
        "logsnr",
    ]
)


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser, cut down to a single sample, seen in a training batch.

    Attributes:
        name: Dotted name of the denoiser in the LightningModule.
        args: Positional arguments, detached copies, one row where there was a batch.
        kwargs: Keyword arguments, likewise.
        timesteps: Where the timesteps come in.
        sample_shape: Shape of one noisy sample, without the batch.
        seen: The timesteps of the whole batch, shape (batch_size,), on the CPU.
        rivals: Arguments that may as well be the timesteps; empty where the name tells.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timesteps: TimestepArgument
    sample_shape: tuple[int, ...]
    seen: Tensor
    rivals: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any] | None:
        """The call in tensors and plain containers; None if an argument is something else."""
        if not all(_is_plain(value) for value in (*self.args, *self.kwargs.values())):
            return None
        return {
            "name": self.name,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "timesteps": asdict(self.timesteps),
            "sample_shape": list(self.sample_shape),
            "seen": self.seen,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> DenoiserCall:
        """Inverse of :meth:`state_dict`, with the arguments on a device."""

        def moved(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return cls(
            name=state["name"],
            args=tree_map(moved, tuple(state["args"])),
            kwargs=tree_map(moved, dict(state["kwargs"])),
            timesteps=TimestepArgument(**state["timesteps"]),
            sample_shape=tuple(state["sample_shape"]),
            seen=state["seen"],
        )

    @classmethod
    def read(cls, callback: object, state: Mapping[str, Any], device: torch.device) -> DenoiserCall:
        """As :meth:`from_state_dict`, of a checkpoint that nobody vouches for.

        Raises:
            MisconfigurationException: If the state of ``callback`` that it is a part of is damaged.
            ValueError: If the place of the timesteps is none.
        """
        with reading_state(callback):
            taken(state, "name", str)
            taken(state, "seen", Tensor)
            return cls.from_state_dict(state, device)

    def for_network(self, network: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with floating-point tensors in the network's dtype: outside of autocast they must agree."""
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

        def cast(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return tree_map(cast, self.args), tree_map(cast, self.kwargs)


class DenoiserProbe:
    """Watches the calls of sub-modules between :meth:`start` and :meth:`stop`.

    Compiled modules run eagerly meanwhile: hooks must not be compiled into them.

    Args:
        root: The LightningModule.
        name: Dotted name of the denoiser, or None to look for it.

    Raises:
        MisconfigurationException: ``name`` is not a sub-module.
    """

    def __init__(self, root: nn.Module, name: str | None = None) -> None:
        self._root = root
        self._name = name
        self._calls: dict[str, DenoiserCall] = {}
        self._called: set[str] = set()
        self._resources = contextlib.ExitStack()
        if name is not None:
            check_name(root, name)

    def start(self) -> None:
        """Begin to watch."""
        self._resources.enter_context(_EAGERLY)
        for name, module in self._root.named_modules():
            if name and (self._name is None or name == self._name):
                hook = module.register_forward_pre_hook(self._watch(name), with_kwargs=True)
                self._resources.callback(hook.remove)

    def stop(self) -> None:
        """Remove every hook."""
        self._resources.close()

    @property
    def called(self) -> bool:
        """Whether something that may be the denoiser has been called."""
        return bool(self._candidates())

    def resolve(self) -> DenoiserCall:
        """The call of the one denoiser.

        Raises:
            MisconfigurationException: There is none, or more than one.
        """
        outermost = self._candidates()
        if self._name is not None and not outermost:
            if self._name in self._called:
                problem = "was called, but without one timestep per sample (a tensor of as many elements as samples)"
            else:
                problem = "was not called in the first training step"
            raise MisconfigurationException(
                f"denoiser={self._name!r} {problem}. Give the name of the network that your training_step calls with "
                "noisy samples and their timesteps."
            )
        if len(outermost) == 1:
            (call,) = outermost.values()
            if call.rivals:
                raise MisconfigurationException(
                    f"denoiser={call.name!r} takes {len(call.rivals)} arguments with one value per sample, "
                    f"{', '.join(call.rivals)}, and none has a name that timesteps go by. Call it 'timestep' ('t', "
                    "'sigma', ...) in the network's forward, so that labels are not taken for timesteps."
                )
            return call
        if not outermost:
            raise MisconfigurationException(
                "denoiser=None: no trainable sub-module was called with a batch of samples and one timestep per sample "
                "in the first training step. Call the denoiser with a tensor of timesteps, one per sample, or pass its "
                "name, for example denoiser='model'."
            )
        listed = "; ".join(
            f"{name!r} ({type(unwrap(self._root.get_submodule(name))).__name__}, {self._size(name):,} parameters, "
            f"samples of shape {call.sample_shape})"
            for name, call in outermost.items()
        )
        raise MisconfigurationException(
            f"denoiser=None: {len(outermost)} sub-modules were called with samples and one timestep each: {listed}. "
            f"Say which one is the denoiser, for example denoiser={max(outermost, key=self._size)!r}."
        )

    def _candidates(self) -> dict[str, DenoiserCall]:
        """Name -> call of what may be the denoiser, without the parts of others."""
        if self._name is not None:
            return self._calls
        calls = {n: call for n, call in self._calls.items() if self._is_trained(n) and not self._is_average(n)}
        if any(call.timesteps.name in TIMESTEP_NAMES for call in calls.values()):
            # A classifier that takes labels, say, looks alike but for the argument's name.
            calls = {name: call for name, call in calls.items() if call.timesteps.name in TIMESTEP_NAMES}
        return {n: call for n, call in calls.items() if not any(n.startswith(f"{other}.") for other in calls)}

    def _size(self, name: str) -> int:
        return sum(parameter.numel() for parameter in self._root.get_submodule(name).parameters())

    def _is_trained(self, name: str) -> bool:
        # What `toggle_optimizer` has frozen for the moment is trained all the same.
        toggled = getattr(self._root, "_param_requires_grad_state", {})
        parameters = self._root.get_submodule(name).parameters()
        return any(toggled.get(parameter, parameter.requires_grad) for parameter in parameters)

    def _is_average(self, name: str) -> bool:
        averages = [known for known, module in self._root.named_modules() if isinstance(module, AveragedModel)]
        return any(f"{name}.".startswith(f"{known}.") for known in averages)

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._called.add(name)
            if name not in self._calls:
                call = read_call(name, unwrap(module), args, kwargs)
                if call is not None:
                    self._calls[name] = call

        return hook


class _Eagerly:
    """Compiled code runs eagerly while anyone watches.

    Counted, because the probes of two detectors overlap without being nested: each would restore what it had found.
    """

    def __init__(self) -> None:
        self._watchers = 0
        self._stance = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._watchers == 0:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._watchers += 1

    def __exit__(self, *exception: object) -> None:
        self._watchers -= 1
        if self._watchers == 0:
            self._stance.close()


_EAGERLY = _Eagerly()


def check_name(root: nn.Module, name: str) -> None:
    """Refuse a denoiser name that the module does not have.

    Raises:
        MisconfigurationException: ``name`` is not a sub-module; the message lists the names there are.
    """
    names = [known for known, _ in root.named_modules() if known]
    if name not in names:
        near = [known for known in names if "." not in known]
        raise MisconfigurationException(
            f"denoiser={name!r} is not a sub-module of {type(root).__name__}. Its sub-modules are {near}; name nested "
            "ones with dots."
        )


def read_call(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DenoiserCall | None:
    """The call as a denoiser's, with a batch (B, ...) and B timesteps; None if it is not one."""
    batch = next((leaf for leaf in tree_leaves((args, dict(kwargs))) if _is_batch(leaf)), None)
    if batch is None:
        return None
    rows = batch.shape[0]
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given: list[tuple[str | None, int | None, Any]] = []
    given += [(positional[i] if i < len(positional) else None, i, value) for i, value in enumerate(args)]
    given += [(key, positional.index(key) if key in positional else None, value) for key, value in kwargs.items()]
    per_sample = [entry for entry in given if _is_per_sample(entry[2], rows)]
    if not per_sample:
        return None
    named = [entry for entry in per_sample if entry[0] in TIMESTEP_NAMES]
    argument, position, timesteps = (named or per_sample)[0]

    def first_row(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf[:1] if leaf.dim() > 0 and leaf.shape[0] == rows else leaf).detach().clone()

    return DenoiserCall(
        name=name,
        args=tree_map(first_row, args),
        kwargs=tree_map(first_row, dict(kwargs)),
        timesteps=TimestepArgument(argument, position, trailing=timesteps.dim() - 1),
        sample_shape=tuple(batch.shape[1:]),
        seen=timesteps.detach().reshape(-1).to("cpu", copy=True),
        rivals=tuple(key or f"number {at}" for key, at, _ in per_sample) if not named and len(per_sample) > 1 else (),
    )


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold the value without pickling a class."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(each) for key, each in value.items())
    return type(value) in (Tensor, bool, int, float, str, type(None))


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.is_floating_point() and leaf.numel() > leaf.shape[0]


def _is_per_sample(value: Any, rows: int) -> bool:
    """One element per sample: (B,), (B, 1), (B, 1, 1, 1)."""
    return (
        isinstance(value, Tensor)
        and value.dim() >= 1
        and value.shape[0] == rows
        and value.numel() == rows
        and not value.is_complex()
    )
