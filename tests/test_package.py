"""The package as a whole: its public names, what importing it costs, and the README's snippets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modules import Tutorial
from torch.utils.data import DataLoader, TensorDataset

import lightning_earlybird

README = Path(__file__).parent.parent / "README.md"


def snippets(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


SNIPPETS = {path: found for path in (README.parent / "docs").glob("*.md") if (found := snippets(path))}


def test_the_public_names_are_these() -> None:
    assert sorted(lightning_earlybird.__all__) == [
        "DeviceTable",
        "EarlyBirdDetector",
        "EnsembleFormatError",
        "MultiTicketStrategy",
        "NonFiniteWeightsError",
        "RankLostError",
        "SampleLogger",
        "SearchLimitError",
        "SpacedDDIMScheduler",
        "TicketCheckpoints",
        "TicketEnsemble",
        "TicketEnsembleSampler",
        "TicketFacts",
        "TicketLoad",
        "TicketMask",
        "TicketPlan",
        "TimestepAwarePruner",
        "TimestepPartition",
        "TimestepRegion",
        "TimestepsOutsideError",
        "devices_that_pay_off",
        "draw_uniform",
        "draw_within",
        "load_from_checkpoint",
        "plan_tickets",
    ]
    assert all(hasattr(lightning_earlybird, name) for name in lightning_earlybird.__all__)


def test_importing_the_package_leaves_wandb_diffusers_and_matplotlib_alone() -> None:
    # Lightning imports what it likes (matplotlib where it is installed): only what comes on top counts.
    code = (
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_earlybird;"
        "print(sorted({'wandb', 'diffusers', 'matplotlib', 'sklearn', 'torch_pruning'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sparsity=.* of the channels cannot be met")  # by a network as narrow as this one
def test_the_readme_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use, later = snippets(README)
    # Only what it costs is changed: epochs, images, sampling steps.
    for long, short in (("max_epochs=500", "max_epochs=6"), ("sample(64", "sample(4"), ("steps=100", "steps=5")):
        assert long in use
        use = use.replace(long, short)
    later = later.replace("batch_size=16", "batch_size=2").replace("steps=50", "steps=5")
    torch.manual_seed(0)
    images = TensorDataset(torch.rand(16, 1, 8, 8) * 2 - 1)
    names: dict[str, object] = {"module": Tutorial(), "datamodule": DataLoader(images, batch_size=8)}
    exec(compile(use, str(README), "exec"), names)
    sampled = names["images"]
    assert isinstance(sampled, torch.Tensor)
    assert sampled.shape == (4, 1, 8, 8)
    assert sampled.abs().max() <= 1
    exec(compile(later, str(README), "exec"), names)
    assert len(names["images"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("document", sorted(SNIPPETS), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
def test_the_snippets_of_the_documents_run_as_printed(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order: later ones may use what earlier ones have made."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippets"}
    try:
        for snippet in SNIPPETS[document]:
            exec(compile(snippet, str(document), "exec"), names)
    finally:
        if torch.distributed.is_initialized():  # of a strategy, which leaves it to the end of the process
            torch.distributed.destroy_process_group()
