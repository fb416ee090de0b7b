"""What becomes of ensembles and checkpoints that were damaged, by accident or on purpose.

    python benchmarks/hostile_files.py [--ensembles 20000] [--checkpoints 5000] [--seed 1]

Every mutation damages a copy of a saved ensemble, or of a checkpoint of tickets, and the copy is read. It must be
refused with an error that names the file, or loaded as exactly what the files say; nothing may be executed or written,
and no file outside of the directory may be opened. The mutations and the judges are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import Victim
from hostile_checkpoints import CheckpointVictim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensembles", type=int, default=20_000)
    parser.add_argument("--checkpoints", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind, number in ((Victim, arguments.ensembles), (CheckpointVictim, arguments.checkpoints)):
        if number:
            tried(kind, number, arguments.seed)


def tried(kind: type[Victim] | type[CheckpointVictim], number: int, seed: int) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        victim = kind(Path(root))
        victim.run(victim.mutations(number, seed))
    kinds = sorted({name for name, _ in victim.counts})
    print(f"\n| {kind.__name__} | refused | loaded |\n|---|---:|---:|")
    for name in kinds:
        print(f"| {name} | {victim.counts[name, 'refused']:,} | {victim.counts[name, 'loaded']:,} |")
    refused, loaded = (sum(victim.counts[name, outcome] for name in kinds) for outcome in ("refused", "loaded"))
    print(f"| all | {refused:,} | {loaded:,} |")
    growth = victim.growth_bytes / 2**20
    print(f"\n{time.monotonic() - started:.0f} s; memory grew by at most {growth:.0f} MiB.", flush=True)


if __name__ == "__main__":
    main()
