"""What Python learns of values while a network runs: of what it decides by them, only one branch is seen."""

import os
import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_earlybird.structure.rules import RULES, Operation

if TYPE_CHECKING:
    from lightning_earlybird.structure.tracer import ChannelTracer

# Their results have as many elements as the values of their operands say.
DATA_DEPENDENT_SHAPES = frozenset(["nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"])
NOT_THE_NETWORKS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))  # code of
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # of these, no operation is seen


class DataReads:
    """Follows what depends on inputs, parameters or chance, to the places where Python reads it.

    Args:
        model: The network.
        inputs: The tensors of the call.

    Attributes:
        places: Where Python has read a value -> the module that did.
        unused: Parameters that no operation has used so far: id -> name.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor]) -> None:
        self.places: dict[str, str] = {}
        self.unused = {id(parameter): name for name, parameter in model.named_parameters()}
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._data: Any = WeakTensorKeyDictionary()
        buffers = (buffer for buffer in model.buffers() if buffer.is_floating_point())
        for tensor in (*inputs, *model.parameters(), *buffers):
            self._data[tensor] = True

    def observe(self, operation: Operation) -> str | None:
        """Take note of an operation; where Python reads a value by it, None if it does not."""
        inputs, results = operation.tensors(), operation.outputs()
        for tensor in inputs:
            self.unused.pop(id(tensor), None)
        reads = not results or operation.name in DATA_DEPENDENT_SHAPES
        place = self.read(inputs) if reads else None
        carries = RULES.get(operation.name) is not RULES["zeros_like"] and any(
            tensor in self._data for tensor in inputs
        )
        if carries or torch.Tag.nondeterministic_seeded in operation.func.tags:
            for result in results:
                self._data[result] = True
        return place

    def read(self, tensors: Iterable[Tensor]) -> str | None:
        """Python learns values of these tensors, and may decide by them what to compute; where, if they are data."""
        if not any(tensor in self._data for tensor in tensors):
            return None
        module, place = self._place()
        self.places[place] = module
        return place

    def _place(self) -> tuple[str, str]:
        """The innermost module of the network whose code is running: its name, and that with file and line."""
        where = ""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(NOT_THE_NETWORKS):
                where = where or f"{os.path.basename(code.co_filename)}:{frame.f_lineno}"
                owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
                name = self._modules.get(id(owner)) if isinstance(owner, nn.Module) else None
                if name is not None:
                    return name, f"{repr(name) if name else type(owner).__name__}, {where}"
            frame = frame.f_back
        return "", where or "the network"


class ReadWatch(TorchFunctionMode):
    """Sees what reads a tensor without any operation.

    Args:
        tracer: What is told of it.
    """

    def __init__(self, tracer: "ChannelTracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self._tracer.record_read(args[:1])
        return func(*args, **(kwargs or {}))
