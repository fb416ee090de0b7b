"""Where a LightningModule holds its denoiser, and how another network takes its place there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_earlybird.compilation import unwrap

# What nn.Module registers in `__dict__`; everything else there is a plain attribute.
_REGISTRIES = ("_modules", "_parameters", "_buffers")

Edit: TypeAlias = tuple[Any, Any, Any]
"""A container, a key in it, and the value that was there."""


def is_alias(value: Any, dense: nn.Module) -> bool:
    """Whether ``value`` is the denoiser or a compiled wrapper around it."""
    return isinstance(value, nn.Module) and unwrap(value) is dense


def surroundings(root: nn.Module, dense: nn.Module) -> list[tuple[str, nn.Module]]:
    """The names and modules of ``root`` that can be reached without passing through the denoiser."""
    hidden = {module for module in root.modules() if is_alias(module, dense)}
    return list(root.named_modules(memo=hidden))


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds besides registered sub-modules, parameters and buffers."""
    return ((key, value) for key, value in list(vars(module).items()) if key not in _REGISTRIES)


def put(root: nn.Module, dense: nn.Module, replacement: nn.Module, edits: list[Edit]) -> None:
    """Put the replacement wherever ``root`` holds the denoiser, in place.

    That is: registered sub-modules (``ModuleList`` and ``ModuleDict`` entries among them), plain attributes, and
    lists, tuples and dictionaries in plain attributes. Every edit is added to ``edits``.
    """
    seen: set[int] = set()

    def exchanged(value: Any) -> Any:
        if is_alias(value, dense):
            return replacement
        if type(value) is tuple:
            items = tuple(exchanged(item) for item in value)
            # The same tuple where nothing changed: the containers that hold it may refuse to be written to.
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if isinstance(value, (list, dict)) and id(value) not in seen:
            seen.add(id(value))
            for key, item in list(enumerate(value) if isinstance(value, list) else value.items()):
                if (new := exchanged(item)) is not item:
                    edits.append((value, key, item))
                    value[key] = new
        return value

    for _, owner in surroundings(root, dense):
        exchanged(owner._modules)
        for key, value in plain_attributes(owner):
            if (new := exchanged(value)) is not value:
                edits.append((owner.__dict__, key, value))
                owner.__dict__[key] = new


def twins(root: nn.Module, dense: nn.Module) -> dict[str, nn.Module]:
    """Other modules in ``root``, by name, with the type and the tensor shapes of the denoiser."""

    def shapes(module: nn.Module) -> dict[str, Any]:
        return {name: tensor.shape for name, tensor in module.state_dict().items()}

    alike = {name: module for name, module in surroundings(root, dense) if type(module) is type(dense)}
    return {name: module for name, module in alike.items() if shapes(module) == shapes(dense)}


def averaged_twins(root: nn.Module, dense: nn.Module) -> list[nn.Module]:
    """Copies of the denoiser that ``root`` itself averages in a ``torch.optim.swa_utils.AveragedModel``."""
    averages = [module for module in root.modules() if isinstance(module, AveragedModel)]
    parts = {part for average in averages for part in average.modules()}
    return [twin for twin in twins(root, dense).values() if twin in parts]
