"""Which dense parameter each parameter of the replacement descends from, and how tensors are handed down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inherit = Callable[[str, Tensor], Tensor]
Source = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class Lineage:
    """A dense network, its replacement, and the dense parent of each parameter of the replacement.

    Args:
        dense: The network that leaves.
        replacement: The network that comes.
        parents: Name of each parameter of the replacement, in its order -> the dense parameter that it is cut from.
    """

    dense: nn.Module
    replacement: nn.Module
    parents: dict[str, nn.Parameter]

    @classmethod
    def trace(cls, dense: nn.Module, replacement: nn.Module, source: Source) -> Lineage:
        """Ask ``source`` for the parent of each parameter.

        Raises:
            ValueError: If ``source`` names a parameter that the denoiser does not have.
        """
        # Tied parameters have several names, any of which `source` may use.
        known = dict(dense.named_parameters(remove_duplicate=False))
        parents = {}
        for name, _ in replacement.named_parameters():
            origin = source(name)
            if origin not in known:
                raise ValueError(
                    f"source({name!r}) is {origin!r}, which is not a parameter of the denoiser. Each parameter of the"
                    " replacement must descend from one: let `source` return its name."
                )
            parents[name] = known[origin]
        return cls(dense, replacement, parents)

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, parameter and dense parent of each parameter of the replacement, in its order."""
        heirs = dict(self.replacement.named_parameters())
        return ((name, heirs[name], parent) for name, parent in self.parents.items())


def share(name: str, heir: nn.Parameter, tensor: Tensor, inherit: Inherit) -> Tensor:
    """The heir's part of a tensor that is shaped like its parent, in memory of its own, laid out like the heir.

    Raises:
        ValueError: If ``inherit`` gives a shape that is not the heir's.
    """
    part = inherit(name, tensor.detach().to_dense())
    if part.shape != heir.shape:
        raise ValueError(
            f"inherit({name!r}, ...) gives the shape {tuple(part.shape)}, but that parameter of the replacement has the"
            f" shape {tuple(heir.shape)}. Let `inherit` cut tensors exactly as `build` cuts the weights."
        )
    # Never the tensor that `inherit` returned: where nothing is cut it may be the parent's own, and two heirs that
    # both keep everything would then update one moment twice.
    return torch.empty_like(heir, dtype=part.dtype, device=part.device, requires_grad=False).copy_(part)


def hand_down(lineage: Lineage, inherit: Inherit) -> None:
    """Move pending gradients to the heirs, so that an unfinished accumulation window loses nothing."""
    heirs = set()
    for name, heir, parent in lineage:
        heirs.add(heir)
        if parent.grad is not None:
            heir.grad = share(name, heir, parent.grad, inherit)
    for parameter in lineage.dense.parameters():
        if parameter not in heirs:
            parameter.grad = None


def match(lineage: Lineage, source: Source) -> None:
    """Give the replacement what the dense network has set on it: ``requires_grad`` and train or eval mode."""
    for _, heir, parent in lineage:
        heir.requires_grad_(parent.requires_grad)
    dense, replacement = lineage.dense, lineage.replacement
    if len({module.training for module in dense.modules()}) == 1:
        replacement.train(dense.training)
        return
    # A denoiser of mixed modes (a frozen norm layer, say): modules with parameters follow the owner of their
    # parameters, those without any stay as `build` made them.
    replacement.training = dense.training
    for name in lineage.parents:
        owner = source(name).rpartition(".")[0]
        replacement.get_submodule(name.rpartition(".")[0]).training = dense.get_submodule(owner).training
