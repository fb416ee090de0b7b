"""Real processes for the tests of this room: a scenario is a function that every rank of a world runs."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning_earlybird

ROOT = Path(lightning_earlybird.__file__).parents[1]


def environment() -> dict[str, str]:
    """One thread a process, on the CPU, with the tests' own modules importable; nothing left of an outer world."""
    outer = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "parallel")))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": "0"}


def start(script: str | Path, *arguments: object, **settings: object) -> subprocess.Popen:
    """Start a script whose Trainer starts the other ranks, in a session of its own, which can be ended as a whole."""
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
        **settings,
    )  # fmt: skip


def run(script: str | Path, *arguments: object, timeout: float = 240) -> tuple[str, str]:
    """Run a script to its end; what it wrote to stdout and stderr."""
    process = start(script, *arguments)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        out, err = process.communicate()
        raise AssertionError(f"{script} {arguments} took longer than {timeout} s:\n{tail(err)}") from None
    assert process.returncode == 0, tail(err)
    return out, err


def end(process: subprocess.Popen) -> None:
    """Kill every process of the session that :func:`start` began."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def tail(text: str, lines: int = 60) -> str:
    return "\n".join(text.replace("\r", "\n").splitlines()[-lines:])


def scenario(functions: Sequence[object]) -> None:
    """To be called under ``if __name__ == "__main__"``: runs the function named by the first argument."""
    known = {function.__name__: function for function in functions}
    known[sys.argv[1]](*map(Path, sys.argv[2:3]), *sys.argv[3:])
