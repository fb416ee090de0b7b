"""What training computes and evaluation does not: a ticket must compute it like the dense network, too.

Channels meet chance there (dropout, noise), which must not tell a ticket from its dense network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_earlybird.structure.assemble import own_numbers, score_numbers, statistics
from lightning_earlybird.structure.plan import ChannelPlan
from lightning_earlybird.structure.tracer import ChannelTracer

DRAWS = frozenset(["rand", "rand_like", "randn", "randn_like", "normal", "uniform", "bernoulli"])


class _NoDropout(TorchFunctionMode):
    """Dropout drops nothing, so that operations are those of evaluation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            args, kwargs = (*args[:4], *([0.0] if len(args) > 4 else []), *args[5:]), {**kwargs}
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        elif "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


class _SameDraws(TorchDispatchMode):
    """Whatever is drawn is the same number for all: networks of different widths cannot draw alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        return out.fill_(1.0 if name == "bernoulli" else 0.5) if name in DRAWS else out


@contextmanager
def without_chance() -> Iterator[None]:
    """Networks compute without dropout, and with one number in place of all that they draw."""
    with _NoDropout(), _SameDraws():
        yield


def as_in_training(plan: ChannelPlan, tracer: ChannelTracer) -> ChannelPlan:
    """The plan with the statistics and the numbers of the training mode, in which operations are counted otherwise.

    Args:
        plan: A plan, traced in evaluation mode.
        tracer: What has seen the same network in training mode.
    """
    ids = torch.full((tracer.couplings.count,), -1)
    for (name, dim), labels in tracer.dimensions.items():
        ids[labels] = plan.ids.get(name, {}).get(dim, ids[labels])
    return replace(
        plan,
        statistics=statistics(tracer, ids.__getitem__),
        own_numbers=own_numbers(tracer),
        score_numbers=score_numbers(tracer),
    )
