"""Ensembles on the Hugging Face hub: found there by name, and written there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_earlybird.files import presentable

# A name of a repository: one slash, no dots or slashes at its ends, as in "user/ensemble".
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")

PATTERNS = ("ensemble.json", "ticket_*.safetensors", "masks.safetensors", "README.md")
"""The files of an ensemble."""


def find_ensemble(
    name: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The directory of an ensemble, downloaded from the hub where it is not a local one.

    Args:
        name: A local directory, which goes first, or the name of a repository on the hub, ``"user/ensemble"``.
        subfolder: Where it is inside of that, such as ``"unet"`` in a pipeline's directory.
        revision: Branch, tag or commit on the hub; like the rest, it has no effect on local directories.
        cache_dir: Where downloaded files are kept.
        token: For repositories that are not public.
        force_download: Whether to download files that are in the cache already.
        local_files_only: Whether to look into the cache only.

    Returns:
        The directory. Whether an ensemble is in it is for the reader to see.

    Raises:
        FileNotFoundError: If it is a name of a repository that could not be had.
        ValueError: If ``subfolder`` leads out of the directory.
    """
    inner = Path(subfolder or ".")
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"subfolder={subfolder!r} must be a path inside of the directory, such as 'unet'.")
    # A path object is meant as a path; whether a name is one shows on the disk.
    if not isinstance(name, str) or os.path.lexists(name) or not _REPOSITORY.fullmatch(name):
        return Path(name) / inner
    import huggingface_hub

    prefix = "" if inner == Path(".") else f"{inner.as_posix()}/"
    try:
        snapshot = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in PATTERNS],
        )
    except Exception as error:  # the network may raise anything
        reason = presentable(str(error)).split(". ")[0].strip()
        raise FileNotFoundError(
            f"directory={name!r} is no directory here, and the Hugging Face hub did not give a repository of that name "
            f"({type(error).__name__}: {reason}). Check the name and the network, or give the path of a directory."
        ) from error
    return Path(snapshot) / inner


def upload_ensemble(
    folder: Path,
    repository: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    """Makes a repository on the hub, where there is none yet, and writes an ensemble's files into it.

    Returns:
        Address of the commit.
    """
    import huggingface_hub

    client = huggingface_hub.HfApi(token=token)
    made = client.create_repo(repository, private=private, exist_ok=True)
    commit = client.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload TicketEnsembleSampler",
        create_pr=create_pr,
        # Tickets of an ensemble that was there before would make one of both.
        delete_patterns=["ticket_*.safetensors", "masks.safetensors"],
    )
    return str(commit.commit_url)
