"""Which denoisers can be pruned, how much of each, and what stays: writes ``docs/reach.md``.

Every network of the zoo in ``tests/zoo`` is traced and verified. The document holds nothing that depends on the
machine, so that it can be checked.

    python benchmarks/reach.py
    python benchmarks/reach.py --check
"""

import argparse
import difflib
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "structure")]

from oracle import partition_of_plan, partition_of_torch_pruning  # noqa: E402 -- the zoo lives with the tests
from zoo import SECTIONS, member, verified  # noqa: E402

from lightning_earlybird.structure import ChannelPlan, Product, WidthCost  # noqa: E402

DOCUMENT = ROOT / "docs" / "reach.md"
OUTPUT = "the network's output"
# Building torch-pruning's graph took longer than 25 s for these, against less than a second here.
ENDLESS = frozenset(["EDM DDPM++", "EDM NCSN++"])

HEADER = """# Reach

Which denoisers can be pruned, and how much of each. The networks are tiny, but built as the real ones are; they live
in [`tests/zoo`](../tests/zoo), and `tests/test_reach.py` takes each of them from the trace to tickets at sparsity 0.3,
0.5, 0.8 and at random ratios, which are compared with the zeroed dense network, trained, saved and read back.

- **Groups, channels**: what a mask chooses among. Channels of one group are chosen among each other.
- **Parameters, MACs**: share of each that hangs on channels which can go.
- **Stays**: layers whose channels are never pruned, with their number of channels and the reason; the layers that make
  the network's output stay everywhere and are not listed.
- **Error**: largest difference between an extracted network and the dense one with the same channels at zero, relative
  to the largest output, in double precision.
- **torch-pruning**: whether the partition of torch-pruning 1.6.1 (which slices are removed together) is the same,
  element by element. Where it differs, ours has passed verification. "Does not finish": not within 25 seconds.

`python benchmarks/reach.py` writes this file; `--check` compares it.
"""


def share(products: Sequence[Product], plan: ChannelPlan) -> float:
    """What is gone of a cost when no channel is left."""
    cost = WidthCost(products, plan.groups)
    dense = torch.tensor([group.size for group in plan.groups])
    return 1 - cost(torch.zeros_like(dense)) / cost(dense)


def what_stays(plan: ChannelPlan) -> str:
    """Frozen channels by reason."""
    channels: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for entry in plan.frozen:
        channels[entry.reason] += entry.size
        layers[entry.reason] += 1
    return "; ".join(
        f"{layers[reason]} layer{'s' * (layers[reason] > 1)} ({count}): {reason}"
        for reason, count in channels.items()
        if reason != OUTPUT
    )


def torch_pruning_says(name: str, plan: ChannelPlan) -> str:
    """How torch-pruning's partition of the same network compares."""
    if name in ENDLESS:
        return "does not finish"
    given = member(name)
    names = list(inspect.signature(given.network.forward).parameters)
    inputs = dict(zip(names, given.args, strict=False)) | given.kwargs
    last = [given.network.get_submodule(entry.name) for entry in plan.frozen if entry.reason == OUTPUT]
    try:
        theirs = partition_of_torch_pruning(given.network, inputs, *last)
    except Exception as error:  # whatever it stumbles over
        return f"fails: {type(error).__name__}"
    ours = partition_of_plan(given.network, plan)
    if ours <= theirs:
        return "agrees" if ours == theirs else f"agrees, and prunes {len(theirs - ours)} of what stays"
    return f"differs in {len(ours - theirs)} of {len(ours)} channels"


def row(name: str) -> str:
    """One line of the table."""
    _, verification = verified(name)
    plan = verification.plan
    cells = [
        name,
        str(len(plan.groups)),
        str(plan.num_channels),
        f"{share(plan.parameters(), plan):.1%}",
        f"{share(plan.macs, plan):.1%}",
        what_stays(plan),
        "< 1e-9" if verification.max_error < 1e-9 else "too large",
        torch_pruning_says(name, plan),
    ]
    return f"| {' | '.join(cells)} |"


def document() -> str:
    """The whole text."""
    head = ("model", "groups", "channels", "parameters", "MACs", "stays", "error", "torch-pruning")
    parts = [HEADER]
    for title, networks in SECTIONS.items():
        table = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *map(row, networks)]
        parts.append(f"## {title}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the document, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail with a diff where the file is not up to date")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = document()
    if not options.check:
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    written = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    diff = list(difflib.unified_diff(written.splitlines(), text.splitlines(), str(DOCUMENT.name), "now", lineterm=""))
    print("\n".join(diff) or f"{DOCUMENT.name} is up to date")
    return 1 if diff else 0


if __name__ == "__main__":
    raise SystemExit(main())
