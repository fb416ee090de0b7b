"""What diffusers' pipelines tell a network about loading, as far as it has a meaning for tickets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Ways of loading that end with the same weights in the same place.
_WITHOUT_EFFECT = {"low_cpu_mem_usage", "disable_mmap", "max_memory", "offload_folder", "offload_state_dict"}
# Ways of loading other files, by the value that asks for ours.
_OTHER_FILES = {"variant": None, "use_safetensors": True, "use_flashpack": False, "quantization_config": None}


def check_loading(dtype: Any, options: Mapping[str, Any]) -> None:
    """Refuses what ensembles cannot do.

    Args:
        dtype: What the tickets are to be converted to, or None.
        options: The other options of diffusers.

    Raises:
        TypeError: If an option is not known.
        ValueError: If one asks for other files than an ensemble has, or the dtype is no floating one.
    """
    if unknown := sorted(set(options) - _WITHOUT_EFFECT - set(_OTHER_FILES)):
        raise TypeError(f"from_pretrained has no arguments {unknown}; see its documentation for those that it has.")
    for name, ours in _OTHER_FILES.items():
        if options.get(name, ours) not in (ours, None):
            raise ValueError(
                f"{name}={options[name]!r}: an ensemble has one set of files, which are safetensors; leave it out."
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be a floating dtype such as torch.bfloat16, or None.")


def device_of(device_map: Any) -> torch.device | None:
    """The one device that a map names; None for None.

    Raises:
        ValueError: If it names no device, or several.
    """
    if device_map is None:
        return None
    try:
        return torch.device(device_map[""] if isinstance(device_map, dict) and set(device_map) == {""} else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} must be one device, such as 'cuda' or {{'': 'cuda:1'}}: tickets are not shared "
            "out over devices. With offload=True only the ticket that is called is there."
        ) from error


def convert(ticket: nn.Module, dtype: torch.dtype) -> None:
    """Converts a ticket to a floating dtype, in place, but for the modules that its class keeps in float32.

    Args:
        ticket: The ticket; networks of diffusers name such modules in ``_keep_in_fp32_modules``.
        dtype: The dtype; those modules are kept from 16-bit ones only.
    """
    kept = set(getattr(ticket, "_keep_in_fp32_modules", None) or ()) if dtype.itemsize < 4 else set()
    for name, tensor in itertools.chain(ticket.named_parameters(), ticket.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
