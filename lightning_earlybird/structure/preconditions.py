"""What a network must be like to be traced, and what to do where it is not."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from lightning_earlybird.structure.crop import OperationLog
from lightning_earlybird.structure.plan import StructureError
from lightning_earlybird.structure.running import undisturbed

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_traceable(model: nn.Module) -> None:
    """Refuse networks whose tensors cannot be computed with or cut.

    Raises:
        StructureError: Something is on the meta device, uninitialised, quantised or TorchScript.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                f"denoiser: {name or type(module).__name__!r} is a TorchScript module, whose tensors cannot be cut. "
                "Use the Python module that it was made from."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise StructureError(
                f"denoiser: {name!r} is not initialised yet (a lazy module). Call the network once with a sample, "
                "before the optimizers are made (for example in configure_model)."
            )
        if tensor.is_meta:
            raise StructureError(
                f"denoiser: {name!r} is on the meta device, where there is nothing to compute with. "
                "Materialise it first (for example in configure_model)."
            )
        if tensor.is_floating_point() and tensor.dtype not in TRAINABLE:
            raise StructureError(
                f"denoiser: {name!r} is of type {tensor.dtype}, which networks do not train in. Prune the network in "
                "float32, bfloat16 or float16, and convert the tickets."
            )
    _check_memory(model)
    if not any(parameter.is_floating_point() or parameter.is_complex() for parameter in model.parameters()):
        raise StructureError(
            f"denoiser: {type(model).__name__} has no floating-point parameters; is it quantised? Prune the network in "
            "floating point, and quantise the tickets."
        )


def _check_memory(model: nn.Module) -> None:
    """Refuse parameters that are views of each other: their slices would be cut apart, and no longer be tied."""
    spans = []
    for name, parameter in model.named_parameters():
        if parameter.numel():
            first = parameter.storage_offset()
            last = first + sum(
                (size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True)
            )
            spans.append((parameter.device, parameter.untyped_storage().data_ptr(), first, last, name))
    spans.sort(key=lambda span: (str(span[0]), *span[1:]))
    for one, other in itertools.pairwise(spans):
        if one[:2] == other[:2] and other[2] <= one[3]:
            raise StructureError(
                f"denoiser: the parameters {one[4]!r} and {other[4]!r} are views of the same memory, so that a ticket "
                "could not keep them tied. Use one parameter in both places (transposed in forward, say)."
            )


def refuse_branches(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], reads: Mapping[str, str], unused: set[str]
) -> None:
    """Refuse networks that use other layers for other inputs.

    Args:
        model: The network.
        args: Positional arguments of the call that was traced.
        kwargs: Its keyword arguments.
        reads: Where values were read by Python -> the module that did.
        unused: Parameters that this call did not use; may be some that no call like it uses.

    Raises:
        StructureError: Some of ``unused`` belong to a part of the network that reads values, or are used when the
            inputs have other values.
    """
    parts = tuple(f"{module}." for module in reads.values() if module)
    missed = {name for name in unused if parts and name.startswith(parts)}
    for change in _CHANGES:
        log = OperationLog(model)
        # Some values mean nothing to the network, and some it cannot be given.
        with contextlib.suppress(Exception), undisturbed(model):
            changed = tree_map(
                lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf,  # noqa: B023
                (tuple(args), dict(kwargs)),
            )
            with log:
                model(*changed[0], **changed[1])
        missed |= unused & log.read()
    if missed:
        layers = sorted({name.rpartition(".")[0] or name for name in missed})
        raise StructureError(
            f"denoiser: {type(model).__name__} decides by the values of tensors which layers to use "
            f"({'; '.join(list(reads)[:3])}), and {len(layers)} were not used in the traced call: "
            f"{', '.join(layers[:5])}. Compute both and choose with torch.where, choose by an argument or by "
            "configuration, or give denoiser= the name of a part without the branch."
        )


# Far away from what the network was called with: a branch that hangs on a sign or a size should show.
_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: -4 * tensor if tensor.is_floating_point() else torch.zeros_like(tensor),
    lambda tensor: torch.randn_like(tensor) if tensor.is_floating_point() else tensor // 2,
    lambda tensor: tensor - 10 if tensor.is_floating_point() else torch.ones_like(tensor),
    lambda tensor: tensor + 10 if tensor.is_floating_point() else 999 * torch.ones_like(tensor),
)


def remedy(model: nn.Module) -> str:
    """What may help where little or nothing can be pruned; empty where nothing is known to."""
    computed = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        or any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values())
    ]
    if not computed:
        return ""
    more = f" and {len(computed) - 3} more" if len(computed) > 3 else ""
    return (
        f" Weights of {', '.join(computed[:3])}{more} are computed from other parameters (weight or spectral "
        "normalisation, parametrizations): fold them with torch.nn.utils.parametrize.remove_parametrizations (or "
        "remove_weight_norm, remove_spectral_norm) before training."
    )
