"""Lightning checkpoints that appear whole or not at all, and stay when the machine goes down right after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_earlybird.checkpoint_files import check_intact, unreadable
from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.files import EnsembleFormatError


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, waits until it is on the disk, and then gives it its name.

    Lightning's own way writes into the folder for temporary files and moves the file from there. Where that folder is
    on another file system, as it often is, moving means copying, and a process that is killed meanwhile leaves half a
    ``last.ckpt`` in the place of the whole one. Nor does it wait for the disk, so that a machine that goes down can
    leave an empty one.

    The files are the same, byte for byte, and the whole checkpoint is not held in memory a second time. Paths that are
    no local ones (``s3://``) are written Lightning's way; there a file appears with its last byte anyway.

    The callbacks of this package put it in the place of Lightning's own; other plugins stay as they are. Around another
    plugin: ``Trainer(plugins=[AsyncCheckpointIO(WholeFileCheckpointIO())])``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path) or "::" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        local = Path(os.path.expanduser(path))
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with file_written_aside(local) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # After a write that failed, torch.save ends its archive all the same, and reports how that went.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(
                cause.errno, f"{cause.strerror}; the checkpoint is not written, an older one there is whole", str(local)
            ) from error

    @override
    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """As Lightning does, once a local file has been compared with its checksums, which torch does not.

        Raises:
            EnsembleFormatError: If the file is damaged, or holds objects that ``weights_only`` does not let through.
            OSError: If it cannot be opened.
        """
        local = Path(os.path.expanduser(path))
        if weights_only is False or "://" in str(path) or "::" in str(path) or not local.exists():
            return super().load_checkpoint(path, map_location, weights_only)
        check_intact(local)
        try:
            return super().load_checkpoint(local, map_location, weights_only)
        except OSError:
            raise
        except Exception as error:  # damaged files make the unpickler stumble over whatever comes next
            trusted = "If you trust it, pass weights_only=False."
            raise EnsembleFormatError(f"{unreadable(local, error)} {trusted}") from error


def write_whole_checkpoints(trainer: pl.Trainer) -> None:
    """Has a Trainer write its checkpoints by :class:`WholeFileCheckpointIO`, unless its user chose another plugin."""
    plugin: CheckpointIO | None = trainer.strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileCheckpointIO()
    while isinstance(plugin, _WrappingCheckpointIO):
        inner = plugin.checkpoint_io
        if type(inner) is TorchCheckpointIO:
            # Its setter takes none but the first.
            plugin._checkpoint_io = WholeFileCheckpointIO()
        plugin = inner
    if any(getattr(callback, "save_last", None) == "link" for callback in trainer.checkpoint_callbacks):
        rank_zero_warn(
            "ModelCheckpoint(save_last='link'): Lightning removes the file that the link leads to before it makes the "
            "new link. A process that is killed between leaves no last checkpoint, and fit(ckpt_path='last') would "
            "start from the beginning. Use save_last=True, which writes a file of its own."
        )
