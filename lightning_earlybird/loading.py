"""Loading a LightningModule from a checkpoint that was taken after its denoiser had become tickets."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.core.saving import _default_map_location
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_earlybird.checkpoint_files import check_form, check_intact, read_checkpoint
from lightning_earlybird.checkpointing import restore_structure, save_structure
from lightning_earlybird.files import EnsembleFormatError

Module = TypeVar("Module", bound=pl.LightningModule)

_LOAD, _SAVE = "on_load_checkpoint", "on_save_checkpoint"
_MARK = "_carries_tickets"
_one_at_a_time = threading.RLock()


def load_from_checkpoint(
    module_class: type[Module],
    checkpoint_path: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    hparams_file: str | os.PathLike[str] | None = None,
    strict: bool | None = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> Module:
    """As ``module_class.load_from_checkpoint``, for checkpoints on either side of the switch.

    One from before the switch gives the module with its dense denoiser, one from after it the module with a
    :class:`TicketEnsemble` in the denoiser's place. The module's own ``on_load_checkpoint`` sees the checkpoint once
    the ensemble is there. Where a ``WeightAveraging`` callback was in the fit, the weights are the averaged ones, which
    Lightning stores as the module's ``state_dict``; the live ones are in the checkpoint's ``current_model_state``.

    A class that derives from :class:`TicketCheckpoints` needs no such help.

    Args:
        module_class: The LightningModule's class.
        checkpoint_path: The file, a URL, or a file-like object.
        map_location: As for ``torch.load``.
        hparams_file: As for Lightning: a file with the constructor's arguments, where the checkpoint has none.
        strict: As for Lightning: whether all names must match; None goes by the module's ``strict_loading``. Tickets
            must be complete in any case.
        weights_only: Whether to refuse checkpoints that hold objects, which unpickling would execute. Lightning's own
            default leaves that to torch, and trusts what it loads from a URL.
        **kwargs: Arguments of the class's constructor; they go before those that ``save_hyperparameters`` has saved.

    Returns:
        The module, as its constructor and the checkpoint make it: in training mode, like every new module.

    Raises:
        EnsembleFormatError: If the file is damaged, or what it says of tickets is, or of a newer format; the message
            names the field.
        MisconfigurationException: If the tickets do not fit the module that the arguments build, or some are missing:
            a checkpoint of one group of ranks under :class:`MultiTicketStrategy` is a part of an ensemble only.

    Example::

        module = load_from_checkpoint(MyModule, "last.ckpt", learning_rate=1e-4)
    """
    local = isinstance(checkpoint_path, str | os.PathLike)
    path, parameters = _as_lightning_takes_it(checkpoint_path), _as_lightning_takes_it(hparams_file)
    if local:
        check_intact(path)
    try:
        with _restoring(module_class, str(path) if local else "the checkpoint"):
            return module_class.load_from_checkpoint(
                path, map_location, parameters, strict, weights_only=weights_only, **kwargs
            )
    except (EnsembleFormatError, MisconfigurationException):
        raise
    except Exception:
        # Whatever a damaged file makes Lightning stumble over is told by its name; other errors are the module's.
        if local and weights_only:
            location = map_location or _default_map_location  # what Lightning takes, to stumble where it did
            check_form(read_checkpoint(path, mapped=False, map_location=location), str(path))
        raise


class TicketCheckpoints:
    """Gives a LightningModule checkpoints that carry the structure of its tickets, with and without our callbacks.

    ``MyModule.load_from_checkpoint(path)`` then works on either side of the switch, and so do ``trainer.validate``,
    ``test``, ``predict`` and ``fit`` with ``ckpt_path`` in a Trainer that has no :class:`TimestepAwarePruner`; a fit
    goes on training the tickets of the checkpoint, and saves checkpoints of the same kind. Hooks of the module's own
    need not call these.

    Example::

        class MyModule(TicketCheckpoints, L.LightningModule):
            ...

        module = MyModule.load_from_checkpoint("last.ckpt")
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The hooks that instances will have, wherever they come from, are wrapped once: not by overriding them, which
        # a hook in the class itself, or a base that is listed before this one, would undo.
        for name, act in ((_LOAD, _restore), (_SAVE, _save)):
            own = getattr(cls, name, None)
            if own is not None and not hasattr(own, _MARK):
                setattr(cls, name, _preceded(own, act))


def _as_lightning_takes_it(path: Any) -> Any:
    return Path(path) if isinstance(path, os.PathLike) else path


def _restore(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    restore_structure(module._trainer, module, checkpoint)


def _save(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    save_structure(module, checkpoint)


def _preceded(
    own: Callable[..., Any], act: Callable[[pl.LightningModule, dict[str, Any]], None]
) -> Callable[[pl.LightningModule, dict[str, Any]], Any]:
    """A hook that does something with the checkpoint before it does what it did."""

    @functools.wraps(own)
    def hook(self: pl.LightningModule, checkpoint: dict[str, Any]) -> Any:
        act(self, checkpoint)
        return own(self, checkpoint)

    setattr(hook, _MARK, True)
    return hook


@contextmanager
def _restoring(module_class: type[pl.LightningModule], file: str) -> Iterator[None]:
    """For the time of the block, new modules take on a checkpoint's structure before their own hook sees it.

    Lightning makes the module and loads its weights in one go, with nothing between the two but that hook. It is
    exchanged on the class, and not in a subclass: checkpoints of LightningCLI insist on the class that they name, which
    may be one below the one that was asked for.
    """

    def act(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        restore_structure(None, module, checkpoint, file)

    with _one_at_a_time:
        own: dict[type, Any] = {cls: vars(cls)[_LOAD] for cls in _below(module_class) if _LOAD in vars(cls)}
        for cls in {module_class: None, **own}:
            setattr(cls, _LOAD, _preceded(getattr(cls, _LOAD), act))
        try:
            yield
        finally:
            for cls in {module_class: None, **own}:
                if cls in own:
                    setattr(cls, _LOAD, own[cls])
                else:
                    delattr(cls, _LOAD)


def _below(cls: type[Any]) -> list[type[Any]]:
    """A class and all that derive from it."""
    return [cls, *(each for sub in cls.__subclasses__() for each in _below(sub))]
