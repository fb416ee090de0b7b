"""Resizing: a dense network takes the shapes of a ticket; the way back from disk, without a trace."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.structure.adapters import HEAD_COUNTS, AttributeValue, changeable, repair_attributes
from lightning_earlybird.structure.extract import register_persistent
from lightning_earlybird.structure.norms import RaggedGroupNorm

REMEDY = "Build the same dense network that the ticket was made from."


def resize_(model: nn.Module, shapes: Mapping[str, Sequence[int]], edits: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give a dense network the shapes of a ticket, in place.

    The values of resized tensors are undefined until a state dict is loaded. Shapes and edits may come from a file that
    nobody vouches for: only existing tensors are resized, only the width attributes of known modules are written, and
    nothing can grow. After an error the network is of no further use.

    Args:
        model: A dense network, freshly built.
        shapes: Shape of every parameter and buffer in the ticket's state dict.
        edits: Module name -> attribute -> value, as :func:`~lightning_earlybird.structure.attribute_edits` wrote them.

    Returns:
        ``model``.

    Raises:
        ValueError: A tensor or attribute does not exist in the network or does not fit; the message names it.
    """
    dense = _copy_of_attributes(model)
    _resize_tensors(model, shapes)
    checked = {name: _checked_edits(dense, name, values) for name, values in edits.items()}
    for name, values in checked.items():
        for attribute in values.keys() & set(HEAD_COUNTS):
            setattr(model.get_submodule(name), attribute, values[attribute])
    repair_attributes(model, dense, lambda module: _input_width(checked.get(module, {})))
    for name, values in checked.items():
        module = model.get_submodule(name)
        sizes = values.pop("group_sizes", None)
        if isinstance(sizes, tuple) and isinstance(module, nn.GroupNorm):
            _make_ragged(name, module, sizes, next((parameter.device for parameter in model.parameters()), None))
        for attribute, value in values.items():
            # The numbers of norm groups and of heads are choices; everything else follows from the tensors.
            if attribute == "num_groups" and not isinstance(module, RaggedGroupNorm):
                module.num_groups = value  # type: ignore[assignment]
            elif getattr(module, attribute) != value:
                raise ValueError(
                    f"attribute {name}.{attribute} = {value} does not fit the tensors, which make it "
                    f"{getattr(module, attribute)}. {REMEDY}"
                )
        heads, width = values.get("heads"), getattr(module, "inner_dim", None)
        if isinstance(heads, int) and isinstance(width, int) and width % heads:
            raise ValueError(f"attribute {name}.heads = {heads} does not divide its width of {width}. {REMEDY}")
    for name, module in model.named_modules():
        if isinstance(module, RaggedGroupNorm) or not isinstance(module, nn.GroupNorm):
            continue
        if module.num_channels % module.num_groups:
            raise ValueError(
                f"attribute {name}.num_groups = {module.num_groups} does not divide its {module.num_channels} "
                f"channels. {REMEDY}"
            )
    return model


def _resize_tensors(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    saved = set(model.state_dict())
    odd = sorted((set(tensors) & saved) - set(shapes)) or sorted(set(shapes) - set(tensors))
    if odd:
        where = "missing from the shapes" if odd[0] in tensors else "not a tensor of the network"
        raise ValueError(f"tensor {odd[0]!r} is {where} ({len(odd)} such). {REMEDY}")
    resized: dict[int, Tensor] = {}  # tied tensors stay tied
    for name, shape in shapes.items():
        tensor, new = tensors[name], tuple(shape)
        old = tuple(tensor.shape)
        if len(new) != len(old) or any(not 1 <= n <= o for n, o in zip(new, old, strict=True)):
            raise ValueError(
                f"tensor {name!r} has shape {new}, which is no part of the dense network's {old}. {REMEDY}"
            )
        if id(tensor) not in resized:
            resized[id(tensor)] = tensor if new == old else _empty(tensor, new)
        if tuple(resized[id(tensor)].shape) != new:
            raise ValueError(f"tensor {name!r} has shape {new}, and another one where it is tied to it. {REMEDY}")
        owner, _, leaf = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            setattr(model.get_submodule(owner), leaf, resized[id(tensor)])
        elif name in saved:
            model.get_submodule(owner).register_buffer(leaf, resized[id(tensor)])
        else:
            register_persistent(model, name, resized[id(tensor)])


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _copy_of_attributes(model: nn.Module) -> nn.Module:
    """The same module tree over the same tensors: it remembers attributes while the original's are repaired."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _input_width(edits: Mapping[str, AttributeValue]) -> int | None:
    """The input width that a module's edits speak of, for modules whose own tensors do not tell it."""
    for attribute in ("channels", "num_channels", "num_features", "normalized_shape", "in_channels"):
        if attribute in edits:
            value = edits[attribute]
            return value if isinstance(value, int) else value[-1]
    return None


def _checked_edits(dense: nn.Module, name: str, values: Mapping[str, Any]) -> dict[str, AttributeValue]:
    try:
        module = dense.get_submodule(name)
    except AttributeError:
        raise ValueError(f"module {name!r} is not in the network. {REMEDY}") from None
    allowed = changeable(module)
    checked: dict[str, AttributeValue] = {}
    for attribute, value in values.items():
        if attribute == "group_sizes" and type(module) is nn.GroupNorm:
            checked[attribute] = _checked_sizes(module, name, value)
            continue
        # What may not be written is not read either: networks warn of some of their attributes.
        old = getattr(module, attribute, None) if attribute in allowed else None
        if not isinstance(old, int | tuple):
            raise ValueError(f"attribute {name}.{attribute} is not a width that a ticket may change.")
        given, limits = ([value], [old]) if isinstance(old, int) else (value, old)
        if (
            not isinstance(given, list | tuple)
            or len(given) != len(limits)
            or any(
                type(number) is not int or not 1 <= number <= limit for number, limit in zip(given, limits, strict=True)
            )
        ):
            raise ValueError(f"attribute {name}.{attribute} = {value!r} must be positive and at most {old}. {REMEDY}")
        checked[attribute] = value if isinstance(old, int) else tuple(given)
    return checked


def _checked_sizes(dense: nn.GroupNorm, name: str, value: Any) -> tuple[int, ...]:
    """Widths of what is left of the groups of a norm; no group can grow, and none can be added."""
    limit = dense.num_channels // dense.num_groups
    if (
        not isinstance(value, list | tuple)
        or not 1 <= len(value) <= dense.num_groups
        or any(type(size) is not int or not 1 <= size <= limit for size in value)
    ):
        raise ValueError(
            f"attribute {name}.group_sizes = {value!r} must list at most {dense.num_groups} positive numbers, each at "
            f"most {limit}. {REMEDY}"
        )
    return tuple(value)


def _make_ragged(name: str, norm: nn.GroupNorm, sizes: tuple[int, ...], device: torch.device | None) -> None:
    if sum(sizes) != norm.num_channels:
        raise ValueError(
            f"attribute {name}.group_sizes = {list(sizes)} adds up to {sum(sizes)} channels and does not fit the "
            f"tensors, which make them {norm.num_channels}. {REMEDY}"
        )
    RaggedGroupNorm.adopt_(norm, sizes, device)
