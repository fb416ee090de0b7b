"""The output folder of a run, and what it goes on from."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

# What tells that a folder holds a run of an example.
TRACES = ("metrics.csv", "checkpoints", "switch", "ensemble", "dense")

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
    """The output folder and the checkpoint to resume from; a run that is there already is not written over.

    Args:
        config: With ``output``, ``resume`` and ``overwrite``.

    Returns:
        The folder, made if need be, and the checkpoint, or None for a run from the start.
    """
    program, output = Path(sys.argv[0]).name, Path(config.output)
    last = output / "checkpoints" / "last.ckpt"
    if rank_zero_only.rank > 0:  # another process of a run whose first one has seen to all this
        return output, _named(config.resume) or (last if config.resume and last.exists() else None)
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
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            # A run that starts anew must not be resumed from one that was here before, should it be killed early.
            last.unlink(missing_ok=True)
        OmegaConf.save(config, output / "config.yaml")
    except OSError as error:
        sys.exit(f"{program}: output={output} cannot be written to ({error}); write elsewhere by output=FOLDER.")
    return output, _named(config.resume) or (last if config.resume and last.exists() else None)


def _named(resume: Any) -> Path | None:
    return Path(resume) if isinstance(resume, str) else None
