"""W&B where nobody is logged in: the run stays on this machine, and it is said how it gets to the service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_earlybird.arguments import check_choice

WandbMode = Literal["auto", "online", "offline"]


def wandb_is_offline(mode: WandbMode = "auto") -> bool:
    """Whether W&B must stay offline; looks for a login without asking for one and without the network.

    Args:
        mode: ``"auto"`` is offline where nobody is logged in, or where ``WANDB_MODE`` says so.

    Raises:
        ValueError: If the mode is none of these.
        MisconfigurationException: If ``"online"`` is asked for and nobody is logged in.
    """
    check_choice("mode", mode, ("auto", "online", "offline"))
    if mode == "offline" or (mode == "auto" and os.environ.get("WANDB_MODE", "online") != "online"):
        return True
    if _is_logged_in():
        return False
    if mode == "online":
        raise MisconfigurationException(
            "mode='online', but nobody is logged in to W&B here: run `wandb login` or set WANDB_API_KEY. "
            "mode='offline' keeps the run on this machine, from where `wandb sync` brings it to the service later."
        )
    return True


def _is_logged_in() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception as error:  # of the client's own service, which can be too busy to answer, or of anything below it
        rank_zero_warn(f"W&B could not say whether somebody is logged in ({type(error).__name__}: {error}).")
        return False


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
        MisconfigurationException: See :func:`wandb_is_offline`.
    """
    offline = wandb_is_offline(mode)
    if offline:
        folder = Path(save_dir).absolute() / "wandb"
        rank_zero_info(
            f"W&B stays offline (mode={mode!r}): the run is kept in {str(folder)!r}. To log online, run `wandb login` "
            f"or set WANDB_API_KEY; to bring this run there later, run `wandb sync {folder}/offline-run-*`."
        )
    # W&B writes from a process of its own, which may be one that a parent of ours has started in another directory
    # (WANDB_SERVICE): what is relative would go there. And Lightning's `offline` alone does not keep a login from being
    # asked for where WANDB_MODE says online.
    save_dir = Path(save_dir).absolute()
    return WandbLogger(
        project=project, save_dir=save_dir, offline=offline, mode="offline" if offline else "online", **settings
    )
