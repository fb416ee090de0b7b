"""The output folder of a run, and what it goes on from."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from lightning_earlybird.checkpoint_files import read_checkpoint
from lightning_earlybird.files import EnsembleFormatError

# What tells that a folder holds a run of an example.
TRACES = ("metrics.csv", "checkpoints", "switch", "ensemble", "dense")

# Folders of a run, and what goes with a run that is replaced; anything else may be the user's.
FOLDERS = ("checkpoints", "samples", "switch", "ensemble", "dense")
LEFT = (
    "checkpoints/**/*.ckpt",
    "samples/*.png",
    "switch",
    "switch.ckpt",
    "interrupted/*.ckpt",
    "ensemble",
    "dense",
    "metrics.csv",
)

# Settings that may name a file or folder of an earlier run.
INPUTS = ("pruner.regions", "data.path", "evaluation.reference", "evaluation.weights_path", "vae")

# Those whose ValueError is about a setting.
PACKAGES = ("lightning_earlybird.", "lightning.")


@contextmanager
def mistakes_told() -> Iterator[None]:
    """End the program with a sentence for a mistake in a setting, as the package tells it, and without a traceback."""
    try:
        yield
    except (MisconfigurationException, ValueError, FileExistsError) as error:
        if not isinstance(error, MisconfigurationException) and not _origin(error).startswith(PACKAGES):
            raise  # a mistake in code, not in a setting
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _origin(error: BaseException) -> str:
    """The module that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))


def prepare_output(config: DictConfig) -> tuple[Path, Path | None]:
    """The output folder and the checkpoint to resume from; makes and removes nothing yet.

    Args:
        config: With ``output``, ``resume`` and ``overwrite``.

    Returns:
        The folder, and the checkpoint, or None for a run from the start.
    """
    program, output = Path(sys.argv[0]).name, Path(config.output)
    last = output / "checkpoints" / "last.ckpt"
    checkpoint = _named(config.resume) or (last if config.resume and last.exists() else None)
    if rank_zero_only.rank > 0:  # another process of a run whose first one has seen to all this
        return output, checkpoint
    if output.exists() and not output.is_dir():
        sys.exit(f"{program}: output={output} is a file; give the name of a folder.")
    if isinstance(config.resume, str) and not Path(config.resume).is_file():
        sys.exit(f"{program}: resume={config.resume} must be true, false or a checkpoint; there is no such file.")
    found = [name for name in TRACES if (output / name).exists()]
    if found and not config.resume and not config.overwrite:
        sys.exit(
            f"{program}: output={output} holds a run already ({', '.join(found)}). Go on with it by resume=true, "
            "replace it by overwrite=true, or write elsewhere by output=FOLDER."
        )
    place = next(each for each in (output, *output.parents) if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        sys.exit(
            f"{program}: output={output} cannot be written to ({place} is no folder that can be written to); write "
            "elsewhere by output=FOLDER."
        )
    if not config.resume:
        _spare_inputs(config, output)
    if checkpoint is not None:
        try:
            fits = "callbacks" in read_checkpoint(checkpoint)
            reason = "it has no field 'callbacks'"
        except (EnsembleFormatError, OSError) as error:
            fits, reason = False, str(error).rstrip(".")
        if not fits:
            sys.exit(
                f"{program}: resume={config.resume}: {checkpoint} is damaged, or no checkpoint ({reason}); go on from "
                "another one by resume=FILE, or start anew by resume=false overwrite=true."
            )
    return output, checkpoint


def make_output(config: DictConfig) -> None:
    """Makes the folder that ``prepare_output`` has checked, without what a run that is replaced left there.

    For when all that a run needs has been read and built.
    """
    if rank_zero_only.rank > 0:
        return
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            # A run that starts anew must not be resumed from one that was here before, should it be killed early.
            (output / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
            if (output / "config.yaml").is_file():  # else the rest is not an example's
                _remove_run(output)
        OmegaConf.save(config, output / "config.yaml")
    except OSError as error:
        sys.exit(
            f"{Path(sys.argv[0]).name}: output={output} cannot be written to ({error}); write elsewhere by "
            "output=FOLDER."
        )


def _remove_run(output: Path) -> None:
    """Removes what a run leaves and the next one would not write over."""
    for pattern in LEFT:
        for path in sorted(output.glob(pattern), reverse=True):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _spare_inputs(config: DictConfig, output: Path) -> None:
    """End the program where a run would be replaced that the new one reads."""
    for key in INPUTS:
        value = OmegaConf.select(config, key)
        if not isinstance(value, str) or not Path(value).exists():
            continue
        path = Path(value).resolve()
        for folder in FOLDERS:
            if (output / folder).resolve() in (path, *path.parents):
                sys.exit(
                    f"{Path(sys.argv[0]).name}: {key}={value} belongs to the run in output={output}, which "
                    "overwrite=true would remove; write elsewhere by output=FOLDER."
                )


def _named(resume: Any) -> Path | None:
    return Path(resume) if isinstance(resume, str) else None
