"""What cannot follow a denoiser that changes its structure in the middle of a fit, said before training begins."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.transition.compiled import compile_context
from lightning_earlybird.transition.optimizers import family
from lightning_earlybird.transition.rehearsal import bare
from lightning_earlybird.transition.slots import averaged_twins, plain_attributes, surroundings, twins


def check_supported(trainer: pl.Trainer, module: pl.LightningModule, name: str | None = None) -> None:
    """Refuse what cannot work once the denoiser is replaced. For callbacks' ``setup`` and ``on_fit_start``.

    In ``setup`` there are no optimizers yet, so only a call in ``on_fit_start`` looks at them.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule.
        name: The denoiser's dotted name in the module, once known: how the module holds it is then checked as well.

    Raises:
        MisconfigurationException: For sharded and unknown strategies; processes that are spawned or forked;
            communication state and static graphs of DDP; synchronised batch norms; quantising precision plugins;
            optimizers that hold parameters outside their groups; and, given ``name``, parts of the denoiser that are
            held or shared outside of it.
    """
    _check_strategy(trainer.strategy)
    if trainer.world_size > 1:
        _check_batch_norm(trainer.strategy, module)
    if isinstance(plugin := trainer.strategy.precision_plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise MisconfigurationException(
            f"plugins={type(plugin).__name__}: it changes the layers, and masks cannot be drawn over layers that it has"
            " changed. Use `precision='bf16-mixed'`, or another precision that keeps plain layers."
        )
    for optimizer in trainer.strategy.optimizers:
        _check_optimizer(bare(optimizer))
    if name is not None:
        _check_denoiser(module, name)
        _check_copies(trainer, module, name)


def _check_strategy(strategy: Strategy) -> None:
    kind = type(strategy).__name__
    # By name, because DeepSpeed's strategy and some of other packages descend from DDPStrategy.
    names = " ".join(base.__name__ for base in type(strategy).__mro__)
    unfit = any(word in names for word in ("DeepSpeed", "FSDP", "Sharded", "XLA"))
    if unfit or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"strategy={kind}: the denoiser's parameters are replaced in the middle of the fit, which only"
            " SingleDeviceStrategy and DDPStrategy can follow; sharded parameters (FSDP, DeepSpeed, ModelParallel)"
            " cannot be cut. Use Trainer(strategy='auto') on one device or Trainer(strategy='ddp') on several."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"strategy={kind}(start_method={strategy.launcher._start_method!r}): the tickets would stay in the worker"
            " processes and the main process would end with the dense network. Start the processes with"
            " Trainer(strategy='ddp') (start_method='popen') or with torchrun; in a notebook use one device and"
            " Trainer(strategy='auto')."
        )
    if not isinstance(strategy, DDPStrategy):
        return
    for argument, value in (
        ("ddp_comm_state", strategy._ddp_comm_state),
        ("model_averaging_period", strategy._model_averaging_period),
    ):
        if value is not None:
            raise MisconfigurationException(
                f"{argument}={value!r} of {kind}: communication state (PostLocalSGD, PowerSGD) is bound to the dense"
                f" parameters, which leave in the middle of the fit. Leave `{argument}` at None."
            )
    if strategy._ddp_kwargs.get("static_graph"):
        raise MisconfigurationException(
            f"static_graph=True of {kind}: which tickets take part in a step depends on the batch, so the graph is not"
            " static. Leave `static_graph` at False."
        )


def _check_batch_norm(strategy: Strategy, module: nn.Module) -> None:
    converting = getattr(strategy, "_layer_sync", None) is not None
    for name, layer in module.named_modules():
        if isinstance(layer, nn.SyncBatchNorm) or (converting and isinstance(layer, _BatchNorm)):
            raise MisconfigurationException(
                f"sync_batchnorm=True with the batch norm {name!r}: a rank whose batch misses a ticket does not join"
                " the statistics of that ticket's layers, and the other ranks wait for it forever. Use"
                " Trainer(sync_batchnorm=False) and no SyncBatchNorm, or a norm that needs no other rank (GroupNorm)."
            )


def check_trained(trainer: pl.Trainer, name: str, network: nn.Module) -> None:
    """Refuse a fit whose optimizers do not know the tickets that a checkpoint has put in the denoiser's place.

    Torch compares the number of parameters only when it restores an optimizer, and one ticket has as many as the dense
    network: the fit would go on without training anything.

    Args:
        trainer: The Trainer, once its optimizers are there.
        name: Dotted name of the network, for the message.
        network: What stands in the denoiser's place.

    Raises:
        MisconfigurationException: No optimizer holds a parameter of it.
    """
    members = [member for optimizer in trainer.optimizers for member in family(bare(optimizer))]
    held = {id(p) for member in members for group in member.param_groups for p in group["params"]}
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    if held and trained and not held & trained:
        raise MisconfigurationException(
            f"configure_optimizers returns optimizers that were made before the checkpoint was loaded: they hold none"
            f" of the parameters of the tickets in {name!r}, which would not be trained. Make them in"
            " `configure_optimizers`, from self.parameters()."
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    members = family(optimizer)
    # Compared by storage, so that flat views of parameters are found as well as the parameters themselves.
    storages = {_storage(p) for member in members for group in member.param_groups for p in group["params"]} - {0}
    for member in members:
        kept = [value for known in members for value in (known, known.state, known.param_groups)]
        for attribute, value in vars(member).items():
            if not any(value is known for known in kept) and _holds(value, storages):
                raise MisconfigurationException(
                    f"configure_optimizers gives {type(member).__name__}: it keeps parameters in its attribute"
                    f" {attribute!r} besides `param_groups` and `state`, where they cannot be replaced when the"
                    " denoiser changes its structure. Use an optimizer that does not, such as SGD or AdamW."
                )


def _holds(value: Any, storages: set[int]) -> bool:
    return any(isinstance(leaf, Tensor) and _storage(leaf) in storages for leaf in _leaves(value))


def _check_denoiser(module: pl.LightningModule, name: str) -> None:
    dense = unwrap(module.get_submodule(name))
    # By identity: attributes may hold anything, also what cannot be hashed or compared.
    parts = {id(part) for part in dense.modules()} - {id(dense)}
    parameters = {id(parameter) for parameter in dense.parameters()}
    held = parts | parameters

    def refuse(what: str, remedy: str) -> None:
        raise MisconfigurationException(f"denoiser={name!r}: {what}. {remedy}")

    for key, parameter in dense.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            refuse(
                f"its parameter {key!r} has gradient hooks, which would not act on the tickets",
                "Work on gradients in `on_before_optimizer_step` or `configure_gradient_clipping` instead.",
            )
    for path, owner in surroundings(module, dense):
        prefix = f"{path}." if path else ""
        context = (owner._compiler_ctx or {}).get("dynamo_ctx") if owner is module else compile_context(owner)
        if getattr(context, "fullgraph", False) and any(inner is dense for inner in owner.modules()):
            refuse(
                f"{path or type(module).__name__!r} around it is compiled with fullgraph=True, and choosing tickets by"
                " timestep breaks the graph",
                "Compile the denoiser itself, or leave `fullgraph` at False.",
            )
        for key, child in owner._modules.items():
            if id(child) in parts:
                refuse(
                    f"a part of it is also held as {prefix + key!r} and would stay dense there",
                    "Reach it through the denoiser instead of holding it a second time.",
                )
        for key, shared in owner._parameters.items():
            if id(shared) in parameters:
                refuse(f"it shares the parameter {prefix + key!r}, which has no tickets", "Make two parameters of it.")
        for key, value in plain_attributes(owner):
            if owner is module and key == "_param_requires_grad_state":
                continue  # what `toggle_optimizer` remembers is handed on at the switch
            leaves = list(_leaves(value))
            if {id(leaf) for leaf in leaves} & held or {id(_bound(leaf)) for leaf in leaves} & {*parts, id(dense)}:
                refuse(
                    f"the attribute {prefix + key!r} keeps parameters, parts or methods of it, which would stay dense",
                    "Keep only the denoiser and look them up on it when they are needed.",
                )


def _check_copies(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """Averages kept by hand pair their tensors with the denoiser's by position, and break when these change shape."""
    dense = unwrap(module.get_submodule(name))
    remedy = (
        "Use the callback lightning.pytorch.callbacks.EMAWeightAveraging, or torch.optim.swa_utils.AveragedModel in the"
        " module, which follow the denoiser."
    )
    callbacks = [(type(callback).__name__, callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for path, owner in [*surroundings(module, dense), *callbacks]:
        for key, value in plain_attributes(owner):
            # The exponential averages of diffusers, of torch_ema and their like.
            if isinstance(getattr(value, "shadow_params", None), (list, tuple)):
                raise MisconfigurationException(
                    f"denoiser={name!r}: {f'{path}.{key}'.lstrip('.')!r} ({type(value).__name__}) averages parameters"
                    f" in a list, which cannot follow the switch. {remedy}"
                )
    averaged = averaged_twins(module, dense)
    for path, twin in twins(module, dense).items():
        pairs = zip(twin.state_dict().values(), dense.state_dict().values(), strict=True)
        if not any(twin is known for known in averaged) and all(torch.equal(mine, its) for mine, its in pairs):
            raise MisconfigurationException(
                f"denoiser={name!r}: {path!r} is a copy of it with the same weights, as averages made by hand are, and"
                f" would stay dense. {remedy} A copy that is meant to stay dense can be held in a plain tuple."
            )


def _leaves(value: Any) -> Iterator[Any]:
    """What a value holds, through lists, tuples, sets and dictionaries (keys and values)."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if not isinstance(item, (list, tuple, set, dict)):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            stack.extend(item)
            stack.extend(item.values() if isinstance(item, dict) else ())


def _bound(item: Any) -> Any:
    """The object whose method, compiled or not, ``item`` is."""
    if isinstance(item, FunctionType):
        item = getattr(item, "_torchdynamo_orig_callable", item)
    return item.__self__ if isinstance(item, MethodType) else None


def _storage(tensor: Tensor) -> int:
    # 0 where there is no memory (meta and empty tensors) or no single storage (sparse tensors).
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
