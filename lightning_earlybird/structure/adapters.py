"""Modules that keep a width as a plain attribute, and what it must be once their tensors have changed shape.

Types are matched by class name along the method resolution order, so that diffusers is not imported. To support a
further module, add an entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_earlybird.structure.norms import RaggedGroupNorm

HEAD_COUNTS = ("heads", "num_heads", "n_heads", "nheads", "n_head", "num_attention_heads", "sliceable_head_dim")
"""What people call the number of attention heads, and what diffusers keeps beside it."""
if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer

AttributeValue = int | tuple[int, ...]
Attributes = dict[str, AttributeValue]


@dataclass(frozen=True)
class Adapter:
    """How one type of module is repaired.

    Attributes:
        names: The attributes that may change; nothing else is ever written, from a trace or from a file.
        repair: (module with its new tensors, dense original, new input width or None) -> values for some of ``names``.
        input_dim: Which dimension of the module's first input holds channels, for modules whose own tensors do not tell
            the width.
        couples: (tracer, module's name, module) -> None: ties channels that the module's code wants equally many of.
    """

    names: tuple[str, ...]
    repair: Callable[[Any, Any, int | None], Attributes]
    input_dim: int | None = None
    couples: Callable[["ChannelTracer", str, Any], None] | None = None


def largest_divisor(width: int, at_most: int) -> int:
    """The largest divisor of ``width`` that does not exceed ``at_most``."""
    return next(divisor for divisor in range(min(width, at_most), 0, -1) if width % divisor == 0)


def _conv(new: Any, dense: Any, width: int | None) -> Attributes:
    # A depthwise convolution has one group a channel; every other grouping is left alone (its channels are frozen).
    groups = (
        new.weight.shape[0]
        if dense.groups > 1 and dense.groups == dense.in_channels == dense.out_channels
        else dense.groups
    )
    first, second = new.weight.shape[0], new.weight.shape[1] * groups
    inputs, outputs = (first, second) if dense.transposed else (second, first)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _linear(new: Any, dense: Any, width: int | None) -> Attributes:
    return {"in_features": new.weight.shape[1], "out_features": new.weight.shape[0]}


def _embedding(new: Any, dense: Any, width: int | None) -> Attributes:
    return {"embedding_dim": new.weight.shape[1]}


def _group_norm(new: Any, dense: Any, width: int | None) -> Attributes:
    channels = new.weight.shape[0] if new.weight is not None else width or dense.num_channels
    if isinstance(dense, RaggedGroupNorm):
        return {"num_channels": channels}
    return {"num_channels": channels, "num_groups": largest_divisor(channels, dense.num_groups)}


def _batch_norm(new: Any, dense: Any, width: int | None) -> Attributes:
    known = new.weight if new.weight is not None else new.running_mean
    return {"num_features": known.shape[0] if known is not None else width or dense.num_features}


def _layer_norm(new: Any, dense: Any, width: int | None) -> Attributes:
    if new.weight is not None:
        return {"normalized_shape": tuple(new.weight.shape)}
    return {"normalized_shape": (width,)} if width and len(dense.normalized_shape) == 1 else {}


def _resample(new: Any, dense: Any, width: int | None) -> Attributes:
    conv = getattr(new, "conv", None)
    if conv is None:
        conv = getattr(new, "Conv2d_0", None)
    weight = getattr(conv, "weight", None)
    if isinstance(weight, nn.Parameter):
        # The convolution is read from its weight, not from its attributes: those may not have been repaired yet.
        inputs, outputs = (
            (weight.shape[0], weight.shape[1])
            if getattr(conv, "transposed", False)
            else (weight.shape[1], weight.shape[0])
        )
        return {"channels": inputs, "out_channels": outputs}
    return {"channels": width, "out_channels": width} if width else {}


def _attention(new: Any, dense: Any, width: int | None) -> Attributes:
    # The Attention of diffusers computes the head width from the tensors at run time; these attributes inform its
    # processors and users.
    last = getattr(new, "to_out", None)
    if isinstance(last, nn.Sequential | nn.ModuleList):
        last = last[0]
    values: Attributes = {}
    for layer, outputs, inputs in (
        (getattr(new, "to_q", None), "inner_dim", "query_dim"),
        (getattr(new, "to_k", None), "inner_kv_dim", "cross_attention_dim"),
        (last, "out_dim", None),
    ):
        weight = getattr(layer, "weight", None)
        if weight is not None:
            values[outputs] = weight.shape[0]
            if inputs is not None:
                values[inputs] = weight.shape[1]
    return values


def _diffusers_or_timm_attention(new: Any, dense: Any, width: int | None) -> Attributes:
    packed = getattr(getattr(new, "qkv", None), "weight", None)
    if packed is None:
        return _attention(new, dense, width)
    heads = getattr(new, "num_heads", 1)
    return {"head_dim": packed.shape[0] // (3 * heads), "attn_dim": packed.shape[0] // 3}


def _self_attention_1d(new: Any, dense: Any, width: int | None) -> Attributes:
    return {"channels": new.value.weight.shape[0]}


def _multihead_attention(new: Any, dense: Any, width: int | None) -> Attributes:
    outer = new.out_proj.weight.shape[0]
    values = {"embed_dim": outer, "head_dim": new.out_proj.weight.shape[1] // new.num_heads}
    if new.in_proj_weight is not None:
        return {**values, "kdim": outer, "vdim": outer}
    return {**values, "kdim": new.k_proj_weight.shape[1], "vdim": new.v_proj_weight.shape[1]}


def _couple_multihead_attention(tracer: "ChannelTracer", name: str, module: Any) -> None:
    """Queries, keys and values are as wide as the module's input: its code says so."""
    prefix = f"{name}." if name else ""
    if module.in_proj_weight is not None:
        inputs = tracer.dimensions.get((f"{prefix}in_proj_weight", 1))
        packed = tracer.dimensions.get((f"{prefix}in_proj_weight", 0))
        inner = list(packed.chunk(3)) if packed is not None else []
    else:
        inputs = tracer.dimensions.get((f"{prefix}q_proj_weight", 1))
        inner = [tracer.dimensions[key] for key in [(f"{prefix}q_proj_weight", 0)] if key in tracer.dimensions]
    for labels in inner:
        if inputs is not None:
            tracer.couplings.tie(inputs, labels, "as wide as another tensor")


def _own_conv(new: Any, dense: Any, width: int | None) -> Attributes:
    weight = new._parameters.get("weight")
    if weight is not None and tuple(dense.weight.shape[:2]) == (dense.out_channels, dense.in_channels):
        return {"in_channels": weight.shape[1], "out_channels": weight.shape[0]}
    if weight is None and dense.in_channels == dense.out_channels and width:
        return {"in_channels": width, "out_channels": width}
    return {}


# Somebody's own convolution, whatever it is called: a leaf that keeps its widths as nn.Conv2d does.
OWN_CONV = Adapter(("in_channels", "out_channels"), _own_conv, input_dim=1)


def _is_own_conv(module: nn.Module) -> bool:
    widths = (vars(module).get("in_channels"), vars(module).get("out_channels"))
    return all(type(width) is int for width in widths) and next(module.children(), None) is None


ADAPTERS: Mapping[str, Adapter] = {
    "_ConvNd": Adapter(("in_channels", "out_channels", "groups"), _conv),
    "Linear": Adapter(("in_features", "out_features"), _linear),
    "Embedding": Adapter(("embedding_dim",), _embedding),
    "GroupNorm": Adapter(("num_channels", "num_groups", "group_sizes"), _group_norm, input_dim=1),
    "_NormBase": Adapter(("num_features",), _batch_norm, input_dim=1),
    "LayerNorm": Adapter(("normalized_shape",), _layer_norm, input_dim=-1),
    "RMSNorm": Adapter(("normalized_shape",), _layer_norm, input_dim=-1),
    "Downsample2D": Adapter(("channels", "out_channels"), _resample, input_dim=1),
    "Upsample2D": Adapter(("channels", "out_channels"), _resample, input_dim=1),
    "Downsample1D": Adapter(("channels", "out_channels"), _resample, input_dim=1),
    "Upsample1D": Adapter(("channels", "out_channels"), _resample, input_dim=1),
    "Attention": Adapter(
        ("inner_dim", "inner_kv_dim", "query_dim", "cross_attention_dim", "out_dim", "head_dim", "attn_dim"),
        _diffusers_or_timm_attention,
    ),
    "SelfAttention1d": Adapter(("channels",), _self_attention_1d),
    "MultiheadAttention": Adapter(
        ("embed_dim", "head_dim", "kdim", "vdim"), _multihead_attention, couples=_couple_multihead_attention
    ),
}


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the module's type or of its nearest base class that has one."""
    known = next((ADAPTERS[base.__name__] for base in type(module).__mro__ if base.__name__ in ADAPTERS), None)
    return OWN_CONV if known is None and _is_own_conv(module) else known


def head_counts(module: nn.Module) -> dict[str, int]:
    """The attributes of a module that seem to count attention heads."""
    own = vars(module)
    return {name: own[name] for name in HEAD_COUNTS if type(own.get(name)) is int}


def changeable(module: nn.Module) -> tuple[str, ...]:
    """The attributes in which a ticket may differ from its dense network."""
    adapter = adapter_of(module)
    return (*(adapter.names if adapter else ()), *head_counts(module))


def repair_attributes(new: nn.Module, dense: nn.Module, width_of: Callable[[str], int | None]) -> None:
    """Set every width attribute of ``new`` (in place) to what its tensors say.

    Args:
        new: The network whose tensors already have their new shapes.
        dense: The network it was made from, with the same module names.
        width_of: Module name -> new width of its input, or None where that is unknown.
    """
    originals = dict(dense.named_modules())
    for name, module in new.named_modules():
        adapter, dense_module = adapter_of(module), originals[name]
        if adapter is None:
            continue
        width = width_of(name) if adapter.input_dim is not None else None
        # Somebody else's class of the same name may lack some of the attributes, or mean something else by them.
        try:
            values = adapter.repair(module, dense_module, width)
        except AttributeError:
            continue
        for attribute, value in values.items():
            if isinstance(getattr(dense_module, attribute, None), int | tuple):
                setattr(module, attribute, value)


def attribute_edits(dense: nn.Module, ticket: nn.Module) -> dict[str, dict[str, int | list[int]]]:
    """What differs between two networks besides their tensors.

    Returns:
        Module name -> attribute -> the ticket's value; JSON-able.
    """
    originals = dict(dense.named_modules())
    edits: dict[str, dict[str, int | list[int]]] = {}
    for name, module in ticket.named_modules():
        for attribute in changeable(module):
            if not hasattr(module, attribute):
                continue
            value = getattr(module, attribute)
            if value != getattr(originals[name], attribute, None):
                edits.setdefault(name, {})[attribute] = list(value) if isinstance(value, tuple) else value
    return edits
