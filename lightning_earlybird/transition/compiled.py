"""Compiling the tickets the way the denoiser was compiled."""

from __future__ import annotations

import itertools
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch import nn
from torch._dynamo import OptimizedModule, eval_frame

from lightning_earlybird.transition.slots import is_alias


def compile_context(module: nn.Module) -> Any | None:
    """A module's compile context, True where that cannot be recovered, None if it is not compiled."""
    if isinstance(module, OptimizedModule):
        return module.dynamo_ctx
    if module._compiled_call_impl is None:
        return None
    # `module.compile()` leaves its context only in the closure of the function that it makes.
    cells = [cell.cell_contents for cell in getattr(module._compiled_call_impl, "__closure__", None) or ()]
    return next((content for content in cells if isinstance(content, eval_frame._TorchDynamoContext)), True)


def denoiser_context(root: nn.Module, dense: nn.Module) -> Any | None:
    """How the denoiser is compiled, be it in place or through a wrapper anywhere in ``root``."""
    contexts = (compile_context(module) for module in [*root.modules(), dense] if is_alias(module, dense))
    return next((context for context in contexts if context is not None), None)


def compile_like(replacement: nn.Module, context: Any | None) -> None:
    """Compile the replacement's ``tickets`` (the replacement itself where it has none) in place.

    Only the tickets: what routes between them depends on the data and would break the graph.
    """
    if context is None:
        return
    if context is True:
        rank_zero_info("How the denoiser was compiled cannot be recovered: its tickets are compiled with the defaults.")
    tickets = getattr(replacement, "tickets", None)
    for ticket in tickets if isinstance(tickets, nn.ModuleList) else [replacement]:
        if context is True:
            ticket.compile()
        else:
            ticket._compiled_call_impl = _isolated(context)(ticket._call_impl)


def _isolated(context: Any) -> Any:
    """A copy of a compile context that counts its recompilations for itself.

    Tickets run the same code, and dynamo's limit (8 variants) is per code object: three tickets with changing numbers
    of rows would reach it and fall back to eager execution, or fail under ``fullgraph=True``. Older versions of torch
    have no such counter; there the context is shared.
    """
    counter = getattr(eval_frame, "_next_isolate_recompiles_id", None)
    if not isinstance(counter, itertools.count) or not hasattr(context, "_isolate_recompiles_id"):
        return context
    copy = object.__new__(type(context))
    copy.__dict__.update(vars(context), _isolate_recompiles_id=next(counter))
    return copy
