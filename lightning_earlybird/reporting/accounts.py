"""W&B where nobody is logged in: the run stays on this machine, and it is said how it gets to the service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_earlybird.arguments import check_choice

WandbMode = Literal["auto", "online", "offline"]


def wandb_is_offline(mode: WandbMode = "auto") -> bool:
    """Whether W&B must stay offline; looks for a login without asking for one and without the network.

    Args:
        mode: ``"auto"`` is offline where nobody is logged in, or where ``WANDB_MODE`` says so.

    Raises:
        ValueError: If the mode is none of these.
    """
    check_choice("mode", mode, ("auto", "online", "offline"))
    if mode != "auto":
        return mode == "offline"
    if os.environ.get("WANDB_MODE", "online") != "online":
        return True
    import wandb

    return not wandb.login(prompt=False, verify=False)


def wandb_logger(
    project: str = "earlybird", *, mode: WandbMode = "auto", save_dir: str | os.PathLike[str] = ".", **settings: Any
) -> WandbLogger:
    """A ``WandbLogger`` that neither asks for a login nor fails without one.

    Args:
        project: Project of the run.
        mode: See :func:`wandb_is_offline`.
        save_dir: Where the run's files go, in a folder ``wandb``.
        **settings: Passed to ``WandbLogger``.

    Returns:
        The logger. Where it stays offline, a line says how to bring the run to the service.

    Raises:
        ValueError: If the mode is none of the known ones.
    """
    offline = wandb_is_offline(mode)
    if offline:
        folder = Path(save_dir) / "wandb"
        rank_zero_info(
            f"W&B stays offline (mode={mode!r}): the run is kept in {str(folder)!r}. To log online, run `wandb login` "
            f"or set WANDB_API_KEY; to bring this run there later, run `wandb sync {folder}/offline-run-*`."
        )
    # Lightning's `offline` alone does not keep a login from being asked for where WANDB_MODE says online.
    return WandbLogger(
        project=project, save_dir=save_dir, offline=offline, mode="offline" if offline else "online", **settings
    )
