"""What becomes of ensembles that were damaged, by accident or on purpose.

    python benchmarks/hostile_files.py [--mutations 20000] [--seed 1]

Every mutation damages a copy of a saved ensemble, and the copy is read. It must be refused with an EnsembleFormatError
that names the file, or loaded as exactly what the files say; nothing may be executed or written, and no file outside of
the directory may be opened. The mutations and the judge are those of the tests.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        victim = Victim(Path(root))
        victim.run(victim.mutations(arguments.mutations, arguments.seed))
    kinds = sorted({kind for kind, _ in victim.counts})
    print("| what was done | refused | loaded |\n|---|---:|---:|")
    for kind in kinds:
        print(f"| {kind} | {victim.counts[kind, 'refused']:,} | {victim.counts[kind, 'loaded']:,} |")
    refused, loaded = (sum(victim.counts[kind, outcome] for kind in kinds) for outcome in ("refused", "loaded"))
    print(f"| all | {refused:,} | {loaded:,} |")
    print(f"\n{time.monotonic() - started:.0f} s; memory grew by at most {victim.growth_bytes / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
