import copy
from typing import Any

import torch
from models import random_mask
from random_networks import RandomNetwork, inputs, random_network
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure import ChannelPlan, StructureError, extract, trace_plan, verify_plan

TOLERANCE = 1e-6  # in double precision; the factor of query scales is in single precision


class WithoutStatistics(TorchFunctionMode):
    """Norms over several channels become a function of each channel: zeros take part in them, missing ones do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is nn.functional.group_norm:
            weight, bias = given.get("weight"), given.get("bias")
            weight, bias = (*args[2:4], weight, bias)[:2]
            shape = (1, -1) + (1,) * (args[0].dim() - 2)
        elif func in (nn.functional.layer_norm, nn.functional.rms_norm):
            weight, bias = (*args[2:4], given.get("weight"), given.get("bias"))[:2]
            shape = (-1,)
        else:
            return func(*args, **given)
        out = torch.atan(3 * args[0])
        out = out if weight is None else out * weight.view(shape)
        return out if bias is None else out + bias.view(shape)


def without(network: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy whose removed slices are zero, one by one."""
    result = copy.deepcopy(network)
    tensors = dict([*result.named_parameters(), *result.named_buffers()])
    removed = {
        channel
        for group in plan.groups
        for channel, stays in zip(group.channels.tolist(), mask.kept[group.name].tolist(), strict=True)
        if not stays
    }
    with torch.no_grad():
        for name, dims in plan.ids.items():
            for dim, ids in dims.items():
                for position, channel in enumerate(ids.tolist()):
                    if channel in removed:
                        tensors[name].select(dim, position).zero_()
    return result


def difference(network: nn.Module, plan: ChannelPlan, mask: TicketMask, seed: int) -> float:
    """Largest difference between the ticket and the zeroed network, on other samples than those that were traced."""
    double = copy.deepcopy(network).double()
    given = tuple(tensor.double() for tensor in inputs(2, seed))
    with torch.no_grad(), WithoutStatistics():
        expected: Tensor = without(double, plan, mask)(*given)
        actual: Tensor = extract(double, plan, mask)(*given)
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
